"""Numbers of entries of a codebook."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.kernels.switch import After, Loop, array, fits, spread
from malloc_bench.kernels.words import FEW

if TYPE_CHECKING:
    from malloc_bench.kernels.chosen import Ways

_NARROW = 16  # numbers of an entry that cost as much as one


class Entries(NamedTuple):
    """codes: [B, H, S, N] uint8; tables: [H, N, K, w]. added: x is the sum of its entries, w = width; else they stand
    side by side. A code that no entry has stands for the last."""

    codes: Tensor
    tables: Tensor
    width: int
    added: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.codes.shape
        return b, h, s, self.width

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.tables]

    def reader(self, queries: int) -> Numbered | None:
        known = self.codes.numel() and self.tables.dtype == torch.float32 and fits(self.codes, self.tables)
        return Numbered(self) if known else None


class Numbered(NamedTuple):
    """The loops over `Entries`: each is looked up, or, of many slots and wide entries, what each is worth is known
    before."""

    x: Entries

    @property
    def most(self) -> int:
        return FEW

    def _loops(self) -> Ways:
        from malloc_bench.kernels.chosen import loops  # here: its compiler takes half a second to load

        _, n, _, w = self.x.tables.shape
        return loops(n, w, self.x.width, int(self.x.added))

    def _known_before(self, heads: int) -> bool:
        h, _, entries, width = self.x.tables.shape
        return heads == h and width > _NARROW and self.x.codes.shape[2] > 2 * entries

    def dot(self, q: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> Loop:
        codes, tables = self.x.codes, self.x.tables
        if not self._known_before(heads):
            return partial(self._loops().dot, array(codes), array(tables), count, q, out, heads)
        from malloc_bench.kernels.passes import worth

        n, w = tables.shape[1], tables.shape[3]
        rows = torch.from_numpy(q).unflatten(0, (-1, heads)).transpose(0, 1).flatten(1, 2)  # [H, B x M, D]
        if self.x.added:
            parts = rows.unsqueeze(1)
        else:
            parts = F.pad(rows, (0, n * w - q.shape[2])).unflatten(2, (n, w)).transpose(1, 2)
        return partial(worth, array(codes), array(parts @ tables.mT), count, out, heads)  # [H, N, B x M, K]

    def mix(self, w: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> tuple[Loop, After]:
        codes, tables = self.x.codes, self.x.tables
        if not self._known_before(heads):
            return partial(self._loops().mix, array(codes), array(tables), count, w, out, heads), None
        from malloc_bench.kernels.passes import fallen

        each = torch.empty(*tables.shape[:2], w.shape[0] * w.shape[1] // heads, tables.shape[2])

        def after() -> None:
            found = each @ tables  # [H, N, B x M, w]
            found = found.sum(1) if self.x.added else found.transpose(1, 2).flatten(2)[..., : self.x.width]
            to = torch.from_numpy(out).unflatten(0, (-1, heads))
            to.add_(found.unflatten(1, (-1, out.shape[1])).transpose(0, 1))

        return partial(fallen, array(codes), w, count, each.numpy(), heads), after

    def rows(self, start: int, stop: int, room: Tensor) -> Tensor:
        _, _, s, d = self.x.shape
        out = room[: (stop - start) * s * d].view(stop - start, s, d)
        dense, given = self._loops().dense, (array(self.x.codes), array(self.x.tables), out.numpy(), start)
        spread(lambda first, last: dense(*given, start + first, start + last), stop - start, out.numel())
        return out
