"""Vectors as numbers of entries in a codebook that all users share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench import kernels
from malloc_bench.kernels import Entries
from malloc_bench.state.quantized import checked, pack_bits, unpack_bits
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

_CELLS = 1 << 22  # distances at a time: 16 MB
_KIDS = 2  # entries that each sum of a beam is tried with


class Codebook:
    """tables [H, M, 2^bits, w]: entries for each head and each of M codes. A plain class: no user has a part in it.

    added: a vector is the sum of its M entries, of full width (residual codes); else they stand side by side.
    """

    def __init__(self, tables: Tensor, bits: int, width: int, added: bool) -> None:
        self.tables, self.bits, self.width, self.added = tables, bits, width, added

    def look_up(self, codes: Tensor) -> Tensor:
        """[B, H, S, M] uint8 -> [B, H, S, D]"""
        h, m, k, w = self.tables.shape
        b, _, s, _ = codes.shape
        flat = self.tables.to(codes.device).transpose(0, 1).reshape(m, h * k, w)
        first = k * torch.arange(h, device=codes.device).view(1, h, 1)  # of each head's entries
        rows = [flat[i].index_select(0, (codes[..., i].long() + first).flatten()) for i in range(m)]
        if self.added:
            return sum(rows[1:], rows[0]).view(b, h, s, w)
        return torch.stack(rows, 1).flatten(1)[:, : self.width].view(b, h, s, self.width)

    def nearest(self, x: Tensor, beam: int = 1) -> Tensor:
        """Codes [B, H, S, M] of x [B, H, S, D]: of each part the nearest entry, or of what the entries before leave.

        beam: of entries that are added, so many sums are held after each one; the nearest is taken in the end.
        """
        b, h, s, d = x.shape
        rows = x.transpose(0, 1).reshape(h, b * s, d).to(self.tables.dtype)
        tables, found = self.tables.to(x.device), []
        if self.added and beam > 1:
            step = max(1, _CELLS // (h * beam * tables.shape[2]))
            parts = [rows[:, i : i + step] for i in range(0, max(b * s, 1), step)]
            made = [kernels.nearest_sums(part, tables, beam, _KIDS) for part in parts]
            found = [_held(part, tables, beam) if each is None else each for part, each in zip(parts, made)]
            return torch.cat(found, 1).view(h, b, s, tables.shape[1]).transpose(0, 1).byte()
        for i in range(tables.shape[1]):
            entries = tables[:, i]
            part = rows if self.added else _part(rows, i, entries.shape[-1])
            found.append(closest(part, entries))
            if self.added:
                rows = rows - entries.gather(1, found[-1].unsqueeze(-1).expand(-1, -1, d))
        return torch.stack(found, -1).view(h, b, s, len(found)).transpose(0, 1).byte()


@dataclass(frozen=True, eq=False)
class FromCodebook(Vectors):
    """x ~ what `book` has under its codes, [B, H, S, ceil(M bits / 8)] uint8."""

    codes: Tensor
    book: Codebook

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.codes.shape
        return b, h, s, self.book.width

    def written(self) -> Entries:
        codes = unpack_bits(self.codes, self.book.bits, self.book.tables.shape[1])
        return Entries(codes, self.book.tables.to(codes.device), self.book.width, self.book.added)

    def dense(self) -> Tensor:
        found = kernels.dense(self.written())
        return self.book.look_up(self._numbers()) if found is None else found

    def _numbers(self) -> Tensor:
        """[B, H, S, M] uint8; padding may hold any."""
        _, m, k, _ = self.book.tables.shape
        return unpack_bits(self.codes, self.book.bits, m).clamp(max=k - 1)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.codes, all_rows(self.codes) if count is None else count)

    def load(self, read: Read, count: Tensor | None) -> FromCodebook:
        return replace(self, codes=read(self.codes, all_rows(self.codes) if count is None else count))

    @staticmethod
    def of(x: Tensor, mask: Tensor, book: Codebook, beam: int = 1) -> FromCodebook:
        """x [B, H, S, D], mask [B, H or 1, S]: which vectors are real; raises ValueError as `checked`."""
        return FromCodebook(pack_bits(book.nearest(checked(x, mask), beam), book.bits), book)


class Pool:
    """rows [P, H, W]: what a model learned once for all users, its own parameter. A plain class: nobody has a part."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


@dataclass(frozen=True, eq=False)
class Pooled(Vectors):
    """[a row of a pool; own]: codes [B, 1, S, 1] int16 name the row of all heads, own is [B, H, S, D - W]."""

    by_slot = True
    codes: Tensor
    own: Tensor
    pool: Pool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, u = self.own.shape
        return b, h, s, self.pool.rows.shape[2] + u

    def dense(self) -> Tensor:
        rows = self.pool.rows.to(self.own.device, self.own.dtype)
        found = rows[self.codes[:, 0, :, 0].long().clamp(0, len(rows) - 1)]  # padding may hold any: [B, S, H, W]
        return torch.cat([found.transpose(1, 2), self.own], -1)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.codes, all_rows(self.codes) if count is None else count)
        yield Ragged(self.own, all_rows(self.own) if count is None else count)

    def load(self, read: Read, count: Tensor | None) -> Pooled:
        count = all_rows(self.codes) if count is None else count
        return replace(self, codes=read(self.codes, count), own=read(self.own, count))


def closest(x: Tensor, entries: Tensor) -> Tensor:
    """Index [H, N] of the nearest of entries [H, K, w] to x [H, N, w]; blockwise. The first where two are as near."""
    half = entries.square().sum(-1).unsqueeze(1) / 2
    step = max(1, _CELLS // max(1, entries.shape[0] * entries.shape[1]))
    parts = [(half - x[:, i : i + step] @ entries.mT).argmin(-1) for i in range(0, max(x.shape[1], 1), step)]
    return torch.cat(parts, 1)


def _held(rows: Tensor, tables: Tensor, beam: int) -> Tensor:
    """Codes [H, N, M] of rows [H, N, D] among tables [H, M, K, D]: sums held are `left` [H, N, W, D] from each row."""
    width, left, codes = rows.shape[2], rows.unsqueeze(2), rows.new_zeros(*rows.shape[:2], 1, 0, dtype=torch.long)
    for entries in tables.unbind(1):
        half = entries.square().sum(-1).unsqueeze(1) / 2
        near = torch.baddbmm(half, left.flatten(1, 2), entries.mT, alpha=-1).unflatten(1, left.shape[1:3])
        near, kids = near.topk(min(beam if left.shape[2] == 1 else _KIDS, len(entries[0])), largest=False)
        near = (near + left.square().sum(-1, keepdim=True) / 2).flatten(2)
        best = near.topk(min(beam, near.shape[2]), largest=False).indices
        parent, kid = (best // kids.shape[3]).unsqueeze(-1), kids.flatten(2).gather(2, best)
        taken = entries.gather(1, kid.flatten(1).unsqueeze(-1).expand(-1, -1, width)).view(*kid.shape, width)
        left = left.gather(2, parent.expand_as(taken)) - taken
        codes = torch.cat([codes.gather(2, parent.expand(-1, -1, -1, codes.shape[3])), kid.unsqueeze(-1)], -1)
    first = left.square().sum(-1).argmin(2)[..., None, None]
    return codes.gather(2, first.expand(-1, -1, 1, codes.shape[3])).squeeze(2)


def _part(rows: Tensor, i: int, width: int) -> Tensor:
    """Channels of part i, the last one filled up with zeros."""
    part = rows[..., i * width : (i + 1) * width]
    return F.pad(part, (0, width - part.shape[-1]))
