"""Vectors written down in two ways at once: a few rows or numbers as they are, or one approximation on another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.state.quantized import pack_bits, unpack_bits
from malloc_bench.state.slots import take
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

_LARGEST = torch.finfo(torch.float16).max


class Over(Vectors):
    """Vectors over others, `base`, which are packed and loaded before them."""

    base: Vectors

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.base.shape

    def shared(self) -> tuple[Vectors, ...]:
        return (*self.base.shared(), self.base)

    def over(self, shared: tuple[Vectors, ...]) -> Vectors:
        return replace(self, base=shared[-1])  # type: ignore[type-var]

    def flops(self, queries: int) -> int:
        return super().flops(queries) + self.dense_flops()

    def dense_flops(self) -> int:
        return self.base.dense_flops()


def under(vectors: Vectors, kind: type[Over]) -> Vectors:
    """What lies under vectors of a kind; others as they are."""
    return vectors.base if isinstance(vectors, kind) else vectors


@dataclass(frozen=True, eq=False)
class Intact(Over):
    """`base`, but for the slots that `marks` names, which are `rows` in their order.

    marks: [B, H, ceil(S / 8), 1] uint8, a bit a slot. rows: [B, H, P, D] float16.
    """

    base: Vectors
    marks: Tensor
    rows: Tensor

    def dense(self) -> Tensor:
        x = self.base.dense()
        if not self.rows.shape[2] or not x.shape[2]:
            return x
        named = unpack_bits(self.marks[..., 0], 1, x.shape[2]).long()
        row = (named.cumsum(-1) - 1).clamp(0, self.rows.shape[2] - 1)
        return torch.where(named.bool().unsqueeze(-1), take(self.rows, row).to(x.dtype), x)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        count = torch.full((1, 1), self.shape[2], device=self.marks.device) if count is None else count
        yield Ragged(self.marks, (count + 7) // 8, None, "index")
        yield Ragged(self.rows, _named(self.marks, count))

    def load(self, read: Read, count: Tensor | None) -> Intact:
        count = torch.full((1, 1), self.base.shape[2], device=self.marks.device) if count is None else count
        marks = read(self.marks, (count + 7) // 8)
        return replace(self, marks=marks, rows=read(self.rows, _named(marks, count)))


def _named(marks: Tensor, count: Tensor) -> Tensor:
    """How many of the first count [B or 1, H or 1] slots are marked, [B, H]."""
    bits = unpack_bits(marks[..., 0], 1, 8 * marks.shape[2])
    return bits.masked_fill(torch.arange(bits.shape[2], device=bits.device) >= count.unsqueeze(-1), 0).sum(-1)


def intact(base: Vectors, x: Tensor, mask: Tensor) -> Intact:
    """`base`, with the rows of x [B, H, S, D] where mask [B, H, S] says so in 16-bit floats."""
    b, h, s = mask.shape
    size = int(mask.sum(-1).max()) if mask.numel() else 0
    index = torch.zeros(b, h, size + 1, dtype=torch.long, device=x.device)
    place = torch.where(mask, mask.cumsum(-1) - 1, size)
    index.scatter_(2, place, torch.arange(s, device=x.device).expand(b, h, s))
    rows = take(x, index[..., :size]) if size else x[:, :, :0]
    return Intact(base, pack_bits(mask.byte(), 1).unsqueeze(-1), rows.clamp(-_LARGEST, _LARGEST).half())


@dataclass(frozen=True, eq=False)
class Outliers(Over):
    """`base`, but for one number in every run of `every`, slot after slot, which is as in `numbers`.

    at: [B, H, P, 1] uint8, which of its run. numbers: [B, H, P, 1] float16. P = ceil(S D / every), every <= 256.
    """

    base: Vectors
    at: Tensor
    numbers: Tensor
    every: int

    def dense(self) -> Tensor:
        x = self.base.dense()
        b, h, s, d = x.shape
        runs = self.at.shape[2]
        where = self.every * torch.arange(runs, device=x.device) + self.at[..., 0].long()
        flat = F.pad(x.flatten(2), (0, 1))  # numbers of padding go where they are cut off
        return flat.scatter(2, where.clamp(max=s * d), self.numbers[..., 0].to(x.dtype))[..., :-1].view(b, h, s, d)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.at, self._runs(count), None, "index")
        yield Ragged(self.numbers, self._runs(count))

    def load(self, read: Read, count: Tensor | None) -> Outliers:
        at = read(self.at, self._runs(count))
        return replace(self, at=at, numbers=read(self.numbers, self._runs(count)))

    def _runs(self, count: Tensor | None) -> Tensor:
        if count is None:
            return all_rows(self.at)
        return (count.long() * self.shape[3] + self.every - 1) // self.every


def outliers(x: Tensor, odd: Tensor, mask: Tensor, every: int) -> tuple[Tensor, Tensor, Tensor]:
    """The oddest number of each run of `every` of x [B, H, S, D]: which of its run [B, H, P, 1] uint8, the number in
    float16, and where these are, [B, H, S, D] bool. odd: as x, higher is odder; mask: [B, H or 1, S]."""
    b, h, s, d = x.shape
    flat = odd.masked_fill(~mask.unsqueeze(-1), -1.0).flatten(2)
    runs = F.pad(flat, (0, -flat.shape[2] % every), value=-2.0).unflatten(2, (-1, every))
    at = runs.argmax(-1)
    where = every * torch.arange(at.shape[2], device=x.device) + at
    numbers = x.flatten(2).gather(2, where)
    found = torch.zeros(b, h, s * d, dtype=torch.bool, device=x.device).scatter_(2, where, True)
    narrow = numbers.clamp(-_LARGEST, _LARGEST).half()
    return at.byte().unsqueeze(-1), narrow.unsqueeze(-1), found.view(b, h, s, d) & mask.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Sum(Over):
    """base + rest: an approximation, and one of what it leaves; each is read in its own way."""

    base: Vectors
    rest: Vectors

    def shared(self) -> tuple[Vectors, ...]:
        return (*self.base.shared(), self.base, *self.rest.shared(), self.rest)

    def over(self, shared: tuple[Vectors, ...]) -> Sum:
        return replace(self, base=shared[len(self.base.shared())], rest=shared[-1])

    def dense(self) -> Tensor:
        return self.base.dense() + self.rest.dense()

    def dot(self, q: Tensor) -> Tensor:
        return self.base.dot(q) + self.rest.dot(q)

    def mix(self, w: Tensor) -> Tensor:
        return self.base.mix(w) + self.rest.mix(w)

    def flops(self, queries: int) -> int:
        return self.base.flops(queries) + self.rest.flops(queries)

    def dense_flops(self) -> int:
        return self.base.dense_flops() + self.rest.dense_flops()

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield from ()

    def load(self, read: Read, count: Tensor | None) -> Sum:
        return self
