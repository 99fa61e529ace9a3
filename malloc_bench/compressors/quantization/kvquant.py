"""Levels where a channel's numbers are, and the few numbers that lie far from any of them apart."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.quantization.codebooks import Codebooks, entries
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Codebook, FromCodebook, Outliers, Vectors, outliers


@register("kvquant")
@dataclass(frozen=True)
class KVQuant(Codebooks):
    """Rounds every number to the nearest of 2^bits levels of its channel, fitted by k-means to training users.

    bits: 1 to 8. every: of so many consecutive numbers the one furthest from its level is stored as it is, 3 bytes; 0:
    none. The paper takes out 1 % by a threshold, scales a layer's levels to each channel's (values: slot's) range and
    weighs errors by the Fisher information, which needs gradients; here each channel has levels of its own, so that no
    user stores a scale, and errors are unweighted.
    """

    bits: int = 4
    every: int = 0

    family = "quantization"
    paper = "KVQuant, Hooper et al., NeurIPS 2024, arXiv 2401.18079"
    formula = "x ~ nearest of the channel's 2^bits levels; the worst of every run of numbers in float16"
    growth = grows(compress="c n L d", read="n L d")
    stores = "codes, and of each run one number and its place (3 bytes); fixed bytes: 2^bits levels of each channel"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 or not (self.every == 0 or 2 <= self.every <= 256):
            raise ValueError(f"kvquant: bits 1 to 8, every 0 or 2 to 256 are needed, not {self}")

    def tables(self, x: Tensor) -> Tensor:
        heads, _, width = x.shape
        numbers = x.transpose(1, 2).flatten(0, 1).unsqueeze(-1)  # [H x D, N, 1]
        start = None
        if x.shape[1]:
            share = (torch.arange(2**self.bits, device=x.device) + 0.5) / 2**self.bits
            start = numbers.quantile(share.to(x.dtype), dim=1).transpose(0, 1)
        return entries(numbers, 2**self.bits, start=start).unflatten(0, (heads, width))

    def codes(self, width: int) -> int:
        return width

    def part(self, width: int) -> int:
        return 1

    def written(self, x: Tensor, mask: Tensor, book: Codebook) -> Vectors:
        base = FromCodebook.of(x, mask, book)
        if not self.every:
            return base
        at, numbers, _ = outliers(x, (x - base.dense()).abs(), mask, self.every)
        return Outliers(base, at, numbers, self.every)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        runs = sum(heads * -(-n * width // self.every) for _, heads, width in layout.vectors) if self.every else 0
        return super().cost(layout, n, length) + 3 * runs
