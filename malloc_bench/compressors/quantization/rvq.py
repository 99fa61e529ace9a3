"""A vector is a sum of entries, each from a codebook of what the ones before leave."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_layers
from malloc_bench.compressors.quantization.codebooks import entries
from malloc_bench.compressors.sizing import Budget, Layout
from malloc_bench.registry import register
from malloc_bench.state import Codebook, Fitted, FromCodebook, Prefill, Sample, Segment, UserState, closest


@register("rvq")
@dataclass(frozen=True)
class RVQ(Encoder):
    """Residual vector quantization: `stages` codes a vector, codebooks of each layer, field and head.

    The codebooks are k-means over vectors of training users' full states and what earlier stages leave of them; all
    users share them. Codes are chosen greedily.
    """

    stages: int = 4
    bits: int = 8

    grid = {"stages": (2, 4, 8), "bits": (4, 8)}
    family = "quantization"
    paper = "Chen et al., Approximate Nearest Neighbor Search by Residual Vector Quantization, Sensors 2010"
    formula = "x ~ sum over stages of the entry nearest to what is left of x"
    stores = "`stages` codes of `bits` bits a vector; fixed bytes: 2^bits entries a stage of each layer, field and head"

    def __post_init__(self) -> None:
        if self.stages < 1 or self.bits not in (4, 8):
            raise ValueError(f"rvq: stages >= 1 and 4 or 8 bits are needed, not {self.stages} and {self.bits}")

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        return Fitted({f"{layer}.{field}": self._tables(x) for (layer, field), x in sample.vectors.items()})

    def _tables(self, x: Tensor) -> Tensor:
        """[H, stages, 2^bits, D] from vectors [H, N, D]."""
        found: list[Tensor] = []
        for _ in range(self.stages):
            found.append(entries(x, 2**self.bits))
            x = x - found[-1].gather(1, closest(x, found[-1]).unsqueeze(-1).expand_as(x))
        return torch.stack(found, 1)

    def write(self, prefill: Prefill) -> UserState:
        assert prefill.fitted is not None
        fitted = prefill.fitted

        def vectors(layer: int, field: str, segment: Segment) -> FromCodebook:
            x = segment.fields[field].dense()
            return FromCodebook.of(x, Codebook(fitted[f"{layer}.{field}"], self.bits, x.shape[3], added=True))

        return map_layers(prefill.state, vectors)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        return layout.beside(n, length) + n * sum(h for _, h, _ in layout.vectors) * -(-self.stages * self.bits // 8)

    def flops(self, state: UserState, history: int) -> int:
        """Each vector against each entry of each stage."""
        shapes = (v.shape for segment in state.segments() for v in segment.fields.values())
        return sum(2 * h * s * d * self.stages * 2**self.bits for _, h, s, d in shapes)
