"""Ragged arrays as bytes, and back without any trust in what the bytes say of their own size."""

from __future__ import annotations

from collections.abc import Sequence

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
    if cols is None:  # whole rows: copied as such
        kept, cells = data[_rows(rows, data.shape[2])], rows.long().sum(1) * data.shape[3]
    else:
        kept, cells = data[_cells(rows, cols, data.shape)], (rows.long() * cols.long()).sum(1)
    flat = kept.reshape(-1).view(torch.uint8).numpy().tobytes() if kept.numel() else b""
    ends = (cells * data.element_size()).cumsum(0).tolist()
    return [flat[start:end] for start, end in zip([0, *ends], ends)]


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
        rows = rows.cpu().expand(users, heads)
        cols = None if cols is None else cols.cpu().expand(users, heads)
        wide = torch.full_like(rows, width) if cols is None else cols
        need = (rows.double() * wide.double()).sum(1, keepdim=True) * like.element_size()  # float64 does not wrap
        self.refuse((rows < 0) | (wide < 0), "has arrays of negative size")
        self.refuse(need > self.left, "is shorter than its own counts say")
        chunks = []
        for user, size in enumerate(need.long().flatten().tolist()):
            chunks.append(self.blobs[user][self.at[user] : self.at[user] + size])
            self.at[user] += size
        size = int(rows.max()) if rows.numel() else 0, int(wide.max()) if cols is not None and users else width
        out = torch.zeros(users, heads, *size, dtype=like.dtype)
        flat = bytearray(b"".join(chunks))
        if flat:
            out[_cells(rows, cols, out.shape)] = torch.frombuffer(flat, dtype=like.dtype)
        return out.to(like.device)

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
