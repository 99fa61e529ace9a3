"""Vectors as codes of a fixed table of levels, times one size a vector, in a rotated frame where that helps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.state.quantized import pack_bits, unpack_bits
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows


class Table:
    """What all users share: levels in rising order [2^bits or fewer] float32, and a rotation [D, D] or None."""

    def __init__(self, levels: Tensor, rotation: Tensor | None = None) -> None:
        self.levels, self.rotation = levels, rotation

    def rotate(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else x @ self.rotation.to(x.device, x.dtype)

    def back(self, x: Tensor) -> Tensor:
        return x if self.rotation is None else x @ self.rotation.mT.to(x.device, x.dtype)


@dataclass(frozen=True, eq=False)
class Coded(Vectors):
    """x = size * levels[codes], rotated back; read in the rotated frame, so that queries turn and vectors do not.

    codes: [B, H, S, ceil(D bits / 8)] uint8. size: [B, H, S, 1] bfloat16.
    """

    codes: Tensor
    size: Tensor
    table: Table
    bits: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.codes.shape
        return b, h, s, self.width

    def _turned(self) -> Tensor:
        levels = self.table.levels.to(self.codes.device)
        codes = unpack_bits(self.codes, self.bits, self.width).int().clamp(max=len(levels) - 1)
        return levels[codes] * self.size.float()

    def dense(self) -> Tensor:
        return self.table.back(self._turned())

    def dot(self, q: Tensor) -> Tensor:
        return self.table.rotate(q) @ self._turned().mT.to(q.dtype)

    def mix(self, w: Tensor) -> Tensor:
        return self.table.back(w @ self._turned().to(w.dtype))

    def flops(self, queries: int) -> int:
        turn = 0 if self.table.rotation is None else 2 * queries * self.shape[1] * self.width**2
        return super().flops(queries) + turn

    def dense_flops(self) -> int:
        _, heads, slots, width = self.shape
        return 0 if self.table.rotation is None else 2 * heads * slots * width**2

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        count = all_rows(self.codes) if count is None else count
        yield Ragged(self.codes, count)
        yield Ragged(self.size, count, None, "scales")

    def load(self, read: Read, count: Tensor | None) -> Coded:
        count = all_rows(self.codes) if count is None else count
        return Coded(read(self.codes, count), read(self.size, count), self.table, self.bits, self.width)


def coded(x: Tensor, size: Tensor, table: Table, edges: Tensor, bits: int) -> Coded:
    """x [B, H, S, D] over size [B, H, S, 1], rotated, each number as the level whose interval it falls in.

    edges: the numbers between neighbouring levels, one fewer than levels. Sizes are rounded first.
    """
    size = size.to(torch.bfloat16)
    by = torch.where(size > 0, size.float(), 1.0)
    codes = torch.bucketize((table.rotate(x.float()) / by).contiguous(), edges.to(x.device)).byte()
    return Coded(pack_bits(codes, bits), size, table, bits, x.shape[3])
