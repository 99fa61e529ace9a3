"""What logits have of distances in events and gaps in time alone, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from malloc_bench.kernels.switch import array, fits, spread


class Gaps(NamedTuple):
    """Which number of a table a gap from 1 on takes, by the float32 next to it: `first` [K] int32 from where its cell
    begins, one more from `edge` [K] float32 on. Cells are floats of one exponent and four more bits, from 1 on."""

    first: np.ndarray
    edge: np.ndarray


def relative(
    by_distance: Tensor,
    by_gap: Tensor | None,
    gaps: Callable[[], Gaps],
    queries: tuple[Tensor, Tensor | None],
    slots: tuple[Tensor, Tensor | None],
) -> Tensor | None:
    """by_distance[position of the query - of the slot], no less than its first number and no more than its last, and
    with times by_gap[`gaps` of the seconds between them] to that: [B or 1, H or 1, M, S].

    queries, slots: positions, and times or None, [B or 1, H or 1, M] and [B or 1, H or 1, S]. Not a bit is other than
    torch's.
    """
    (asked, asked_at), (placed, placed_at) = queries, slots
    if timed := by_gap is not None and asked_at is not None and placed_at is not None:
        given = [by_distance, by_gap, asked, placed, asked_at, placed_at]
    else:  # times that nobody looks at
        given = [by_distance, by_distance, asked, placed, asked, placed]
    if not fits(*given) or any(x.dtype != torch.float32 for x in given[:2]):
        return None
    b, h = (max(x.shape[axis] for x in given[2:]) for axis in (0, 1))
    m, s = asked.shape[2], placed.shape[2]
    if not b * m * s:
        return None
    from malloc_bench.kernels.passes import standing  # here: its compiler takes half a second to load

    out = by_distance.new_empty(b, h, m, s)
    known = [array(x) for x in (*given, out.view(b * h, m, s))]
    spread(lambda start, stop: standing(*gaps(), *known, timed, h, start, stop), b * h, out.numel())
    return out
