"""Runs of neighbouring events stay or go together."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import as_compressor, grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("chunkkv")
@dataclass(frozen=True)
class ChunkKV(Eviction):
    """Keeps whole runs of `chunk` slots by the mean of another method's scores over the run and all heads.

    inner: the method that scores, a name or {name: {parameter: value}}. The paper's runs of 10 to 20 are of words; what
    goes together in a history is shorter. The last run that fits is cut to the budget, its newest slots stay.
    """

    inner: Any = "snapkv"
    chunk: int = 4

    grid = {"inner": ("snapkv", "h2o"), "chunk": (2, 4, 8, 16)}
    family = "eviction"
    per_head = False
    paper = "ChunkKV, Liu et al., arXiv 2502.00299"
    formula = "score = mean over the slots of i's run of the sum over heads of the inner score"
    growth = grows(compress="w n L d")
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if self.chunk < 1 or not isinstance(self.inner, Eviction):
            raise ValueError(f"chunkkv: chunk >= 1 and an inner method that scores are needed, not {self}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs

    def supports(self, backbone: Any) -> str | None:
        return self.inner.supports(backbone)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        real = prefill.mask(layer)
        score = torch.where(real, self.inner.scores(prefill, layer), 0.0).sum(1, keepdim=True)
        there = real[:, :1].to(score.dtype)
        width, short = score.shape[-1], -score.shape[-1] % self.chunk
        total, count = (F.pad(x, (0, short)).unflatten(-1, (-1, self.chunk)).sum(-1) for x in (score, there))
        return (total / count.clamp(min=1)).repeat_interleave(self.chunk, -1)[..., :width]

    def forced(self, k: Tensor) -> tuple[Tensor | int, Tensor | int]:
        return self.inner.forced(k)
