"""Lower layers keep more than upper ones."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.division import Divided
from malloc_bench.registry import register
from malloc_bench.state import Prefill


@register("pyramid")
@dataclass(frozen=True)
class Pyramid(Divided):
    """Divides the budget over layers on a straight line, from the bottom, which keeps most, to the top.

    inner: the method that scores, a name or {name: {parameter: value}}. beta: the top layer keeps 1 / beta of an equal
    share; the paper's 20 is for 32 layers, of two it would leave the upper one nothing.
    """

    inner: Any = "snapkv"
    beta: float = 2.0

    growth = grows(compress="w n L d")
    paper = "PyramidKV, Cai et al., arXiv 2406.02069"
    formula = "share of layer l of L: from 2 - 1/beta at the bottom to 1/beta at the top; slots by the inner score"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"pyramid: beta >= 1 is needed, not {self.beta}")

    def shares(self, prefill: Prefill) -> Tensor:
        line = torch.linspace(2 - 1 / self.beta, 1 / self.beta, len(prefill.layers), dtype=torch.float64)
        line = line if len(line) > 1 else torch.ones_like(line)
        return line.to(prefill.state.length.device).view(1, -1, 1).expand(len(prefill.state), -1, -1)
