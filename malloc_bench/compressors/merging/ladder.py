"""Backbones that merge old tokens before the stack: level by level, one token for a run of those of the level below."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from malloc_bench.backbones.attention import AttentionBackbone, fill, over
from malloc_bench.backbones.block import Block, Places, each_stores
from malloc_bench.backbones.probing import probe_flops
from malloc_bench.compressors.heads.shared import layers, swap
from malloc_bench.compressors.trimmed import trimmed
from malloc_bench.state import (
    Dense,
    Events,
    Prefill,
    Segment,
    Slots,
    Stats,
    UserState,
    joined,
    map_tensors,
    take,
)
from malloc_bench.state.extend import grow

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

_ROWS, _EVER = 64, 1 << 40  # queries at a time; longer than any history


class Merger(nn.Module, ABC):
    """Runs of tokens [B, N, K, width], each what the first layer stores of it, to one input of the stack, [B, N, d]."""

    @abstractmethod
    def start(self, inverse: Tensor, bias: Tensor) -> None:
        """Begin as the mean of what came into the layer: inverse [d, width] and bias [d] take a row back to it."""

    @abstractmethod
    def flops(self, runs: int) -> int: ...


@dataclass(frozen=True)
class Rungs:
    """spans: events to a token of each level, 1 first, each a multiple of the one before. lags: a token is made so many
    events after its last one, 0 first, rising; those that it stands for are then forgotten."""

    spans: tuple[int, ...]
    lags: tuple[int, ...]

    def made(self, level: int, events: int) -> int:
        """Tokens of a level that have been made of a history, forgotten ones too."""
        return max(events - self.lags[level], 0) // self.spans[level]

    def tokens(self, events: int, below: int | None = None) -> int:
        """Slots of a state, or those of events before `below`."""
        first = [self.made(level, events) * span for level, span in enumerate(self.spans)]
        first = [n if below is None else min(n, below) for n in first]
        return sum((n - after) // span for n, after, span in zip(first, [*first[1:], 0], self.spans))


@dataclass(frozen=True)
class Plan:
    """All tokens ever made of a history, in the order in which they are: [T] each.

    place: in the tokens level by level. at: the last event of a token. since, until: lengths of the history at which it
    is a slot. merged: that it is no event. bands: some tokens, which may be seen by any of them [K], and by which.
    """

    place: Tensor
    at: Tensor
    since: Tensor
    until: Tensor
    merged: Tensor
    bands: tuple[tuple[slice, Tensor, Tensor], ...]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept may serve a training later
def plan(rungs: Rungs, events: int) -> Plan:
    """Of a history of so many events."""
    rows: list[tuple[int, ...]] = []
    for number, span in enumerate(rungs.spans):
        for b in range(rungs.made(number, events)):
            gone, end = _EVER, (b + 1) * span
            if number + 1 < len(rungs.spans):
                wide = rungs.spans[number + 1]
                gone = (b * span // wide + 1) * wide + rungs.lags[number + 1]
            rows.append((end + rungs.lags[number], number, end - 1, gone, len(rows)))
    rows.sort(key=lambda row: (row[0], row[1] > 0, -row[1]))  # an event, then what its coming merges, longest first
    since, level, at, until, place = torch.tensor(rows, dtype=torch.long).view(-1, 5).unbind(1)
    asks = torch.where(level > 0, since, at)  # the length of the history that a token sees
    seen = (since <= asks[:, None]) & (asks[:, None] < until) & (at < at[:, None])
    seen |= torch.eye(len(at), dtype=torch.bool)
    bands = []
    for start in range(0, max(len(at), 1), _ROWS):
        some = slice(start, min(start + _ROWS, len(at)))
        index = seen[some].any(0).nonzero()[:, 0]
        bands.append((some, index, seen[some][:, index]))
    return Plan(place, at, since, until, level > 0, tuple(bands))


@dataclass(frozen=True, kw_only=True)
class Line(Places):
    plan: Plan


class RungBlock(Block):
    """Comes before a block's own class: in the plain pass a token sees what was a slot when it came."""

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        assert isinstance(places, Line)
        mixed, where = [], Places(places.positions, places.times)
        for rows, index, seen in places.plan.bands:
            mask = seen[None, None]
            keys = Segment({k: Dense(v[:, :, index]) for k, v in own.items()}, None)
            logits = self.logits(q[:, :, rows], keys, asked.rows(rows), where.rows(index))
            mixed.append(self.mix(self.weigh([logits], [mask], [None])[0], keys))
        return torch.cat(mixed, dim=2)


class Ladder(AttentionBackbone):
    """Comes before a backbone's own class. Training, prefill and append see the same slots at the same time."""

    rungs: Rungs
    mergers: Any  # an nn.ModuleList of `Merger`s, one for each level but the first

    def forward(self, events: Events) -> Tensor:
        line, (x, places, asked) = self._line(events)
        for block in self.blocks:
            q, own, gate = block.project(x)
            x = block.combine(x, block.causal(q, own, places, asked), gate)
        return self._output(x[:, ~line.merged])

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        self.admit(events)
        line, (x, places, asked) = self._line(events)
        n = events.count[:, None]
        made, stays = line.since <= n, (line.since <= n) & (n < line.until)
        at = places.positions.int().expand(len(n), -1, -1)
        slots = Slots(made.sum(1, keepdim=True).to(events.count.dtype), at, places.times)
        full, _ = fill(self.blocks, x, places, asked, slots, Stats())
        state = UserState(tuple(full), events.count)
        state, _ = trimmed(state, lambda *_: stays[:, None], [None] * len(full))
        ids = torch.arange(len(state)) if users is None else users
        maps = {name: v for name, v in self._known_maps(stats).items() if name != "tables"}  # merged: no item
        return Prefill(state, ids, events, seed=seed, uses_positions=True, **maps)

    def append(self, state: UserState, events: Events) -> UserState:
        """Up to the next merge at a time."""
        done, span, lag = torch.zeros_like(events.count), self.rungs.spans[1], self.rungs.lags[1]
        while True:
            now = (events.count - done).minimum(span - (state.length - lag) % span)
            index = done[:, None].long() + torch.arange(int(now.max()) if len(now) else 0, device=now.device)
            part = events.take(index.clamp(max=max(events.items.shape[1] - 1, 0)), now)
            state, done = joined(super().append(state, part)), done + now
            for level in range(len(self.mergers), 0, -1):
                over = state.length - self.rungs.lags[level]
                due = (now > 0) & (over > 0) & (over % self.rungs.spans[level] == 0)
                if bool(due.any()):
                    state = self._merged(state, level, due)
            if bool((done >= events.count).all()):
                return state

    def watch(self, state: UserState, events: Events, grown: UserState, stats: Stats) -> dict[str, Any]:
        return {}  # merged tokens took the place of what new events asked

    def _line(self, events: Events) -> tuple[Plan, tuple[Tensor, Line, Places]]:
        """The plan of a history, its tokens' inputs [B, T, d], and where they stand."""
        line = plan(self.rungs, events.items.shape[1])
        line = map_tensors(lambda x: x.to(events.items.device), line)
        every = [self._embed(events, torch.arange(events.items.shape[1], device=line.at.device)[None])]
        for level, merger in enumerate(self.mergers, 1):
            runs, span = self.rungs.made(level, events.items.shape[1]), self.rungs.spans[level]
            ratio = span // self.rungs.spans[level - 1]
            end = torch.arange(1, runs + 1, device=line.at.device) * span - 1
            stored = _rows(self.blocks[0].project(every[-1][:, : runs * ratio])[1])
            every.append(merger(stored.unflatten(1, (runs, ratio))) + self.positions(end))
        tokens = events.take(line.at.expand(len(events.count), -1), events.count)
        if tokens.times is not None and tokens.next_times is not None:
            tokens = replace(tokens, next_times=torch.where(line.merged, tokens.times, tokens.next_times))
        places, asked = self._places(tokens, line.at[None])
        return line, (torch.cat(every, 1)[:, line.place], Line(places.positions, places.times, plan=line), asked)

    def _merged(self, state: UserState, level: int, due: Tensor) -> UserState:
        """The state with one token for those before it of the level below, of users [B] for whom it is `due`."""
        span, short = self.rungs.spans[level], self.rungs.spans[level - 1]
        end = (state.length - self.rungs.lags[level]).long()[:, None]  # [B, 1]
        (segment, *_), first, at = state.layers[0], (end - span)[:, None], (end - 1).clamp(min=0)
        assert segment.slots is not None and segment.slots.positions is not None, "as `joined` leaves them"
        wanted = (end - span + torch.arange(short, span + 1, short, device=end.device) - 1)[:, None, :, None]
        same = (segment.slots.positions.unsqueeze(2) == wanted) & segment.slots.mask(segment.width).unsqueeze(2)
        there, index = same.any(-1, keepdim=True), same.byte().argmax(-1)  # a later method may have dropped some
        stored = {name: take(v.dense(), index) * there for name, v in segment.fields.items()}
        x = self.mergers[level - 1](_rows(stored)[:, None]) + self.positions(at)
        below, _ = trimmed(state, lambda _, places: places < first, [None] * len(state.layers))
        times = None
        if self.uses_times and segment.slots.timestamps is not None:
            last = same[:, :, -1].byte().argmax(-1, keepdim=True)
            times = segment.slots.timestamps.gather(2, last)[:, 0]
        token = Events(torch.zeros_like(at).int(), due.to(state.length.dtype), times, times)
        places, asked = self._places(token, at)
        itself = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=at.device)
        _, own = over(self.blocks, x, itself, below.layers, state.length, places, asked)
        goes, upto = due[:, None, None], end[:, None]
        state, _ = trimmed(
            state, lambda _, places: ~goes | (places < first) | (places >= upto), [None] * len(state.layers)
        )
        tail = Slots(token.count[:, None], at.int()[:, None], None if times is None else times[:, None])
        state = joined(UserState(grow(state.layers, own, tail), state.length))
        return trimmed(state, lambda _, places: places >= 0, [None] * len(state.layers))[0]  # in order of places

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        rungs, events = self.rungs, list(each_stores(self.blocks, self.items.weight))
        pair = sum(block.attend_flops(1, event) for block, event in events)
        linear, first = sum(block.linear_flops(1) for block in self.blocks), self.blocks[0]
        if step == "statistics":
            return sum(probe_flops(block, event, rungs.tokens(tokens), stats) for block, event in events)
        if step == "read":
            raw = None if state is None else state.events
            if raw is None:
                return super().flops(step, tokens, state)
            held = max((rungs.tokens(n) for n in raw.count.tolist()), default=0)
            return super().flops(step, tokens) + self.flops("prefill", raw.items.shape[1]) + pair * tokens * held
        if step == "prefill":
            line, fused = plan(rungs, tokens), getattr(first, str(first.fused))
            total = linear * len(line.at) + pair * sum((s.stop - s.start) * len(index) for s, index, _ in line.bands)
            for level, merger in enumerate(self.mergers, 1):
                runs = rungs.made(level, tokens)
                below = runs * (rungs.spans[level] // rungs.spans[level - 1])
                total += merger.flops(runs) + 2 * below * fused.in_features * fused.out_features
            return total
        total, length = 0, 0 if state is None or not len(state) else int(state.length.max())
        before = state
        while tokens:
            now = min(tokens, rungs.spans[1] - (length - rungs.lags[1]) % rungs.spans[1])
            total += super().flops("append", now, before)
            total += 0 if before is not None else pair * now * rungs.tokens(length)
            tokens, length, before = tokens - now, length + now, None
            for level, merger in enumerate(self.mergers, 1):
                end = length - rungs.lags[level]
                if end > 0 and end % rungs.spans[level] == 0:
                    total += merger.flops(1) + linear + pair * (1 + rungs.tokens(length, end - rungs.spans[level]))
        return total


def _rows(own: dict[str, Tensor]) -> Tensor:
    """All that a layer stores of a token, [B, H, M, D] a field, side by side: [B, M, width]."""
    return torch.cat([own[name].transpose(1, 2).flatten(2) for name in sorted(own)], -1)


def climb(backbone: Backbone, rungs: Rungs, mergers: list[Merger]) -> None:
    """Make a backbone merge so; mergers: of each level but the first."""
    device = next(backbone.parameters()).device
    for block in layers(backbone):
        swap(block, RungBlock)
    vars(backbone).update(rungs=rungs)
    backbone.mergers = nn.ModuleList(mergers).to(device)
    swap(backbone, Ladder)
    backbone.uses_positions, backbone.only_adds = True, False
    _start(backbone)


def climbing(weights: Mapping[str, Tensor], adapted: Backbone) -> dict[str, Tensor]:
    """Trained weights of the un-adapted backbone, and mergers that begin with them."""
    made = copy.deepcopy(adapted)
    made.load_state_dict({**made.state_dict(), **weights})
    _start(made)
    return {**weights, **{name: x for name, x in made.state_dict().items() if name.startswith("mergers.")}}


@torch.no_grad()
def _start(backbone: Any) -> None:
    """By least squares over items, from what the first layer stores of them to their embeddings."""
    x = backbone.items.weight[1:1025] * backbone.config.dim**0.5
    x = x + backbone.positions.weight[torch.arange(len(x), device=x.device) % backbone.max_length]
    rows = _rows(backbone.blocks[0].project(x[None])[1])[0]
    mean, centre = rows.mean(0), x.mean(0)
    square = (rows - mean).T @ (rows - mean)
    square.diagonal().add_(1e-3 * square.diagonal().mean())
    inverse = torch.linalg.solve(square, (rows - mean).T @ (x - centre)).T
    for merger in backbone.mergers:
        merger.start(inverse, centre - inverse @ mean)
