"""Grouped-query attention: several query heads share a head of keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from malloc_bench.backbones.block import Block
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import SharedHeads, converted, layers, narrow, outputs, refusal, swap
from malloc_bench.registry import register

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class FewerHeads(Structural):
    """Keys and values in `n_kv_heads` heads, queries in all of theirs."""

    family = "heads"
    n_kv_heads: int

    def supports(self, backbone: "Backbone") -> str | None:
        if why := refusal(self.name, backbone):
            return why
        heads = layers(backbone)[0].heads
        if heads > self.n_kv_heads and heads % self.n_kv_heads == 0:
            return None
        return f"{self.name} needs a larger multiple of {self.n_kv_heads} heads, {backbone.name} has {heads}"

    def adapt(self, backbone: "Backbone") -> None:
        for block in layers(backbone):
            rows, width = outputs(block), block.parts["keys"] // block.heads * self.n_kv_heads
            narrow(block, rows | {name: rows[name][:width] for name in ("keys", "values")})
            block.stored_heads = self.n_kv_heads
            swap(block, SharedHeads)

    def convert(self, weights: Mapping[str, Tensor], adapted: "Backbone") -> dict[str, Tensor]:
        """Each head of keys and values begins as the mean of those of its group (GQA, section 2.1)."""

        def pooled(block: Block, parts: dict[str, Tensor]) -> dict[str, Tensor]:
            group = block.heads // self.n_kv_heads
            for name in ("keys", "values"):
                parts[name] = parts[name].unflatten(0, (self.n_kv_heads, group, -1)).mean(1).flatten(0, 1)
            return parts

        return converted(weights, adapted, pooled)


@register("gqa")
@dataclass(frozen=True)
class GQA(FewerHeads):
    """Stores fewer heads of keys and values: neighbouring query heads share them (Ainslie et al., EMNLP 2023).

    n_kv_heads: heads of keys and values; the backbone's heads must be a larger multiple of it. With `finetune` as in
    the paper: the heads of a trained model are pooled and trained on.
    """

    n_kv_heads: int = 2

    paper = "GQA, Ainslie et al., EMNLP 2023, arXiv 2305.13245"
    formula = "query head h reads keys and values of head floor(h x n_kv_heads / heads)"
    growth = grows(memory="n L d / h", read="n L d")
    stores = "keys and values of every event in n_kv_heads heads"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_kv_heads < 1:
            raise ValueError(f"gqa: n_kv_heads must be at least 1, not {self.n_kv_heads}")
