"""A vector is a sum of entries, each from a codebook of what the ones before leave."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.quantization.codebooks import Codebooks, entries
from malloc_bench.registry import register
from malloc_bench.state import closest


@register("rvq")
@dataclass(frozen=True)
class RVQ(Codebooks):
    """Residual vector quantization: `stages` codes a vector, codebooks of each layer, field and head.

    The codebooks are k-means over vectors of training users' full states and what earlier stages leave of them; all
    users share them. Codes are chosen greedily.
    """

    stages: int = 4
    bits: int = 8

    grid = {"stages": (2, 4, 8), "bits": (4, 8)}
    added = True
    by_vector = True
    family = "quantization"
    paper = "Chen et al., Approximate Nearest Neighbor Search by Residual Vector Quantization, Sensors 2010"
    formula = "x ~ sum over stages of the entry nearest to what is left of x"
    growth = grows(memory="n L", compress="c n L d", read="n L d")
    stores = "`stages` codes of `bits` bits a vector; fixed bytes: 2^bits entries a stage of each layer, field and head"

    def __post_init__(self) -> None:
        if self.stages < 1 or self.bits not in (4, 8):
            raise ValueError(f"{self.name}: stages >= 1 and 4 or 8 bits are needed, not {self.stages} and {self.bits}")

    def tables(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        for _ in range(self.stages):
            found.append(entries(x, 2**self.bits))
            x = x - found[-1].gather(1, closest(x, found[-1]).unsqueeze(-1).expand_as(x))
        return torch.stack(found, 1)

    def codes(self, width: int) -> int:
        return self.stages
