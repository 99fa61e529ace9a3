"""What a compressor gets to see: the full state of a batch of users and the attention statistics it asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from malloc_bench.state.observed import Lazy, Observed, Rows, check, check_users, softmax_rows
from malloc_bench.state.slots import Slots
from malloc_bench.state.user_state import Events, Segment, UserState, map_tensors
from malloc_bench.state.vectors import Dense

T = TypeVar("T")


@dataclass(frozen=True)
class Stats:
    """Attention statistics a method needs; ask for the union of several with `|`.

    column_sum: total |weight| that each slot received from the history's own queries.
    window: weights of the newest `window` queries of the history over all slots, one row each.
    """

    column_sum: bool = False
    window: int = 0

    def __or__(self, other: Stats) -> Stats:
        return Stats(self.column_sum or other.column_sum, max(self.window, other.window))


class MissingStatistic(ValueError):
    """A compressor asked a Prefill for attention statistics that nobody gathered."""


@dataclass(frozen=True, eq=False)
class Prefill:
    """The full state of B users, who they are, and what was observed while it was made.

    state: one dense segment a layer.
    users: [B] int64 ids, stable between runs: what is random hashes them.
    column_sum: a layer each, [B, H, S]: sum over the history's queries of the |attention weight| on each slot
        (mean over the query heads that share a kv-head). Softmax weights are their own absolute values.
    window: a layer each, [B, H, W, S]: signed weights of the newest W queries, oldest first; rows of users with fewer
        than W events start with zeros. Where query heads share a kv-head: the mean of their absolute values. Both
        statistics are 0 on slots that a user does not have.
    seed: the cell's seed.
    uses_positions: the backbone's `read` needs the positions of slots, so a method that skips events must store them.
    uses_kinds: the backbone reads `Events.kinds`, so raw events that it is rebuilt from must store them.
    stacks: the layers are this many stacks of equal depth, each over slots of its own (Climber's blocks).
    whole: [B] bytes that budgets are fractions of; None: those of `state`. Behind a structural compressor they are the
        bytes of the full state that the un-adapted backbone makes.
    """

    state: UserState
    users: Tensor
    events: Events | None = None
    column_sum: Sequence[Tensor] | None = None
    window: Sequence[Tensor] | None = None
    seed: int = 0
    uses_positions: bool = False
    uses_kinds: bool = False
    stacks: int = 1
    whole: Tensor | None = None
    memo: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def layers(self) -> range:
        return range(len(self.state.layers))

    def apart(self) -> tuple[Prefill, ...]:
        """Each stack by itself, with its share of the statistics."""
        if self.stacks == 1:
            return (self,)
        depth = len(self.layers) // self.stacks
        views = []
        for first in range(0, len(self.layers), depth):
            part = slice(first, first + depth)
            state = UserState(self.state.layers[part], self.state.length)
            sums = None if self.column_sum is None else self.column_sum[part]
            window = None if self.window is None else self.window[part]
            views.append(replace(self, state=state, column_sum=sums, window=window, stacks=1, memo={}))
        return tuple(views)

    def segment(self, layer: int) -> Segment:
        """The only segment of a layer."""
        (segment,) = self.state.layers[layer]
        return segment

    def slots(self, layer: int) -> Slots:
        slots = self.segment(layer).slots
        assert slots is not None, "a full state has slots"
        return slots

    def rows(self, layer: int) -> Tensor:
        """How many rows each user's vectors have in a layer, slots or those of a memory: [B] int64."""
        segment, length = self.segment(layer), self.state.length.long()
        return torch.full_like(length, segment.width) if segment.slots is None else segment.slots.count[:, 0].long()

    def keys(self, layer: int) -> Tensor:
        """[B, H, S, D]"""
        return self.segment(layer).fields["keys"].dense()

    def values(self, layer: int) -> Tensor:
        """[B, H, S, D]"""
        return self.segment(layer).fields["values"].dense()

    def mask(self, layer: int) -> Tensor:
        """True where a slot is real, [B, H or 1, S]."""
        return self.slots(layer).mask(self.segment(layer).width)

    def attention_received(self, layer: int) -> Tensor:
        """`column_sum` of a layer, [B, H, S]; raises MissingStatistic."""
        if self.column_sum is None:
            raise MissingStatistic(
                "needs = Stats(column_sum=True) is missing on the compressor, or it is not first in a chain"
            )
        return self.column_sum[layer]

    def newest_attention(self, layer: int, window: int) -> Tensor:
        """Weights of the newest `window` queries, [B, H, min(window, W), S]; raises MissingStatistic."""
        if self.window is None:
            raise MissingStatistic(
                f"needs = Stats(window={window}) is missing on the compressor, or it is not first in a chain"
            )
        if isinstance(self.window, Lazy):
            return self.window.newest(layer, min(window, self.segment(layer).width))
        rows, slots = self.window[layer].shape[2:]
        if rows < min(window, slots):
            raise MissingStatistic(f"the newest {window} queries are asked for, only {rows} were observed")
        return self.window[layer][:, :, -window:]

    def full_bytes(self) -> Tensor:
        """[B] int64: what a budget of 1 comes to."""
        return self.remember("full bytes", self.state.nbytes) if self.whole is None else self.whole

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """make() once per Prefill and key, so that one score serves every budget."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def take(self, users: Tensor) -> Prefill:
        """The given rows of the batch, users [B'] int64; nothing is remembered of the others."""
        sums, window = (None if x is None else list(x) for x in (self.column_sum, self.window))
        whole = replace(self, column_sum=sums, window=window, memo={})
        return map_tensors(lambda x: x.index_select(0, users.to(x.device)), whole)

    def over(self, state: UserState) -> Prefill:
        """The same users with the state that an earlier link of a chain has made: no statistics."""
        return replace(self, state=state, column_sum=None, window=None, memo={})

    @staticmethod
    def from_tensors(
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        queries: Sequence[Tensor] | None = None,
        attention: Sequence[Tensor] | Rows | None = None,
        lengths: Tensor | None = None,
        users: Tensor | None = None,
        positions: bool = False,
        seed: int = 0,
    ) -> Prefill:
        """A Prefill of plain tensors, so that any compressor can be tried without a backbone.

        Args, one entry a layer: keys [B, H, S, D], values [B, H, S, D'], any floating point dtype, on any one device;
        queries [B, Hq, S, D], Hq a multiple of H (causal softmax attention is computed from them) or attention
        [B, Hq, S, S] (row = query), or a function (layer, first, last) -> the rows [B, Hq, last - first, S] of the
        queries first ... last - 1. lengths [B] int, default S; users [B] int. positions: slots must know theirs.
        Statistics are worked out block by block when a method asks for them. Budgets are shares of the bytes in the
        dtype given. Raises ValueError that names the argument and what was expected.
        """
        check("keys", keys, keys, "D")
        check("values", values, keys, "D'")
        (b, _, s, _), device = keys[0].shape, keys[0].device
        if lengths is not None:
            check_users("lengths", lengths, b, s)
        if users is not None:
            check_users("users", users, b)
        if queries is not None:
            check("queries", queries, keys, "D")
        if attention is not None and not callable(attention):
            check("attention", attention, keys, "S")
        count = (torch.full((b,), s) if lengths is None else lengths).to(device, torch.int32)
        rows: Rows | None = None
        if callable(attention):
            rows = attention
        elif attention is not None:
            maps = attention
            rows = lambda layer, first, last: maps[layer][:, :, first:last]  # noqa: E731
        elif queries is not None:
            rows = softmax_rows(keys, queries)
        seen = None if rows is None else Observed(rows, count, s, tuple(k.shape[1] for k in keys))
        column_sum, window = (None, None) if seen is None else (Lazy(seen), Lazy(seen, all_rows=True))
        slots = Slots(count[:, None])
        layers = tuple((Segment({"keys": Dense(k), "values": Dense(v)}, slots),) for k, v in zip(keys, values))
        ids = torch.arange(b, device=device) if users is None else users.to(device)
        return Prefill(UserState(layers, count), ids, None, column_sum, window, seed, positions)
