"""What backbones over item ids share: their sizes, the embedding, the head that ranks the catalogue, and its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.base import Backbone
from malloc_bench.backbones.losses import next_item_loss, sampled_loss
from malloc_bench.state import Batch


@dataclass(frozen=True)
class Sizes:
    """layers: blocks; heads: attention heads; dim: width d; max_length: events kept.

    head: outputs and items are compared by cosine over a temperature, or by their dot product.
    """

    layers: int = 2
    heads: int = 1
    dim: int = 50
    max_length: int = 200
    dropout: float = 0.2
    head: Literal["cosine", "dot"] = "cosine"
    temperature: float = 0.05

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "dim", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, not {self.dim} with {self.heads} heads")
        if not 0 <= self.dropout < 1 or not self.temperature > 0:
            raise ValueError("dropout must be in [0, 1) and temperature above 0")


class ItemBackbone(Backbone):
    """Outputs and items in one space; `forward` ends with `_head`."""

    Config: ClassVar[type] = Sizes

    def __init__(self, config: Sizes, n_items: int) -> None:
        super().__init__()
        self.config, self.n_items, self.max_length = config, n_items, config.max_length
        self.items = nn.Embedding(n_items + 1, config.dim, padding_idx=0)

    def loss(self, batch: Batch) -> Tensor:
        return self._told(self(batch.events), batch)

    def _told(self, outputs: Tensor, batch: Batch) -> Tensor:
        """The mean loss of outputs [B, S, d], those of the batch's events."""
        hidden, table, targets = outputs * self.logit_scale, self.catalogue(), batch.targets.long() - 1
        if batch.negatives is not None:
            return sampled_loss(hidden, table, targets, batch.negatives.long() - 1, batch.each)
        return next_item_loss(hidden[targets >= 0], table, targets[targets >= 0])

    @property
    def logit_scale(self) -> float:
        """What scores are multiplied by to be logits."""
        return 1 / self.config.temperature if self.config.head == "cosine" else 1.0

    def catalogue(self) -> Tensor:
        return self._head(self.items.weight[1:])

    def _head(self, x: Tensor) -> Tensor:
        """Vectors as they are compared, [..., d]."""
        return F.normalize(x, dim=-1) if self.config.head == "cosine" else x
