"""Half precision."""

from dataclasses import dataclass

import torch

from malloc_bench.compressors.quantization.cast import Cast
from malloc_bench.registry import register


@register("float16")
@dataclass(frozen=True)
class Float16(Cast):
    """Writes every number in 16 bits, 11 of them precise: what most deployments store anyway."""

    paper = "IEEE 754-2008 binary16"
    formula = "x rounded to the nearest float16, saturating"
    stores = "every number as float16"
    dtype = torch.float16
