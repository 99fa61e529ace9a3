"""SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781), pre-norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import Block, Places
from malloc_bench.backbones.items import Sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.backbones.sums import Weigher, softmax
from malloc_bench.registry import register
from malloc_bench.state import Projection


class SASRecBlock(Block):
    """x + Attention(LN x), then x + FFN(LN x) with a ReLU between two d x d maps (paper, section 3.2).

    For its kin: a feed-forward `wider` times d, and matrices alone, maps and norms without a vector to learn.
    """

    fused: str | None = "qkv"
    weighing = "softmax"

    def __init__(self, dim: int, heads: int, rate: float, wider: int = 1, vectors: bool = True) -> None:
        super().__init__()
        self.heads, self.stored_heads, self.rate = heads, heads, rate
        self.parts = dict.fromkeys(("queries", "keys", "values"), dim)
        self.scale = (dim // heads) ** -0.5
        self.norm_attention, self.norm_ffn = (nn.LayerNorm(dim, elementwise_affine=vectors) for _ in range(2))
        self.qkv = nn.Linear(dim, 3 * dim, bias=vectors)
        self.out = nn.Linear(dim, dim, bias=vectors)
        self.up, self.down = nn.Linear(dim, wider * dim, bias=vectors), nn.Linear(wider * dim, dim, bias=vectors)

    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        q, own, _ = self.split(self.qkv(self.norm_attention(x)))
        return q * self.scale, own, None

    def projection(self) -> Projection | None:
        norm = self.norm_attention
        return self._projected(self.qkv, {"weight": norm.weight, "bias": norm.bias}, False, norm.eps)

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        x = x + dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.rate, self.training)
        hidden = dropout(torch.relu(self.up(self.norm_ffn(x))), self.rate, self.training)
        return x + dropout(self.down(hidden), self.rate, self.training)

    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        """Softmax over all sources; a slot that stands for m events counts m times: + log m."""
        shifted = []
        for x, mask, mass in zip(logits, masks, masses):
            x = x if mass is None else x + mass.clamp(min=1e-6).log().unsqueeze(2)
            shifted.append(x.masked_fill(~mask, -torch.inf))
        if len(shifted) == 1:
            return [shifted[0].softmax(-1)]
        return list(torch.cat(shifted, -1).softmax(-1).split([x.shape[-1] for x in shifted], -1))

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        return F.scaled_dot_product_attention(q, own["keys"], own["values"], is_causal=True, scale=1.0)

    def in_tiles(self, own: dict[str, Tensor], places: Places, asked: Places) -> tuple[Tensor, Tensor, Weigher] | None:
        return own["keys"], own["values"], softmax

    def causal_pairs(self, slots: int) -> int:
        """The full square, as FLOP counters have it; the kernel skips most of the upper half."""
        return slots**2


class PaperBlock(SASRecBlock):
    """h = LN x + Attention(LN x; x), then LN h + FFN(LN h), as in the code of SASRec's authors: what is carried on is

    normed, keys and values are not. Unlike there, a map follows the heads; its output is dropped out, not weights.
    """

    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], None]:
        weight, bias, own = self.qkv.weight, self.qkv.bias, self.parts["queries"]
        asked = F.linear(self.norm_attention(x), weight[:own], bias[:own])
        q, stored, _ = self.split(torch.cat([asked, F.linear(x, weight[own:], bias[own:])], -1))
        return q * self.scale, stored, None

    def projection(self) -> Projection:
        return self._projected(self.qkv, {}, False, None)

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        x = self.norm_attention(x) + dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.rate, self.training)
        x = self.norm_ffn(x)
        hidden = dropout(torch.relu(self.up(x)), self.rate, self.training)
        return x + dropout(self.down(hidden), self.rate, self.training)


@dataclass(frozen=True)
class SASRecSizes(Sizes):
    """layers: blocks; heads: attention heads; dim: width d; max_length: events kept.

    head: outputs and items are compared by cosine over a temperature, or by their dot product. block: "pre_norm", or
    the "paper"'s, which carries normed vectors on and stores maps of plain ones.
    """

    block: Literal["pre_norm", "paper"] = field(default="pre_norm", metadata={"unsaid": "pre_norm"})


@register("sasrec")
class SASRec(AttentionBackbone):
    """A causal transformer over item and learned position embeddings, the field's common baseline.

    From the paper: embeddings x sqrt(d), one-d feed-forward, causal mask, dropout. Ours, as in the comparison of
    HSTU's authors (arXiv 2402.17152): pre-norm, and a cosine head with a temperature; `block: paper` and `head: dot`
    norm and score as the code of its own authors, which has no map behind the heads, and dropout on their weights.
    Presets: the settings of that comparison.
    """

    Config = SASRecSizes
    paper = "Kang and McAuley, Self-Attentive Sequential Recommendation, ICDM 2018, arXiv 1808.09781"
    presets = {
        "ml-1m": {"layers": 2, "heads": 1, "dim": 50},
        "ml-20m": {"layers": 4, "heads": 4, "dim": 256},
        "books": {"layers": 4, "heads": 4, "dim": 64, "max_length": 50, "dropout": 0.5},
    }

    def __init__(self, config: SASRecSizes, n_items: int, has_time: bool = False) -> None:
        make = PaperBlock if config.block == "paper" else SASRecBlock
        super().__init__(config, n_items, lambda: make(config.dim, config.heads, config.dropout))
        self.norm = nn.LayerNorm(config.dim)

    def _output(self, x: Tensor) -> Tensor:
        return self._head(self.norm(x))
