"""Nothing is compressed: what every method is held against."""

from dataclasses import dataclass
from typing import Any

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Prefill, UserState


@register("full")
@dataclass(frozen=True)
class Full(Compressor):
    """The full float32 state."""

    family = "baseline"
    paper = "none: the reference"
    formula = "every slot of every layer stays"
    growth = grows(memory="n L d", read="n L d")
    stores = "keys and values of every event in float32"

    @property
    def takes_budget(self) -> bool:
        return False

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        return prefill.state
