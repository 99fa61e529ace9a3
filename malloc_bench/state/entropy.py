"""Ids of events in as few bytes as their popularity allows: range asymmetric numeral systems (Duda, arXiv 1311.2540).

An id of probability p takes log2(1 / p) bits; a user's ids are one number, written down byte by byte. All users step at
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from malloc_bench.state.packing import Reader
from malloc_bench.state.user_state import Events
from malloc_bench.state.vectors import Ragged

_BITS = 24  # of a frequency: catalogues below 2^24
_LOW = 1 << 31  # a state lies in _LOW .. 256 _LOW - 1
_STATE = 5  # bytes of one


class ItemFrequencies:
    """Of id i + 1, from counts [n] of anything not negative: whole numbers >= 1, none above 2^23, so that no id takes
    less than a bit; what they lack to 2^24 goes to one id more, which nobody has. A plain class."""

    def __init__(self, counts: Tensor) -> None:
        share = counts.double().cpu().clamp(min=0)
        free = (1 << _BITS - 1) - len(share)
        if free < 0 or not len(share):
            raise ValueError(f"ids are coded of 1 to {1 << _BITS - 1} items, not {len(share)}")
        share = share / share.sum().clamp(min=1e-30)
        share = torch.minimum(share * ((1 << _BITS) - 2 * len(share)), torch.tensor(float(free)))
        freq = 1 + share.floor().long()
        freq = torch.cat([freq, (1 << _BITS) - freq.sum()[None]])
        self.freq, self.start = freq, freq.cumsum(0) - freq

    def encode(self, items: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Of items [B, S] from 1 the first count [B] as bytes [B, L] uint8, of which each user has size [B] int32."""
        ids, n = (items.long().cpu() - 1).clamp(0, len(self.freq) - 2), count.long().cpu()
        b, s = ids.shape
        most = _STATE + (_BITS // 8 + 1) * s
        out, at = torch.zeros(b, most + 1, dtype=torch.uint8), torch.zeros(b, dtype=torch.long)
        x = torch.full((b,), _LOW)

        def emit(which: Tensor) -> None:
            nonlocal x, at
            out.scatter_(1, torch.where(which, at, most)[:, None], (x & 255).byte()[:, None])
            x, at = torch.where(which, x >> 8, x), at + which

        for step in reversed(range(s)):
            freq, start, real = self.freq[ids[:, step]], self.start[ids[:, step]], step < n
            while bool((wide := real & (x >= freq * (_LOW >> _BITS << 8))).any()):
                emit(wide)
            x = torch.where(real, (x // freq << _BITS) + x % freq + start, x)
        for _ in range(_STATE):
            emit(n > 0)
        last = at[:, None] - 1 - torch.arange(int(at.max()) if b else 0)  # what was written last is read first
        return out.gather(1, last.clamp(min=0)).to(items.device), at.int().to(items.device)

    def decode(self, code: Tensor, size: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, S] int32, and who [B] has bytes that `encode` could not have written."""
        code, size, n = code.cpu(), size.long().cpu(), count.long().cpu()
        code = torch.cat([code, torch.zeros(len(code), 1, dtype=torch.uint8)], 1)
        s = int(n.max()) if len(n) else 0
        x, at = torch.zeros(len(n), dtype=torch.long), torch.zeros(len(n), dtype=torch.long)

        def take(which: Tensor) -> None:
            nonlocal x, at
            which = which & (at < size)
            byte = code.gather(1, at.clamp(max=code.shape[1] - 1)[:, None])[:, 0].long()
            x, at = torch.where(which, x << 8 | byte, x), at + which

        for _ in range(_STATE):
            take(n > 0)
        items = torch.zeros(len(n), s, dtype=torch.int32)
        wrong = (n > 0) & (x < _LOW)
        for step in range(s):
            real, slot = step < n, x & ((1 << _BITS) - 1)
            found = torch.searchsorted(self.start, slot, right=True) - 1
            items[:, step] = torch.where(real, found + 1, 0).int()
            wrong = wrong | (real & (found == len(self.freq) - 1))
            x = torch.where(real, self.freq[found] * (x >> _BITS) + slot - self.start[found], x)
            while bool((short := real & (x < _LOW) & (at < size)).any()):
                take(short)
        wrong = wrong | ((n > 0) & (x != _LOW)) | (at != size)
        return items.to(count.device), wrong.to(count.device)


@dataclass(frozen=True, eq=False)
class CodedEvents(Events):
    """Events whose ids are stored as `code` [B, L] uint8, of which each user has `size` [B] int32 bytes."""

    code: Tensor | None = None
    size: Tensor | None = None
    table: ItemFrequencies | None = None

    @staticmethod
    def of(events: Events, table: ItemFrequencies) -> CodedEvents:
        code, size = table.encode(events.items, events.count)
        return CodedEvents(events.items, events.count, events.times, None, events.kinds, code, size, table)

    def then(self, new: Events) -> CodedEvents:
        assert self.table is not None
        return CodedEvents.of(super().then(new), self.table)

    def stored(self) -> dict[str, Tensor]:
        return {name: x for name, x in super().stored().items() if name != "items"}

    def parts(self, length: Tensor) -> Iterator[Ragged]:
        assert self.code is not None and self.size is not None
        one = torch.ones(len(length), 1, dtype=torch.long, device=length.device)
        yield Ragged(self.size[:, None, None, None], one, None, "ids sizes")
        yield Ragged(self.code[:, None, :, None], self.size[:, None], None, "ids")
        yield from super().parts(length)

    def load(self, read: Reader, length: Tensor) -> CodedEvents:
        assert self.code is not None and self.size is not None and self.table is not None
        size = read.numbers(self.size[:, None], torch.iinfo(torch.int32).max, "has ids of negative size")
        code = read(self.code[:, None, :, None], size)[:, 0, :, 0]
        read.refuse(length[:, None] > 8 * size.long(), "has more ids than bits")
        items, wrong = self.table.decode(code, size[:, 0], length)
        read.refuse(wrong[:, None], "has ids that were never coded")
        events: Any = super().load(read, length)
        return replace(events, items=items, code=code, size=size[:, 0])
