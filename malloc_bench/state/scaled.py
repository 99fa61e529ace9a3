"""Vectors of about one size, and a byte of scale for each below an exponent that a head shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

STEPS = 8  # of a scale in an octave
EDGE = 126  # exponents that a float32 has


@dataclass(frozen=True, eq=False)
class Scaled(Vectors):
    """x = 2^(top - scale / 8) y, y what `shape_of` has; scale: [B, H, S, 1] uint8; top: [B, H, 1, 1] int8."""

    shape_of: Vectors
    scale: Tensor
    top: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.shape_of.shape

    def dense(self) -> Tensor:
        return size_of(self.top, self.scale) * self.shape_of.dense()

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.top, torch.ones(1, 1, dtype=torch.long, device=self.top.device), None, "scales")
        yield Ragged(self.scale, all_rows(self.scale) if count is None else count, None, "scales")
        yield from self.shape_of.parts(count)

    def load(self, read: Read, count: Tensor | None) -> Scaled:
        top = read(self.top, torch.ones(1, 1, dtype=torch.long))
        scale = read(self.scale, all_rows(self.scale) if count is None else count)
        return replace(self, top=top, scale=scale, shape_of=self.shape_of.load(read, count))


def size_of(top: Tensor, scale: Tensor) -> Tensor:
    return torch.exp2(top.float() - scale.float() / STEPS)


def sized(size: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """scale and top, of sizes [B, H, S, 1] >= 0; mask [B, H or 1, S]: which vectors are real. What is 32 octaves below
    the largest stays there."""
    most = torch.where(mask.unsqueeze(-1), size, 0.0)
    most = torch.cat([most, most.new_zeros(*most.shape[:2], 1, 1)], 2).amax(2, keepdim=True)  # of no vector 0
    top = most.clamp(min=2.0**-EDGE).log2().ceil().clamp(-EDGE, EDGE)
    scale = ((top - size.clamp(min=2.0**-149).log2()) * STEPS).round().clamp(0, 255)
    return scale.byte(), top.to(torch.int8)
