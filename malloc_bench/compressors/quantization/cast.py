"""What the narrower floats share: every number is rounded to a dtype, and nothing is stored beside it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_vectors
from malloc_bench.compressors.sizing import Layout
from malloc_bench.state import UserState, rounded


class Cast(Encoder):
    """Rounds every number to `dtype`, those beyond its range to its largest; a subclass names the dtype."""

    dtype: ClassVar[torch.dtype]
    family = "quantization"

    def encode(self, state: UserState) -> UserState:
        return map_vectors(state, lambda name, segment: rounded(segment.fields[name].dense(), self.dtype))

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        per_slot = sum(heads * width for _, heads, width in layout.vectors)
        return layout.beside(n, length) + n * per_slot * self.dtype.itemsize
