"""Chosen slots, in order."""

from __future__ import annotations

from torch import Tensor

from malloc_bench.kernels.switch import fits, spread


def sorted_places(order: Tensor, wanted: Tensor, size: int) -> Tensor | None:
    """Of slots `order` [B, H, S], each once, those that are `wanted` [B, H, S] bool, rising: [B, H, size] int64, of
    whom there are no more than size; 0 beyond them."""
    if not order.numel() or not fits(order, wanted):
        return None
    from malloc_bench.kernels.places import placed  # here: its compiler takes half a second to load

    b, h, s = order.shape
    out = order.new_empty(b * h, size)
    arrays = [x.expand(b, h, s).reshape(b * h, s).numpy() for x in (order, wanted)]
    spread(lambda start, stop: placed(*arrays, out.numpy(), start, stop), b * h, order.numel())
    return out.view(b, h, size)
