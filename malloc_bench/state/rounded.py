"""Vectors rounded to a narrower float, read as float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows, narrowed


@dataclass(frozen=True, eq=False)
class Rounded(Vectors):
    """data: [B, H, S, D], the bits of floats of `dtype`; 8-bit ones lie in uint8, which torch can index and fill."""

    data: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, d = self.data.shape
        return b, h, s, d

    def dense(self) -> Tensor:
        x = self.data.view(self.dtype).float()
        return x if self.dtype.itemsize > 1 else x.nan_to_num()  # padding may hold bits that are no number

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.data, all_rows(self.data) if count is None else count)

    def load(self, read: Read, count: Tensor | None) -> Rounded:
        return Rounded(read(self.data, all_rows(self.data) if count is None else count), self.dtype)


def rounded(x: Tensor, dtype: torch.dtype) -> Rounded:
    """x [B, H, S, D] rounded to the nearest of `dtype`, what is beyond its range to its largest."""
    data = narrowed(x, dtype)
    return Rounded(data if dtype.itemsize > 1 else data.view(torch.uint8), dtype)
