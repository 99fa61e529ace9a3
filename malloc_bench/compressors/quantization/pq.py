"""A vector is cut into parts, and each part is the number of an entry in a codebook."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.quantization.codebooks import Codebooks, entries
from malloc_bench.registry import register


@register("pq")
@dataclass(frozen=True)
class PQ(Codebooks):
    """Product quantization: `bits` bits for every `group` channels, codebooks of each layer, field, head and group.

    The codebooks are k-means over vectors of training users' full states; all users share them.
    """

    group: int = 4
    bits: int = 8

    grid = {"group": (2, 4, 8), "bits": (4, 8)}
    by_vector = True
    family = "quantization"
    paper = "Jegou et al., Product Quantization for Nearest Neighbor Search, TPAMI 2011"
    formula = "part i of x ~ its nearest entry in codebook i of 2^bits"
    growth = grows(compress="c n L d", read="n L d")
    stores = (
        "a code of `bits` bits for every `group` channels; fixed bytes: 2^bits entries of each layer, field and head"
    )

    def __post_init__(self) -> None:
        if self.group < 1 or self.bits not in (4, 8):
            raise ValueError(f"pq: group >= 1 and 4 or 8 bits are needed, not {self.group} and {self.bits}")

    def tables(self, x: Tensor) -> Tensor:
        parts = F.pad(x, (0, -x.shape[2] % self.group)).unflatten(2, (-1, self.group)).permute(2, 0, 1, 3)
        return torch.stack([entries(part, 2**self.bits) for part in parts], 1)

    def codes(self, width: int) -> int:
        return -(-width // self.group)

    def part(self, width: int) -> int:
        return self.group
