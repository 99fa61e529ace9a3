"""The training users that a method may be fitted to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from malloc_bench.state.prefill import Prefill
from malloc_bench.state.slots import take

EACH = 16  # vectors of a user, layer, field and head that a codebook or basis sees


class Sample:
    """Prefills of training users, a chunk at a time: each pass makes them anew, so that no two need be held at once."""

    def __init__(self, make: Callable[[], Iterable[Prefill]]) -> None:
        self._make = make

    @staticmethod
    def of(prefills: Sample | Prefill | Iterable[Prefill]) -> Sample:
        """From one Prefill, such as `Prefill.from_tensors` makes, or several."""
        if isinstance(prefills, Sample):
            return prefills
        held = (prefills,) if isinstance(prefills, Prefill) else tuple(prefills)
        return Sample(lambda: held)

    def __iter__(self) -> Iterator[Prefill]:
        return iter(self._make())

    @cached_property
    def vectors(self) -> dict[tuple[int, str], Tensor]:
        """As `some` of `EACH`, made once."""
        return self.some(EACH)

    def some(self, each: int) -> dict[tuple[int, str], Tensor]:
        """(layer, field) -> [H, N, D], up to so many of each user, evenly spaced, in float32; one pass for all."""
        found: dict[tuple[int, str], list[Tensor]] = {}
        for prefill in self:
            for layer in prefill.layers:
                rows = prefill.rows(layer)
                want = torch.arange(each, device=rows.device)
                index = torch.where(rows[:, None] > each, (2 * want + 1) * rows[:, None] // (2 * each), want)  # [B, E]
                some = index < rows[:, None]
                for name, vectors in prefill.segment(layer).fields.items():
                    x = vectors.dense().float()
                    if x.shape[2]:
                        x = take(x, index.clamp(max=x.shape[2] - 1)[:, None].expand(-1, x.shape[1], -1))
                        found.setdefault((layer, name), []).append(x.transpose(1, 2)[some].transpose(0, 1))
        return {key: torch.cat(parts, 1) for key, parts in found.items()}
