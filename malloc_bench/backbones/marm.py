"""MARM, the memory augmented recommendation model (Kuaishou, CIKM 2025, arXiv 2411.09425)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.backbones.attention import AttentionBackbone, Sizes
from malloc_bench.backbones.block import Block, Places, block_pairs
from malloc_bench.backbones.sasrec import SASRecBlock
from malloc_bench.registry import register
from malloc_bench.state import Batch, Dense, Events, Prefill, Segment, Slots, Stats, UserState, take

_GATHER = 8  # a gathered row costs about as much as so many that are multiplied in place


@dataclass(frozen=True)
class MARMSizes(Sizes):
    """As `Sizes`; search: each layer's own, over what it stores (GSU), before it attends to top_k slots (ESU).

    "dot": the slots whose product with the layer's query is largest, head by head. "group": the newest slots in the
    token's own of `groups` hashed groups. The token itself is one of the top_k.
    """

    search: Literal["none", "dot", "group"] = "none"
    top_k: int = 32
    groups: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search not in ("none", "dot", "group"):
            raise ValueError(f"search must be none, dot or group, not {self.search!r}")
        if self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.groups % 2 or not 2 <= self.groups <= 2 * self.dim:
            raise ValueError(f"groups must be even, from 2 to 2 x dim = {2 * self.dim}, not {self.groups}")


class MARMBlock(SASRecBlock):
    """SASRec's block and weights, its key and value maps absorbed: it attends to hidden vectors as they are stored.

    q.(W_k h) = (W_k' q).h and sum w (W_v h) = W_v (sum w h): a token costs O(n d) a head, and no key or value is made.
    """

    fused = None  # it stores no keys and values

    def __init__(self, config: MARMSizes) -> None:
        super().__init__(config.dim, config.heads, config.dropout)
        self.search, self.top_k, self.groups = config.search, config.top_k, config.groups

    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        """Queries [B, H, M, d] (with a channel more for the token's group) and one field `hidden` [B, 1, M, d]."""
        hidden = self.norm_attention(x)
        w_q, w_k, _ = self.qkv.weight.chunk(3)
        q = F.linear(hidden, w_q, self.qkv.bias.chunk(3)[0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        q = (q * self.scale) @ w_k.unflatten(0, (self.heads, -1))  # a key's bias is the same for all slots: softmax
        hidden = hidden.unsqueeze(1).contiguous()
        if self.search == "group":
            q = torch.cat([q, self._group(hidden).to(q.dtype).unsqueeze(-1).expand(*q.shape[:3], 1)], -1)
        return q, {"hidden": hidden}, None

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        w_v, b_v = (y.chunk(3)[2].unflatten(0, (self.heads, -1)) for y in (self.qkv.weight, self.qkv.bias))
        return super().combine(x, mixed @ w_v.mT + b_v.unsqueeze(1), gate)  # weights sum to 1: the bias as it is

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        hidden = segment.fields["hidden"]
        if self.search != "group":
            return hidden.dot(q)
        elsewhere = q[..., -1:] != self._group(hidden.dense()).unsqueeze(-2)
        return hidden.dot(q[..., :-1]).masked_fill(elsewhere, -torch.inf)

    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        """Softmax over all sources, or over the top_k slots of all sources that the search finds."""
        if self.search == "none":
            return super().weigh(logits, masks, masses)
        counted = [x if m is None else x + m.clamp(min=1e-6).log().unsqueeze(2) for x, m in zip(logits, masses)]
        joined = torch.cat([x.masked_fill(~mask, -torch.inf) for x, mask in zip(counted, masks)], -1)
        score = joined.detach()
        if self.search == "group":  # sources and slots come in time order
            score = torch.where(score.isfinite(), torch.arange(score.shape[-1], device=score.device), -1)
        found = score.topk(min(self.top_k, score.shape[-1]), -1).indices
        kept = torch.zeros_like(joined, dtype=torch.bool).scatter_(-1, found, True)
        weights = joined.masked_fill(~kept, -torch.inf).softmax(-1)
        return list(weights.split([x.shape[-1] for x in logits], -1))

    def mix(self, weights: Tensor, segment: Segment) -> Tensor:
        """[B, H, M, S] -> [B, H, M, d]; after a search in a state only the slots found are touched."""
        hidden = segment.fields["hidden"]
        if not self._gathers(segment):
            return hidden.mix(weights)
        top = weights.topk(self.top_k, -1)
        rows = take(hidden.dense(), top.indices.flatten(2)).unflatten(2, top.indices.shape[2:])
        return (top.values.unsqueeze(-2) @ rows).squeeze(-2)

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        if self.search != "none":
            return Block.causal(self, q, own, places, asked)
        hidden = own["hidden"].expand(-1, self.heads, -1, -1)
        return F.scaled_dot_product_attention(q, hidden, hidden, is_causal=True, scale=1.0)

    def causal_blocks(
        self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places
    ) -> Iterator[tuple[Tensor, Segment, slice]]:
        for weights, part, rows in super().causal_blocks(q, own, places, asked):
            yield weights, replace(part, slots=None), rows  # no state: many queries share the slots

    def logit_flops(self, queries: int, segment: Segment) -> int:
        return segment.fields["hidden"].flops(queries * self.heads)

    def attend_flops(self, queries: int, segment: Segment) -> int:
        search = self.logit_flops(queries, segment)
        if not self._gathers(segment):
            return 2 * search
        return search + 2 * queries * self.heads * self.top_k * segment.fields["hidden"].shape[3]

    def causal_pairs(self, slots: int) -> int:
        return super().causal_pairs(slots) if self.search == "none" else block_pairs(slots)

    def _group(self, hidden: Tensor) -> Tensor:
        """Cross-polytope hash, [B, 1, S] int64: the largest of the leading coordinates in size, and its sign."""
        leading = hidden[..., : self.groups // 2]
        return torch.cat([leading, -leading], -1).argmax(-1)

    def _gathers(self, segment: Segment) -> bool:
        stored = segment.slots is not None and isinstance(segment.fields["hidden"], Dense)
        return self.search != "none" and stored and _GATHER * self.top_k <= segment.width


class MemoryCache:
    """What each layer gave for each user's events, with the training step whose parameters made it.

    An entry belongs to a user and a place in the kept history, and is found where the item at that place is the one
    asked for, so an item met twice has two entries (the paper does not tell its key). Layer 0 is not cached: it is the
    item's embedding, which is always at hand.

    refresh: the stream writes an event again in every so many-th epoch; 0: never, entries stay as first written.
    vectors: [users, max_length, L - 1, d] float32; items, steps: [users, max_length] (item 0: no entry); now: steps
    trained so far; asked, found: events looked up and those that had an entry.
    """

    def __init__(self, users: int, config: MARMSizes, refresh: int = 1) -> None:
        self.vectors = torch.zeros(users, config.max_length, config.layers - 1, config.dim)
        self.items = torch.zeros(users, config.max_length, dtype=torch.int32)
        self.steps = torch.zeros(users, config.max_length, dtype=torch.long)
        self.refresh, self.now, self.asked, self.found = refresh, 0, 0, 0

    @property
    def hit_rate(self) -> float:
        """Share of the events looked up so far that had an entry; nan before the first look-up."""
        return self.found / self.asked if self.asked else float("nan")

    def held(self, users: Tensor, events: Events) -> Tensor:
        """True where an event has an entry, [B, S]; raises ValueError for more events than a user has places."""
        width, places = events.items.shape[1], self.items.shape[1]
        if width > places:
            raise ValueError(f"this memory has max_length={places} places a user, the history has {width} events")
        return (self.items[users, :width] == events.items) & events.mask()

    def look_up(self, users: Tensor, events: Events) -> tuple[Tensor, Tensor]:
        """Entries [B, S, L - 1, d] of users [B], and where there is one, [B, S] bool."""
        held = self.held(users, events)
        self.asked, self.found = self.asked + int(events.count.sum()), self.found + int(held.sum())
        return self.vectors[users, : held.shape[1]], held

    def write(self, users: Tensor, events: Events, state: UserState, where: Tensor) -> None:
        """Write the outputs in a full state of the events down, where [B, S] is True, as of the step `now`."""
        row, place = (where & events.mask()).nonzero(as_tuple=True)
        at = users[row], place
        self.items[at], self.steps[at] = events.items[row, place], self.now
        for i, (segment,) in enumerate(state.layers[1:]):
            self.vectors[(*at, i)] = segment.fields["hidden"].dense()[row, 0, place].detach()


@dataclass(frozen=True)
class Gap:
    """What a cache of older parameters does to a read; age: mean training steps since the entries were written.

    error: |read - fresh read| / |fresh read|; overlap: share of the fresh top ten items that stay in the top ten.
    """

    hit_rate: float
    age: float
    error: float
    overlap: float


@register("marm")
class MARM(AttentionBackbone):
    """The newest item attends, layer by layer, to the cached outputs that the layer below gave for each past item.

    From the paper: what is cached per user, item and layer is the attention block's output, so a state is L x n x d
    numbers; layer 0 is the item itself; multi-layer target attention, O(n d) a layer; results are written back; with
    SIM, each layer searches its own history. Ours, where the paper is silent: the masked self-attention stack is
    SASRec's (pre-norm, learned positions, the same weights by the same names); an output is stored as the next layer
    reads it, normalised; key and value maps are absorbed into query and mixture; training goes through the stack, not
    through cached outputs; what a cache misses is built by the stack; a search by group hashes the layer's stored
    vectors (cross-polytope), as ids are no part of a state. Searches score every slot: they save the mixture only.
    """

    paper = "MARM, the Memory Augmented Recommendation Model, Kuaishou, CIKM 2025, arXiv 2411.09425"
    Config = MARMSizes
    fields = ("hidden",)

    def __init__(self, config: MARMSizes, n_items: int, has_time: bool = False) -> None:
        super().__init__(config, n_items, lambda: MARMBlock(config))
        self.norm = torch.nn.LayerNorm(config.dim)
        self.memory: MemoryCache | None = None

    def _output(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return F.normalize(x, dim=-1) if self.config.head == "cosine" else x

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        """A look-up in `memory` where there is one and users are named, else built by the masked self-attention stack.

        Statistics are those of the stack, and means over heads: all heads share a slot.
        """
        if self.memory is not None and users is not None and stats == Stats():
            return Prefill(self.recall(self.memory, users, events), users, events, seed=seed)
        built = super().prefill(events, users, stats, seed)
        received, newest = (
            None if xs is None else [x.mean(1, keepdim=True) for x in xs] for xs in (built.column_sum, built.window)
        )
        state = built.state if self.memory is None or users is None else self.recall(self.memory, users, events)
        return replace(built, state=state, column_sum=received, window=newest)

    def recall(self, memory: MemoryCache, users: Tensor, events: Events) -> UserState:
        """The state of users [B] from what is cached; what is not is built from the events alone and written back."""
        cached, held = memory.look_up(users, events)
        missed = events.mask() & ~held
        if bool(missed.any()):
            built = super().prefill(events).state
            memory.write(users, events, built, missed)
            cached = memory.vectors[users, : events.items.shape[1]]
        positions = torch.arange(events.items.shape[1], device=events.items.device)[None]
        itself = self.blocks[0].norm_attention(self._embed(events, positions))
        slots = Slots(events.count[:, None])
        hidden = [itself, *cached.unbind(2)]
        return UserState(tuple((Segment({"hidden": Dense(x.unsqueeze(1))}, slots),) for x in hidden), events.count)


def stream(
    backbone: MARM,
    log: Events,
    optimizer: torch.optim.Optimizer,
    memories: Sequence[MemoryCache],
    *,
    epochs: int,
    chunk: int = 8,
) -> None:
    """Train through the log in time order, all users side by side, `chunk` events a step, epoch after epoch.

    log: row u is user u of the memories. After each step the chunk's events attend to what a memory holds of the past,
    and their outputs are written to it with the parameters of that step, so in one epoch entries differ in age.
    """
    users, width = torch.arange(len(log.count)), log.items.shape[1]
    place = torch.arange(width)
    for epoch in range(epochs):
        for start in range(0, width, chunk):
            seen = _first(log, start + chunk)
            following = _first(log, start + chunk + 1).items[:, 1:]
            targets = F.pad(following, (0, seen.items.shape[1] - following.shape[1]))
            targets[:, :start] = 0  # learned in earlier steps
            if bool(targets.any()):
                backbone.train()
                optimizer.zero_grad()
                backbone.loss(Batch(seen, targets)).backward()
                optimizer.step()
            backbone.eval()
            with torch.no_grad():
                for memory in memories:
                    memory.now += 1
                    state = backbone.recall(memory, users, _first(log, start))
                    new = (seen.count - state.length).clamp(min=0)
                    grown = backbone.append(state, seen.last(new))
                    fresh = memory.refresh > 0 and epoch % memory.refresh == 0
                    due = torch.full_like(seen.items, fresh, dtype=torch.bool) | ~memory.held(users, seen)
                    memory.write(users, seen, grown, due & (place[: seen.items.shape[1]] >= start))


def read_gap(backbone: MARM, memory: MemoryCache, users: Tensor, history: Events, tokens: Events) -> Gap:
    """How far reads of tokens [B, M] from the memory are from reads of a state built with today's parameters."""
    held, age = memory.held(users, history), memory.now - memory.steps[users, : history.items.shape[1]]
    with torch.no_grad():
        fresh = backbone.read(tokens, AttentionBackbone.prefill(backbone, history).state)[tokens.mask()]
        stale = backbone.read(tokens, backbone.recall(memory, users, history))[tokens.mask()]
        top, kept = ((x @ backbone.catalogue().T).topk(min(10, backbone.n_items)).indices for x in (fresh, stale))
    same = (top.unsqueeze(-1) == kept.unsqueeze(-2)).any(-1).float().mean()
    return Gap(
        hit_rate=float(held.sum() / history.count.sum()),
        age=float(age[held].float().mean()),
        error=float((stale - fresh).norm() / fresh.norm()),
        overlap=float(same),
    )


def _first(events: Events, n: int) -> Events:
    """The oldest n events of each user."""
    return Events(events.items[:, :n], events.count.clamp(max=n))
