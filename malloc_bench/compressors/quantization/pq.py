"""A vector is cut into parts, and each part is the number of an entry in a codebook."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import Encoder, map_layers
from malloc_bench.compressors.quantization.codebooks import entries
from malloc_bench.compressors.sizing import Budget, Layout
from malloc_bench.registry import register
from malloc_bench.state import Codebook, Fitted, FromCodebook, Prefill, Sample, Segment, UserState


@register("pq")
@dataclass(frozen=True)
class PQ(Encoder):
    """Product quantization: `bits` bits for every `group` channels, codebooks of each layer, field, head and group.

    The codebooks are k-means over vectors of training users' full states; all users share them.
    """

    group: int = 4
    bits: int = 8

    grid = {"group": (2, 4, 8), "bits": (4, 8)}
    family = "quantization"
    paper = "Jegou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011"
    formula = "part i of x ~ its nearest entry in codebook i of 2^bits"
    stores = (
        "a code of `bits` bits for every `group` channels; fixed bytes: 2^bits entries of each layer, field and head"
    )

    def __post_init__(self) -> None:
        if self.group < 1 or self.bits not in (4, 8):
            raise ValueError(f"pq: group >= 1 and 4 or 8 bits are needed, not {self.group} and {self.bits}")

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        return Fitted({f"{layer}.{field}": self._tables(x) for (layer, field), x in sample.vectors.items()})

    def _tables(self, x: Tensor) -> Tensor:
        """[H, M, 2^bits, group] from vectors [H, N, D]."""
        parts = F.pad(x, (0, -x.shape[2] % self.group)).unflatten(2, (-1, self.group)).permute(2, 0, 1, 3)
        return torch.stack([entries(part, 2**self.bits) for part in parts], 1)

    def write(self, prefill: Prefill) -> UserState:
        assert prefill.fitted is not None
        fitted = prefill.fitted

        def vectors(layer: int, field: str, segment: Segment) -> FromCodebook:
            x = segment.fields[field].dense()
            return FromCodebook.of(x, Codebook(fitted[f"{layer}.{field}"], self.bits, x.shape[3], added=False))

        return map_layers(prefill.state, vectors)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        codes = sum(heads * ceil(ceil(width / self.group) * self.bits / 8) for _, heads, width in layout.vectors)
        return layout.beside(n, length) + n * codes

    def flops(self, state: UserState, history: int) -> int:
        """Each part of each vector against each entry."""
        shapes = (v.shape for segment in state.segments() for v in segment.fields.values())
        return sum(2 * h * s * -(-d // self.group) * self.group * 2**self.bits for _, h, s, d in shapes)
