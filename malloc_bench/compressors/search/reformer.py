"""Reformer: a token sees those slots alone that fall into its bucket."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.backbones import block as plain
from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import Block, Places, block_pairs
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import converted, layers, narrow, outputs, swap
from malloc_bench.compressors.trimmed import NEVER, refusal
from malloc_bench.registry import register
from malloc_bench.state import Segment, Stats, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class HashBlock(Block):
    """Comes before a block's own class: keys are the directions of queries, slots of other buckets weigh nothing."""

    rotations: Tensor  # [rounds, D, buckets / 2]

    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        q, own, gate = super().project(x)  # type: ignore[safe-super]
        return q, {"keys": F.normalize(q, dim=-1), **own}, gate

    def buckets(self, x: Tensor) -> Tensor:
        """Of vectors [B, H, S, D], in each round: the nearest of the rotated axes and their opposites."""
        turned = torch.einsum("bhsd,rdk->bhrsk", F.normalize(x, dim=-1), self.rotations.to(x.dtype))
        return torch.cat([turned, -turned], -1).argmax(-1)  # [B, H, rounds, S]

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        asks, keys = self.buckets(q), self.buckets(segment.fields["keys"].dense().to(q.dtype))
        apart = (asks.unsqueeze(-1) != keys.unsqueeze(-2)).all(2)
        return super().logits(q, segment, queries, slots).masked_fill(apart, NEVER)

    causal, in_tiles = Block.causal, Block.in_tiles  # nothing faster knows of buckets

    def causal_pairs(self, slots: int) -> int:
        return block_pairs(slots)


class HashBackbone(AttentionBackbone):
    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        """Beside attention, the rotations of whatever is compared."""
        total = super().flops(step, tokens, state, stats)  # type: ignore[safe-super]
        if step == "statistics":
            rotated = [stats.window + tokens if stats.window else 0] * len(self.blocks)
        elif step == "prefill":
            ends = [min(start + plain.BLOCK, tokens) for start in range(0, tokens, plain.BLOCK)]
            rotated = [tokens + sum(ends)] * len(self.blocks)
        else:
            held = [()] * len(self.blocks) if state is None else state.layers
            rotated = [2 * tokens + sum(tokens + segment.width for segment in layer) for layer in held]
        return total + sum(2 * n * b.heads * b.rotations.numel() for n, b in zip(rotated, self.blocks))


@register("reformer")
@dataclass(frozen=True)
class Reformer(Structural):
    """Attention within buckets of a locality-sensitive hash, queries and keys of one map (Kitaev et al., ICLR 2020).

    From the paper: shared queries and keys, keys of length 1, random rotations, several rounds, of which one that
    agrees is enough. Ours: a token always sees itself; no sorting into chunks of equal size, so slots of other buckets
    are masked rather than skipped. The paper has buckets of 64 tokens and 2 to 8 rounds; 8 buckets and 2 rounds show
    a token about a quarter of a history.
    """

    buckets: int = 8
    rounds: int = 2

    family = "search"
    paper = "Reformer, Kitaev et al., ICLR 2020, arXiv 2001.04451"
    formula = "attention over slots with argmax([R k; -R k]) = argmax([R q; -R q]) in any round; k = q / |q|"
    growth = grows(memory="n L d", read="n L d")
    stores = "keys and values of every event, for another token may fall into any bucket: it saves no bytes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets < 2 or self.buckets % 2 or self.rounds < 1:
            raise ValueError(f"reformer: buckets must be even, rounds at least 1, not {self.buckets}, {self.rounds}")

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: "Backbone") -> None:
        for i, block in enumerate(layers(backbone)):
            rows, device = outputs(block), next(block.parameters()).device
            shape = self.rounds, block.parts["queries"] // block.heads, self.buckets // 2
            drawn = torch.randn(shape, generator=torch.Generator().manual_seed(i))
            block.register_buffer("rotations", drawn.to(device))
            narrow(block, {name: index for name, index in rows.items() if name != "keys"})
            swap(block, HashBlock)
        swap(backbone, HashBackbone)

    def convert(self, weights: Mapping[str, Tensor], adapted: "Backbone") -> dict[str, Tensor]:
        """Queries and values as they were; the map to keys is dropped."""

        def without(block: Block, parts: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: parts[name] for name in block.parts}

        return converted(weights, adapted, without)
