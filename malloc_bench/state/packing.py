"""Ragged arrays as bytes, and back without any trust in what the bytes say of their own size."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from malloc_bench.state.vectors import Ragged


def stored_bytes(part: Ragged, users: Sequence[int]) -> list[bytes]:
    """The stored rows and columns of each of the given users, head after head."""
    which, heads = torch.tensor(users, dtype=torch.long), part.data.shape[1]
    data = part.data.detach().index_select(0, which.to(part.data.device)).cpu()
    rows, cols = (
        None if x is None else x.cpu().expand(len(part.data), heads).index_select(0, which)
        for x in (part.rows, part.cols)
    )
    assert rows is not None
    if (alike := _alike(rows, cols, data.shape[3])) is not None:
        kept, cells = data[:, :, : alike[0], : alike[1]], torch.tensor([heads * prod(alike)] * len(which))
    elif cols is None:  # whole rows: copied as such
        kept, cells = data[_rows(rows, data.shape[2])], rows.long().sum(1) * data.shape[3]
    else:
        kept, cells = data[_cells(rows, cols, data.shape)], (rows.long() * cols.long()).sum(1)
    flat = kept.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if kept.numel() else b""
    ends = (cells * data.element_size()).cumsum(0).tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends)]


def _alike(rows: Tensor, cols: Tensor | None, width: int) -> tuple[int, int] | None:
    """Rows and columns, [B or 1, H or 1], where all users and heads have as many, as the one user of a request: these

    need no mask."""
    found = [width if x is None else _one(x.numpy()) for x in (rows, cols)]
    return None if None in found else (found[0], found[1])  # type: ignore[return-value]


def _one(x: np.ndarray) -> int | None:
    """The number that all are; None where they differ, or are none."""
    return int(x.flat[0]) if x.size == 1 or (x.size and (x == x.flat[0]).all()) else None


def _rows(rows: Tensor, size: int) -> Tensor:
    """True in the leading rows [..., H] of [..., H, size]."""
    return torch.arange(size) < rows.unsqueeze(-1)


def _cells(rows: Tensor, cols: Tensor | None, shape: Sequence[int]) -> Tensor:
    """True in the leading rows x cols [..., H] of shape [..., H, R, C]; row-major, as they are stored."""
    real = _rows(rows, shape[-2]).unsqueeze(-1)
    if cols is not None:
        real = real & (torch.arange(shape[-1]) < cols.unsqueeze(-1)).unsqueeze(-2)
    return real.expand(tuple(shape))


class Reader:
    """Reads ragged arrays back, all users at once, in the order in which they were packed.

    Nothing is allocated before the bytes that should fill it are there; what does not fit raises a ValueError.
    """

    def __init__(self, blobs: Sequence[bytes]) -> None:
        self.blobs = blobs
        self.at = [0] * len(blobs)

    @property
    def left(self) -> Tensor:
        """Bytes not read yet, [B, 1] int64."""
        return torch.tensor([len(b) - at for b, at in zip(self.blobs, self.at)], dtype=torch.long).view(-1, 1)

    def __call__(self, like: Tensor, rows: Tensor, cols: Tensor | None = None) -> Tensor:
        """The next array [B, H, max rows, max cols]; heads, dtype and device (without cols: the width) as `like` has
        them, rows and cols [B or 1, H or 1]."""
        users, heads, width = len(self.blobs), like.shape[1], like.shape[3]
        rows, cols = rows.cpu(), None if cols is None else cols.cpu()
        alike = _alike(rows, cols, width) if users else None
        if alike is not None and min(alike) >= 0:
            flat = self._take([heads * prod(alike) * like.element_size()] * users)
            new = torch.frombuffer(flat, dtype=like.dtype) if flat else torch.empty(0, dtype=like.dtype)
            return new.view(users, heads, *alike).to(like.device)
        rows, wide = rows.expand(users, heads), torch.tensor([[width]]) if cols is None else cols.expand(users, heads)
        self.refuse((rows < 0) | (wide < 0), "has arrays of negative size")
        flat = self._take((rows.double() * wide).sum(1).mul(like.element_size()).tolist())  # float64 does not wrap
        size = int(rows.max()) if rows.numel() else 0, int(wide.max()) if users else width
        out = torch.zeros(users, heads, *size, dtype=like.dtype)
        if flat:
            out[_cells(rows, None if cols is None else wide, out.shape)] = torch.frombuffer(flat, dtype=like.dtype)
        return out.to(like.device)

    def _take(self, sizes: Sequence[float]) -> bytearray:
        """So many bytes of each user, one after the other."""
        ends = [at + int(size) for at, size in zip(self.at, sizes)]
        short = [end > len(blob) for end, blob in zip(ends, self.blobs)]
        if any(short):
            self.refuse(torch.tensor(short).unsqueeze(1), "is shorter than its own counts say")
        found = bytearray(b"".join(blob[at:end] for blob, at, end in zip(self.blobs, self.at, ends)))
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
