"""What backbones that attend over per-event keys and values share: one pass that serves all four calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.block import Block, Known, Places, block_pairs, each_stores
from malloc_bench.backbones.folded import CELLS, alone, in_one_pass, over_segment, read_flops, row_size
from malloc_bench.backbones.items import ItemBackbone, Sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.backbones.probing import Asking, Drawn, Note, Seen, Watch, probe_flops, probed
from malloc_bench.backbones.statistics import newcomers, newest, observed, over_group, standing
from malloc_bench.state import (
    Dense,
    Events,
    Layer,
    Named,
    Prefill,
    Probes,
    Segment,
    Slots,
    Stats,
    UserState,
    extend,
    newest_rows,
)


class AttentionBackbone(ItemBackbone):
    """A stack of `layers` blocks over item and learned position embeddings."""

    blocks: Any  # an nn.ModuleList of `Block`s

    def __init__(self, config: Sizes, n_items: int, block: Callable[[], Block]) -> None:
        super().__init__(config, n_items)
        self.positions = nn.Embedding(config.max_length + 1, config.dim)  # + 1: a candidate behind a full history
        self.blocks = nn.ModuleList(block() for _ in range(config.layers))
        for table in (self.items, self.positions):
            nn.init.trunc_normal_(table.weight, std=0.02)

    def _embed(self, events: Events, positions: Tensor) -> Tensor:
        x = self.items(events.items) * self.config.dim**0.5 + self.positions(positions.long())
        return dropout(x, self.config.dropout, self.training)

    def _known_maps(self, stats: Stats) -> dict[str, Any]:
        """Of `stats` what is the model's own, no user's, by its name in `Prefill`."""
        found: dict[str, Any] = {"outputs": output_maps(self.blocks)} if stats.outputs else {}
        made = [block.projection() for block in self.blocks] if stats.projections else [None]
        if None not in made:
            items, positions = self.items.weight.detach() * self.config.dim**0.5, self.positions.weight
            found |= {"projections": tuple(made), "tables": Named({"items": items, "positions": positions})}
        return found

    @abstractmethod
    def _output(self, x: Tensor) -> Tensor:
        """The stack's output [B, M, d], ready to be multiplied with `catalogue`."""

    def _places(self, events: Events, positions: Tensor) -> tuple[Places, Places]:
        """Of the events as slots, and of the events as queries (with the time at which they are asked)."""
        place, items = positions[:, None], events.items[:, None]
        if not self.uses_times:
            return Places(place, None), Places(place, None, items)
        if events.times is None or events.next_times is None:
            raise ValueError(f"this {self.name} was made for data with times: events need `times` and `next_times`")
        return Places(place, events.times[:, None]), Places(place, events.next_times[:, None], items)

    def forward(self, events: Events) -> Tensor:
        positions = torch.arange(events.items.shape[1], device=events.items.device)[None]
        places, asked = self._places(events, positions)
        x = self._embed(events, positions)
        for block in self.blocks:
            q, own, gate = block.project(x)
            x = block.combine(x, block.causal(q, own, places, asked), gate)
        return self._output(x)

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        b, s = len(events.items), self.admit(events)
        positions = torch.arange(s, device=events.items.device)[None]
        places, asked = self._places(events, positions)
        slots = Slots(events.count[:, None], None, places.times)
        layers, seen = fill(self.blocks, self._embed(events, positions), places, asked, slots, stats)
        ids = torch.arange(b) if users is None else users
        state = UserState(tuple(layers), events.count)
        seen |= self._known_maps(stats)
        return Prefill(state, ids, events, seed=seed, uses_positions=self.uses_positions, **seen)

    def read(self, tokens: Events, state: UserState) -> Tensor:
        return self._read(tokens, state, None)

    def reads(self, tokens: Events, length: Tensor) -> Callable[[UserState], Tensor]:
        if getattr(self.read, "__func__", None) is not AttentionBackbone.read:  # in a way of its own
            return super().reads(tokens, length)
        known = Known()
        return lambda state: self._read(tokens, state, known if torch.equal(state.length, length) else None)

    def _read(self, tokens: Events, state: UserState, known: Known | None) -> Tensor:
        if state.events is not None:  # raw events only: rebuild, then read
            state = self._rebuild(state, tokens)
        m = tokens.items.shape[1]
        positions = state.length.long()[:, None].expand(-1, m)
        return self._output(self._over(tokens, positions, state, None, known=known)[0])

    def reading(self, tokens: Events, state: UserState) -> list[Tensor]:
        positions = state.length.long()[:, None].expand(-1, tokens.items.shape[1])
        drawn: list[Drawn] = []

        def watch(block: Block, q: Tensor, own: dict[str, Tensor], asked: Places) -> Note:
            drawn.append(Drawn(own, tokens.mask()))
            return drawn[-1].note

        self._over(tokens, positions, state, None, watch)
        return [over_group(torch.stack(each.total).sum(0), each.own) for each in drawn]

    def probe(
        self, state: UserState, events: Events, stats: Stats, items: Named, tokens: Events | None = None
    ) -> list[dict[Hashable, Probes]]:
        def send(tokens: Events, ahead: Tensor) -> list[Seen]:
            return self._seen(tokens, state.length.long()[:, None] + ahead, state, None)

        def reach(tokens: Events, ahead: Tensor, state: UserState) -> Tensor:
            positions = (state.length.long()[:, None] + ahead).clamp(max=self.max_length)
            return self._output(self._over(tokens, positions, state, None)[0])

        ranking = self.scoring is not None
        asking = Asking(events, items, tokens, partial(self._top, state), self.uses_times, ranking)
        return probed(send, reach, state, stats, asking)

    def _top(self, state: UserState, asked: Events, m: int) -> Tensor:
        """The m items [B, m] that are nearest to what tokens [B, 1] read."""
        return (self.read(asked, state)[:, 0] @ self.catalogue().T).topk(min(m, self.n_items)).indices + 1

    def _ranking_flops(self, stats: Stats) -> int:
        return 2 * self.n_items * self.config.dim * sum(ask.which == "top" for ask in stats.asks)

    def watch(self, state: UserState, events: Events, grown: UserState, stats: Stats) -> dict[str, Any]:
        if not (stats.column_sum or stats.window or stats.queries):
            return {}
        m = events.items.shape[1]
        behind = torch.ones(m, m, dtype=torch.bool, device=events.items.device).tril()[None, None]
        positions = state.length.long()[:, None] + torch.arange(m, device=events.items.device)
        return dict(newcomers(self._seen(events, positions, state, behind), grown, events.count, stats))

    def _seen(self, tokens: Events, positions: Tensor, state: UserState, own_mask: Tensor | None) -> list[Seen]:
        """What went on in each layer while tokens passed."""
        seen: list[Seen] = []

        def watch(block: Block, q: Tensor, own: dict[str, Tensor], asked: Places) -> Note | None:
            seen.append(Seen(block, q, own, asked))
            return seen[-1].note if own_mask is None else None

        self._over(tokens, positions.clamp(max=self.max_length), state, own_mask, watch)
        return seen

    def append(self, state: UserState, events: Events) -> UserState:
        self.grown(state, events)
        m = events.items.shape[1]
        behind = torch.ones(m, m, dtype=torch.bool, device=events.items.device).tril()[None, None]
        positions = state.length.long()[:, None] + torch.arange(m, device=events.items.device)
        _, own = self._over(events, positions.clamp(max=self.max_length), state, behind)  # padding may stand beyond
        return self._grown(state, own, events, positions)

    def _grown(self, state: UserState, own: list[dict[str, Tensor]], events: Events, positions: Tensor) -> UserState:
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
        total += self._ranking_flops(stats) if step == "statistics" else 0
        for i, (block, event) in enumerate(each_stores(self.blocks, self.items.weight)):
            pair = block.attend_flops(1, event)
            if step == "statistics":
                total += 2 * block.heads * block_pairs(tokens) * stats.column_sum
                total += block.logit_flops((stats.window + bool(stats.queries and block.biased)) * tokens, event)
                total += probe_flops(block, event, tokens, stats)
                continue
            total += block.linear_flops(tokens)
            total += pair * {"prefill": block.causal_pairs(tokens), "append": tokens**2, "read": tokens}[step]
            if raw:
                rebuilt = {k: Dense(v.dense().expand(-1, -1, raw, -1)) for k, v in event.fields.items()}
                total += block.attend_flops(tokens, Segment(rebuilt, Slots(torch.full((1, 1), raw))))
            if state is not None and state.layers:
                total += sum(read_flops(block, tokens, segment) for segment in state.layers[i])
        return total

    def _rebuild(self, state: UserState, tokens: Events) -> UserState:
        events = state.events
        assert events is not None
        if events.times is not None and tokens.times is not None:
            following = torch.cat([events.times[:, 1:], events.times[:, :1]], dim=1)  # last column: set below
            last = (events.count.long() - 1).clamp(min=0)[:, None]
            if following.shape[1]:
                following = following.scatter(1, last, tokens.times[:, :1])
            events = replace(events, next_times=following)
        return self.prefill(events).state

    def _over(
        self,
        tokens: Events,
        positions: Tensor,
        state: UserState,
        own_mask: Tensor | None,
        watch: Watch | None = None,
        known: Known | None = None,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Tokens through every layer, each attending to the state and, by own_mask [1, 1, M, M], to one another.

        None: each to itself alone. watch, known: see `over`.
        """
        places, asked = self._places(tokens, positions)
        x = self._embed(tokens, positions)
        return over(self.blocks, x, own_mask, state.layers, state.length, places, asked, watch, known)


def fill(
    blocks: Iterable[Block], x: Tensor, places: Places, asked: Places, slots: Slots, stats: Stats
) -> tuple[list[Layer], dict[str, Any]]:
    """Left-aligned events x [B, S, d] through a stack onto themselves: its layers, and by name what of each was asked
    for, as `Prefill` has it."""
    count = slots.count[:, 0]
    layers: list[Layer] = []
    seen: dict[str, list[Tensor]] = {}
    for block in blocks:
        q, own, gate = block.project(x)
        if stats.inputs:
            seen.setdefault("inputs", []).append(x)
        if stats.queries:
            seen.setdefault("queries", []).append(newest_rows(block.asking(q, asked), count, stats.queries))
            if block.biased:
                everything = Segment({k: Dense(v) for k, v in own.items()}, None)
                seen.setdefault("standing", []).append(standing(block, q, everything, places, asked, count))
        if stats.column_sum:
            mixed, received = observed(block, q, own, places, asked, slots.mask(x.shape[1])[:, 0])
            seen.setdefault("column_sum", []).append(over_group(received, own))
        else:
            mixed = block.causal(q, own, places, asked)
        if stats.window:
            weights = newest(block, q, own, places, asked, count, stats.window)
            seen.setdefault("window", []).append(over_group(weights, own))
        before, x = x, block.combine(x, mixed, gate)
        if stats.alike:
            seen.setdefault("alike", []).append(F.cosine_similarity(before, x, dim=-1))
        layers.append((Segment({k: Dense(v) for k, v in own.items()}, slots),))
    return layers, dict(seen)


def output_maps(blocks: Iterable[Block]) -> Named | None:
    """`Prefill.outputs` of a stack; None where a layer has no such map."""
    maps = {str(i): block.outputs() for i, block in enumerate(blocks)}
    return None if None in maps.values() else Named({name: x for name, x in maps.items() if x is not None})


def over(
    blocks: Iterable[Block],
    x: Tensor,
    own_mask: Tensor | None,
    layers: Iterable[Layer],
    length: Tensor,
    places: Places,
    asked: Places,
    watch: Watch | None = None,
    known: Known | None = None,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Tokens x [B, M, d] through a stack over its layers and, by own_mask [B or 1, 1, M, M], one another (None: each
    over itself alone).

    Returns the outputs [B, M, d] and what each layer would store of the tokens. watch: is told of each layer what went
    on there. known: of the same tokens what the first block makes of them; it is noted there.
    """
    stored: list[dict[str, Tensor]] = []
    for block, layer in zip(blocks, layers):
        q, own, gate = block.project(x) if known is None else known(block, x)
        known = None
        note = None if watch is None else watch(block, q, own, asked)
        x = block.combine(x, _attend(block, q, own, own_mask, layer, length, places, asked, note), gate)
        stored.append(own)
    return x, stored


def _attend(
    block: Block,
    q: Tensor,
    own: dict[str, Tensor],
    own_mask: Tensor | None,
    layer: Layer,
    length: Tensor,
    places: Places,
    asked: Places,
    note: Note | None = None,
) -> Tensor:
    """Attention of M tokens over a layer's segments and the tokens themselves, [B, H, M, D]; blocked over queries.

    note: takes, block by block, what comes from the segments alone, and logits, masks, masses and weights.
    """
    if (
        own_mask is None
        and note is None
        and (found := in_one_pass(block, q, own, layer, length, places, asked)) is not None
    ):
        return found
    sources: list[tuple[Segment, Places | None]] = []
    end = length[:, None]
    for segment in reversed(layer):
        if segment.slots is None:
            sources.insert(0, (segment, None))
            continue
        sources.insert(0, (segment, Places(segment.slots.places(segment.width, end), segment.slots.timestamps)))
        end = end - segment.slots.count
    b, h, m, _ = q.shape
    mine = m if own_mask is not None else 1
    step = max(1, CELLS // max(1, b * h * (mine + sum(row_size(s) for s, _ in sources))))
    out: list[Tensor] = []
    for start in range(0, m, step):
        rows = slice(start, min(start + step, m))
        part, at = q[:, :, rows], asked.rows(rows)
        seen = [over_segment(block, part, s, at, p) for s, p in sources]
        logits, masks, masses = [x for x, *_ in seen], [x for _, x, *_ in seen], [x for _, _, x, _ in seen]
        if own_mask is None:
            among, mix_own = alone(block, part, {k: v[:, :, rows] for k, v in own.items()}, at, places.rows(rows))
            masks.append(torch.ones_like(among[:1, :1], dtype=torch.bool))
        else:
            tokens = Segment({k: Dense(v) for k, v in own.items()}, None)
            among, mix_own = block.logits(part, tokens, at, places), partial(block.mix, segment=tokens)
            masks.append(own_mask[:, :, rows])
        weights = block.weigh([*logits, among], masks, [*masses, None])
        mixed = mix_own(weights[-1])
        parts = [mix(w) for w, (*_, mix) in zip(weights, seen)]
        if note is not None:
            note(sum(parts, torch.zeros_like(mixed)), [*logits, among], masks, [*masses, None], weights)
        for part in parts:
            mixed = mixed + part
        out.append(mixed)
    return out[0] if len(out) == 1 else torch.cat(out, dim=2)
