"""A quarter of the bytes, no scale."""

from dataclasses import dataclass

import torch

from malloc_bench.compressors.quantization.cast import Cast
from malloc_bench.registry import register


@register("float8")
@dataclass(frozen=True)
class Float8(Cast):
    """Writes every number in 8 bits (e4m3), 4 of them precise; magnitudes from 2^-9 to 448."""

    paper = "FP8 Formats for Deep Learning, Micikevicius et al., arXiv 2209.05433"
    formula = "x rounded to the nearest float8_e4m3fn, saturating"
    stores = "every number as float8_e4m3fn"
    dtype = torch.float8_e4m3fn
