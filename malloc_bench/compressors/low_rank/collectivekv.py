"""CollectiveKV: most of a key and value comes from a pool that all users share, a few numbers are the event's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import Block
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import converted, layers, narrow, outputs, swap
from malloc_bench.compressors.trimmed import refusal
from malloc_bench.registry import register
from malloc_bench.state import Batch, Dense, Events, Pool, Pooled, Prefill, Segment, Stats, UserState, Vectors, extend

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

SHARED = ("keys", "values")
BALANCE = 0.01  # of the loss that spreads events over the pool


class PoolBlock(Block):
    """Comes before a block's own class. Its fused map ends with a router's scores of each entry, for keys and values.

    pool_keys, pool_values: [P, H, D - own]. uneven: how unevenly the last training batch used them, 1 at best.
    """

    pool_keys: nn.Parameter
    pool_values: nn.Parameter
    uneven: Tensor

    def projection(self) -> None:
        return None

    def split(self, mapped: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        part = dict(zip(self.parts, mapped.split(list(self.parts.values()), -1)))
        heads = {name: x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for name, x in part.items() if name != "gate"}
        own, codes, uneven = {}, [], []
        for name, scores in zip(SHARED, part["route"].chunk(2, -1)):
            best, code = scores.max(-1)  # [B, M]
            gate = torch.sigmoid(best)[..., None, None]
            rows = getattr(self, f"pool_{name}")[code] * (1 + gate - gate.detach())  # [B, M, H, D - own]
            own[name] = torch.cat([rows.transpose(1, 2).to(mapped.dtype), heads[name]], -1)
            codes.append(code)
            if self.training:
                used = torch.bincount(code.flatten(), minlength=scores.shape[-1]).to(scores.dtype) / code.numel()
                uneven.append(scores.shape[-1] * used @ scores.softmax(-1).flatten(0, -2).mean(0))
        if uneven:
            vars(self)["uneven"] = torch.stack(uneven).mean()
        return heads["queries"], {**own, "codes": torch.stack(codes, -1)[:, None]}, part.get("gate")

    def stored(self, fields: Mapping[str, Tensor]) -> dict[str, Vectors]:
        """What a state keeps of tokens; in training the vectors, through which alone a router learns."""
        if self.training:
            return {name: Dense(fields[name]) for name in SHARED}
        made: dict[str, Vectors] = {}
        for name, code in zip(SHARED, fields["codes"].short().split(1, -1)):
            pool = getattr(self, f"pool_{name}")
            made[name] = Pooled(code, fields[name][..., pool.shape[2] :].contiguous(), Pool(pool))
        return made

    def attend_flops(self, queries: int, segment: Segment) -> int:
        return sum(segment.fields[name].flops(queries) for name in SHARED)


class PoolBackbone(AttentionBackbone):
    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        full = super().prefill(events, users, stats, seed)  # type: ignore[safe-super]
        whole = [{name: x.dense() for name, x in segment.fields.items()} for segment in full.state.segments()]
        kept = [Segment(b.stored(x), s.slots) for b, x, s in zip(self.blocks, whole, full.state.segments())]
        return replace(full, state=replace(full.state, layers=tuple((segment,) for segment in kept)))

    def _grown(self, state: UserState, own: list[dict[str, Tensor]], events: Events, positions: Tensor) -> UserState:
        return extend(state, [b.stored(fields) for b, fields in zip(self.blocks, own)], events, self.uses_times)

    def loss(self, batch: Batch) -> Tensor:
        return self._balanced(super().loss(batch))

    def ranking_loss(self, history: Events, tokens: Events, labels: Tensor) -> Tensor:
        return self._balanced(super().ranking_loss(history, tokens, labels))

    def _balanced(self, loss: Tensor) -> Tensor:
        if not self.training:
            return loss
        loss = loss + BALANCE * sum(block.uneven for block in self.blocks)
        for block in self.blocks:
            vars(block)["uneven"] = block.uneven.detach()  # a copy of the backbone has no use for the batch's graph
        return loss


@register("collectivekv")
@dataclass(frozen=True)
class CollectiveKV(Structural):
    """Keys and values whose larger part is an entry of a pool of learned rows, chosen by a router (2601.19178, 2026).

    own: numbers of an event's own, in each head, key and value. pool: entries, of keys and of values in each layer; a
    row holds all heads. From the paper: the parts, the argmax router, a loss that balances it. Ours: the router learns
    by a sigmoid gate whose gradient passes straight through, so that the gate need not be read (no peak loss); own
    numbers are as the backbone makes its keys, SiLU behind HSTU. The paper has 1 to 10 own numbers and 10,000 entries,
    as many as small catalogues have items; 512 here. Methods behind it see, and store, whole vectors.
    """

    own: int = 2
    pool: int = 512

    family = "low-rank"
    paper = "CollectiveKV, 2026, arXiv 2601.19178"
    formula = "k = [pool[argmax r(x)]; W x], v likewise with a pool and router of its own"
    growth = grows(memory="n L", read="n L d")
    stores = "of every event and layer two pool numbers (int16) and 2 x heads x `own` floats; the pools are parameters"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.own < 1 or not 2 <= self.pool <= 1 << 15:
            raise ValueError(f"collectivekv: own >= 1 and 2 <= pool <= 32768 are needed, not {self.own}, {self.pool}")

    def supports(self, backbone: Backbone) -> str | None:
        if why := refusal(self.name, backbone):
            return why
        width = min(block.parts["keys"] // block.heads for block in layers(backbone))
        return None if self.own < width else f"collectivekv: own={self.own} leaves nothing of a head's {width} to share"

    def adapt(self, backbone: Backbone) -> None:
        for block in layers(backbone):
            rows, width = outputs(block), block.parts["keys"] // block.heads
            spread = getattr(block, str(block.fused)).weight.detach().std()
            last = {
                name: rows[name].unflatten(0, (block.heads, -1))[:, width - self.own :].flatten() for name in SHARED
            }
            narrow(block, rows | last | {"route": torch.zeros(2 * self.pool).long()})  # drawn anew below
            linear = getattr(block, str(block.fused))
            nn.init.normal_(linear.weight[-2 * self.pool :].detach(), std=float(spread))
            for name in SHARED:
                drawn = torch.randn(self.pool, block.heads, width - self.own, device=linear.weight.device)
                drawn = drawn * spread * linear.in_features**0.5  # as large as what they stand for
                block.register_parameter(f"pool_{name}", nn.Parameter(drawn))
            swap(block, PoolBlock)
        swap(backbone, PoolBackbone)

    def convert(self, weights: Mapping[str, Tensor], adapted: Backbone) -> dict[str, Tensor]:
        """Each head's last channels stay; pools and routers begin fresh."""

        def shortened(block: Block, parts: dict[str, Tensor]) -> dict[str, Tensor]:
            for name in SHARED:
                parts[name] = parts[name].unflatten(0, (block.heads, -1))[:, -self.own :].flatten(0, 1)
            linear = getattr(block, str(block.fused))
            rows = [linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]]
            return parts | {"route": torch.cat(rows, 1)[-2 * self.pool :].detach()}

        return converted(weights, adapted, shortened)
