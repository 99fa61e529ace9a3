"""Vectors that are written down as they are."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from malloc_bench.kernels.switch import After, Loop, array, fits
from malloc_bench.kernels.words import FEW


class Plain(NamedTuple):
    """data [B, H, S, D]"""

    data: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, d = self.data.shape
        return b, h, s, d

    def tensors(self) -> list[Tensor]:
        return [self.data]

    def reader(self, queries: int) -> Rows | None:
        return Rows(self.data.contiguous()) if self.data.dtype == torch.float32 and fits(self.data) else None


class Rows(NamedTuple):
    """The loops over a `Plain`."""

    data: Tensor

    @property
    def most(self) -> int:
        return FEW

    def dot(self, q: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> Loop:
        from malloc_bench.kernels.passes import dot  # here: its compiler takes half a second to load

        return partial(dot, array(self.data), count, q, out, heads)

    def mix(self, w: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> tuple[Loop, After]:
        from malloc_bench.kernels.passes import mix

        return partial(mix, array(self.data), count, w, out, heads), None

    def rows(self, start: int, stop: int, room: Tensor) -> Tensor:
        return self.data.flatten(0, 1)[start:stop]
