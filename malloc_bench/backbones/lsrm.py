"""LSRM (Zhang et al., RecSys 2024, arXiv 2311.11351): a decoder over item ids, from 98 K to 829 M parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.items import Sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.backbones.sasrec import SASRecBlock
from malloc_bench.registry import register


@dataclass(frozen=True)
class Scale(Sizes):
    """As `Sizes`; dropout: rate of the embeddings and the lowest layer; dropout_top: of the highest; on a line between.

    head: scores are dot products, the softmax as it is usually meant, or cosines over a temperature.
    """

    layers: int = 2
    heads: int = 2
    dim: int = 64
    max_length: int = 50
    dropout: float = 0.3
    head: Literal["cosine", "dot"] = "dot"
    dropout_top: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dropout_top < 1:
            raise ValueError(f"dropout_top must be in [0, 1), not {self.dropout_top}")

    def rates(self) -> list[float]:
        """Each layer's dropout, the lowest first; a single layer is the lowest."""
        step = (self.dropout_top - self.dropout) / max(self.layers - 1, 1)
        return [self.dropout + step * i for i in range(self.layers)]


class LSRMBlock(SASRecBlock):
    """x + Attention(LN x), then x + FFN(LN x) with a GELU at width 4 d: 12 d^2 parameters, all of them in matrices."""

    def __init__(self, dim: int, heads: int, rate: float) -> None:
        super().__init__(dim, heads, rate, wider=4, vectors=False)

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        x = x + dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.rate, self.training)
        return x + dropout(self.down(F.gelu(self.up(self.norm_ffn(x)))), self.rate, self.training)


@register("lsrm")
class LSRM(AttentionBackbone):
    """A causal transformer decoder over item ids made to be scaled: SASRec's kind of attention, many sizes.

    From the paper: item ids alone, 50 events, layers, heads and widths, a GELU, cross-entropy over the whole catalogue,
    more dropout in low layers than in high ones, and Adam followed by SGD (`training: {optimizer: adam_then_sgd}`).
    Ours: the rates of dropout and the line between them, which our sources do not give, and dropout only on what is
    added to x; pre-norm; maps without biases and norms without parameters, by which the counts are the paper's to the
    last digit; SASRec's embeddings x sqrt(d). Scores are dot products, the softmax as it is usually meant; cosine is
    an option of ours.
    """

    paper = "Zhang et al., Scaling Law of Large Sequential Recommendation Models (LSRM), RecSys 2024, arXiv 2311.11351"
    Config = Scale
    presets = {  # named by the paper's count of parameters beside the embeddings, 12 L d^2
        name: {"layers": layers, "heads": heads, "dim": dim}
        for name, layers, heads, dim in (
            ("98k", 2, 2, 64),
            ("786k", 4, 4, 128),
            ("1.57m", 8, 4, 128),
            ("9.44m", 12, 8, 256),
            ("75.5m", 24, 8, 512),
            ("829m", 48, 24, 1200),
        )
    }

    def __init__(self, config: Scale, n_items: int, has_time: bool = False) -> None:
        rates = iter(config.rates())
        super().__init__(config, n_items, lambda: LSRMBlock(config.dim, config.heads, next(rates)))

    def _output(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.head == "cosine" else F.layer_norm(x, x.shape[-1:])
