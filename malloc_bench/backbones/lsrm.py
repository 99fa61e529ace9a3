"""LSRM (Zhang et al., RecSys 2024, arXiv 2311.11351): a decoder over item ids, from 98 K to 829 M parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from malloc_bench.backbones.attention import AttentionBackbone, Sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.backbones.sasrec import SASRecBlock
from malloc_bench.registry import register

Preset = Literal["98k", "786k", "1.57m", "9.44m", "75.5m", "829m"]

#: preset -> (layers, heads, dim), the paper's; the name is the number of parameters beside the embeddings, 12 L d^2.
PRESETS: dict[Preset, tuple[int, int, int]] = dict(
    zip(get_args(Preset), ((2, 2, 64), (4, 4, 128), (8, 4, 128), (12, 8, 256), (24, 8, 512), (48, 24, 1200)))
)


@dataclass(frozen=True)
class Scale:
    """preset: one of the paper's sizes; layers, heads and dim that are given go before it. max_length: events kept.

    dropout: rate of the embeddings and the lowest layer; dropout_top: of the highest; on a line in between.
    head: outputs and items are compared by their dot product, or by cosine over a temperature.
    """

    preset: Preset = "98k"
    layers: int | None = None
    heads: int | None = None
    dim: int | None = None
    max_length: int = 50
    dropout: float = 0.3
    dropout_top: float = 0.1
    head: Literal["cosine", "dot"] = "dot"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {self.preset}")
        if not 0 <= self.dropout_top < 1:
            raise ValueError(f"dropout_top must be in [0, 1), not {self.dropout_top}")
        self.sizes()

    def sizes(self) -> Sizes:
        """What every attention backbone asks for; raises ValueError where it makes no model."""
        given = (self.layers, self.heads, self.dim)
        layers, heads, dim = (own if mine is None else mine for mine, own in zip(given, PRESETS[self.preset]))
        return Sizes(layers, heads, dim, self.max_length, self.dropout, self.head, self.temperature)

    def rates(self) -> list[float]:
        """Each layer's dropout, the lowest first; a single layer is the lowest."""
        layers = self.sizes().layers
        return [self.dropout + (self.dropout_top - self.dropout) * i / max(layers - 1, 1) for i in range(layers)]


class LSRMBlock(SASRecBlock):
    """x + Attention(LN x), then x + FFN(LN x) with a GELU at width 4 d: 12 d^2 parameters, all of them in matrices."""

    def __init__(self, dim: int, heads: int, rate: float) -> None:
        super().__init__(dim, heads, rate, wider=4, vectors=False)

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        x = x + dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.rate, self.training)
        return x + dropout(self.down(F.gelu(self.up(self.norm_ffn(x)))), self.rate, self.training)


@register("lsrm")
class LSRM(AttentionBackbone):
    """SASRec's decoder made large: causal softmax attention over item and learned position embeddings.

    From the paper: item ids alone, 50 events, layers, heads and widths, a GELU, cross-entropy over the whole catalogue,
    more dropout in low layers than in high ones, and Adam followed by SGD (`training: {optimizer: adam_then_sgd}`).
    Ours: the rates of dropout and the line between them, which our sources do not give, and dropout only on what is
    added to x; pre-norm; maps without biases and norms without parameters, by which the counts are the paper's to the
    last digit; SASRec's embeddings x sqrt(d). Scores are dot products, the softmax as it is usually meant; cosine is
    an option of ours.
    """

    paper = "Zhang et al., Scaling Law of Large Sequential Recommendation Models (LSRM), RecSys 2024, arXiv 2311.11351"
    Config = Scale

    def __init__(self, config: Scale, n_items: int, has_time: bool = False) -> None:
        sizes, rates = config.sizes(), iter(config.rates())
        super().__init__(sizes, n_items, lambda: LSRMBlock(sizes.dim, sizes.heads, next(rates)))

    def _output(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.head == "cosine" else F.layer_norm(x, x.shape[-1:])
