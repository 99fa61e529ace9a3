"""Rec2PM: a few memory tokens, overwritten after each segment of the history, whose events go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.attention import AttentionBackbone, over
from malloc_bench.backbones.block import each_stores
from malloc_bench.backbones.probing import probe_flops
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import layers, swap
from malloc_bench.compressors.trimmed import refusal, trimmed
from malloc_bench.registry import register
from malloc_bench.state import Events, Prefill, Slots, Stats, UserState, joined
from malloc_bench.state.extend import grow

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class RecurrentBackbone(AttentionBackbone):
    """Comes before a backbone's own class: every call goes segment by segment, as a user does."""

    segment: int
    memory: nn.Parameter  # [tokens, d]
    again: nn.Linear  # what the last layer stored of a token, for the token that overwrites it

    def forward(self, events: Events) -> Tensor:
        whole = torch.full_like(events.count, events.items.shape[1])
        return self._output(torch.cat(self._follow(self._nothing(events), replace(events, count=whole))[0], 1))

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        self.admit(events)
        _, state = self._follow(self._nothing(events), events)
        ids = torch.arange(len(state)) if users is None else users
        maps = {name: x for name, x in self._known_maps(stats).items() if name != "tables"}  # a memory is no item
        return Prefill(state, ids, events, seed=seed, uses_positions=True, **maps)

    def append(self, state: UserState, events: Events) -> UserState:
        self.grown(state, events)
        return self._follow(state, events)[1]

    def watch(self, state: UserState, events: Events, grown: UserState, stats: Stats) -> dict[str, Any]:
        return {}  # a memory took the place of what new events asked

    def _nothing(self, events: Events) -> UserState:
        return UserState(((),) * len(self.blocks), torch.zeros_like(events.count))

    def _follow(self, state: UserState, events: Events) -> tuple[list[Tensor], UserState]:
        """Up to the end of a segment at a time: what events come out as, [B, M, d] each time, and the state then."""
        done, outputs = torch.zeros_like(events.count), []
        while True:
            now = (events.count - done).minimum(self.segment - state.length % self.segment)
            m = int(now.max()) if len(now) else 0
            step = torch.arange(m, device=now.device)
            part = events.take((done[:, None].long() + step).clamp(max=max(events.items.shape[1] - 1, 0)), now)
            at = (state.length.long()[:, None] + step).clamp(max=self.max_length)  # padding may stand beyond
            behind = torch.ones(m, m, dtype=torch.bool, device=now.device).tril()[None, None]
            if m:
                x, own = self._over(part, at, state, behind)
            else:  # nobody has an event
                x = self.memory.new_zeros(len(now), 0, self.memory.shape[1])
                own = [block.project(x)[1] for block in self.blocks]
            outputs.append(x)
            state, done = joined(self._grown(state, own, part, at)), done + now
            ended = (now > 0) & (state.length % self.segment == 0)
            if bool(ended.any()):
                state = self._overwritten(state, part.last(ended), ended)
            if bool((done >= events.count).all()):
                return outputs, state

    def _overwritten(self, state: UserState, last: Events, ended: Tensor) -> UserState:
        """The state of users [B] whose segment has `ended`, by their `last` event, with a new memory alone in it."""
        m = len(self.memory)
        at = (state.length.long() - 1).clamp(min=0)[:, None].expand(-1, m)
        x = (self.memory + self.positions(at)).to(self.memory.dtype)
        if bool((ended & (state.length > self.segment)).any()):
            x = x + self.again(self._remembered(state, m).transpose(1, 2).flatten(2))
        tokens = last.each(lambda c: c[:, :1].expand(-1, m), ended.to(last.count.dtype) * m)
        places, asked = self._places(tokens, at)
        among = torch.ones(1, 1, m, m, dtype=torch.bool, device=at.device)
        _, own = over(self.blocks, x, among, state.layers, state.length, places, asked)
        goes = ended[:, None, None]
        state, _ = trimmed(state, lambda *_: ~goes, [None] * len(state.layers))
        tail = Slots(tokens.count[:, None], at.int()[:, None], places.times)
        return joined(UserState(grow(state.layers, own, tail), state.length))

    def _remembered(self, state: UserState, m: int) -> Tensor:
        """What the last layer stored of the memory, [B, H, m, D]: of the slots before the segment that ends. Zeros for
        what is not there: nothing before the first end, or what a later method has dropped."""
        segment = state.layers[-1][0]
        assert segment.slots is not None and segment.slots.positions is not None, "as `joined` leaves them"
        before = segment.slots.positions < (state.length - self.segment)[:, None, None]
        there = (before & segment.slots.mask(segment.width)).unsqueeze(-1)
        stored = torch.where(there, segment.fields["values"].dense(), 0.0)[:, :, :m]
        return F.pad(stored, (0, 0, 0, m - stored.shape[2]))

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        c, m = self.segment, len(self.memory)
        left = tokens % c + m * (tokens >= c)
        if step == "statistics":
            return sum(
                probe_flops(block, event, left, stats) for block, event in each_stores(self.blocks, self.items.weight)
            )
        if step == "read":
            raw = None if state is None else state.events
            if raw is None:
                return super().flops(step, tokens, state)
            held = int((raw.count % c + m * (raw.count >= c)).max()) if len(raw.count) else 0
            over = sum(
                block.attend_flops(tokens, event) * held for block, event in each_stores(self.blocks, self.items.weight)
            )
            return super().flops(step, tokens) + self.flops("prefill", raw.items.shape[1]) + over
        length = 0 if state is None or not len(state) else int(state.length.max())
        held = 0 if state is None else sum(segment.width for segment in state.layers[0])
        total, first = 0, state
        while tokens:
            now = min(tokens, c - length % c)
            total += super().flops("append", now, first)
            pair = sum(block.attend_flops(1, event) for block, event in each_stores(self.blocks, self.items.weight))
            total += 0 if first is not None else pair * now * held
            tokens, length, held, first = tokens - now, length + now, held + now, None
            if length % c == 0:
                total += super().flops("append", m) + pair * m * held
                total += 2 * m * self.again.weight.numel() * (length > c)
                held = m
        return total


@register("rec2pm")
@dataclass(frozen=True)
class Rec2PM(Structural):
    """`memories` tokens that take in each whole `segment` of events and overwrite themselves (Chen et al., 2026).

    Within a segment a token sees the memory of before it and the segment's events up to itself; at its end new memory
    tokens see all that and one another, and take its place. From the paper: 4 memory tokens, that a memory becomes the
    next one's input. Ours: training goes through the segments in turn, as requests do, so that it needs neither the
    paper's reference memories, made of the whole history to train in parallel, nor its squared distance to them; a new
    memory token begins as a learned vector and a map of what the last layer stored of the old one; keys and values
    of the memory are stored, as any read needs them, where the paper stores the tokens and makes these again.
    """

    memories: int = 4
    segment: int = 16

    family = "merging"
    paper = "Rec2PM, Chen et al. 2026, arXiv 2602.11605"
    formula = (
        "after each whole segment memory' = stack(e + W v(memory), over memory, the segment and itself); loss: the "
    )
    formula += "next item's alone, without the paper's |memory' - reference|^2, for segments are trained in turn"
    growth = grows(memory="m L d", read="m L d")
    stores = "keys, values and positions of the memory tokens and of the events of the segment begun"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.memories < self.segment:  # as many as events would pass for these, whose places are implied
            raise ValueError(
                f"rec2pm: memories must be at least 1 and fewer than a segment's events, not {self.memories} of "
                f"{self.segment}"
            )

    def supports(self, backbone: Backbone) -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: Backbone) -> None:
        table: Tensor = backbone.items.weight  # type: ignore[union-attr,assignment]
        d, width = table.shape[1], layers(backbone)[-1].parts["values"]
        vars(backbone).update(segment=self.segment)
        drawn = torch.randn(self.memories, d, device=table.device)
        backbone.memory = nn.Parameter(0.02 * d**0.5 * drawn)  # as large as an item
        backbone.again = nn.Linear(width, d, bias=False).to(table.device)
        swap(backbone, RecurrentBackbone)
        backbone.uses_positions, backbone.only_adds = True, False
