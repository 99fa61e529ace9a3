"""What a compressor gets to see: the full state of a batch of users and the attention statistics it asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.state.given import check, finite
from malloc_bench.state.named import Fitted, Named
from malloc_bench.state.observed import Asked, Lazy, Observed, Rows, SoftmaxRows, absolute_sums
from malloc_bench.state.probes import GIVEN, Ask, Probes, plain
from malloc_bench.state.rebuilt import Projection
from malloc_bench.state.slots import Slots
from malloc_bench.state.stats import MissingStatistic as MissingStatistic
from malloc_bench.state.stats import Stats as Stats
from malloc_bench.state.user_state import Events, Segment, UserState, map_tensors
from malloc_bench.state.vectors import Dense

T = TypeVar("T")

OBSERVED = ("column_sum", "window", "queries", "standing", "inputs", "alike", "reader", "probed")  # layer by layer


@dataclass(frozen=True, eq=False)
class Prefill:
    """The full state of B users, who they are, and what was observed while it was made.

    state: one segment a layer, of vectors `by_slot`, dense but for what was trained to be stored otherwise.
    users: [B] int64 ids, stable between runs: what is random hashes them.
    column_sum: a layer each, [B, H, S]: sum over the history's queries of the |attention weight| on each slot
        (mean over the query heads that share a kv-head). Softmax weights are their own absolute values.
    window: a layer each, [B, H, W, S]: signed weights of the newest W queries, oldest first; rows of users with fewer
        than W events start with zeros. Where query heads share a kv-head: the mean of their absolute values. Both
        statistics are 0 on slots that a user does not have.
    queries: a layer each, [B, Hq, W, D]: the newest W queries as they multiply keys (what softmax divides by is in
        them), oldest first; rows of users with fewer than W events start with zeros.
    standing: a layer each, [B, Hq, S]: the part of the next token's logits that is of where slots stand, if any is.
    inputs: a layer each, [B, S, d]: what the layer got in for every event.
    alike: a layer each, [B, S]: the cosine between what the layer got in for an event and what came out.
    reader: a layer each, [B, H, S]: mean |weight| of the tokens that read the full state, as `column_sum`.
    probed: a layer each, by `Ask.kind`: what probes asked and got.
    outputs: by the layer's number, [Hq, D, d]: what a unit of a head's mixed values adds to the layer's output (with
        HSTU before its gate and norm).
    projections: a layer each, how it makes keys and values of its input.
    tables: `items` [n_items + 1, d] and `positions` [max_length + 1, d], whose rows add up to the lowest layer's input.
    items: facts about items, row i is item i + 1: `categories` [n_items] int64 from 0, `popularity` [n_items], its
        training events. With probes: `probes` or `popular` [M], ids of the items to send, `gaps` [M], seconds between
        two training events.
    fitted: what the method has learned of training users; None for most.
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
    queries: Sequence[Tensor] | None = None
    standing: Sequence[Tensor] | None = None
    inputs: Sequence[Tensor] | None = None
    probed: Sequence[Mapping[Hashable, Probes]] | None = None
    outputs: Named | None = None
    items: Named | None = None
    fitted: Fitted | None = None
    alike: Sequence[Tensor] | None = None
    reader: Sequence[Tensor] | None = None
    projections: tuple[Projection, ...] | None = None
    tables: Named | None = None

    def __repr__(self) -> str:
        named = ("column_sum", "window", "queries", "inputs", "probed", "outputs", "items", "fitted", "alike", "reader")
        known = [name for name in named if getattr(self, name) is not None]
        return f"Prefill({self.state!r}{'; with ' * bool(known)}{', '.join(known)})"

    @property
    def layers(self) -> range:
        return range(len(self.state.layers))

    def apart(self) -> tuple[Prefill, ...]:
        """Each stack by itself, with its share of the statistics."""
        if self.stacks == 1:
            return (self,)
        depth = len(self.layers) // self.stacks
        return tuple(self.only(range(first, first + depth)) for first in range(0, len(self.layers), depth))

    def only(self, layers: Sequence[int], stacks: int = 1) -> Prefill:
        """Some layers, of so many stacks, with their share of the statistics; nothing is remembered."""

        def some(x: Any) -> Any:  # what is worked out when it is read stays so
            return x[layers.start : layers.stop] if isinstance(layers, range) else [x[i] for i in layers]

        state = UserState(tuple(some(self.state.layers)), self.state.length)
        seen: dict[str, Any] = {name: some(x) for name, x in self._observed().items()}
        outputs = self.outputs and Named({str(i): self.outputs[str(layer)] for i, layer in enumerate(layers)})
        maps = None if self.projections is None else tuple(some(self.projections))
        return replace(self, state=state, **seen, outputs=outputs, projections=maps, stacks=stacks, memo={})

    def _observed(self) -> dict[str, Any]:
        """What is known layer by layer, by name, of users' own."""
        known = {name: getattr(self, name) for name in OBSERVED}
        return {name: x for name, x in known.items() if x is not None}

    def segment(self, layer: int) -> Segment:
        """The segment of a layer that has slots, if any has; beside it may be a memory that a method has left."""
        own = self.state.layers[layer]
        (segment,) = [each for each in own if each.slots is not None] or own
        return segment

    def slots(self, layer: int) -> Slots:
        slots = self.segment(layer).slots
        assert slots is not None, "a full state has slots"
        return slots

    def rows(self, layer: int) -> Tensor:
        """How many rows each user's vectors have in a layer, slots (of the head that has most) or those of a memory:
        [B] int64."""
        segment, length = self.segment(layer), self.state.length.long()
        return torch.full_like(length, segment.width) if segment.slots is None else segment.slots.count.amax(1).long()

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
        return _there(self.column_sum, "column_sum=True")[layer]

    def newest_attention(self, layer: int, window: int) -> Tensor:
        """Weights of the newest `window` queries, [B, H, min(window, W), S]; raises MissingStatistic."""
        known = _there(self.window, f"window={window}")
        if isinstance(known, Lazy):
            return known.newest(layer, min(window, self.segment(layer).width))
        rows, slots = known[layer].shape[2:]
        if rows < min(window, slots):
            raise MissingStatistic(f"the newest {window} queries are asked for, only {rows} were observed")
        return known[layer][:, :, -window:]

    def newest_received(self, layer: int, window: int) -> Tensor:
        """Total |weight| that each slot received of the newest `window` queries, [B, H, S]; raises MissingStatistic."""
        known = _there(self.window, f"window={window}")
        if isinstance(known, Lazy):
            return known.newest_sums(layer, window)
        return absolute_sums(self.newest_attention(layer, window))

    def newest_queries(self, layer: int, window: int) -> tuple[Tensor, Tensor]:
        """The newest `window` queries [B, Hq, window, D], oldest first, and which there are, [B, 1, window]."""
        known = _there(self.queries, f"queries={window}")
        if isinstance(known, Asked):
            found = known.newest(layer, window)
        else:
            found = known[layer][:, :, -window:]
            if found.shape[2] < min(window, int(self.rows(layer).max()) if len(self.users) else 0):
                raise MissingStatistic(f"the newest {window} queries are asked for, only {found.shape[2]} are known")
            found = F.pad(found, (0, 0, window - found.shape[2], 0))
        age = torch.arange(window, 0, -1, device=found.device)
        return found, (age <= self.rows(layer)[:, None])[:, None]

    def layer_input(self, layer: int) -> Tensor:
        """`inputs` of a layer, [B, S, d]; raises MissingStatistic."""
        return _there(self.inputs, "inputs=True")[layer]

    def likeness(self, layer: int) -> Tensor:
        """`alike` of a layer, [B, S]; raises MissingStatistic."""
        return _there(self.alike, "alike=True")[layer]

    def reading_attention(self, layer: int) -> Tensor:
        """`reader` of a layer, [B, H, S]; raises MissingStatistic."""
        return _there(self.reader, "reader=True")[layer]

    def probes(self, layer: int, ask: Ask | None = None) -> Probes:
        """What probes asked of a layer and got; ask None: the only ones there are. Raises MissingStatistic."""
        known = _there(self.probed, "probes=64")[layer]
        if ask is None:
            (found,) = known.values()
            return found
        if GIVEN in known:
            return known[GIVEN].first(ask.number)
        return _there(known.get(ask.kind), f"probes={ask}").first(ask.number)

    def output_map(self, layer: int) -> Tensor:
        """`outputs` of a layer, [Hq, D, d]; raises MissingStatistic."""
        return _there(self.outputs, "outputs=True")[str(layer)]

    def projection(self, layer: int) -> Projection:
        """`projections` of a layer; raises MissingStatistic."""
        return _there(self.projections, "projections=True")[layer]

    def shared(self) -> list[list[Tensor]]:
        """Tensors that no user has a part in, and no method may write to."""
        maps = self.outputs, self.items, self.fitted, self.tables, *(self.projections or ())
        return [list(x.values()) for x in maps if x is not None]

    def slot_items(self, layer: int) -> Tensor:
        """The item of each slot, [B, 1, S], 0 for padding, of whole histories only; raises MissingStatistic."""
        events = _there(self.events, "events=True")
        slots, width = self.slots(layer), self.segment(layer).width
        if not width:
            return slots.count.new_zeros(len(self.state), 1, 0)
        place = slots.places(width, self.state.length[:, None])[:, 0].long()
        place = place.clamp(0, events.items.shape[1] - 1).expand(len(self.state), -1)
        return (events.items.gather(1, place) * self.mask(layer)[:, 0])[:, None]  # positions of padding are garbage

    def slot_times(self, layer: int) -> Tensor | None:
        """When each slot's event was, [B, 1, S] int64 seconds, garbage for padding; None where nobody knows. Raises
        MissingStatistic where a whole history's events were not asked for."""
        slots, width = self.slots(layer), self.segment(layer).width
        if slots.timestamps is not None:
            return slots.timestamps[:, :1]
        times = _there(self.events, "events=True").times
        if times is None or not width:
            return None
        place = slots.places(width, self.state.length[:, None])[:, 0].long().clamp(0, times.shape[1] - 1)
        return times.gather(1, place.expand(len(times), -1))[:, None]

    def slot_categories(self, layer: int) -> Tensor:
        """The category of each slot's item, [B, 1, S], -1 for padding; raises MissingStatistic."""
        return self._fact("categories", layer, -1)

    def slot_popularity(self, layer: int) -> Tensor:
        """Training events of each slot's item, [B, 1, S], -1 for padding; raises MissingStatistic."""
        return self._fact("popularity", layer, -1)

    def _fact(self, name: str, layer: int, padding: int) -> Tensor:
        known = _there(None if self.items is None else self.items.get(name), f"{name}=True")
        item = self.slot_items(layer).long()
        return torch.where(item > 0, known.to(item.device)[(item - 1).clamp(min=0)], padding)

    def full_bytes(self) -> Tensor:
        """[B] int64: what a budget of 1 comes to."""
        return self.remember("full bytes", self.state.nbytes) if self.whole is None else self.whole

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """make() once per Prefill and key, so that one score serves every budget."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def given(self, fitted: Fitted | None) -> Prefill:
        """The same with what a method has learned, beside the state; what it remembers is apart for every fit."""
        if fitted is None or fitted is self.fitted:
            return self
        there = self.state.length.device  # ids may be elsewhere
        nothing: dict[Hashable, Any] = {}
        moved, memo = self.remember(("fitted", fitted.digest), lambda: (fitted.to(there), nothing))
        return replace(self, fitted=moved, memo=memo)

    def take(self, users: Tensor) -> Prefill:
        """The given rows of the batch, users [B'] int64; nothing is remembered of the others."""
        seen: dict[str, Any] = {name: list(x) for name, x in self._observed().items()}
        whole = replace(self, **seen, memo={})
        return map_tensors(lambda x: x.index_select(0, users.to(x.device)), whole)

    def over(self, state: UserState) -> Prefill:
        """The same users with the state that an earlier link of a chain has made: slots have moved, so nothing that
        was known of them is kept, nor the events."""
        nothing: dict[str, Any] = dict.fromkeys(OBSERVED)
        return replace(self, state=state, **nothing, events=None, memo={})

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
        events: Events | None = None,
        items: Named | None = None,
        outputs: Sequence[Tensor] | None = None,
        probes: Sequence[Tensor] | None = None,
    ) -> Prefill:
        """A Prefill of plain tensors, so that any compressor can be tried without a backbone.

        Args, one entry a layer: keys [B, H, S, D], values [B, H, S, D'], any floating point dtype, on any one device;
        queries [B, Hq, S, D], Hq a multiple of H (causal softmax attention is computed from them) or attention
        [B, Hq, S, S] (row = query), or a function (layer, first, last) -> the rows [B, Hq, last - first, S] of the
        queries first ... last - 1. lengths [B] int, default S; users [B] int. positions: slots must know theirs.
        events, items: what slots are of, event i of slot i, and facts about items (`Prefill.items`). outputs, one entry
        a layer: [Hq, D', d], a map behind each query head's mixture.
        Statistics are worked out block by block when a method asks for them. Budgets are shares of the bytes in the
        dtype given. Raises ValueError that names the argument and what was expected.
        """
        check(
            keys, values, queries=queries, attention=attention, lengths=lengths, users=users, events=events,
            items=items, outputs=outputs, probes=probes,
        )  # fmt: skip
        (b, _, s, _), device = keys[0].shape, keys[0].device
        count = (torch.full((b,), s) if lengths is None else lengths).to(device, torch.int32)
        keys, values = finite("keys", keys, count), finite("values", values, count)
        queries = None if queries is None else finite("queries", queries, count)
        rows: Rows | None = None
        if callable(attention):
            rows = attention
        elif attention is not None:
            maps = finite("attention", attention, count)
            rows = lambda layer, first, last: maps[layer][:, :, first:last]  # noqa: E731
        elif queries is not None:
            rows = SoftmaxRows(keys, queries)
        seen = None if rows is None else Observed(rows, count, s, tuple(k.shape[1] for k in keys))
        column_sum, window = (None, None) if seen is None else (Lazy(seen), Lazy(seen, all_rows=True))
        slots = Slots(count[:, None])
        layers = tuple((Segment({"keys": Dense(k), "values": Dense(v)}, slots),) for k, v in zip(keys, values))
        ids = torch.arange(b, device=device) if users is None else users.to(device)
        asked = None if queries is None else Asked(queries, keys, count)
        state = UserState(layers, count)
        behind = None if outputs is None else Named({str(i): x for i, x in enumerate(outputs)})
        probed: list[Mapping[Hashable, Probes]] | None = None
        if probes is not None:
            probed = [{GIVEN: plain(q, layer[0], count)} for q, layer in zip(probes, layers)]
        return Prefill(
            state, ids, events, column_sum, window, seed, positions, queries=asked, items=items, outputs=behind,
            probed=probed,
        )  # fmt: skip


def _there(known: T | None, what: str) -> T:
    """`known`; raises MissingStatistic where it is not, in a line that says what to ask for."""
    if known is None:
        raise MissingStatistic(
            f"needs = Stats({what}) is missing on the compressor, it is not first in a chain, or nobody can tell here"
        )
    return known
