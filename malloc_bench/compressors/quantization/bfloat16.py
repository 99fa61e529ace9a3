"""Half the bytes, the whole range."""

from dataclasses import dataclass

import torch

from malloc_bench.compressors.quantization.cast import Cast
from malloc_bench.registry import register


@register("bfloat16")
@dataclass(frozen=True)
class BFloat16(Cast):
    """Writes every number in 16 bits, 8 of them precise, with the range of float32."""

    paper = "bfloat16 of Google Brain; Kalamkar et al., arXiv 1905.12322"
    formula = "x rounded to the nearest bfloat16, saturating"
    stores = "every number as bfloat16"
    dtype = torch.bfloat16
