"""How large a state may be and what it takes: budgets, layouts of bytes, and the search for the largest that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from malloc_bench.registry import clipped
from malloc_bench.state import Prefill

MOST_TIMES, MOST_BYTES = 1_000_000, 1 << 50  # what is made of them stays within 64 bits
COUNT_BYTES = 4  # one int32: the length of a history, or the count of a set of slots


@dataclass(frozen=True)
class Budget:
    """The target size of a state: a fraction of the user's own full bytes, or `slots` or `bytes` per user.

    Full bytes are those of the state in its own dtype: float32 behind a backbone.
    """

    fraction: float | None = None
    slots: int | None = None
    bytes: int | None = None

    @staticmethod
    def parse(value: Any) -> Budget:
        """From 0.25, {slots: 16} or {bytes: 4096}. Raises ValueError that says what was expected."""
        if isinstance(value, Budget):
            return value
        if _within(value, Real, MOST_TIMES):
            return Budget(fraction=float(value))
        if isinstance(value, Mapping) and len(value) == 1:
            ((unit, size),) = value.items()
            if unit in ("slots", "bytes") and _within(size, Integral, MOST_BYTES):
                return Budget(**{unit: int(size)})
        sizes = (value, *(value.values() if isinstance(value, Mapping) else ()))
        large = any(_within(x, Real, inf) and x > MOST_TIMES and x != inf for x in sizes)
        most = f"; the largest are {MOST_TIMES:,}, and 2^50 slots or bytes" if large else ""
        raise ValueError(
            f"a budget is a fraction above 0, {{slots: N}} or {{bytes: N}}, not {clipped(repr(value))}{most}"
        )

    def value(self) -> float | dict[str, int]:
        """As `parse` takes it."""
        if self.fraction is not None:
            return self.fraction
        return {"slots": self.slots} if self.slots is not None else {"bytes": self.bytes or 0}

    def target(self, full: Tensor) -> Tensor | None:
        """Bytes [B] that a state may take, from the full state's bytes [B]; None where slots are budgeted."""
        if self.slots is not None:
            return None
        if self.bytes is not None:
            return torch.full_like(full, self.bytes)
        assert self.fraction is not None
        return (full.double() * self.fraction).floor().long()


def _within(value: Any, kind: type[Any], most: float) -> bool:
    """Whether it is such a number, numpy's too, above 0."""
    return isinstance(value, kind) and not isinstance(value, bool) and bool(0 < value <= most)


@dataclass(frozen=True)
class Layout:
    """What n slots take, in bytes per user, beside how their vectors are encoded.

    counts: stored counts, one for each distinct set of slots. lists: how many lists of slots the method tells apart: 1,
    or one for each layer or head. positions, mass, times: how many lists of them are stored; positions and mass are
    not where every event has its own slot. vectors: (field, heads, width) of every layer. number: bytes of one number
    of a dense vector. score: lists of numbers that are carried along for later updates. index: bytes of one position or
    mass, and moment: of one time. fixed: bytes of memories beside the slots.
    """

    counts: int
    lists: int
    positions: int
    mass: int
    times: int
    vectors: tuple[tuple[str, int, int], ...]
    number: int = 4
    score: int = 0
    index: int = 4
    fixed: int = 0
    moment: int = 8

    def beside(self, n: Tensor, length: Tensor) -> Tensor:
        """Bytes [B] of everything but the vectors."""
        index = self.index * (self.positions + self.mass)
        every = n * (self.moment * self.times + 4 * self.score)
        return COUNT_BYTES * (1 + self.counts) + self.fixed + every + torch.where(n < length, n * index, 0)

    def then(self, later: Layout) -> Layout:
        """Of a chain: what one link tells apart or writes down stays told apart and written down."""
        counts = max(self.counts, later.counts)
        return replace(
            self,
            counts=counts,
            lists=max(self.lists, later.lists),
            positions=max(self.positions, later.positions),
            mass=max(self.mass, later.lists) if self.mass else later.mass and max(later.mass, counts),
            times=max(self.times, later.times),
            score=later.score,
            fixed=later.fixed,
        )

    def dense(self, n: Tensor, length: Tensor) -> Tensor:
        """Bytes [B] with dense vectors."""
        return self.beside(n, length) + n * sum(self.number * heads * width for _, heads, width in self.vectors)


def dense_layout(
    prefill: Prefill, per: Literal["state", "layer", "head"], mass: bool = False, consecutive: bool = False
) -> Layout:
    """The layout of one stack's kept slots, the same in the whole state or each layer's or head's own.

    A memory has nothing beside its vectors.
    """
    vectors: list[tuple[str, int, int]] = []
    for layer in prefill.layers:
        vectors += [(name, v.shape[1], v.shape[3]) for name, v in prefill.segment(layer).fields.items()]
    heads = [next(iter(prefill.segment(layer).fields.values())).shape[1] for layer in prefill.layers]
    counts = 1 if per == "state" else len(heads)
    lists = {"state": 1, "layer": len(heads), "head": sum(heads)}[per]
    number = next((v.dense().element_size() for v in prefill.segment(0).fields.values()), 4)
    old = prefill.segment(0).slots
    if old is None:
        return Layout(0, 0, 0, 0, 0, tuple(vectors), number)
    implied, times = consecutive and old.positions is None, old.timestamps is not None
    mass = mass or old.mass is not None  # of an earlier compression that is gone on with
    positions = prefill.uses_positions and not implied
    return Layout(counts, lists, lists * positions, lists * mass, lists * times, tuple(vectors), number)


def slots_within(target: Tensor, length: Tensor, cost: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest n [B] <= length whose cost(n) [B] is within target [B]; at least one slot where there is an event.

    cost must rise with n below length; at n = length it may drop (a complete list of positions is not stored).
    """
    length = length.long()
    low, high = length.clamp(max=1), (length - 1).clamp(min=1).minimum(length)
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        fits = cost(middle) <= target
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return torch.where(cost(length) <= target, length, low)
