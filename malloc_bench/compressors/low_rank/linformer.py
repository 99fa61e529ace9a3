"""Linformer: keys and values projected along the history to a fixed number of slots, as running sums."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import BLOCK, Block, Places, block_pairs
from malloc_bench.backbones.folded import alone
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import layers, swap
from malloc_bench.compressors.trimmed import refusal
from malloc_bench.registry import register
from malloc_bench.state import Dense, Events, Prefill, Segment, Stats, UserState, Vectors

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

Memory = dict[str, Vectors]


class ProjectedBlock(Block):
    """Comes before a block's own class. maps: E of keys and F of values, [slots, max_length] each."""

    slots: int
    map_keys: nn.Parameter
    map_values: nn.Parameter
    slot_bias: nn.Parameter

    def weights_at(self, positions: Tensor, own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What events at positions [B or 1, M] add to each slot: [B or 1, H or 1, slots, M] for keys and for values."""
        index = positions.clamp(max=self.map_keys.shape[1] - 1)
        e, f = (x[:, index].transpose(0, 1).unsqueeze(1) for x in (self.map_keys, self.map_values))
        return e, f

    def begun(self, memory: Memory | None, maps: tuple[Tensor, Tensor] | None) -> tuple[Memory | None, Tensor | None]:
        """The sums that tokens go on from, and what theirs are divided by, [B, H, M or 1, slots]; None: nothing."""
        return memory, None

    def over(
        self, q: Tensor, own: dict[str, Tensor], memory: Memory | None, at: Tensor | None, places: Places, asked: Places
    ) -> Tensor:
        """Tokens [B, H, M, D] over a memory, themselves, and where `at` has their positions those before them too."""
        asked, places = (Places(p.positions.expand(len(q), -1, -1), p.times) for p in (asked, places))
        own_logits, mix_own = alone(self, q, own, asked, places)
        maps = None if at is None else self.weights_at(at, own)
        memory, total = self.begun(memory, maps)
        logits = q.new_zeros(*q.shape[:3], len(self.slot_bias)) if memory is None else memory["keys"].dot(q)
        total = torch.ones_like(logits[:1, :1, :1]) if total is None else total
        total = total.expand(-1, -1, q.shape[2], -1)
        out: list[Tensor] = []
        for start in range(0, max(q.shape[2], 1), BLOCK):
            rows, seen = slice(start, start + BLOCK), slice(0, start + BLOCK)
            among = logits[:, :, rows]
            if maps is not None:
                pairs = (q[:, :, rows] @ own["keys"][:, :, seen].mT).tril(start - 1)
                among = among + pairs @ maps[0][..., seen].mT
            every = torch.ones_like(among[:1, :1], dtype=torch.bool)
            among = among / total[:, :, rows] + self.slot_bias.to(q.dtype)
            w, _ = weights = self.weigh([among, own_logits[:, :, rows]], [every, every[..., :1]], [None, None])
            w = w / total[:, :, rows]
            mixed = torch.zeros_like(q[:, :, rows]) if memory is None else memory["values"].mix(w)
            if maps is not None:
                mixed = mixed + (w @ maps[1][..., seen]).tril(start - 1) @ own["values"][:, :, seen]
            out.append(torch.cat([mixed, weights[1]], -1))
        mixed, mine = torch.cat(out, 2).split([q.shape[3], 1], -1)
        return mixed + mix_own(mine)

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        return self.over(q, own, None, torch.arange(q.shape[2], device=q.device)[None], places, asked)

    def written(self, own: dict[str, Tensor], at: Tensor, real: Tensor, memory: Memory | None) -> dict[str, Tensor]:
        """A memory, [B, H, slots, D] a field, after events of which `real` [B, M] are there."""
        maps = dict(zip(("keys", "values"), self.weights_at(at, own)))
        new = {name: (maps[name] * real[:, None, None]) @ x for name, x in own.items()}
        return new if memory is None else {name: memory[name].dense() + v for name, v in new.items()}

    def memory_flops(self, step: str, tokens: int, memory: Memory | None) -> int:
        """Of what `over` and `written` do with a memory, None of a history that begins."""
        if memory is None:
            return 0
        return sum(v.flops(tokens) + (v.dense_flops() if step != "read" else 0) for v in memory.values())


class ProjectedBackbone(AttentionBackbone):
    """Comes before a backbone's own class: of each layer one memory, which read and append see beside the tokens."""

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        s = self.admit(events)
        at = torch.arange(s, device=events.items.device)[None]
        _, memories = self._follow(events, at, [None] * len(self.blocks), True)
        ids = torch.arange(len(events.count)) if users is None else users
        return Prefill(_state(memories, events.count), ids, events, seed=seed)

    def read(self, tokens: Events, state: UserState) -> Tensor:
        if state.events is not None:  # raw events only: rebuild, then read
            state = self._rebuild(state, tokens)
        at = state.length.long()[:, None].expand(-1, tokens.items.shape[1])
        return self._follow(tokens, at, _memories(state), False)[0]

    def append(self, state: UserState, events: Events) -> UserState:
        length = self.grown(state, events)
        at = state.length.long()[:, None] + torch.arange(events.items.shape[1], device=events.items.device)
        return _state(self._follow(events, at.clamp(max=self.max_length), _memories(state), True)[1], length)

    def _follow(
        self, events: Events, at: Tensor, memories: Sequence[Memory | None], writes: bool
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Tokens at positions [B or 1, M] behind the memories: outputs and, where they write, what these become."""
        places, asked = self._places(events, at)
        x, grown = self._embed(events, at), []
        for block, memory in zip(self.blocks, memories):
            q, own, gate = block.project(x)
            x = block.combine(x, block.over(q, own, memory, at if writes else None, places, asked), gate)
            if writes:
                grown.append(block.written(own, at, events.mask().to(x.dtype), memory))
        return self._output(x), grown

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        if step == "statistics":
            return 0
        raw = 0 if state is None or state.events is None else state.events.items.shape[1]
        total = self.flops("prefill", raw) if raw else 0
        for block, memory in zip(self.blocks, [None] * len(self.blocks) if state is None else _memories(state)):
            width = sum(block.parts[name] for name in ("keys", "values"))  # of all heads
            total += block.linear_flops(tokens) + 2 * tokens * width  # over themselves
            total += block.memory_flops(step, tokens, memory) if memory is not None or not raw else 0
            if raw:
                total += 2 * tokens * block.slots * width
            if step != "read":
                pairs = block_pairs(tokens)
                total += 2 * pairs * (width + 2 * block.heads * block.slots) + 2 * tokens * block.slots * width
        return total


def _memories(state: UserState) -> list[Memory | None]:
    """Of each layer; None where it has been dropped."""
    return [dict(layer[0].fields) if layer else None for layer in state.layers]


def _state(memories: Sequence[dict[str, Tensor]], length: Tensor) -> UserState:
    return UserState(tuple((Segment({k: Dense(v) for k, v in m.items()}, None),) for m in memories), length)


@register("linformer")
@dataclass(frozen=True)
class Linformer(Structural):
    """Keys and values of all events, projected to `slots` rows by learned maps along the history (Wang et al., 2020).

    Causal by running sums: a token reads the sums over the events before it, beside itself, and an event is added to
    them once and forgotten. From the paper: maps of keys and of values, shared by the heads ("headwise"). Ours: the
    prefix sums; a layer's own maps; they begin as the mean of neighbouring events, so that nothing need be unlearned;
    a bias for each slot, as HSTU's bias of distances and gaps has nothing to act upon but the token itself. The paper
    has 128 or 256 rows for 512 tokens or more; 16 here for 100 to 200 events.
    """

    slots: int = 16

    family = "low-rank"
    paper = "Linformer, Wang et al. 2020, arXiv 2006.04768"
    formula = "keys_j = sum over i < t of E[j, i] k_i, values_j = sum of F[j, i] v_i: attention over j and itself"
    growth = grows(memory="m L d", read="m L d")
    stores = "`slots` keys and values in each layer, whatever the length of the history, also of an empty one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slots < 1:
            raise ValueError(f"linformer: slots must be at least 1, not {self.slots}")

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: "Backbone") -> None:
        length, device = backbone.max_length, next(backbone.parameters()).device
        owner = torch.arange(length, device=device) * self.slots // length  # of each event
        pooled = (owner == torch.arange(self.slots, device=device)[:, None]) * (self.slots / length)
        for block in layers(backbone):
            vars(block).update(slots=self.slots)
            for name in ("map_keys", "map_values"):
                block.register_parameter(name, nn.Parameter(pooled + 0.1 / length * torch.randn_like(pooled)))
            block.slot_bias = nn.Parameter(torch.zeros(self.slots, device=device))
            swap(block, ProjectedBlock)
        swap(backbone, ProjectedBackbone)
        backbone.has_slots = backbone.only_adds = False
