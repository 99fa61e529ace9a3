"""What a fleet costs over how often each user asks, and where keeping a state begins to pay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from malloc_bench.measure.fleet.fleet import Lines, at, break_even

MOST = 9  # methods beside ids
ALIKE = math.log(1.3)  # costs nearer than that are told once
_BETWEEN = (1e-3, 1e5)  # requests per user and day


class Sweep(NamedTuple):
    """asked [N]: requests per user and day, ascending; paid: what each method's fleet costs there, [N] by label, and
    rebuilt, that of ids alone; evens: by label (requests, cost) from which on keeping pays, of those within `asked`."""

    asked: np.ndarray
    paid: dict[str, np.ndarray]
    rebuilt: np.ndarray
    evens: dict[str, tuple[float, float]]


def sweep(paid: Mapping[str, Lines], rebuilt: Lines, asked: float) -> Sweep:
    """Around where keeping begins to pay, and the requests that were `asked` for.

    paid: of each method by label, better ones first: of those that cost about the same the first is kept, MOST in all.
    """
    shown = _shown(paid)
    evens = {method: even for method in shown if (even := break_even(paid[method], rebuilt))}
    some = [*evens.values(), *([asked] if asked > 0 else [])]
    low = max(min(some, default=1) / 30, _BETWEEN[0])
    x = np.geomspace(low, max(min(max(some, default=1) * 30, _BETWEEN[1]), 10 * low), 300)
    of = {method: np.array([at(paid[method], each) for each in x]) for method in shown}
    within = {m: (even, at(paid[m], even)) for m, even in evens.items() if x[0] <= even <= x[-1]}
    return Sweep(x, of, np.array([at(rebuilt, each) for each in x]), within)


def _shown(paid: Mapping[str, Lines]) -> list[str]:
    """The first of those that cost about the same while nobody asks."""
    found: dict[str, float] = {}
    for method, lines in paid.items():
        idle = max(at(lines, 0.0), 1e-12)
        if len(found) < MOST and all(abs(math.log(idle / other)) > ALIKE for other in found.values()):
            found[method] = idle
    return list(found)
