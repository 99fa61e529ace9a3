"""Vectors in few bits: bit-packed codes with a scale (and a zero point) per group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench import kernels
from malloc_bench.kernels import Affine, writing
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows, unhalved

_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True, eq=False)
class Quantized(Vectors):
    """x ~ scale * code + zero, codes of `bits` bits packed along the width.

    codes: [B, H, S, ceil(D bits / 8)] uint8.
    scale, zero: [B, H, G, W] float32. along "slots": `group` consecutive slots share a pair per channel
        (G = ceil(S / group), W = D); along "width": `group` channels of a slot share one (G = S, W = ceil(D / group)).
        zero None: symmetric codes around 2^(bits-1).
    wide: [B, H, 1, 1] uint8. Scales are stored as float16; 1 marks a user and head whose scales need float32.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    wide: Tensor
    bits: int
    width: int
    group: int
    along: Literal["slots", "width"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.codes.shape
        return b, h, s, self.width

    def written(self) -> Affine:
        sizes = (self.group, 1) if self.along == "slots" else (1, self.group)
        return Affine(self.codes, self.bits, self.width, self.scale, self.zero, *sizes)

    def dense(self) -> Tensor:
        if (found := kernels.dense(self.written())) is not None:
            return found
        codes = unpack_bits(self.codes, self.bits, self.width).to(self.scale.dtype)
        if self.zero is None:
            return (codes - 2 ** (self.bits - 1)) * self._spread(self.scale)
        return codes * self._spread(self.scale) + self._spread(self.zero)

    def _spread(self, per_group: Tensor) -> Tensor:
        """[B, H, G, W] -> [B, H, S, D], every group's number at each of its members."""
        axis, size = (2, self.codes.shape[2]) if self.along == "slots" else (3, self.width)
        if per_group.shape[axis] == 1:
            return per_group
        return per_group.repeat_interleave(self.group, dim=axis).narrow(axis, 0, size)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        heads = self.codes.shape[1]
        one = torch.ones(1, 1, dtype=torch.long, device=self.codes.device)
        count = all_rows(self.codes) if count is None else count
        groups = self.groups(count).expand(len(self.codes), heads)
        wide = self.wide[..., 0, 0].long()
        yield Ragged(self.wide, one, None, "scales")
        yield Ragged(self.codes, count)
        some = bool(wide.any())
        for numbers in (self.scale, self.zero):
            if numbers is not None:
                fits = numbers.clamp(-_HALF.max, _HALF.max) if some else numbers  # only rows that fit are stored of it
                yield Ragged(fits.half(), groups * (1 - wide) if some else groups, None, "scales")
                yield Ragged(numbers, groups * wide if some else one - 1, None, "scales")  # zstd frames it

    def load(self, read: Read, count: Tensor | None) -> Quantized:
        flag = read.numbers(self.wide[..., 0, 0], 1, "has a flag of wide scales that is neither 0 nor 1").long()
        wide = flag[..., None, None].to(self.wide.dtype)
        count = all_rows(self.codes) if count is None else count
        codes = read(self.codes, count)
        groups, some = self.groups(count).expand(flag.shape), bool(flag.any())
        none = torch.zeros(1, 1, dtype=torch.long, device=flag.device)

        def numbers(like: Tensor | None) -> Tensor | None:
            if like is None:
                return None
            narrow = read(like.half(), groups * (1 - flag) if some else groups).float()
            full = read(like, groups * flag if some else none)
            if not some:
                return narrow
            size = max(narrow.shape[2], full.shape[2])
            narrow, full = (F.pad(x, (0, 0, 0, size - x.shape[2])) for x in (narrow, full))
            return torch.where(wide.bool(), full, narrow)

        scale, zero = numbers(self.scale), numbers(self.zero)
        assert scale is not None
        return replace(self, codes=codes, scale=scale, zero=zero, wide=wide)

    def groups(self, count: Tensor) -> Tensor:
        return (count + self.group - 1) // self.group if self.along == "slots" else count


def quantize(
    x: Tensor, mask: Tensor, bits: int, group: int, along: Literal["slots", "width"], symmetric: bool = False
) -> Quantized:
    """Round-to-nearest quantization of x [B, H, S, D]; mask [B, H or 1, S] keeps padding out of every group's range.

    Asymmetric: zero = min, scale = (max - min) / (2^bits - 1). Symmetric: scale = max|x| / (2^(bits-1) - 1). Raises
    ValueError as `checked`.
    """
    b, h, s, d = x.shape
    x = checked(unhalved(x), mask)
    real = mask.unsqueeze(-1)
    known = writing.spans(x, mask, bits, group, along)
    if known is not None:
        low, high = known
    elif along == "slots":
        blank = (torch.where(real, x, fill) for fill in (torch.inf, -torch.inf))
        low, high = (_grouped(y, group, along, fill) for y, fill in zip(blank, (torch.inf, -torch.inf)))
        low, high = low.amin(3), high.amax(3)
        low, high = (torch.where(low.isfinite(), y, 0.0) for y in (low, high))  # groups of padding only
    else:  # a padded slot has groups of its own
        low, high = _grouped(x, group, along, torch.inf).amin(4), _grouped(x, group, along, -torch.inf).amax(4)
        low, high = (torch.where(real, y, 0.0) for y in (low, high))
    levels = 2**bits - 1
    zero = None if symmetric else low
    scale = torch.maximum(high, -low) / (levels // 2) if symmetric else (high - low) / levels

    tiny = (scale > 0) & (scale < _HALF.tiny)  # float16 would lose digits or underflow to 0
    wide = (tiny | (scale > _HALF.max) | (low.abs() > _HALF.max)).any(3, keepdim=True).any(2, keepdim=True)
    scale = torch.where(wide, scale, scale.half().float())
    zero = None if zero is None else torch.where(wide, zero, zero.half().float())
    out = Quantized(x.new_empty(b, h, s, 0, dtype=torch.uint8), scale, zero, wide.byte(), bits, d, group, along)
    step = torch.where(scale > 0, scale, 1.0)
    if (written := writing.write(x, mask, bits, group, along, step, zero)) is not None:
        return replace(out, codes=written)
    step = out._spread(step)
    shifted = x / step + 2 ** (bits - 1) if zero is None else (x - out._spread(zero)) / step
    codes = torch.where(real, shifted, 0.0).round_().clamp_(1 if symmetric else 0, levels).byte()
    return replace(out, codes=pack_bits(codes, bits))


def checked(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, H, S, D]; raises ValueError where what is real of it, mask [B, H or 1, S], is NaN or infinite: codes have
    no word for that, and would read as any number."""
    if x.numel() and not bool(x.sum().isfinite()):  # may also be of padding, or too large a sum
        wrong = int((~x.isfinite() & mask.unsqueeze(-1)).sum())
        if wrong:
            raise ValueError(f"numbers to be written in codes are NaN or infinite: {wrong} of {x.numel()}")
    return x


def _grouped(x: Tensor, group: int, along: str, fill: float) -> Tensor:
    """Split slots (dim 2) or channels (dim 3) into groups: one dim more, the last group filled up."""
    axis = 2 if along == "slots" else 3
    short = -x.shape[axis] % group
    if short:
        x = F.pad(x, (0, 0, 0, short) if axis == 2 else (0, short), value=fill)
    return x.unflatten(axis, (x.shape[axis] // group, group))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., D] below 2^bits -> [..., ceil(D bits / 8)], a stream of bits, the lowest first."""
    if bits == 8:
        return codes
    if 8 % bits:  # codes that cross bytes go bit by bit
        single = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=torch.uint8, device=codes.device)) & 1
        return pack_bits(single.flatten(-2), 1)
    per_byte = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    packed = codes[..., 0].clone()
    for i in range(1, per_byte):
        packed |= codes[..., i] << (bits * i)
    return packed


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `pack_bits`: [..., ceil(D bits / 8) or more] uint8 -> [..., D] uint8."""
    if bits == 8:
        return packed[..., :width]
    if 8 % bits:
        first = torch.arange(width, device=packed.device) * bits
        byte, shift = first // 8, first % 8
        low, high = F.pad(packed, (0, 1))[..., byte], F.pad(packed, (0, 1))[..., byte + 1]
        return ((low.int() | high.int() << 8) >> shift & (2**bits - 1)).byte()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)[..., :width]
