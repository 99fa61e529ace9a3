"""Vectors in few bits with one byte of scale each, below an exponent that a head's vectors share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.state.quantized import pack_bits, unpack_bits
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

STEPS = 8  # of a scale in an octave
_TRIED = 5  # scales a vector: the one that no code exceeds, and smaller ones
_EDGE = 127  # exponents that a float32 has


@dataclass(frozen=True, eq=False)
class MicroScaled(Vectors):
    """x = 2^(top - scale / 8) (code - (2^bits - 1) / 2): levels lie evenly around 0, which is none of them.

    codes: [B, H, S, ceil(D bits / 8)] uint8. scale: [B, H, S, 1] uint8. top: [B, H, 1, 1] int8.
    """

    codes: Tensor
    scale: Tensor
    top: Tensor
    bits: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.codes.shape
        return b, h, s, self.width

    def dense(self) -> Tensor:
        codes = unpack_bits(self.codes, self.bits, self.width).float()
        return (codes - (2**self.bits - 1) / 2) * _size(self.top, self.scale)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        count = all_rows(self.codes) if count is None else count
        yield Ragged(self.top, torch.ones(1, 1, dtype=torch.long, device=self.top.device))
        yield Ragged(self.codes, count)
        yield Ragged(self.scale, count)

    def load(self, read: Read, count: Tensor | None) -> MicroScaled:
        count = all_rows(self.codes) if count is None else count
        top = read(self.top, torch.ones(1, 1, dtype=torch.long))
        return MicroScaled(read(self.codes, count), read(self.scale, count), top, self.bits, self.width)


def _size(top: Tensor, scale: Tensor) -> Tensor:
    return torch.exp2(top.float() - scale.float() / STEPS)


def microscaled(x: Tensor, mask: Tensor, bits: int) -> MicroScaled:
    """x [B, H, S, D] in codes of `bits` bits; of a few scales each vector gets the one with the least squared error.

    mask [B, H or 1, S]: which vectors are real.
    """
    x = torch.where(mask.unsqueeze(-1), x.float(), 0.0)
    half = (2**bits - 1) / 2
    most = x.abs().amax(3, keepdim=True) / half
    whole = F.pad(most, (0, 0, 0, 1)).amax(2, keepdim=True)  # of no vector 0
    top = whole.clamp(min=2.0**-_EDGE).log2().ceil().clamp(-_EDGE, _EDGE).to(torch.int8)
    least = ((top.float() - most.clamp(min=2.0**-149).log2()) * STEPS).floor()  # no code is exceeded
    best, kept = None, least
    for tried in range(_TRIED):
        scale = (least + tried).clamp(0, 255)
        error = ((_codes(x, _size(top, scale), half) - half) * _size(top, scale) - x).square().sum(3, keepdim=True)
        better = error < best if best is not None else torch.ones_like(error, dtype=torch.bool)
        kept, best = torch.where(better, scale, kept), error if best is None else torch.minimum(error, best)
    scale = kept.clamp(0, 255).byte()
    codes = _codes(x, _size(top, scale), half).byte()
    return MicroScaled(pack_bits(codes, bits), scale, top, bits, x.shape[3])


def _codes(x: Tensor, size: Tensor, half: float) -> Tensor:
    return (x / size.clamp(min=2.0**-126) + half).round().clamp(0, 2 * half)
