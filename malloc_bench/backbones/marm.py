"""MARM, the memory augmented recommendation model (Kuaishou, CIKM 2025, arXiv 2411.09425)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import Block, Places, block_pairs
from malloc_bench.backbones.folded import alone
from malloc_bench.backbones.items import Sizes
from malloc_bench.backbones.marm_cache import MemoryCache
from malloc_bench.backbones.sasrec import SASRecBlock
from malloc_bench.backbones.sums import Weigher, softmax
from malloc_bench.registry import register
from malloc_bench.state import Batch, Dense, Events, Prefill, Segment, Slots, Stats, UserState, Vectors, take

_GATHER = 8  # a gathered row costs about as much as so many that are multiplied in place


@dataclass(frozen=True)
class MARMSizes(Sizes):
    """As `Sizes`; search: each layer's own, over what it stores (GSU), before it attends to top_k slots (ESU).

    "dot": the slots whose product with the layer's query is largest, head by head. "group": the newest slots in the
    token's own of `groups` hashed groups. The token itself is one of the top_k.

    cached: retrieval trains as the paper does, on what is cached of the past, without a gradient.
    """

    search: Literal["none", "dot", "group"] = "none"
    top_k: int = 32
    groups: int = 8
    cached: bool = field(default=False, metadata={"unsaid": False})

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
            q = torch.cat([q, self._group(hidden).float().unsqueeze(-1).expand(*q.shape[:3], 1)], -1)
        return q, {"hidden": hidden}, None

    def projection(self) -> None:
        return None  # what is stored is the normed input itself

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        w_v, b_v = (y.chunk(3)[2].unflatten(0, (self.heads, -1)) for y in (self.qkv.weight, self.qkv.bias))
        return super().combine(x, mixed @ w_v.mT + b_v.unsqueeze(1), gate)  # weights sum to 1: the bias as it is

    def outputs(self) -> Tensor:
        """Of a unit of mixed hidden vectors: through the value map, then the output map."""
        return self.qkv.weight.chunk(3)[2].unflatten(0, (self.heads, -1)).mT @ self.out.weight.T.unflatten(
            0, (self.heads, -1)
        )

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        hidden = _keys(segment)
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
        hidden = _values(segment)
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

    def in_tiles(self, own: dict[str, Tensor], places: Places, asked: Places) -> tuple[Tensor, Tensor, Weigher] | None:
        hidden = own["hidden"].expand(-1, self.heads, -1, -1)
        return (hidden, hidden, softmax) if self.search == "none" else None

    def beside(self, q: Tensor, own: dict[str, Tensor], past: Tensor, places: Places, asked: Places) -> Tensor:
        """Each event's attention to itself and, of what is kept of those before it, `past` [B, 1, S, d], no other."""
        kept = Segment({"hidden": Dense(past)}, None)
        before = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril(-1)[None, None]
        among, mix_own = alone(self, q, own, asked, places)
        itself = torch.ones_like(among[:1, :1], dtype=torch.bool)
        older, mine = self.weigh([self.logits(q, kept, asked, places), among], [before, itself], [None, None])
        return self.mix(older, kept) + mix_own(mine)

    def causal_blocks(
        self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places
    ) -> Iterator[tuple[Tensor, Segment, slice]]:
        for weights, part, rows in super().causal_blocks(q, own, places, asked):
            yield weights, replace(part, slots=None), rows  # no state: many queries share the slots

    def logit_flops(self, queries: int, segment: Segment) -> int:
        return _keys(segment).flops(queries * self.heads)

    def attend_flops(self, queries: int, segment: Segment) -> int:
        search = self.logit_flops(queries, segment)
        if not self._gathers(segment):
            return search + _values(segment).flops(queries * self.heads)
        return search + 2 * queries * self.heads * self.top_k * _values(segment).shape[3]

    def causal_pairs(self, slots: int) -> int:
        return super().causal_pairs(slots) if self.search == "none" else block_pairs(slots)

    def _group(self, hidden: Tensor) -> Tensor:
        """Cross-polytope hash, [B, 1, S] int64: the largest of the leading coordinates in size, and its sign."""
        leading = hidden[..., : self.groups // 2]
        return torch.cat([leading, -leading], -1).argmax(-1)

    def _gathers(self, segment: Segment) -> bool:
        stored = segment.slots is not None and isinstance(_values(segment), Dense)
        return self.search != "none" and stored and _GATHER * self.top_k <= segment.width


def _keys(segment: Segment) -> Vectors:
    """Hidden vectors as they are asked; a compressor may store others to be mixed."""
    return segment.fields["keys" if "keys" in segment.fields else "hidden"]


def _values(segment: Segment) -> Vectors:
    return segment.fields["values" if "values" in segment.fields else "hidden"]


@register("marm")
class MARM(AttentionBackbone):
    """A decoder that caches each layer's outputs: the newest item attends to what the layer below gave for past items.

    From the paper: what is cached per user, item and layer is the attention block's output, so a state is L x n x d
    numbers; layer 0 is the item itself; multi-layer target attention, O(n d) a layer; results are written back; with
    SIM, each layer searches its own history. Ours, where the paper is silent: the masked self-attention stack is
    SASRec's (pre-norm, learned positions, the same weights by the same names); an output is stored as the next layer
    reads it, normalised; key and value maps are absorbed into query and mixture; what a cache misses is built by the
    stack; a search by group hashes the layer's stored vectors (cross-polytope), as ids are no part of a state. Searches
    score every slot: they save the mixture only. Training goes through the stack, or with `cached` as the paper's does:
    an event attends to itself and to what the memory holds of those before it, written when they were last trained on,
    with the parameters (and the dropout) of that step, here an epoch ago, and passes no gradient to it. Layer 0, the
    items, is no entry and does learn. An entry is found at its place, so training needs `window: newest`.
    """

    config: MARMSizes
    paper = "MARM, the Memory Augmented Recommendation Model, Kuaishou, CIKM 2025, arXiv 2411.09425"
    Config = MARMSizes
    fields = ("hidden",)

    def __init__(self, config: MARMSizes, n_items: int, has_time: bool = False) -> None:
        super().__init__(config, n_items, lambda: MARMBlock(config))
        self.norm = torch.nn.LayerNorm(config.dim)
        self.memory: MemoryCache | None = None
        self.entries: MemoryCache | None = None  # of the users that it trains on

    def _output(self, x: Tensor) -> Tensor:
        return self._head(self.norm(x))

    def carried(self, users: int) -> dict[str, Tensor]:
        if not self.config.cached:
            return {}
        held = self.entries = MemoryCache(users, self.config, device=self.items.weight.device)
        return {"vectors": held.vectors, "items": held.items, "steps": held.steps, "now": held.now}

    def loss(self, batch: Batch) -> Tensor:
        """With `cached`, and entries for the batch's users, over those; else through the stack."""
        if self.entries is None or batch.users is None:
            return super().loss(batch)
        self.entries.now += 1
        return self._told(self._over_entries(self.entries, batch.users, batch.events, batch.targets > 0), batch)

    def _over_entries(self, memory: MemoryCache, users: Tensor, events: Events, due: Tensor) -> Tensor:
        """`forward` over the entries of users [B], or where there are none over outputs of today without a gradient.

        What it gives for events that are due, [B, S] bool, is written back.
        """
        held = memory.held(users, events)[:, None, :, None]
        kept = memory.vectors[users, : events.items.shape[1]]
        positions = torch.arange(events.items.shape[1], device=events.items.device)[None]
        places, asked = self._places(events, positions)
        x, layers = self._embed(events, positions), []
        for i, block in enumerate(self.blocks):
            q, own, gate = block.project(x)
            layers.append((Segment({"hidden": Dense(own["hidden"])}, None),))
            if i:
                today = own["hidden"].detach()
                past = torch.where(held, kept[:, None, :, i - 1].to(today.dtype), today)
                mixed = block.beside(q, own, past, places, asked)
            else:
                mixed = block.causal(q, own, places, asked)
            x = block.combine(x, mixed, gate)
        memory.write(users, events, UserState(tuple(layers), events.count), due)
        return self._output(x)

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        """A look-up in `memory` where there is one and users are named, else built by the masked self-attention stack.

        Statistics are those of the stack.
        """
        if self.memory is not None and users is not None and stats == Stats():
            return Prefill(self.recall(self.memory, users, events), users, events, seed=seed)
        built = super().prefill(events, users, stats, seed)
        if self.memory is None or users is None:
            return built
        return replace(built, state=self.recall(self.memory, users, events))

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
