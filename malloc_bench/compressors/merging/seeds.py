"""Seeds: learned tokens that summarise the history by attention, as running means; the events go."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import layers, swap
from malloc_bench.compressors.low_rank.linformer import Memory, ProjectedBackbone, ProjectedBlock
from malloc_bench.compressors.trimmed import refusal
from malloc_bench.registry import register
from malloc_bench.state import Dense

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

_CONTENT, _RECENT = 15.0, 40.0  # logs of the largest weights by content and by age
_LEAST, _MOST = -30.0, 66.0  # of a seed's weight: of no event, of 50,000 that weigh most


class SeededBlock(ProjectedBlock):
    """Comes before a block's own class. A seed's weights on events are exp of bounded logits, so plain sums will do."""

    seed_asks: nn.Parameter  # [H, slots, D]
    seed_keys: nn.Parameter
    seed_values: nn.Parameter
    recency: nn.Parameter  # [slots], 0 to 1
    max_length: int

    def weights_at(self, positions: Tensor, own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        liked = self.seed_asks @ own["keys"].mT  # [B, H, slots, M]
        age = positions[:, None, None] * (_RECENT / self.max_length)
        found = (_CONTENT * (liked / _CONTENT).tanh() + self.recency.clamp(0, 1)[:, None] * age).exp()
        return found, found

    def begun(self, memory: Memory | None, maps: tuple[Tensor, Tensor] | None) -> tuple[Memory, Tensor]:
        """Sums with each seed's own key and value, of weight 1."""
        sums = {"keys": self.seed_keys[None], "values": self.seed_values[None]}
        total = sums["keys"].new_ones(*sums["keys"].shape[:3])[:, :, None]  # [B or 1, H, 1, slots]
        if memory is not None:
            weight = memory["logs"].dense().clamp(max=_MOST).exp()
            sums = {name: x + weight * memory[name].dense() for name, x in sums.items()}
            total = total + weight.mT
        if maps is not None:
            total = total + (maps[0].cumsum(-1) - maps[0]).mT
        batch = total.shape[0] if maps is None else maps[0].shape[0]
        return {name: Dense(x.expand(batch, -1, -1, -1)) for name, x in sums.items()}, total

    def written(self, own: dict[str, Tensor], at: Tensor, real: Tensor, memory: Memory | None) -> dict[str, Tensor]:
        weights = self.weights_at(at, own)[0] * real[:, None, None]
        total = weights.sum(-1, keepdim=True)
        sums = {name: weights @ x for name, x in own.items()}
        if memory is not None:
            old = memory["logs"].dense().clamp(max=_MOST).exp()
            total, sums = total + old, {name: x + old * memory[name].dense() for name, x in sums.items()}
        total = total.clamp(min=math.exp(_LEAST))
        return {**{name: x / total for name, x in sums.items()}, "logs": total.log()}

    def memory_flops(self, step: str, tokens: int, memory: Memory | None) -> int:
        width = sum(self.parts[name] for name in ("keys", "values"))
        found = 2 * tokens * self.slots * width
        if memory is not None:
            found += sum(v.dense_flops() for v in memory.values()) * (1 if step == "read" else 2)
        return found + (0 if step == "read" else 2 * 2 * tokens * self.slots * self.parts["keys"])


@register("seeds")
@dataclass(frozen=True)
class Seeds(Structural):
    """`seeds` learned tokens in each layer, each a mean of the history weighted by its attention (Chen et al., 2025).

    A token reads the seeds, as the events before it left them, and itself; an event is added to each seed's mean and
    forgotten. From the paper: learned seeds that attend to the history, candidates that attend to the seeds alone, a
    state of constant size. Ours: seeds in every layer as running means, where the paper's events attend to one another
    at length and seeds are made anew of all of them, so that no event could be appended to a state; logits bounded at
    15, and a learned slope by which a seed prefers recent events; no loss of reconstruction. The paper has 128 seeds or
    more for thousands of events; 8 here.
    """

    seeds: int = 8

    family = "merging"
    paper = "VISTA, Chen et al. 2025, arXiv 2510.22049"
    formula = "w_ji = exp(15 tanh(a_j k_i / 15) + r_j i), i < t; key_j = (s_j + sum of w_ji k_i) / (1 + sum of w_ji), "
    formula += "values alike: attention over j and itself"
    growth = grows(memory="m L d", read="m L d")
    stores = "mean keys, mean values and a log weight of each seed in each layer and head, whatever the history"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds < 1:
            raise ValueError(f"seeds: seeds must be at least 1, not {self.seeds}")

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: "Backbone") -> None:
        for block in layers(backbone):
            vars(block).update(slots=self.seeds, max_length=backbone.max_length)
            device, heads = next(block.parameters()).device, block.stored_heads
            for name, part in (("asks", "keys"), ("keys", "keys"), ("values", "values")):
                drawn = 0.1 * torch.randn(heads, self.seeds, block.parts[part] // heads, device=device)
                block.register_parameter(f"seed_{name}", nn.Parameter(drawn))
            block.recency = nn.Parameter(torch.linspace(0, 1, self.seeds, device=device))
            block.slot_bias = nn.Parameter(torch.zeros(self.seeds, device=device))
            swap(block, SeededBlock)
        swap(backbone, ProjectedBackbone)
        backbone.has_slots = backbone.only_adds = False
        vars(backbone).update(fields=("keys", "values", "logs"))
