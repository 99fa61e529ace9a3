"""What a method's measured costs come to for a fleet of machines, and when keeping a state beats rebuilding it."""

from malloc_bench.measure.fleet.costs import Costs, Slopes, at_candidates, costs, rebuilt, slopes
from malloc_bench.measure.fleet.fleet import Fleet, Lines, Plan, at, break_even
from malloc_bench.measure.fleet.prices import Prices, read_prices

__all__ = [
    "Costs", "Fleet", "Lines", "Plan", "Prices", "Slopes", "at", "at_candidates", "break_even", "costs", "read_prices",
    "rebuilt", "slopes",
]  # fmt: skip
