"""Vectors in few bits with one byte of scale and one of zero point each, below an exponent that a head shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench import kernels
from malloc_bench.kernels import Affine
from malloc_bench.state.quantized import checked, pack_bits, unpack_bits
from malloc_bench.state.scaled import EDGE, STEPS, size_of
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

_TRIED = 4  # scales a vector: the smallest that no code exceeds, and smaller ones


@dataclass(frozen=True, eq=False)
class MicroScaled(Vectors):
    """x = s (code - (2^bits - 1 - zero) / 2), s = 2^(top - scale / 8).

    codes: [B, H, S, ceil(D bits / 8)] uint8. scale: [B, H, S, 1] uint8. zero: [B, H, S, 1] int8. top: [B, H, 1, 1]
    int8.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    top: Tensor
    bits: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.codes.shape
        return b, h, s, self.width

    def written(self) -> Affine:
        return Affine(self.codes, self.bits, self.width, self.scale, self.zero, 1, self.width, self.top)

    def dense(self) -> Tensor:
        if (found := kernels.dense(self.written())) is not None:
            return found
        codes = unpack_bits(self.codes, self.bits, self.width).float()
        return (codes - (2**self.bits - 1 - self.zero.float()) / 2) * size_of(self.top, self.scale)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        count = all_rows(self.codes) if count is None else count
        yield Ragged(self.top, torch.ones(1, 1, dtype=torch.long, device=self.top.device), None, "scales")
        yield Ragged(self.codes, count)
        for each in (self.scale, self.zero):
            yield Ragged(each, count, None, "scales")

    def load(self, read: Read, count: Tensor | None) -> MicroScaled:
        count = all_rows(self.codes) if count is None else count
        top = read(self.top, torch.ones(1, 1, dtype=torch.long))
        codes, scale, zero = (read(each, count) for each in (self.codes, self.scale, self.zero))
        return MicroScaled(codes, scale, zero, top, self.bits, self.width)


def microscaled(x: Tensor, mask: Tensor, bits: int) -> MicroScaled:
    """x [B, H, S, D] in codes of `bits` bits; of a few scales each vector gets the one with the least squared error.

    mask [B, H or 1, S]: which vectors are real. Raises ValueError as `checked`.
    """
    x, levels = torch.where(mask.unsqueeze(-1), checked(x.float(), mask), 0.0), 2**bits - 1
    low, high = x.amin(3, keepdim=True), x.amax(3, keepdim=True)
    # a zero point moves by 63 steps at most: where all numbers lie close together and far from 0, steps are wider
    need = torch.maximum((high - low) / levels, (low / 2 + high / 2).abs() / 63)
    whole = F.pad(need, (0, 0, 0, 1)).amax(2, keepdim=True)  # of no vector 0
    top = whole.clamp(min=2.0**-EDGE).log2().ceil().clamp(-EDGE, EDGE).to(torch.int8)
    least = ((top.float() - need.clamp(min=2.0**-149).log2()) * STEPS).floor()
    best: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    for tried in range(_TRIED):
        scale = (least + tried).clamp(0, 255)
        size = size_of(top, scale).clamp(min=2.0**-EDGE)
        zero = (low / size + high / size).round().clamp(-127, 127)  # twice the middle, in steps
        first = (zero - levels) / 2
        codes = (x / size - first).round().clamp(0, levels)
        error = ((codes + first) * size - x).square().sum(3, keepdim=True)
        made = error, scale, zero, codes
        if best is not None:
            better = error < best[0]
            made = tuple(torch.where(better, new, old) for new, old in zip(made, best))  # type: ignore[assignment]
        best = made
    assert best is not None
    _, scale, zero, codes = best
    return MicroScaled(pack_bits(codes.byte(), bits), scale.byte(), zero.to(torch.int8), top, bits, x.shape[3])
