"""Codebooks from training users' vectors, and what methods share that write vectors as numbers of entries."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, Sources, map_layers
from malloc_bench.compressors.sizing import Budget, Layout
from malloc_bench.state import (
    Codebook,
    Fitted,
    FromCodebook,
    Prefill,
    Sample,
    Scaled,
    Segment,
    UserState,
    Vectors,
    closest,
    grouped,
)
from malloc_bench.state.sample import EACH


class Codebooks(Encoder):
    """Codes of `bits` bits into codebooks of each layer, field and head, fitted to training users' full states.

    A subclass makes the tables and says how many codes a vector takes. added: a vector is the sum of its entries; each:
    how many vectors of a training user, layer and field it learns of.
    """

    bits: int
    each: ClassVar[int] = EACH
    added: ClassVar[bool] = False

    @abstractmethod
    def tables(self, x: Tensor) -> Tensor:
        """[H, M, 2^bits, w] from vectors [H, N, D]."""

    @abstractmethod
    def codes(self, width: int) -> int:
        """M, of a vector so wide."""

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        return Fitted({f"{layer}.{field}": self.tables(x) for (layer, field), x in sample.some(self.each).items()})

    def write(self, prefill: Prefill) -> UserState:
        assert prefill.fitted is not None
        fitted = prefill.fitted

        def vectors(layer: int, field: str, segment: Segment) -> Vectors:
            if isinstance(known := segment.fields[field], FromCodebook | Scaled):
                return known  # keys that fitted values were rounded for
            x = known.dense()
            return self.written(
                x, segment.real(x), Codebook(fitted.of(layer, field), self.bits, x.shape[3], self.added)
            )

        return map_layers(prefill.state, vectors)

    def written(self, x: Tensor, mask: Tensor, book: Codebook) -> Vectors:
        """x [B, H, S, D] in the codes of a book; mask [B, H or 1, S]."""
        return FromCodebook.of(x, mask, book)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        slot = sum(heads * -(-self.codes(width) * self.bits // 8) for _, heads, width in layout.vectors)
        return layout.beside(n, length) + n * slot

    def flops(self, state: UserState, of: Sources) -> int:
        """Each part of each vector, or all of it in each stage, against each entry."""
        shapes = (v.shape for segment in state.segments() for v in segment.fields.values())
        return sum(2 * h * s * self.codes(d) * self.part(d) * 2**self.bits for _, h, s, d in shapes)

    def part(self, width: int) -> int:
        """Channels of an entry."""
        return width


def entries(x: Tensor, count: int, rounds: int = 10, start: Tensor | None = None) -> Tensor:
    """[H, count, w]: Lloyd's k-means over x [H, N, w] from `start`, or `count` rows drawn by lot, the same for the
    same x.

    Entries that nothing is nearest to stay where they were; where there are fewer rows than entries, some are alike.
    """
    heads, rows, width = x.shape
    if not rows:
        return x.new_zeros(heads, count, width)
    lot = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(x.device)
    found = x[:, lot[torch.arange(count, device=x.device) % rows]] if start is None else start
    for _ in range(rounds):
        near = closest(x, found)  # [H, N]
        total, size = (grouped(each[None], near[None], count)[0] for each in (x, torch.ones_like(x[..., :1])))
        found = torch.where(size > 0, total / size.clamp(min=1), found)
    return found
