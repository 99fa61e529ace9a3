"""Each layer's map to keys and values through a narrow latent, which is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.low_rank.latent import Latent, LatentMethod
from malloc_bench.compressors.recompute.inputs import normed, refusal
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Fitted, Map, Prefill, Sample, Stats

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("palu")
@dataclass(frozen=True)
class Palu(LatentMethod):
    """The map [W_k W_v] of every layer as a product A B of rank r, the best for training users' inputs; x A is stored.

    From the paper: the factoring, whitened by inputs, and B absorbed. Ours: keys and values of all heads share the
    latent (the paper factors each, by groups of heads): where keys are as wide as inputs that is exact in half of the
    numbers; and one rank for all layers, not one by Fisher information. Behind HSTU the latent comes before the SiLU,
    so keys and values are rebuilt at every read.
    """

    paper = "Palu, Chang et al., ICLR 2025, arXiv 2407.21118"
    formula = "[W_k W_v] ~ A B by the leading eigenvectors B of W' E[x x'] W, A = W B'; k = act(x A B_k + b)"
    growth = grows(memory="r n L", compress="r n L d", read="r n L + r L d")
    stores = "r float16 numbers a slot and layer; fixed bytes: A and B of every layer"
    fit_fields = ()

    @property
    def needs(self) -> Stats:
        return Stats(inputs=True, projections=True)

    def supports(self, backbone: Backbone) -> str | None:
        return refusal(self.name, backbone, smaller=False) or super().supports(backbone)

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        seen: dict[int, Tensor] = {}
        maps: dict[int, Tensor] = {}
        for prefill in sample:
            for layer in prefill.layers:
                x = normed(prefill, layer)[:, 0][prefill.mask(layer)[:, 0]].double()
                seen[layer] = seen.get(layer, 0) + x.mT @ x
                wide = [
                    prefill.projection(layer)[field].transpose(0, 1).flatten(1) for field in _fields(prefill, layer)
                ]
                maps[layer] = torch.cat(wide, 1).double()  # [d, N]
        found: dict[str, Tensor] = {}
        for layer, w in maps.items():
            second = seen[layer] / seen[layer].diagonal().mean().clamp(min=1e-30)
            second = second + 1e-6 * torch.eye(len(w), dtype=w.dtype, device=w.device)  # else few users lose directions
            basis = torch.linalg.eigh(w.mT @ second @ w).eigenvectors.flip(-1)[:, : len(w)]
            found |= {f"{layer}.down": (w @ basis).float(), f"{layer}.up": basis.mT.float()}
        return Fitted(found)

    def latents(self, prefill: Prefill) -> list[Latent]:
        made, fitted = [], prefill.fitted
        assert fitted is not None
        for layer in prefill.layers:
            projection, up, at = prefill.projection(layer), {}, 0
            for field in _fields(prefill, layer):
                heads, _, d = projection[field].shape
                part = fitted[f"{layer}.up"][:, at : (at := at + heads * d)]
                weight = part.unflatten(1, (heads, d)).transpose(0, 1)
                up[layer, field] = Map(weight, projection.get(f"{field}.bias"), projection.silu)
            made.append(Latent(layer, normed(prefill, layer), fitted[f"{layer}.down"], up))
        return made


def _fields(prefill: Prefill, layer: int) -> list[str]:
    return sorted(prefill.segment(layer).fields)
