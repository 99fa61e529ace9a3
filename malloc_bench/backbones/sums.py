"""Causal attention that keeps the column sums of its weights on the way: few heads at a time, in a core's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CELLS = 1 << 18  # weights at a time, a megabyte: they are still in cache when they are summed
LONG = 1024  # slots from which on one head fills that, and products of more rows are faster

#: query rows -> what makes weights of their products [n, rows, keys up to the last row] of some heads of all, in place
Weigher = Callable[[slice], Callable[[Tensor, slice], Tensor]]


def tiled(q: Tensor, keys: Tensor, values: Tensor, real: Tensor, weigher: Weigher) -> tuple[Tensor, Tensor]:
    """Causal attention of a left-aligned batch onto itself, and the sum of |weights| that each key received.

    q, keys, values: [B, H, S, D], without a gradient; real [B, S] bool, padding asks nothing. A weigher gives the
    future no weight. Returns [B, H, S, D] and [B, H, S].
    """
    b, h, s, _ = q.shape
    rows, across, values = q.flatten(0, 1), keys.flatten(0, 1).mT, values.flatten(0, 1)
    asks = real[:, None].expand(b, h, s).flatten(0, 1).to(q.dtype)
    mixed, received = torch.empty_like(values), q.new_zeros(b * h, s)
    most = 64 if s <= LONG else 256
    step = max(1, CELLS // max(1, min(s, most) * s))
    buffer = q.new_empty(min(step, b * h) * min(s, most) * s)
    for start in range(0, s, most):
        stop = min(start + most, s)
        weigh = weigher(slice(start, stop))
        for first in range(0, b * h, step):
            some = slice(first, min(first + step, b * h))
            shape = some.stop - first, stop - start, stop
            weights = buffer[: shape[0] * shape[1] * stop].view(shape)
            weights = weigh(torch.bmm(rows[some, start:stop], across[some, :, :stop], out=weights), some)
            torch.bmm(weights, values[some, :stop], out=mixed[some, start:stop])
            received[some, :stop] += torch.bmm(asks[some, None, start:stop], weights.abs_()).squeeze(1)
    return mixed.unflatten(0, (b, h)), received.unflatten(0, (b, h))


def softmax(rows: slice) -> Callable[[Tensor, slice], Tensor]:
    """The weigher of plain softmax attention."""
    future = torch.ones(rows.stop - rows.start, rows.stop - rows.start, dtype=torch.bool).triu(1)

    def weigh(weights: Tensor, some: slice) -> Tensor:
        weights[..., rows].masked_fill_(future, -torch.inf)
        return torch.softmax(weights, -1, out=weights)

    return weigh
