"""Climber (NetEase Cloud Music, CIKM 2025, arXiv 2502.09888; its first version names the model ASTRO)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any, Literal

import torch
from torch import Tensor, nn

from malloc_bench.backbones.attention import AttentionBackbone, fill, over
from malloc_bench.backbones.base import Backbone
from malloc_bench.backbones.block import BLOCK, Block, Known, Places, block_pairs, each_stores
from malloc_bench.backbones.climber_partition import SCENARIOS, STRATEGIES, TIMED, balanced, compact
from malloc_bench.backbones.folded import read_flops
from malloc_bench.backbones.hstu import TIME_BUCKETS, relative_bias
from malloc_bench.backbones.items import Sizes
from malloc_bench.backbones.probing import Watch, probe_flops, sent
from malloc_bench.backbones.sasrec import SASRecBlock
from malloc_bench.registry import register
from malloc_bench.state import Dense, Events, Layer, Prefill, Segment, Slots, Stats, UserState, grow, take


@dataclass(frozen=True)
class ClimberSizes(Sizes):
    """blocks: sub-sequences N_b, each with a stack of `layers` of its own.

    strategy: what deals events out to blocks: item_hash; category, whole categories of items (`Dataset.categories`) so
    that blocks have about as many items each; feedback, equal bands of what the user did (`Dataset.kinds`); stride, the
    position in the kept history modulo `blocks`; part_of_day, equal parts of the day; day_of_week, equal parts of the
    week (at most 7 blocks). Days are UTC. scenario: what each temperature is learned for, by the moment at which the
    prediction is asked for: one for all, part_of_day (quarters), or weekend (and not). What asks for days reads times.
    """

    blocks: int = 2
    strategy: Literal["item_hash", "category", "feedback", "stride", "part_of_day", "day_of_week"] = "item_hash"
    scenario: Literal["one", "part_of_day", "weekend"] = "one"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("strategy", (*STRATEGIES, "category")), ("scenario", SCENARIOS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        most = {"day_of_week": 7, "feedback": 256}.get(self.strategy, self.max_length)
        if not 1 <= self.blocks <= most:
            raise ValueError(f"blocks must be 1 to {most} with strategy {self.strategy}, not {self.blocks}")


class AdaptiveBlock(SASRecBlock):
    """Softmax((QK' + relative bias) / temperature) V, then a feed-forward (paper, adaptive transformer layer)."""

    def __init__(self, config: ClimberSizes, times: bool, bias: bool = True) -> None:
        super().__init__(config.dim, config.heads, config.dropout)
        scenarios, self.scenario = SCENARIOS[config.scenario]
        self.temperature = nn.Parameter(torch.full((scenarios,), log(config.dim / config.heads) / 2))  # its logarithm
        self.scale = 1.0  # the temperature stands for sqrt(d), and begins there
        self.position_bias = self.time_bias = None
        if bias:
            self.position_bias = nn.Parameter(torch.empty(config.max_length + 1).normal_(std=0.02))
            self.time_bias = nn.Parameter(torch.empty(TIME_BUCKETS + 1).normal_(std=0.02)) if times else None

    biased = True
    fused = None  # `among` takes keys and values of all heads
    causal = Block.causal  # blockwise: the bias is in the way of SASRec's kernel
    causal_pairs = Block.causal_pairs
    in_tiles = Block.in_tiles

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        pairs = Places(slots.positions.unsqueeze(-2), None if slots.times is None else slots.times.unsqueeze(-2))
        return self._adapt(segment.fields["keys"].dot(q), queries, pairs)

    def asking(self, q: Tensor, asked: Places) -> Tensor:
        return self._cooled(q, asked)

    def _adapt(self, raw: Tensor, asked: Places, slots: Places) -> Tensor:
        """Logits [B, H, M, S] from products; asked [B or 1, 1, M], slots [B or 1, H or 1, M or 1, S]."""
        if self.position_bias is not None:
            gap = None
            if asked.times is not None and slots.times is not None:
                gap = asked.times.unsqueeze(-1) - slots.times
            raw = raw + relative_bias(
                self.position_bias, self.time_bias, asked.positions.unsqueeze(-1) - slots.positions, gap
            )
        return self._cooled(raw, asked)

    def _cooled(self, raw: Tensor, asked: Places) -> Tensor:
        """[B, H, M, ...] over the temperature of each query's scenario."""
        if asked.times is None or len(self.temperature) == 1:
            return raw / self.temperature.exp()
        return raw / self.temperature.exp()[self.scenario(asked.times)].unsqueeze(-1)

    def among(
        self, q: Tensor, own: dict[str, Tensor], index: Tensor, seen: Tensor, places: Places, asked: Places
    ) -> Tensor:
        """All S tokens over their block's events before them and themselves, [B, H, S, D].

        index: [B, K], the block's events among the tokens; seen: [B, S, K], those that a token sees.
        """
        keys, values = (take(own[name], index[:, None]) for name in ("keys", "values"))
        segment = Segment({"keys": Dense(keys)}, None)
        times = None if places.times is None else places.times[:, 0].gather(1, index)[:, None]
        itself = Places(places.positions.unsqueeze(-1), None if places.times is None else places.times.unsqueeze(-1))
        mine = self._adapt((q * own["keys"]).sum(-1, keepdim=True), asked, itself)
        mixed = []
        for start in range(0, max(q.shape[2], 1), BLOCK):
            rows = slice(start, start + BLOCK)
            logits = self.logits(q[:, :, rows], segment, asked.rows(rows), Places(index[:, None], times))
            logits = logits.masked_fill(~seen[:, None, rows], -torch.inf)
            weights = torch.cat([logits, mine[:, :, rows]], -1).softmax(-1)
            mixed.append(weights[..., :-1] @ values + weights[..., -1:] * own["values"][:, :, rows])
        return torch.cat(mixed, dim=2)


class Fusion(nn.Module):
    """Bit-wise gating: G = ATL(E) over the blocks' vectors, Y = G * sigmoid(squeeze-and-excitation(G)), then a map."""

    def __init__(self, config: ClimberSizes) -> None:
        super().__init__()
        self.layer = AdaptiveBlock(config, times=False, bias=False)
        wide = config.blocks * config.dim
        self.squeeze, self.excite = nn.Linear(wide, config.dim), nn.Linear(config.dim, wide)
        self.score = nn.Linear(wide, config.dim)

    def forward(self, x: Tensor, asked: Places) -> Tensor:
        """x [B, M, N_b, d] -> [B, M, d]"""
        b, m, n, _ = x.shape
        q, own, _ = self.layer.project(x.flatten(0, 1))
        times = None if asked.times is None else asked.times[:, 0].expand(b, m).reshape(b * m, 1, 1).expand(-1, 1, n)
        where = Places(torch.zeros(1, 1, n, device=x.device), times)
        segment = Segment({name: Dense(v) for name, v in own.items()}, None)
        weights = self.layer.logits(q, segment, where, where).softmax(-1)
        g = self.layer.combine(x.flatten(0, 1), self.layer.mix(weights, segment), None).view(b, m, -1)
        return self.score(g * torch.sigmoid(self.excite(torch.relu(self.squeeze(g)))))

    def flops(self, tokens: int) -> int:
        blocks = self.score.in_features // self.score.out_features
        maps = sum(x.in_features * x.out_features for x in (self.squeeze, self.excite, self.score))
        attention = 4 * blocks**2 * self.score.out_features
        return self.layer.linear_flops(tokens * blocks) + tokens * (2 * maps + attention)


@register("climber")
class Climber(AttentionBackbone):
    """A transformer over N_b parts of the history: adaptive layers of each part's own, fused by a gate.

    From the paper: events of the whole history are partitioned into blocks; each block has its own layers; a bias of
    positions and times is added to QK', then a temperature of layer, block and scenario divides, in the place of
    sqrt(d); the blocks' vectors go through one more such layer without bias and a bit-wise gate. Making the state costs
    n^2 d / N_b where blocks are equal, for an event passes through the layers of its own block only.

    Ours, where the paper is silent. The paper filters by behaviour; here what users did is one strategy of several, and
    each event is in exactly one block, for good: `stride` too counts from the first event that is kept, so append
    equals prefill up to `max_length`, but a window that begins one event later deals all of them out anew. A
    prediction behind event t fuses all blocks: in each block b a chain of hidden vectors of t starts from its embedding
    and attends, layer by layer, to b's own events before t (their vectors in that layer) and to itself. In t's own
    block that chain is what is stored of t; in the others nothing is stored, so a candidate needs no feedback. So
    `read` over the state equals the plain pass, and training, which asks for a prediction behind every event, costs
    n^2 d. Pre-norm residual layers as in `sasrec`, bias tables as in `hstu`, positions in the whole history,
    temperatures exp(a learned number), a two-layer gate over all N_b d numbers and a linear map behind it; the
    scenario is the moment of the request.

    State: `layers` for block 0, then for block 1, ...; the layers of a block share slots, with positions. Attention
    statistics are those of a block's own events.
    """

    paper = "Climber: Toward Efficient Scaling Laws for Large Recommendation Models, CIKM 2025, arXiv 2502.09888"
    Config = ClimberSizes
    uses_positions = True
    config: ClimberSizes
    block_of: Tensor  # of each item, with strategy category

    def __init__(self, config: ClimberSizes, n_items: int, has_time: bool = False) -> None:
        if not has_time and (config.strategy in TIMED or config.scenario != "one"):
            raise ValueError(
                f"climber with strategy {config.strategy} and scenario {config.scenario} reads times, which this data "
                "does not have: take item_hash, feedback or stride, and scenario one"
            )
        super().__init__(config, n_items, lambda: AdaptiveBlock(config, has_time))
        self.blocks.extend(AdaptiveBlock(config, has_time) for _ in range((config.blocks - 1) * config.layers))
        self.fusion, self.norm = Fusion(config), nn.LayerNorm(config.dim)
        self.uses_times = has_time
        self.uses_categories = config.strategy == "category"
        if self.uses_categories:
            self.register_buffer("block_of", torch.full((n_items + 1,), -1))  # a checkpoint keeps it

    def categorise(self, categories: Tensor) -> None:
        self.block_of.copy_(balanced(categories, self.config.blocks))

    def _output(self, x: Tensor) -> Tensor:
        return self._head(self.norm(x))

    def _stacks(self) -> list[slice]:
        """The layers of each block, among `self.blocks` and a state's layers."""
        depth = self.config.layers
        return [slice(b * depth, (b + 1) * depth) for b in range(self.config.blocks)]

    def _partition(self, events: Events, positions: Tensor) -> list[Tensor]:
        """For each block which events are its own, [B, S] bool; positions [B or 1, S]."""
        if self.uses_categories:
            if self.block_of[0] < 0:
                raise ValueError("climber with strategy category does not know the items' categories: call categorise")
            at = self.block_of[events.items.long()]
        else:
            at = STRATEGIES[self.config.strategy](events, positions, self.config.blocks)
        return [at == b for b in range(self.config.blocks)]

    def _groups(self, events: Events, positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each block its events in time order, [B, K], of which the first [B] count."""
        real = events.mask()
        return [compact(own & real) for own in self._partition(events, positions)]

    def forward(self, events: Events) -> Tensor:
        positions = torch.arange(events.items.shape[1], device=events.items.device)[None]
        places, asked = self._places(events, positions)
        embedded, outputs = self._embed(events, positions), []
        for part, (index, count) in zip(self._stacks(), self._groups(events, positions)):
            before = index[:, None] < positions[..., None]
            seen = before & (torch.arange(index.shape[1], device=index.device) < count[:, None])[:, None]
            x = embedded
            for block in list(self.blocks)[part]:
                q, own, gate = block.project(x)
                x = block.combine(x, block.among(q, own, index, seen, places, asked), gate)
            outputs.append(x)
        return self._output(self.fusion(torch.stack(outputs, 2), asked))

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        b, s = len(events.items), self.admit(events)
        self._places(events, events.items)  # refuses events without the times that it reads
        layers: list[Layer] = []
        seen: dict[str, list[Tensor]] = {}
        positions = torch.arange(s, device=events.items.device)[None]
        for part, (index, count) in zip(self._stacks(), self._groups(events, positions)):
            own = events.take(index, count)
            places, asked = self._places(own, index)
            slots = Slots(count[:, None], index[:, None].int(), places.times)
            made, known = fill(list(self.blocks)[part], self._embed(own, index), places, asked, slots, stats)
            layers += made
            for name, each in known.items():
                seen.setdefault(name, []).extend(each)
        ids = torch.arange(b) if users is None else users
        state = UserState(tuple(layers), events.count)
        uses = {"uses_positions": self.uses_positions, "uses_kinds": self.config.strategy == "feedback"}
        found: dict[str, Any] = {**seen, **uses, **self._known_maps(stats), "stacks": self.config.blocks}
        return Prefill(state, ids, events, seed=seed, **found)

    def _over(
        self,
        tokens: Events,
        positions: Tensor,
        state: UserState,
        own_mask: Tensor | None,
        watch: Watch | None = None,
        known: Known | None = None,
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        places, asked = self._places(tokens, positions)
        embedded = self._embed(tokens, positions)
        masks: list[Tensor | None] = [None] * self.config.blocks
        if own_mask is not None:  # new events; candidates are in no block
            itself = torch.eye(own_mask.shape[-1], dtype=torch.bool, device=own_mask.device)
            masks = [own_mask & (own[:, None, None] | itself) for own in self._partition(tokens, positions)]
        outputs: list[Tensor] = []
        stored: list[dict[str, Tensor]] = []
        for part, mask in zip(self._stacks(), masks):
            layers = state.layers[part]
            x, own = over(list(self.blocks)[part], embedded, mask, layers, state.length, places, asked, watch, known)
            outputs.append(x)
            stored += own
        return self.fusion(torch.stack(outputs, 2), asked), stored

    def watch(self, state: UserState, events: Events, grown: UserState, stats: Stats) -> dict[str, Any]:
        return Backbone.watch(self, state, events, grown, stats)  # which new events are of a block is not followed

    def _grown(self, state: UserState, own: list[dict[str, Tensor]], events: Events, positions: Tensor) -> UserState:
        layers: list[Layer] = []
        for part, (index, count) in zip(self._stacks(), self._groups(events, positions)):
            chosen = events.take(index, count)
            times = chosen.times[:, None] if self.uses_times and chosen.times is not None else None
            tail = Slots(count[:, None], positions.gather(1, index)[:, None].int(), times)
            new = [{name: take(v, index[:, None]) for name, v in fields.items()} for fields in own[part]]
            layers += grow(state.layers[part], new, tail) if index.shape[1] else state.layers[part]
        return UserState(tuple(layers), state.length + events.count)

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        """As for every backbone. Of a prefill and its statistics: `state`, the full state that comes out, says how wide
        each block is; without it blocks are of equal size. New events pass through every block, as candidates do."""
        n, raw = self.config.blocks, None if state is None else state.events
        widths = [(tokens + b) // n for b in range(n)]
        if raw is not None:
            positions = torch.arange(raw.items.shape[1], device=raw.items.device)[None]
            widths = [index.shape[1] for index, _ in self._groups(raw, positions)]
        elif state is not None and step in ("prefill", "statistics"):
            widths = [state.layers[part.start][0].width for part in self._stacks()]
        probes = {"prefill": 0, "statistics": sent(stats)}  # they come out of the stacks as candidates do
        total = self.fusion.flops(probes.get(step, tokens))
        total += self._ranking_flops(stats) if step == "statistics" else 0
        for i, (block, event) in enumerate(each_stores(self.blocks, self.items.weight)):
            width = widths[i // self.config.layers]
            pair, filling = block.attend_flops(1, event), block.linear_flops(width)
            filling += pair * block.causal_pairs(width)
            if step == "statistics":
                total += 2 * self.config.heads * block_pairs(width) * stats.column_sum
                total += event.fields["keys"].flops(stats.window * width)
                total += probe_flops(block, event, width, stats)
            elif step == "prefill":
                total += filling
            else:
                total += block.linear_flops(tokens) + pair * (tokens if step == "read" else tokens**2)
                total += filling + pair * tokens * width if raw is not None else 0
                if state is not None and state.layers:
                    total += sum(read_flops(block, tokens, segment) for segment in state.layers[i])
        return total
