"""Vectors of some channels, and vectors as a size times a direction that several share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows


@dataclass(frozen=True, eq=False)
class Channels(Vectors):
    """data [B, H, S, C]: the channels `index` [B, H, 1, C] (uint8, or int16 of more than 256) of width D, else 0."""

    data: Tensor
    index: Tensor
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.data.shape
        return b, h, s, self.width

    def _at(self, rows: int) -> Tensor:
        """[B, H, rows, C]"""
        b, h, _, c = self.index.shape
        return self.index.long().clamp(0, self.width - 1).expand(b, h, rows, c)

    def _spread(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:3], self.width).scatter(3, self._at(x.shape[2]), x)

    def dense(self) -> Tensor:
        return self._spread(self.data)

    def dot(self, q: Tensor) -> Tensor:
        return q.gather(3, self._at(q.shape[2])) @ self.data.mT.to(q.dtype)

    def mix(self, w: Tensor) -> Tensor:
        return self._spread(w @ self.data.to(w.dtype))

    def flops(self, queries: int) -> int:
        _, heads, slots, channels = self.data.shape
        return 2 * queries * heads * slots * channels

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.index, all_rows(self.index), None, "index")
        yield Ragged(self.data, all_rows(self.data) if count is None else count)

    def load(self, read: Read, count: Tensor | None) -> Channels:
        index = read(self.index, all_rows(self.index))
        return replace(self, index=index, data=read(self.data, all_rows(self.data) if count is None else count))

    @staticmethod
    def of(x: Tensor, index: Tensor) -> Channels:
        """The channels index [B, H, C] of x [B, H, S, D]."""
        index = index.sort(-1).values.unsqueeze(2)
        data = x.gather(3, index.expand(-1, -1, x.shape[2], -1))
        return Channels(data, index.to(torch.uint8 if x.shape[3] <= 256 else torch.int16), x.shape[3])


@dataclass(frozen=True, eq=False)
class Sized(Vectors):
    """size * direction: size [B, H, S, 1] its own, direction [B, H, S, D] shared."""

    size: Tensor
    direction: Vectors

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.direction.shape

    def shared(self) -> tuple[Vectors, ...]:
        return (*self.direction.shared(), self.direction)

    def over(self, shared: tuple[Vectors, ...]) -> Sized:
        return replace(self, direction=shared[-1])

    def dense(self) -> Tensor:
        return self.size * self.direction.dense()

    def dot(self, q: Tensor) -> Tensor:
        return self.direction.dot(q) * self.size.mT.to(q.dtype)

    def mix(self, w: Tensor) -> Tensor:
        return self.direction.mix(w * self.size.mT.to(w.dtype))

    def flops(self, queries: int) -> int:
        return self.direction.flops(queries)

    def dense_flops(self) -> int:
        return self.direction.dense_flops()

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.size, all_rows(self.size) if count is None else count, None, "scales")

    def load(self, read: Read, count: Tensor | None) -> Sized:
        return replace(self, size=read(self.size, all_rows(self.size) if count is None else count))
