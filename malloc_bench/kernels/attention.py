"""A whole read of few tokens over plain vectors, in one pass."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from malloc_bench.kernels.affine import FEW
from malloc_bench.kernels.switch import fits, spread

_NO_BIAS, _NO_MASS = np.zeros((1, 0, 0), np.float32), np.zeros((1, 0), np.float32)


def attend(
    q: Tensor,
    own: Mapping[str, Tensor],
    slots: Mapping[str, Tensor],
    count: Tensor,
    mass: Tensor | None,
    bias: tuple[Tensor, Tensor] | None,
    normaliser: float | None,
) -> Tensor | None:
    """What tokens q [B, H, M, D] mix of slots and of themselves, [B, H, M, D']: a softmax of q.k, or with a normaliser
    SiLU(q.k) over it.

    own, slots: `keys` and `values`, [B, H, M, .] of each token and [B, H, S, .] of the slots. count: [B, H or 1], slots
    that are real. mass: [B, H or 1, S], what each counts. bias: of slots [B or 1, H or 1, M, S], and of each token over
    itself [B or 1, H or 1, M].
    """
    given = [q, own["keys"], own["values"], slots["keys"], slots["values"]]
    given += ([] if mass is None else [mass]) + ([] if bias is None else [*bias])
    b, h, m, _ = q.shape
    alike = all(x.shape[:2] == (b, h) for x in given[:5]) and all(x.dtype == torch.float32 for x in given)
    if not 0 < m <= FEW or not q.numel() or not alike or not fits(*given):
        return None
    from malloc_bench.kernels.passes import attention  # here: its compiler takes half a second to load

    call = attention(normaliser is None)
    out = q.new_empty(b, h, m, own["values"].shape[3])
    vectors = [_rows(x, b, h) for x in given[:5]]
    biases, own_bias = (_NO_BIAS, _NO_MASS) if bias is None else (_rows(bias[0], b, h), _rows(bias[1], b, h))
    masses = _NO_MASS if mass is None else _rows(mass, b, h)
    counts, scale = _rows(count.int(), b, h), np.float32(1.0 if normaliser is None else 1.0 / normaliser)
    arrays = [*vectors[:3], own_bias, *vectors[3:], counts, masses, biases, scale]

    def some(start: int, stop: int) -> None:
        room = torch.empty(3, slots["keys"].shape[2] + 1)  # by torch: what is measured as memory is seen there
        call(*arrays, room.numpy(), out.view(b * h, m, -1).numpy(), start, stop)

    spread(some, b * h, slots["keys"].numel())
    return out


def _rows(x: Tensor, b: int, h: int) -> np.ndarray:
    """[B or 1, H or 1, ...] with both in a row, as few as there are."""
    if x.shape[0] == 1 < b and x.shape[1] == h > 1:
        x = x.expand(b, *x.shape[1:])
    array = x.detach().contiguous().numpy()
    return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])
