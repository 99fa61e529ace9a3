"""Probe tokens behind a backbone: what they are, and what a layer's own arithmetic says of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from malloc_bench.backbones.block import Block, Places
from malloc_bench.state import (
    Ask,
    Dense,
    Events,
    Layer,
    MissingStatistic,
    Named,
    Probes,
    Segment,
    Slots,
    Stats,
    UserState,
)


@dataclass(frozen=True, eq=False)
class Reach:
    """Tokens that stand so many events `ahead`, no user's own, and what sends them through the stack over a state."""

    send: Callable[[Events, Tensor, UserState], Tensor]
    tokens: Events
    ahead: tuple[int, ...]

    def __call__(self, state: UserState) -> Tensor:
        return self.send(self.tokens, torch.tensor(self.ahead, device=self.tokens.items.device), state)

    def some(self, rows: slice | Tensor) -> Reach:
        ahead = tuple(torch.tensor(self.ahead)[rows.cpu() if isinstance(rows, Tensor) else rows].tolist())
        tokens = self.tokens.each(lambda x: x[:, rows], torch.full_like(self.tokens.count, len(ahead)))
        return Reach(self.send, tokens, ahead)


@dataclass(frozen=True, eq=False)
class LayerProbes(Probes):
    """Probes that ask a backbone's layer; itself: [B, Hq, M, 1], the logit of a token over itself; positions, times:

    [B, 1, M], where they stand and when they are asked for; reach: how they come out."""

    block: Block | None = None
    itself: Tensor | None = None
    positions: Tensor | None = None
    times: Tensor | None = None
    reach: Reach | None = None

    def _by_probe(self) -> dict[str, Tensor]:
        places = {"itself": self.itself, "positions": self.positions, "times": self.times}
        return super()._by_probe() | {name: x for name, x in places.items() if x is not None}

    def _asked(self) -> tuple[Block, Places]:
        assert self.block is not None and self.positions is not None
        return self.block, Places(self.positions, self.times)

    @property
    def normaliser(self) -> float:
        return float(getattr(self.block, "normaliser", 1.0))

    def asking(self) -> Tensor:
        block, asked = self._asked()
        return block.asking(self.queries, asked)

    def logits(self, segment: Segment) -> Tensor:
        block, asked = self._asked()
        assert segment.slots is not None
        places = segment.slots.places(segment.width, self.length[:, None])
        return block.logits(self.queries, segment, asked, Places(places, segment.slots.timestamps))

    def weigh(self, segment: Segment) -> tuple[Tensor, Tensor]:
        block, _ = self._asked()
        assert segment.slots is not None and self.itself is not None
        mask = segment.slots.mask(segment.width).unsqueeze(2)
        masks = [mask, mask.new_ones(1, 1, 1, 1)]
        weights, share = block.weigh([self.logits(segment), self.itself], masks, [segment.slots.mass, None])
        return weights, share

    def mix(self, weights: Tensor, segment: Segment) -> Tensor:
        return self._asked()[0].mix(weights, segment)

    def _some(self, rows: slice | Tensor) -> Self:
        return replace(super()._some(rows), reach=self.reach and self.reach.some(rows))

    def outputs(self, state: UserState) -> Tensor | None:
        return None if self.reach is None else self.reach(state)


Note = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor]], None]
# is told of a layer, and gives what is to be told of tokens there
Watch = Callable[[Block, Tensor, dict[str, Tensor], Places], Note | None]


@dataclass
class Seen:
    """What went on in one layer while tokens passed: their queries and own vectors, where they stood, and what `note`
    was told of them."""

    block: Block
    q: Tensor
    own: dict[str, Tensor]
    asked: Places
    got: list[Tensor] = field(default_factory=list)
    itself: list[Tensor] = field(default_factory=list)
    share: list[Tensor] = field(default_factory=list)
    total: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)

    def note(
        self,
        got: Tensor,
        logits: Sequence[Tensor],
        masks: Sequence[Tensor],
        masses: Sequence[Tensor | None],
        weights: Sequence[Tensor],
    ) -> None:
        """Of some tokens, each of which sees the state and itself, last."""
        self.got.append(got)
        self.itself.append(logits[-1])
        self.share.append(weights[-1])
        self.weights.append(weights[0])
        if not self.block.normalised:
            return
        if bool((weights[-1] > 1e-20).all()):  # the cheap way
            self.total.append(logits[-1] - weights[-1].log())
        else:
            known = [
                x if m is None else x + self.block.each(m).clamp(min=1e-6).log().unsqueeze(2)
                for x, m in zip(logits, masses)
            ]
            parts = [x.masked_fill(~self.block.each(mask), -torch.inf).logsumexp(-1) for x, mask in zip(known, masks)]
            self.total.append(torch.stack(parts).logsumexp(0).unsqueeze(-1))

    def probes(self, length: Tensor, layer: Layer) -> LayerProbes:
        """layer: of the state that they passed over."""
        b, _, m, _ = self.q.shape
        times = None if self.asked.times is None else self.asked.times.expand(b, 1, m)
        total = torch.cat(self.total, 2) if self.total else None
        over, weights = (layer[0], torch.cat(self.weights, 2)) if len(layer) == 1 else (None, None)
        return LayerProbes(
            self.q, torch.cat(self.got, 2), torch.cat(self.share, 2), total, length, self.own, over, weights,
            self.block, torch.cat(self.itself, 2), self.asked.positions.expand(b, 1, m), times,
        )  # fmt: skip


@dataclass
class Drawn:
    """What tokens drew from each slot, the mean |weight| as parts [B, Hq, S] of a sum; real: [B, M], no padding."""

    own: dict[str, Tensor]
    real: Tensor
    total: list[Tensor] = field(default_factory=list)
    known: int = 0

    def note(self, got: Tensor, logits: Any, masks: Any, masses: Any, weights: Sequence[Tensor]) -> None:
        weight = weights[0].abs()
        rows = slice(self.known, self.known + weight.shape[2])
        share = self.real[:, rows].to(weight.dtype) / self.real.sum(1, keepdim=True).clamp(min=1)
        self.total.append((share[:, None, None] @ weight).squeeze(2))
        self.known = rows.stop


@dataclass(frozen=True)
class Asking:
    """What probes of a user may be made of. events: the newest of the history; items: facts; reader: the tokens that
    will read, where they are known; top: the items [B, M] that the model ranks first for an event [B, 1] that asks."""

    events: Events
    items: Named
    reader: Events | None
    top: Callable[[Events, int], Tensor]
    timed: bool
    ranking: bool

    def tokens(self, ask: Ask) -> tuple[Events, Tensor]:
        """The probe items behind each history, and how many events ahead. Times follow the history's newest event by

        gaps of training, never by the request's own. In retrieval a token is an event, and is asked after one gap more.
        """
        drawn = self._items(ask)
        m = drawn.shape[1]
        ahead = torch.tensor(ask.horizon, device=drawn.device).repeat(-(-m // len(ask.horizon)))[:m]
        return self._at(drawn, ahead), ahead

    def _at(self, drawn: Tensor, ahead: Tensor) -> Events:
        """Tokens of items [B, M] so many events ahead, [M]."""
        (b, m), times, following, events = drawn.shape, None, None, self.events
        if self.timed:
            gaps = self.items.get("gaps")
            if gaps is None or events.times is None or len(gaps) < m:
                raise MissingStatistic(f"this backbone reads times, and the gaps of {m} probes are not known")
            gaps = gaps[:m].to(drawn.device)
            last = (events.count.long() - 1).clamp(min=0)[:, None]
            newest = events.times.gather(1, last) if events.times.shape[1] else events.count.long()[:, None]
            times = newest + gaps * (ahead + 1)
            following = times if self.ranking else times + gaps.roll(1)
        count = torch.full((b,), m, dtype=torch.int32, device=drawn.device)
        return Events(drawn.int(), count, times, following)

    def _items(self, ask: Ask) -> Tensor:
        """[B, M]"""
        ask = ask.in_ranking() if self.ranking else ask
        events, m = self.events, ask.number
        device, b = events.items.device, len(events.count)
        if ask.which == "top":
            newest = _turns(events.items, events.count, 1, newest=True)
            return self.top(self._at(newest, torch.zeros(1, dtype=torch.long, device=device)), m)
        if ask.which == "own":
            return _turns(events.items, events.count, m, newest=True)
        if ask.which == "candidates":
            if self.reader is None:
                raise MissingStatistic("nobody knows the tokens that will read")
            return _turns(self.reader.items, self.reader.count, m)
        known = {"drawn": self.items.get("probes"), **{name: self.items.get(name) for name in ("even", "popular")}}
        drawn = known[ask.which] if isinstance(ask.which, str) else torch.tensor(ask.which)
        if drawn is None:
            raise MissingStatistic(f"nobody knows which items are {ask.which}: items need their popularity in training")
        return drawn[:m].to(device).expand(b, -1)


def _turns(items: Tensor, count: Tensor, m: int, newest: bool = False) -> Tensor:
    """The first m of items [B, S], of which count [B] are real, or the newest of them, again and again; [B, M].

    Item 1 where there is none.
    """
    place = torch.arange(m, device=items.device) % count.long().clamp(min=1)[:, None]
    if newest:
        place = (count.long() - 1)[:, None] - place
    if not items.shape[1]:
        return torch.ones_like(place)
    return items.long().gather(1, place.clamp(min=0)).where((count > 0)[:, None], 1)


def probed(
    send: Callable[[Events, Tensor], list[Seen]],
    reach: Callable[[Events, Tensor, UserState], Tensor],
    state: UserState,
    stats: Stats,
    asking: Asking,
) -> list[dict[Hashable, Probes]]:
    """What each layer has seen of the probes of `stats`, by `Ask.kind`.

    send: tokens [B, M] and how many events they stand ahead of the next one, [M], through the stack over the state.
    reach: what they come out with over another one.
    """
    found: list[dict[Hashable, Probes]] = [{} for _ in state.layers]
    for ask in stats.asks:
        tokens, ahead = asking.tokens(ask)
        come_out, ranked = Reach(reach, tokens, tuple(ahead.tolist())), ask.which == "top" and not asking.ranking
        for layer, seen, own in zip(found, send(tokens, ahead), state.layers):
            layer[ask.kind] = replace(seen.probes(state.length, own), reach=come_out, ranked=ranked)
    return found


def sent(stats: Stats) -> int:
    """Tokens that go through the stack for the probes of `stats`; one asks for those that come out on top."""
    return sum(ask.number + (ask.which == "top") for ask in stats.asks)


def probe_flops(block: Block, event: Segment, history: int, stats: Stats) -> int:
    """Of the probes of `stats` in one layer over the state of a history; event: what one token stores."""
    m = sent(stats)
    if not m:
        return 0
    slots = Slots(torch.full((1, 1), history))
    state = Segment({k: Dense(v.dense().expand(-1, -1, history, -1)) for k, v in event.fields.items()}, slots)
    return block.linear_flops(m) + m * block.attend_flops(1, event) + block.attend_flops(m, state)
