"""What backbones that attend over per-event keys and values share: one pass that serves all four calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from malloc_bench.backbones.base import Backbone
from malloc_bench.backbones.losses import dropout, next_item_loss
from malloc_bench.state import Batch, Dense, Events, Layer, Prefill, Segment, Slots, Stats, UserState, extend

_BLOCK = 256  # queries at a time in the plain pass
_CELLS = 1 << 24  # weights at a time over a state: 64 MB


@dataclass(frozen=True)
class Places:
    """Where tokens or slots stand: positions [B, H or 1, S] and times [B, H or 1, S] (None without times)."""

    positions: Tensor
    times: Tensor | None

    def rows(self, part: slice) -> Places:
        return Places(self.positions[..., part], None if self.times is None else self.times[..., part])


class Block(nn.Module):
    """One layer: what is stored of an event, how a token weighs the slots, what becomes of the mixture.

    A structural compressor swaps this module for one of its own.
    """

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """x [B, M, d] -> queries [B, H, M, D], fields to store [B, H, M, D] each, and a gate for `combine`."""

    @abstractmethod
    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's output [B, M, d] from its input and the mixed values [B, H, M, D]."""

    @abstractmethod
    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        """Attention weights over several sources that are attended together; logits [B, H, M, S_i], 0 where masked."""

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        """[B, H, M, S] before masking; queries' times are those at which the prediction is asked for."""
        return segment.fields["keys"].dot(q)

    def mix(self, weights: Tensor, segment: Segment) -> Tensor:
        """[B, H, M, S] -> [B, H, M, D]"""
        return segment.fields["values"].mix(weights)

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        """Plain causal attention of a left-aligned batch onto itself, [B, H, S, D]; subclasses have faster ones."""
        return torch.cat([self.mix(w, part) for w, part, _ in self.causal_blocks(q, own, places, asked)], dim=2)

    def causal_blocks(
        self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places
    ) -> Iterator[tuple[Tensor, Segment, slice]]:
        """Weights of `_BLOCK` queries at a time over the keys they may see: (weights, segment of keys, query rows)."""
        b, _, s, _ = q.shape
        count = torch.full((b, 1), s, dtype=torch.int32, device=q.device)
        for start in range(0, max(s, 1), _BLOCK):
            rows = slice(start, min(start + _BLOCK, s))
            part = Segment({k: Dense(v[:, :, : rows.stop]) for k, v in own.items()}, Slots(count))
            keys = torch.arange(rows.stop, device=q.device)
            mask = (keys <= keys[rows, None])[None, None]  # left-aligned: no real query sees padding
            logits = self.logits(q[:, :, rows], part, asked.rows(rows), places.rows(slice(0, rows.stop)))
            (weights,) = self.weigh([logits], [mask], [None])
            yield weights, part, rows

    def linear_flops(self, tokens: int) -> int:
        """Of `project` and `combine`: each linear map sees each token once."""
        return 2 * tokens * sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))

    def attend_flops(self, queries: int, segment: Segment) -> int:
        """Of `logits` and `mix` over a segment, per user."""
        return sum(vectors.flops(queries) for vectors in segment.fields.values())

    def causal_pairs(self, slots: int) -> int:
        """Pairs of query and key that `causal` multiplies."""
        return _block_pairs(slots)


class AttentionBackbone(Backbone):
    """A stack of `Block`s over item and position embeddings, scored by cosine or dot product with the item table.

    Config fields used here: dim, layers, max_length, dropout, head ("cosine" or "dot"), temperature.
    """

    items: nn.Embedding
    positions: nn.Embedding
    config: Any
    blocks: Any  # an nn.ModuleList of `Block`s

    def _embed(self, events: Events, positions: Tensor) -> Tensor:
        x = self.items(events.items) * self.config.dim**0.5 + self.positions(positions.long())
        return dropout(x, self.config.dropout, self.training)

    @abstractmethod
    def _output(self, x: Tensor) -> Tensor:
        """The stack's output [B, M, d], ready to be multiplied with `catalogue`."""

    def _places(self, events: Events, positions: Tensor) -> tuple[Places, Places]:
        """Of the events as slots, and of the events as queries (with the time at which they are asked)."""
        if not self.uses_times:
            return Places(positions[:, None], None), Places(positions[:, None], None)
        if events.times is None or events.next_times is None:
            raise ValueError(f"this {self.name} was made for data with times: events need `times` and `next_times`")
        return Places(positions[:, None], events.times[:, None]), Places(positions[:, None], events.next_times[:, None])

    def forward(self, events: Events) -> Tensor:
        positions = torch.arange(events.items.shape[1], device=events.items.device)[None]
        places, asked = self._places(events, positions)
        x = self._embed(events, positions)
        for block in self.blocks:
            q, own, gate = block.project(x)
            x = block.combine(x, block.causal(q, own, places, asked), gate)
        return self._output(x)

    def loss(self, batch: Batch) -> Tensor:
        real = batch.targets > 0
        hidden = self(batch.events)[real]
        table = self.catalogue()
        scale = 1 / self.config.temperature if self.config.head == "cosine" else 1.0
        return next_item_loss(hidden * scale, table, batch.targets[real].long() - 1)

    def catalogue(self) -> Tensor:
        table = self.items.weight[1:]
        return nn.functional.normalize(table, dim=-1) if self.config.head == "cosine" else table

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        b, s = events.items.shape
        if s > self.max_length:
            raise ValueError(f"{self.name} keeps at most max_length={self.max_length} events, the history has {s}")
        positions = torch.arange(s, device=events.items.device)[None]
        places, asked = self._places(events, positions)
        slots = Slots(events.count[:, None], None, places.times)
        x = self._embed(events, positions)
        layers: list[Layer] = []
        sums: list[Tensor] = []
        windows: list[Tensor] = []
        for block in self.blocks:
            q, own, gate = block.project(x)
            if stats.column_sum:
                mixed, received = _observed(block, q, own, places, asked, events.mask())
                sums.append(received)
            else:
                mixed = block.causal(q, own, places, asked)
            if stats.window:
                windows.append(_newest(block, q, own, places, asked, events.count, stats.window))
            x = block.combine(x, mixed, gate)
            layers.append((Segment({k: Dense(v) for k, v in own.items()}, slots),))
        ids = torch.arange(b) if users is None else users
        state = UserState(tuple(layers), events.count)
        return Prefill(state, ids, events, sums or None, windows or None, seed, self.uses_positions)

    def read(self, tokens: Events, state: UserState) -> Tensor:
        if state.events is not None:  # raw events only: rebuild, then read
            state = self._rebuild(state, tokens)
        m = tokens.items.shape[1]
        alone = torch.eye(m, dtype=torch.bool, device=tokens.items.device)[None, None]
        positions = state.length.long()[:, None].expand(-1, m)
        return self._output(self._over(tokens, positions, state, alone)[0])

    def append(self, state: UserState, events: Events) -> UserState:
        if state.events is not None:
            raise ValueError("a state of raw events grows by its ids alone, not by append")
        m = events.items.shape[1]
        total = int((state.length + events.count).max()) if len(state) else 0
        if total > self.max_length:
            raise ValueError(f"{self.name} keeps at most max_length={self.max_length} events, appending makes {total}")
        behind = torch.ones(m, m, dtype=torch.bool, device=events.items.device).tril()[None, None]
        positions = state.length.long()[:, None] + torch.arange(m, device=events.items.device)
        _, own = self._over(events, positions.clamp(max=self.max_length), state, behind)  # padding may stand beyond
        return extend(state, own, events, self.uses_times)

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        raw = 0 if state is None or state.events is None else state.events.items.shape[1]  # rebuilt before a read
        total = self.flops("prefill", raw) if raw else 0
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            own = block.project(self.items.weight.new_zeros(1, 1, self.items.embedding_dim))[1]
            event = Segment({k: Dense(v) for k, v in own.items()}, None)  # what one token stores
            pair = block.attend_flops(1, event)
            if step == "statistics":
                total += 2 * own["keys"].shape[1] * _block_pairs(tokens) * stats.column_sum
                total += event.fields["keys"].flops(stats.window * tokens)
                continue
            total += block.linear_flops(tokens)
            total += pair * (block.causal_pairs(tokens) if step == "prefill" else tokens * (tokens + raw))
            if state is not None and state.layers:
                total += sum(block.attend_flops(tokens, segment) for segment in state.layers[i])
        return total

    def _rebuild(self, state: UserState, tokens: Events) -> UserState:
        events = state.events
        assert events is not None
        if events.times is not None and tokens.times is not None:
            following = torch.cat([events.times[:, 1:], events.times[:, :1]], dim=1)  # last column: set below
            last = (events.count.long() - 1).clamp(min=0)[:, None]
            if following.shape[1]:
                following = following.scatter(1, last, tokens.times[:, :1])
            events = Events(events.items, events.count, events.times, following)
        return self.prefill(events).state

    def _over(
        self, tokens: Events, positions: Tensor, state: UserState, own_mask: Tensor
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Tokens through every layer, each attending to the state and, by own_mask [1, 1, M, M], to one another."""
        places, asked = self._places(tokens, positions)
        x = self._embed(tokens, positions)
        stored: list[dict[str, Tensor]] = []
        for block, layer in zip(self.blocks, state.layers):
            q, own, gate = block.project(x)
            x = block.combine(x, _attend(block, q, own, own_mask, layer, state.length, places, asked), gate)
            stored.append(own)
        return x, stored


def _block_pairs(slots: int) -> int:
    """Pairs of query and key that `causal_blocks` multiplies."""
    ends = [min(start + _BLOCK, slots) for start in range(0, slots, _BLOCK)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends))


def _attend(
    block: Block,
    q: Tensor,
    own: dict[str, Tensor],
    own_mask: Tensor,
    layer: Layer,
    length: Tensor,
    places: Places,
    asked: Places,
) -> Tensor:
    """Attention of M tokens over a layer's segments and the tokens themselves, [B, H, M, D]; blocked over queries."""
    sources: list[tuple[Segment, Places]] = []
    end = length[:, None]
    for segment in reversed(layer):
        assert segment.slots is not None
        sources.insert(0, (segment, Places(segment.slots.places(segment.width, end), segment.slots.timestamps)))
        end = end - segment.slots.count
    b, h, m, _ = q.shape
    step = max(1, _CELLS // max(1, b * h * (m + sum(s.width for s, _ in sources))))
    mine = Segment({k: Dense(v) for k, v in own.items()}, None)
    out: list[Tensor] = []
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        logits = [block.logits(q[:, :, rows], s, asked.rows(rows), p) for s, p in sources]
        logits.append(block.logits(q[:, :, rows], mine, asked.rows(rows), places))
        masks = [s.slots.mask(s.width).unsqueeze(2) for s, _ in sources if s.slots]
        masses = [s.slots.mass for s, _ in sources if s.slots]
        weights = block.weigh(logits, [*masks, own_mask[:, :, rows]], [*masses, None])
        mixed = block.mix(weights[-1], mine)
        for w, (segment, _) in zip(weights, sources):
            mixed = mixed + block.mix(w, segment)
        out.append(mixed)
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)


def _observed(
    block: Block, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain causal attention with the sum of |weights| that each key received: ([B, H, S, D], [B, H, S])."""
    received = q.new_zeros(q.shape[:3])
    mixed: list[Tensor] = []
    for weights, part, rows in block.causal_blocks(q, own, places, asked):
        mixed.append(block.mix(weights, part))
        asks = real[:, None, None, rows].to(q.dtype)  # padding asks nothing
        received[:, :, : rows.stop] += (asks @ weights.abs()).squeeze(2)
    return torch.cat(mixed, dim=2), received


def _newest(
    block: Block, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places, count: Tensor, window: int
) -> Tensor:
    """Weights of each user's newest `window` queries, oldest first, [B, H, window, S]; zeros where there is no such."""
    b, h, s, d = q.shape
    if s == 0:
        return q.new_zeros(b, h, window, 0)
    at = count.long()[:, None] - window + torch.arange(window, device=q.device)  # [B, W]
    index = at.clamp(min=0)
    queries = q.gather(2, index[:, None, :, None].expand(-1, h, -1, d))
    times = None if asked.times is None else asked.times[:, 0].gather(1, index)[:, None]
    everything = Segment({k: Dense(v) for k, v in own.items()}, None)
    logits = block.logits(queries, everything, Places(index[:, None], times), places)
    mask = (torch.arange(s, device=q.device) <= at[..., None])[:, None]  # [B, 1, W, S]
    (weights,) = block.weigh([logits], [mask | (at < 0)[:, None, :, None]], [None])
    return weights * (at >= 0)[:, None, :, None]
