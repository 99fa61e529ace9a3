"""Activation Beacon: after each chunk of events one learned token stays, the events go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from malloc_bench.backbones.attention import fill
from malloc_bench.backbones.block import Places, each_stores
from malloc_bench.backbones.probing import probe_flops
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import layers, swap
from malloc_bench.compressors.trimmed import COLUMNS, NEVER, Banded, Trimmed, refusal, trimmed
from malloc_bench.registry import register
from malloc_bench.state import Events, Prefill, Segment, Slots, Stats, UserState, joined
from malloc_bench.state.extend import grow

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class Marked(Places):
    """beacon: [S] bool, which of the slots are one; `chunk` events come before each."""

    beacon: Tensor
    chunk: int

    def rows(self, part: slice | Tensor) -> Marked:
        plain = super().rows(part)
        return Marked(positions=plain.positions, times=plain.times, beacon=self.beacon[part], chunk=self.chunk)


class BeaconBlock(Banded):
    """A token sees the beacons before it and the events of its own chunk; of a state, which has no others, all."""

    chunk: int

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        found = super().logits(q, segment, queries, slots)
        if not isinstance(slots, Marked):
            return found
        apart = queries.positions.unsqueeze(-1) // self.chunk != slots.positions.unsqueeze(-2) // self.chunk
        return found.masked_fill(apart & ~slots.beacon, NEVER)

    def bands(self, slots: int) -> list[tuple[slice, Tensor]]:
        found, line = [], self.chunk + 1
        step = max(1, 64 // line) * line
        for start in range(0, max(slots, 1), step):
            stop = min(start + step, slots)
            index = torch.cat([torch.arange(start)[self.chunk :: line], torch.arange(start, stop)])
            found.append((slice(start, stop), index))
        return found


class BeaconBackbone(Trimmed):
    """Comes before a backbone's own class; its line of tokens is the events with a beacon, item -1, after a chunk."""

    chunk: int
    beacon: nn.Parameter

    def line(self, events: Events) -> tuple[Events, Tensor, Tensor]:
        """Events [B, S] with their beacons, which of the tokens [S'] are one, and their positions [1, S'].

        A beacon stands where the last event of its chunk does, and when.
        """
        tokens = torch.arange(_tokens(events.items.shape[1], self.chunk), device=events.items.device)
        place = tokens % (self.chunk + 1)
        at, beacon = tokens // (self.chunk + 1) * self.chunk + place.clamp(max=self.chunk - 1), place == self.chunk
        made = events.take(at.expand(len(events.count), -1), events.count + events.count // self.chunk)
        return replace(made, items=made.items.masked_fill(beacon, -1)), beacon, at[None]

    def _embed(self, events: Events, positions: Tensor) -> Tensor:
        x = super()._embed(replace(events, items=events.items.clamp(min=0)), positions)  # type: ignore[safe-super]
        return x + (events.items < 0).unsqueeze(-1) * self.beacon

    def _known_maps(self, stats: Stats) -> dict[str, Any]:
        found = super()._known_maps(stats)
        return {name: x for name, x in found.items() if name != "tables"}  # a beacon is no item

    def forward(self, events: Events) -> Tensor:
        tokens, beacon, at = self.line(events)
        places, asked = self._places(tokens, at)
        marked, x = (
            Marked(positions=places.positions, times=places.times, beacon=beacon, chunk=self.chunk),
            self._embed(tokens, at),
        )
        for block in self.blocks:
            q, own, gate = block.project(x)
            x = block.combine(x, block.causal(q, own, marked, asked), gate)
        return self._output(x[:, ~beacon])

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        self.admit(events)
        tokens, beacon, at = self.line(events)
        places, asked = self._places(tokens, at)
        marked = Marked(positions=places.positions, times=places.times, beacon=beacon, chunk=self.chunk)
        slots = Slots(tokens.count[:, None], at.int()[:, None].expand(len(tokens.count), -1, -1), places.times)
        full, seen = fill(self.blocks, self._embed(tokens, at), marked, asked, slots, stats)
        of_slots = {name: seen.pop(name) for name in COLUMNS.keys() & seen.keys()}
        begun = events.count[:, None, None] // self.chunk
        state, kept = trimmed(
            UserState(tuple(full), events.count),
            lambda _, places: beacon | (places // self.chunk == begun),
            [None] * len(full),
            of_slots,
        )
        ids = torch.arange(len(state)) if users is None else users
        return Prefill(state, ids, events, seed=seed, uses_positions=True, **seen, **kept, **self._known_maps(stats))

    def append(self, state: UserState, events: Events) -> UserState:
        """Chunk by chunk: events see the state and one another, then the beacon of a chunk sees it and takes over."""
        done = torch.zeros_like(events.count)
        while True:
            now = (events.count - done).minimum(self.chunk - state.length % self.chunk)
            index = done[:, None].long() + torch.arange(int(now.max()) if len(now) else 0, device=now.device)
            part = events.take(index.clamp(max=max(events.items.shape[1] - 1, 0)), now)
            state, done = joined(super().append(state, part)), done + now  # type: ignore[safe-super]
            ended = (now > 0) & (state.length % self.chunk == 0)
            if bool(ended.any()):
                state = self._ended(state, part.last(ended), ended)
            if bool((done >= events.count).all()):
                return state

    def _grown(self, state: UserState, own: list[dict[str, Tensor]], events: Events, positions: Tensor) -> UserState:
        return super(Trimmed, self)._grown(state, own, events, positions)

    def _ended(self, state: UserState, last: Events, ended: Tensor) -> UserState:
        """The state with a beacon in the place of the newest chunk, of users [B] whose chunk has `ended` by `last`."""
        token = replace(last, items=torch.full_like(last.items, -1))
        at = (state.length.long() - 1).clamp(min=0)[:, None]
        itself = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=at.device)
        _, own = self._over(token, at, state, itself)
        goes, first = ended[:, None, None], (state.length - self.chunk)[:, None, None]
        state, _ = trimmed(state, lambda _, places: ~goes | (places < first), [None] * len(state.layers))
        times = token.times[:, None] if self.uses_times and token.times is not None else None
        tail = Slots(token.count[:, None], at.int()[:, None], times)
        return joined(UserState(grow(state.layers, own, tail), state.length))

    def watch(self, state: UserState, events: Events, grown: UserState, stats: Stats) -> dict[str, Any]:
        return {}  # a beacon took the place of what new events asked

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        line, c = _tokens(tokens, self.chunk), self.chunk
        if step == "prefill":
            return super().flops(step, line)
        if step == "statistics":
            probes = sum(
                probe_flops(b, e, tokens // c + tokens % c, stats)
                for b, e in each_stores(self.blocks, self.items.weight)
            )
            return super().flops(step, line, stats=replace(stats, probes=())) + probes
        if step == "read":
            raw = None if state is None else state.events
            if raw is None:
                return super().flops(step, tokens, state)
            left = int((raw.count // c + raw.count % c).max()) if len(raw.count) else 0
            over = sum(
                block.attend_flops(tokens, event) * left for block, event in each_stores(self.blocks, self.items.weight)
            )
            return super().flops(step, tokens) + self.flops("prefill", raw.items.shape[1]) + over
        total, widths = 0, [0] * len(self.blocks)
        length = 0 if state is None or not len(state) else int(state.length.max())
        while tokens:
            now = min(tokens, c - length % c)
            steps = [now, 1] if length % c + now == c else [now]  # the beacon
            total += sum(super(BeaconBackbone, self).flops("append", n, state) for n in steps)
            for i, (block, event) in enumerate(each_stores(self.blocks, self.items.weight)):
                held = 0 if state is None else sum(segment.width for segment in state.layers[i])
                seen = widths[i] * sum(steps) + (now if len(steps) > 1 else 0)
                total += block.attend_flops(1, event) * seen
                widths[i] += held + (now if len(steps) == 1 else 1 - length % c)
            tokens, length, state = tokens - now, length + now, None
        return total


def _tokens(events: int, chunk: int) -> int:
    return events + events // chunk


@register("beacon")
@dataclass(frozen=True)
class Beacon(Structural):
    """One learned token after each `chunk` events, whose keys and values stand for them after (Zhang et al., 2025).

    A beacon sees the beacons before it and its chunk's events; a token sees the beacons and the events of the chunk
    that has begun. From the paper: chunks, what sees what, training on the next item alone. Ours: one beacon a chunk,
    at its end, where the paper spreads 8 to 512 over 1,024 or 2,048 tokens; one chunk size, where it draws one; maps
    shared with the events, where beacons have copies of their own; a beacon stands where its last event does.
    """

    chunk: int = 8

    family = "merging"
    paper = "Activation Beacon, Zhang et al., ICLR 2025, arXiv 2401.03462"
    formula = "after event (a + 1) chunk - 1 a token b attends to beacons 0..a-1, the chunk's events and itself; keys "
    formula += "and values of b then take the place of the chunk's"
    growth = grows()
    stores = "keys, values and positions of a beacon for each whole chunk and of the events of the one begun"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 2:
            raise ValueError(f"beacon: chunk must be at least 2, not {self.chunk}")

    def supports(self, backbone: Backbone) -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: Backbone) -> None:
        table: Tensor = backbone.items.weight  # type: ignore[union-attr,assignment]
        for block in layers(backbone):
            vars(block).update(chunk=self.chunk)
            swap(block, BeaconBlock)
        vars(backbone).update(chunk=self.chunk)
        backbone.beacon = nn.Parameter(0.02 * table.shape[1] ** 0.5 * torch.randn_like(table[0]))  # as large as an item
        swap(backbone, BeaconBackbone)
        backbone.uses_positions, backbone.only_adds = True, False
