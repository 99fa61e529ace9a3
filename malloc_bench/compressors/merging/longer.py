"""LONGER's token merge: neighbouring events become one token before the stack, the newest stay single."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import layers
from malloc_bench.compressors.merging.ladder import Merger, Rungs, climb, climbing
from malloc_bench.compressors.trimmed import refusal
from malloc_bench.registry import register

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class SideBySide(Merger):
    """A linear map of a run's rows, one behind the other."""

    def __init__(self, ratio: int, width: int, dim: int) -> None:
        super().__init__()
        self.ratio, self.linear = ratio, nn.Linear(ratio * width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(2))

    def start(self, inverse: Tensor, bias: Tensor) -> None:
        self.linear.weight.copy_(inverse.repeat(1, self.ratio) / self.ratio)
        self.linear.bias.copy_(bias)

    def flops(self, runs: int) -> int:
        return 2 * runs * self.linear.in_features * self.linear.out_features


@register("longer")
@dataclass(frozen=True)
class Longer(Structural):
    """Runs of `merge` events become one token before the stack, all but the newest `recent` (Chai et al., 2025).

    A run is merged once `recent` newer events are there; its token sees the merged ones before it, and an event the
    merged ones and the single events before it. From the paper: adjacent merging by concatenation before the stack, the
    newest events single, a cache to which later events are added. Ours: what is concatenated is what the first layer
    stores of each event, a map of its embedding, for an embedding is in no state; the map begins as the mean; merged
    tokens go through all layers, where the paper's only queries behind its first are the newest; no global tokens, no
    transformer within a run. The paper merges 4 or 8 of 2,000 events and keeps 100; 8 of 100 to 200 and 16 here.
    """

    merge: int = 8
    recent: int = 16

    family = "merging"
    paper = "LONGER, Chai et al., RecSys 2025, arXiv 2505.04421"
    formula = (
        "x_a = W [k_i; v_i of the first layer, i in run a] + b + position; attention over x_0 ... x_a, single events"
    )
    growth = grows(memory="m L d + b n L d", read="m L d + b n L d")
    stores = "keys, values and positions of a token for each run of `merge` events and of the newest, at least `recent`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge < 2 or self.recent < 1:
            raise ValueError(f"longer: merge must be at least 2 and recent 1, not {self.merge}, {self.recent}")

    def supports(self, backbone: Backbone) -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: Backbone) -> None:
        parts, dim = layers(backbone)[0].parts, backbone.catalogue().shape[1]
        merger = SideBySide(self.merge, parts["keys"] + parts["values"], dim)
        climb(backbone, Rungs((1, self.merge), (0, self.recent)), [merger])

    def convert(self, weights: Mapping[str, Tensor], adapted: Backbone) -> dict[str, Tensor]:
        return climbing(weights, adapted)
