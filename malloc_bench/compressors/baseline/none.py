"""No history at all: the floor under every method."""

from dataclasses import dataclass
from typing import Any

import torch

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Prefill, UserState


@register("none")
@dataclass(frozen=True)
class NoHistory(Compressor):
    """No state at all: the reading token sees itself alone, as a new user's first event does."""

    family = "baseline"
    paper = "none: the floor"
    formula = "no slot stays; the token stands at position 0"
    growth = grows(memory="0", read="0")
    stores = "a history length of 0"

    @property
    def takes_budget(self) -> bool:
        return False

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        return UserState(((),) * len(prefill.layers), torch.zeros_like(prefill.state.length))
