"""Vectors that are codes of few bits, times a scale, plus an offset."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.kernels.switch import fits, spread

FEW = 4  # queries that read codes one after the other; more unpack them once and multiply
WORDS = {1: (8, 1), 2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}  # bits: codes in a word, bytes of a word
_CACHED = 1 << 18  # numbers unpacked at a time: a megabyte, so that they are multiplied where they lie


class Affine(NamedTuple):
    """x = scale * code + offset, [B, H, S, width] of float32.

    codes: [B, H, S, ceil(width bits / 8)] uint8, a stream of bits a slot, the lowest first. scale, offset: [B, H, G, W]
    float32, a row for `slots` slots and a column for `channels` channels, of which one is 1. G or W may be 1 for all.
    """

    codes: Tensor
    bits: int
    width: int
    scale: Tensor
    offset: Tensor
    slots: int
    channels: int


def dot(x: Affine, q: Tensor) -> Tensor | None:
    """q . x for every vector x: [B, H, M, D] -> [B, H, M, S]."""
    return _read("dot", x, q, x.codes.shape[2])


def mix(x: Affine, w: Tensor) -> Tensor | None:
    """Weighted sums of the vectors: [B, H, M, S] -> [B, H, M, D]."""
    return _read("mix", x, w, x.width)


def _read(what: str, x: Affine, asked: Tensor, width: int) -> Tensor | None:
    """Heads that share the vectors ask one after the other."""
    b, h, m, k = asked.shape
    heads = x.codes.shape[1]
    if x.codes.shape[0] != b or heads not in (1, h) or (given := _Given.of(x, asked)) is None:
        return None
    rows = asked.reshape(b * heads, h // heads * m, k)
    out = asked.new_empty(len(rows), rows.shape[1], width)
    if rows.shape[1] > FEW:
        for part, vectors in given.blocks():
            torch.matmul(rows[part], vectors.mT if what == "dot" else vectors, out=out[part])
    else:
        given.run(what, rows.detach().contiguous().numpy(), out.numpy())
    return out.view(b, h, m, width)


def dense(x: Affine) -> Tensor | None:
    """The vectors, [B, H, S, D]."""
    given = _Given.of(x)
    if given is None:
        return None
    out = x.scale.new_empty(*x.codes.shape[:3], x.width)
    given.run("dense", None, out.flatten(0, 1).numpy())
    return out


class _Given(NamedTuple):
    """An `Affine` as loops take it, users and heads in a row."""

    loops: tuple
    codes: np.ndarray  # [N, S, groups of channels, bytes]
    scale: np.ndarray  # [N, G, W]
    offset: np.ndarray
    group: int | None  # slots to a row of scales; None: one, and columns are of several channels
    width: int

    @staticmethod
    def of(x: Affine, asked: Tensor | None = None) -> _Given | None:
        known = [x.codes, x.scale, x.offset] + ([] if asked is None else [asked])
        if (
            x.bits not in WORDS
            or not x.codes.numel()
            or not fits(*known)
            or any(each.dtype != torch.float32 for each in known[1:])
        ):
            return None
        from malloc_bench.kernels.loops import loops  # here: its compiler takes half a second to load

        (b, h, s, bytes_), (planes, step), columns, codes = x.codes.shape, WORDS[x.bits], 1, x.codes
        if x.channels == 1:
            group: int | None = x.slots if x.scale.shape[2] > 1 else s
            sizes = x.scale.shape[2], x.width
        else:
            group, columns = None, x.scale.shape[3]
            if x.slots != 1 or (columns > 1 and (x.width % x.channels or x.channels % planes)):
                return None
            sizes = s, columns
        if short := -bytes_ % step:
            codes, bytes_ = F.pad(codes, (0, short)), bytes_ + short
        scale, offset = (_array(each, b, h, *sizes) for each in (x.scale, x.offset))
        rows = _array(codes, b, h, s, bytes_).reshape(b * h, s, columns, bytes_ // columns)
        return _Given(loops(x.bits, planes, step), rows, scale, offset, group, x.width)

    def run(self, what: str, given: np.ndarray | None, out: np.ndarray, first: int = 0) -> None:
        """One of the loops over rows `first` on, as many as out has."""
        kernel: Callable[..., None] = getattr(self.loops, f"{what}_by_{'slot' if self.group is None else 'channel'}")
        rows = slice(first, first + len(out))
        arrays = [x[rows] for x in (self.codes, self.scale, self.offset)]
        if given is not None:
            arrays.insert(1, given)
        if self.group is not None:
            arrays.append(self.group)  # type: ignore[arg-type]
        spread(lambda start, stop: kernel(*arrays, out, start, stop), len(out), out.shape[0] * self.codes[0].size)

    def blocks(self):  # type: ignore[no-untyped-def]
        """A few rows at a time, as a slice and their vectors [n, S, D] in a buffer that the next ones will have."""
        n, s = self.codes.shape[:2]
        step = max(1, min(n, _CACHED // max(1, s * self.width)))
        buffer = torch.empty(step, s, self.width)
        for start in range(0, n, step):
            part = buffer[: min(step, n - start)]
            self.run("dense", None, part.numpy(), start)
            yield slice(start, start + len(part)), part


def _array(x: Tensor, b: int, h: int, rows: int, columns: int) -> np.ndarray:
    """[B or 1, H or 1, rows or 1, columns or 1] -> [B x H, rows, columns]"""
    if x.shape != (b, h, rows, columns):
        x = x.expand(b, h, rows, columns)
    return x.detach().contiguous().numpy().reshape(b * h, rows, columns)
