"""KuaiFormer's window schedule: the oldest events in large windows, the middle in small ones, the newest single."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import layers
from malloc_bench.compressors.merging.ladder import Merger, Rungs, climb, climbing
from malloc_bench.compressors.trimmed import refusal
from malloc_bench.registry import register

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class Encoder(Merger):
    """One bidirectional transformer layer over a run, and the mean of what comes out."""

    def __init__(self, ratio: int, width: int, dim: int, heads: int) -> None:
        super().__init__()
        self.ratio, self.heads = ratio, heads
        self.inward, self.qkv, self.out = nn.Linear(width, dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3))
        return (x + self.down(torch.relu(self.up(self.norm_ffn(x))))).mean(2)

    def start(self, inverse: Tensor, bias: Tensor) -> None:
        self.inward.weight.copy_(inverse)
        self.inward.bias.copy_(bias)
        for part in (self.out, self.down):
            part.weight.normal_(std=0.005)  # an embedding is small beside what a norm gives
            part.bias.zero_()

    def flops(self, runs: int) -> int:
        dim = self.out.in_features
        maps = dim * (self.inward.in_features + 6 * dim)
        return 2 * runs * self.ratio * (maps + 2 * self.ratio * dim)


@register("kuaiformer")
@dataclass(frozen=True)
class KuaiFormer(Structural):
    """One token for each `large` run of the oldest events, for each `small` run of later ones; the newest stay single.

    An event joins a small window once `recent` newer ones are there, that one a large window once `middle` small ones
    are between; a merged token sees the merged ones before it. From the paper: the schedule, a bidirectional
    transformer layer and a mean for each window before the stack. Ours: windows that move on with the history, so that
    a large one is made of its small ones; what is merged is what the first layer stores of each event, a map of its
    embedding, for an embedding is in no state; an encoder for each of the two kinds. The paper has 2 windows of 64, 5
    of 16 and 48 single events of 256; 32, at least 2 of 8 and 16 here for 100 to 200.
    """

    large: int = 32
    small: int = 8
    middle: int = 2
    recent: int = 16

    family = "merging"
    paper = "KuaiFormer, Liu et al. 2024, arXiv 2411.10057"
    formula = (
        "x_a = mean(encoder([k_i; v_i of the first layer, i in window a])) + position; attention over x_0 ... x_a, "
    )
    formula += "single events"
    growth = grows(memory="m L d + b n L d", read="m L d + b n L d")
    stores = "keys, values and positions of a token for each window and of the newest events, at least `recent`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.small < 2 or self.recent < 1 or self.middle < 1:
            raise ValueError(f"kuaiformer: small must be at least 2, middle and recent 1, not {self}")
        if self.large <= self.small or self.large % self.small:
            raise ValueError(f"kuaiformer: large must be a multiple of small={self.small}, not {self.large}")

    def supports(self, backbone: Backbone) -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: Backbone) -> None:
        block, dim = layers(backbone)[0], backbone.catalogue().shape[1]
        width = block.parts["keys"] + block.parts["values"]
        lags = 0, self.recent, self.recent + self.middle * self.small
        ratios = self.small, self.large // self.small
        climb(
            backbone,
            Rungs((1, self.small, self.large), lags),
            [Encoder(ratio, width, dim, block.heads) for ratio in ratios],
        )

    def convert(self, weights: Mapping[str, Tensor], adapted: Backbone) -> dict[str, Tensor]:
        return climbing(weights, adapted)
