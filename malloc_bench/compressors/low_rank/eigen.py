"""Coefficients in a basis that training users share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.low_rank.latent import Latent, LatentMethod
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Fitted, Map, Prefill, Sample, side_by_side

Share = Literal["all", "layer", "field"]


@register("eigen")
@dataclass(frozen=True)
class Eigen(LatentMethod):
    """Principal components of training users' keys and values: a slot is stored by its leading coefficients.

    share: what lies side by side under one basis: every layer, head and field of a stack, those of a layer, or a
    field's heads. The paper has a basis a layer and field, and rank by a threshold of energy; at equal bytes one basis
    for all is better. All users share the basis, so unlike `svd` nothing of it is stored for a user, and it fits nobody
    as well as their own.
    """

    share: Share = "all"

    paper = "Eigen Attention, Saxena et al., EMNLP Findings 2024, arXiv 2408.05646"
    formula = "c = ([K V] - mean) U_r, U of the covariance over training users; q.k is read as (U_k' q).c + q.mean_k"
    growth = grows(memory="r n", compress="r n L d", read="r n L + r L d")
    stores = "r float16 coefficients a slot for all layers and fields; fixed bytes: the basis and the mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share not in get_args(Share):
            raise ValueError(f"eigen: share all, layer or field is needed, not {self.share!r}")

    fit_fields = ("share",)

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        sums: dict[str, list[Any]] = {}
        for prefill in sample:
            for name, group in self._groups(prefill):
                x = _wide(prefill, group)[:, 0][prefill.mask(group[0][0])[:, 0]]  # [slots, N]
                one = [len(x), x.sum(0), x.mT @ x]
                sums[name] = [a + b for a, b in zip(sums[name], one)] if name in sums else list(one)
        found: dict[str, Tensor] = {}
        for name, (count, total, square) in sums.items():
            assert isinstance(total, Tensor)
            mean = total / max(int(count), 1)
            cov = square / max(int(count), 1) - torch.outer(mean, mean)
            found[f"{name}.mean"] = mean.float()
            found[f"{name}.basis"] = torch.linalg.eigh(cov).eigenvectors.flip(-1).float()
        return Fitted(found)

    def latents(self, prefill: Prefill) -> list[Latent]:
        made, fitted = [], prefill.fitted
        assert fitted is not None
        for name, group in self._groups(prefill):
            x, mean, basis = _wide(prefill, group).float(), fitted[f"{name}.mean"], fitted[f"{name}.basis"]
            up, at = {}, 0
            for layer, field in group:
                _, heads, _, d = prefill.segment(layer).fields[field].shape
                rows = slice(at, at := at + heads * d)
                up[layer, field] = Map(basis[rows].unflatten(0, (heads, d)).mT, mean[rows].unflatten(0, (heads, d)))
            made.append(Latent(group[0][0], x - mean.to(x.device), basis, up))
        return made

    def _groups(self, prefill: Prefill) -> Iterator[tuple[str, list[tuple[int, str]]]]:
        """(layer, field) of all that lies under one basis, and a name for it."""
        depth = len(prefill.layers) // prefill.stacks
        groups: dict[str, list[tuple[int, str]]] = {}
        for layer in prefill.layers:
            for field in prefill.segment(layer).fields:
                place = {"all": f"{layer // depth}", "layer": f"{layer}", "field": f"{layer}.{field}"}[self.share]
                groups.setdefault(place, []).append((layer, field))
        yield from groups.items()


def _wide(prefill: Prefill, group: list[tuple[int, str]]) -> Tensor:
    """[B, 1, S, N] float64."""
    return side_by_side([prefill.segment(layer).fields[field].dense() for layer, field in group], own=False)
