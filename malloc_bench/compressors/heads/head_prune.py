"""The least important heads of a trained backbone are dropped; what they say on average stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.heads.mean_heads import refusal
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Dense, Fitted, Named, Prefill, Ragged, Segment, Stats, UserState, Vectors
from malloc_bench.state.vectors import Read

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@dataclass(frozen=True, eq=False)
class SomeHeads(Vectors):
    """kept: vectors of some heads, [B, K, S, D]; shared: `heads` [K], which they are, `means` [H, D], the others'."""

    kept: Dense
    all_users: Named

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, _, s, d = self.kept.shape
        return b, len(self.all_users["means"]), s, d

    def dense(self) -> Tensor:
        x = self.kept.dense()
        whole = self.all_users["means"].to(x)[:, None].expand(self.shape)
        return whole.index_copy(1, self.all_users["heads"].to(x.device), x)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        return self.kept.parts(count)

    def load(self, read: Read, count: Tensor | None) -> SomeHeads:
        return replace(self, kept=self.kept.load(read, count))


@register("head_prune")
@dataclass(frozen=True)
class HeadPrune(Compressor):
    """Drops the heads whose values move the layers' outputs least, of all layers together; nothing is trained.

    keep: the share of heads that stays, one in each layer at least. Michel et al. rank heads by the gradient of the
    loss, which a state knows nothing of; here by how much they add. A dropped head is not silent: each of its slots is
    read as the mean key and value of training users, so the layers above meet what they know. It saves bytes, not work.
    """

    keep: float = 0.5

    family = "heads"
    paper = "after Michel et al., Are Sixteen Heads Really Better than One?, NeurIPS 2019, arXiv 1905.10650"
    formula = "importance of a head = |W_o of the head|_F x sqrt(mean |v|^2 over training users)"
    growth = grows(read="n L d")
    stores = "keys and values of every event in the kept heads; fixed bytes: means and importance of every head"
    grid = {"keep": (0.25, 0.5, 0.75)}
    fit_fields = ()

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(f"head_prune: keep must be above 0 and below 1, not {self.keep}")

    @property
    def needs(self) -> Stats:
        return Stats(outputs=True)

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: Backbone) -> str | None:
        return refusal("head_prune drops", backbone, 1)

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        found: dict[str, Tensor] = {}
        for (layer, name), x in sample.vectors.items():  # [H, N, D]
            found[f"{layer}.{name}"] = x.mean(1)
            if name == "values":
                found[f"{layer}.importance"] = x.square().sum(-1).mean(1).sqrt()
        maps = next(iter(sample))
        for layer in maps.layers:
            sizes = maps.output_map(layer).flatten(1).norm(dim=1).float()  # of query heads
            of_heads = found[f"{layer}.importance"]
            found[f"{layer}.importance"] = of_heads * sizes.unflatten(0, (len(of_heads), -1)).norm(dim=1)
        return Fitted(found)

    def heads(self, fitted: Fitted, layers: int) -> list[Tensor]:
        """Which heads of each layer stay, in rising order."""
        importance = torch.stack([fitted[f"{layer}.importance"] for layer in range(layers)])  # [L, H]
        first = torch.zeros_like(importance, dtype=torch.bool).scatter(1, importance.argmax(1, keepdim=True), True)
        order = importance.masked_fill(first, torch.inf).flatten().argsort(descending=True, stable=True)
        most = max(layers, round(self.keep * importance.numel()))
        stays = torch.zeros_like(first).flatten().index_fill(0, order[:most], True).view_as(first)
        return [row.nonzero().squeeze(1) for row in stays]

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        made = []
        for layer, heads in enumerate(self.heads(fitted, len(prefill.layers))):
            segment, fields = prefill.segment(layer), dict[str, Vectors]()
            for name, vectors in segment.fields.items():
                known = Named({"heads": heads, "means": fitted[f"{layer}.{name}"]})
                fields[name] = SomeHeads(Dense(vectors.dense()[:, heads.to(vectors.dense().device)]), known)
            made.append((Segment(fields, segment.slots),))
        return UserState(tuple(made), prefill.state.length)
