"""Ragged arrays as bytes, and back without any trust in what the bytes say of their own size."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from malloc_bench.state.vectors import Ragged


def stored_bytes(part: Ragged, users: Sequence[int]) -> list[bytes]:
    """The stored rows and columns of each of the given users, head after head.

    In numpy: a state is some fifty small arrays, and there each step of torch costs more than the copy itself.
    """
    data, which = _array(part.data), list(users)
    rows, cols = _array(part.rows), None if part.cols is None else _array(part.cols)
    if which != list(range(len(data))):
        rows = rows[which] if len(rows) == len(data) else rows
        cols = cols[which] if cols is not None and len(cols) == len(data) else cols
        data = data[which]
    if (alike := _alike(rows, cols, data.shape[3])) is not None:
        flat = data[:, :, : alike[0], : alike[1]].tobytes()
        size = data.shape[1] * prod(alike) * data.itemsize
        return [flat[i * size : (i + 1) * size] for i in range(len(which))]
    rows = np.broadcast_to(rows, data.shape[:2])
    cols = None if cols is None else np.broadcast_to(cols, data.shape[:2])
    if cols is None:  # whole rows: copied as such
        kept, cells = data[_first(data.shape[2], rows)], rows.sum(1, dtype=np.int64) * data.shape[3]
    else:
        kept, cells = data[_cells(rows, cols, data.shape)], (rows.astype(np.int64) * cols).sum(1)
    flat, ends = kept.tobytes(), (cells * data.itemsize).cumsum().tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends)]


def _array(x: Tensor) -> np.ndarray:
    """The numbers, or the bits of floats that numpy does not know."""
    x = x.detach().cpu()
    try:
        return x.numpy()
    except TypeError:
        return x.view({1: torch.uint8, 2: torch.int16}[x.element_size()]).numpy()


def _alike(rows: np.ndarray, cols: np.ndarray | None, width: int) -> tuple[int, int] | None:
    """Rows and columns, [B or 1, H or 1], where all users and heads have as many, as the one user of a request: these
    need no mask."""
    found = [width if x is None else _one(x) for x in (rows, cols)]
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def _one(x: np.ndarray) -> int | None:
    """The number that all are; None where they differ, or are none."""
    return int(x.flat[0]) if x.size == 1 or (x.size and (x == x.flat[0]).all()) else None


def _first(size: int, count: np.ndarray) -> np.ndarray:
    """True in the leading count [...] of [..., size]."""
    return np.arange(size) < count[..., None]


def _cells(rows: np.ndarray, cols: np.ndarray | None, shape: Sequence[int]) -> np.ndarray:
    """True in the leading rows x cols [B, H] of shape [B, H, R, C]; row-major, as they are stored."""
    real = _first(shape[2], rows)[..., None]
    if cols is not None:
        real = real & _first(shape[3], cols)[:, :, None]
    return np.broadcast_to(real, tuple(shape))


_WIDE = 64  # times the largest array that users may share a padded one with


class Reader:
    """Reads ragged arrays back, all users at once, in the order in which they were packed.

    Nothing is allocated before the bytes that should fill it are there; what does not fit raises a ValueError.
    """

    def __init__(self, blobs: Sequence[bytes]) -> None:
        self.blobs = blobs
        self.views = [memoryview(blob) for blob in blobs]  # slices of these are no copies
        self.at = [0] * len(blobs)

    @property
    def left(self) -> Tensor:
        """Bytes not read yet, [B, 1] int64."""
        return torch.tensor([len(b) - at for b, at in zip(self.blobs, self.at)], dtype=torch.long).view(-1, 1)

    def __call__(self, like: Tensor, rows: Tensor, cols: Tensor | None = None) -> Tensor:
        """The next array [B, H, max rows, max cols]; heads, dtype and device (without cols: the width) as `like` has
        them, rows and cols [B or 1, H or 1]."""
        users, heads, width = len(self.blobs), like.shape[1], like.shape[3]
        sizes = _array(rows), None if cols is None else _array(cols)
        alike = _alike(*sizes, width) if users else None
        if alike is not None and min(alike) >= 0:
            flat = self._take([heads * prod(alike) * like.element_size()] * users)
            new = torch.frombuffer(flat, dtype=like.dtype) if flat else torch.empty(0, dtype=like.dtype)
            return new.view(users, heads, *alike).to(like.device)
        high = np.broadcast_to(sizes[0], (users, heads))
        wide = np.broadcast_to(np.array([[width]]) if sizes[1] is None else sizes[1], (users, heads))
        self.refuse(torch.from_numpy((high < 0) | (wide < 0)), "has arrays of negative size")
        flat = self._take(((high.astype(float) * wide).sum(1) * like.element_size()).tolist())  # float64 does not wrap
        most = [int(x.max()) if x.size else none for x, none in ((high, 0), (wide, width))]
        if prod(most) > _WIDE * max(float((high.astype(float) * wide).max(initial=0)), 2**16):
            self.refuse(
                torch.ones(users, 1, dtype=torch.bool), f"of arrays of up to {most[0]} rows and {most[1]} columns"
            )
        out = torch.zeros(users, heads, *most, dtype=like.dtype)
        if flat:
            real = torch.from_numpy(_cells(high, None if cols is None else wide, out.shape).copy())
            out[real] = torch.frombuffer(flat, dtype=like.dtype)
        return out.to(like.device)

    def _take(self, sizes: Sequence[float]) -> bytearray:
        """So many bytes of each user, one after the other."""
        ends = [at + int(size) for at, size in zip(self.at, sizes)]
        short = [end > len(blob) for end, blob in zip(ends, self.blobs)]
        if any(short):
            self.refuse(torch.tensor(short).unsqueeze(1), "is shorter than its own counts say")
        found = bytearray().join([view[at:end] for view, at, end in zip(self.views, self.at, ends)])
        self.at = ends
        return found

    def numbers(self, like: Tensor, most: Tensor | int, what: str) -> Tensor:
        """The next number of each user and head, [B, H] integers as in `like`; raises ValueError outside 0 .. most."""
        found = self(like[..., None, None], torch.ones(1, 1, dtype=torch.long)).view(len(self.blobs), like.shape[1])
        self.refuse((found < 0) | (found > most), what)
        return found

    def refuse(self, wrong: Tensor, what: str) -> None:
        """Raise ValueError with the first user of whom wrong [B, ...] says so."""
        if bool(wrong.any()):
            user = int(wrong.flatten(1).any(1).nonzero()[0])
            raise ValueError(f"packed state of user {user} ({len(self.blobs[user])} bytes) {what}")

    def finish(self) -> None:
        self.refuse(self.left > 0, "is longer than its own counts say")
