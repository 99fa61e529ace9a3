"""One budget over layers and heads that are not alike: how much each may keep of what all keep together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.base import as_compressor
from malloc_bench.compressors.selection import Eviction
from malloc_bench.compressors.sizing import Layout
from malloc_bench.state import Prefill, Stats, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class Divided(Eviction):
    """Another method says which slots of a head go first, an implementation how many each layer or head may keep.

    k [B] is the total over layers and heads. Slots are bought one by one, so that k slots are among k + 1 and one total
    is searched: an implementation writes `shares`, or `order` where what is bought next does not follow from shares. A
    head may keep none. {slots: N} means N in each layer and head on average. heads: heads of a layer differ too.
    """

    even = False
    heads: ClassVar[bool] = False
    inner: Any

    family = "eviction"
    stores = "keys and values of k events in all, a count and positions (where the backbone reads them) as they differ"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.inner, Eviction) or (self.heads and not self.inner.per_head) or not self.inner.even:
            raise ValueError(
                f"{self.name}: an inner method that scores slots{' head by head' * self.heads} and divides nothing "
                f"itself is needed, not {self.inner}"
            )

    def shares(self, prefill: Prefill) -> Tensor:
        """[B, L, H or 1] >= 0, relative, of a Prefill of one stack; 0 gets slots when all others have theirs."""
        raise TypeError(f"{type(self).__name__} must define shares(prefill) -> (B, L, H or 1), or order(prefill)")

    def order(self, prefill: Prefill) -> Tensor:
        """[B, L, H or 1, S]: when each layer's or head's first, second ... slot is bought, smaller earlier; rising.

        From shares: Webster's method of divisors, which no total can make take back a slot.
        """
        share = torch.cat([self.shares(view).double() for view in prefill.apart()], 1).unsqueeze(-1)
        which = torch.arange(max(prefill.segment(layer).width for layer in prefill.layers), device=share.device)
        last = torch.finfo(torch.float64).max
        return torch.where(share > 0, (which + 0.5) / share.clamp(min=1e-300), last)

    def counts(self, prefill: Prefill, k: Tensor) -> Tensor:
        """Slots of each layer and head, [B, L, H or 1], of k [B] in all."""
        return (prefill.remember(("turns", self), lambda: self._turns(prefill)) <= k.view(-1, 1, 1, 1)).sum(-1)

    def _turns(self, prefill: Prefill) -> Tensor:
        """[B, L, H or 1, S]: the total at which each slot is bought; beyond `most` where there is none."""
        there = self._there(prefill)
        order = self.order(prefill)
        order = order.expand(*there.shape, order.shape[-1])
        real = torch.arange(order.shape[-1], device=order.device) < there.unsqueeze(-1)
        turn = order.masked_fill(~real, torch.inf).flatten(1).argsort(dim=1, stable=True).argsort(dim=1) + 1
        return turn.view(order.shape)

    def _there(self, prefill: Prefill) -> Tensor:
        """Slots that there are, [B, L, H or 1]; 0 for heads that a layer does not have."""
        found = [prefill.slots(layer).count.long() for layer in prefill.layers]
        if not self.heads:
            return torch.stack([n.amax(1, keepdim=True) for n in found], 1)
        heads = [next(iter(prefill.segment(layer).fields.values())).shape[1] for layer in prefill.layers]
        wide = [n.expand(-1, h) for n, h in zip(found, heads)]
        return torch.stack([torch.nn.functional.pad(n, (0, max(heads) - n.shape[1])) for n in wide], 1)

    # ---- sizes

    def most(self, prefill: Prefill, slots: int | None = None) -> Tensor:
        there = self._there(prefill)
        return (there if slots is None else there.clamp(max=slots)).sum((1, 2))

    def pieces(self, prefill: Prefill) -> tuple[Layout, ...]:
        """Each layer, or each head."""
        found: list[Layout] = []
        for layer in prefill.state.layers:
            view = replace(prefill, state=UserState((layer,), prefill.state.length), stacks=1, memo={})
            whole = self.inner.layout(view)
            if not self.heads:
                found.append(whole)
                continue
            heads = max(heads for _, heads, _ in whole.vectors)
            lists = {name: getattr(whole, name) // heads for name in ("lists", "positions", "mass", "times")}
            alone = tuple((name, 1, width) for name, _, width in whole.vectors)
            found += [replace(whole, counts=1, vectors=alone, **lists)] * heads
        return tuple(found)

    def spread(self, prefill: Prefill, k: Tensor) -> Sequence[Tensor]:
        counts = self.counts(prefill, k)
        heads = [next(iter(layer[0].fields.values())).shape[1] if self.heads else 1 for layer in prefill.state.layers]
        return [n for each, h in zip(counts.unbind(1), heads) for n in each[:, :h].unbind(1)]

    @property
    def _costs(self) -> Any:
        return self  # who gets how much is part of what k slots cost

    # ---- what the inner method does

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        return super().keep(prefill, self.counts(prefill, k))

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        heads = next(iter(prefill.segment(layer).fields.values())).shape[1] if self.heads else k.shape[1]
        return self.inner.index(prefill, layer, k[:, :heads])

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return self.inner.scores(prefill, layer)

    def layout(self, prefill: Prefill) -> Layout:
        return self.inner.layout(prefill)

    @property
    def needs(self) -> Stats:
        return self.inner.needs

    def supports(self, backbone: Backbone) -> str | None:
        return super().supports(backbone) or self.inner.supports(backbone)
