"""What is promised of fits, and the budgets that promises are tried at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from malloc_bench.compressors import Budget, Compressor
from malloc_bench.compressors.base import MissingFit
from malloc_bench.testing.worlds import World, fitted, packed

_MANY = tuple(map(Budget.parse, (0.9, 0.5, 0.25, 0.1, 0.02, {"slots": 1}, {"slots": 6}, {"bytes": 1}, {"bytes": 2500})))
_SOME = tuple(map(Budget.parse, (0.5, 0.1, {"bytes": 2500})))


def budgets(compressor: Compressor, some: bool = False) -> Sequence[Budget | None]:
    if not compressor.takes_budget:
        return (None,)
    return tuple(b for b in (_SOME if some else _MANY) if compressor.accepts(b) is None)


def learns(why: str) -> None:
    raise AssertionError(f"its fit fails ({why})")


def learns_soundly(compressor: Compressor, world: World) -> None:
    """What a method learns depends on the sample and nothing else, and without it there is one clear line."""
    if not compressor.fit_parts():
        return
    budget = budgets(compressor, some=True)[0]
    assert world.fitted is not None and world.fitted.nbytes > 0, "fit has failed, or found nothing"
    first, second, other = (fitted(compressor, world.sample(compressor, draw), budget) for draw in (1, 1, 2))
    assert first.digest == second.digest, "the same sample gives two fits"
    assert first.digest != other.digest, "other users give the same fit"
    prefill = replace(world, fitted=None).prefill(compressor.needs)
    again = compressor.compress(replace(prefill, memo={}), budget, first)
    assert packed(compressor.compress(prefill, budget, first)) == packed(again), "the same fit makes two states"
    try:
        compressor.compress(replace(prefill, memo={}), budget)
    except MissingFit as error:
        assert "\n" not in str(error), "what it says without a fit is more than a line"
    else:
        raise AssertionError("it compressed without what it learns")
