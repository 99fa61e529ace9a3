"""Vectors that are codes of few bits, times a scale, plus an offset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.kernels.switch import After, Loop, array, fits, spread
from malloc_bench.kernels.words import BYTES, GIVEN, MIDDLE, WIDE, WORDS

if TYPE_CHECKING:
    from malloc_bench.kernels.loops import Ways


@dataclass(frozen=True, eq=False)
class Affine:
    """x = scale * code + offset, [B, H, S, width] of float32.

    codes: [B, H, S, ceil(width bits / 8) or more] uint8, a stream of bits a slot, the lowest first.
    scale, offset: [B, H, G, W] float32, a row for `slots` slots and a column for `channels` channels, of which one is
    1. G or W may be 1 for all.
    offset None: -2^(bits-1) scale. top [B, H, 1, 1] int8: scale and offset are whole numbers s and o, uint8 and int8,
    for 2^(top - s / 8) and (o - (2^bits - 1)) / 2 times that.
    """

    codes: Tensor
    bits: int
    width: int
    scale: Tensor
    offset: Tensor | None
    slots: int
    channels: int
    top: Tensor | None = None
    _known: list[Coded] = field(default_factory=list)  # the reader, where it has no copies of its own

    @cached_property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.codes.shape
        return b, h, s, self.width

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.codes, self.scale, self.offset, self.top) if x is not None]

    def reader(self, queries: int) -> Coded | None:
        if (not self._known or torch.is_grad_enabled()) and not fits(*self.tensors()):
            return None
        if self._known:
            return self._known[0]
        known, (_, _, s, size) = WORDS.get(self.bits), self.codes.shape
        kind = torch.float32 if self.top is None else torch.uint8
        if known is None or not self.codes.numel() or self.scale.dtype != kind or self.width > WIDE:
            return None
        planes, step = known
        groups, group, rows, columns = 1, s, s, self.scale.shape[3]
        if self.channels == 1 and self.top is None:  # loops by channel know of no top
            rows, columns = self.scale.shape[2], self.width
            group = self.slots if rows > 1 else s
        elif self.slots != 1 or (columns > 1 and (columns * self.channels != self.width or self.channels % planes)):
            return None
        else:
            groups = columns
        codes = self.codes if not (short := -size % step) else F.pad(self.codes, (0, short))
        how = BYTES if self.top is not None else MIDDLE if self.offset is None else GIVEN
        scale = _spread(self.scale, rows, columns)
        offset = scale if self.offset is None else _spread(self.offset, rows, columns)
        from malloc_bench.kernels.loops import dense, loops  # here: its compiler takes half a second to load

        words, by_channel = codes.shape[3] // (step * groups), self.channels == 1 and self.top is None
        ways = loops(self.bits, words, groups, how)[by_channel]
        unpack = dense(self.bits, words, groups, self.width, how)[by_channel]
        top = scale if self.top is None else array(self.top)
        read = Coded(ways, unpack, (array(codes), scale, offset, top, group), (s, self.width))
        at = {x.data_ptr() for x in self.tensors()}
        if all(x.ctypes.data in at for x in read.given[:4]):
            self._known.append(read)
        return read


def _spread(x: Tensor, rows: int, columns: int) -> np.ndarray:
    """[B, H, rows or 1, columns or 1] -> [B, H, rows, columns]"""
    if x.shape[2] != rows or x.shape[3] != columns:
        x = x.expand(-1, -1, rows, columns)
    return array(x)


class Coded(NamedTuple):
    """The loops over an `Affine`."""

    ways: Ways
    unpack: Callable[..., None]
    given: tuple
    size: tuple[int, int]

    @property
    def most(self) -> int:
        return self.ways.most

    def dot(self, q: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> Loop:
        return partial(self.ways.dot, *self.given, count, q, out, heads)

    def mix(self, w: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> tuple[Loop, After]:
        return partial(self.ways.mix, *self.given, count, w, out, heads), None

    def rows(self, start: int, stop: int, room: Tensor) -> Tensor:
        out = room[: (stop - start) * self.size[0] * self.size[1]].view(stop - start, *self.size)
        given = *self.given, out.numpy(), start
        spread(lambda first, last: self.unpack(*given, start + first, start + last), stop - start, out.numel())
        return out
