"""Slots whose values nothing else that matters can stand for."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState


@register("capkv")
@dataclass(frozen=True)
class CapKV(Eviction):
    """Keeps slots by the leverage of their values in a capacity matrix that is weighted by what queries look for.

    As in the authors' code, keys and the mean query are of unit length, and weights are relative to the largest. Ours:
    the mean is of the newest `window` queries, the next request's position bias joins the cosines, and no sinks.
    """

    tau: float = 5.0
    window: int = 64

    grid = {"tau": (1.0, 2.5, 5.0, 10.0), "window": (16, 64)}
    family = "eviction"
    version_placed = 2
    paper = "CapKV, arXiv 2604.25975"
    note = (
        "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .730 / .694, slots by lot .785 / .758: "
        "leverage favours what stands apart"
    )
    formula = "score = w v'(I + sum_j w_j v_j v_j')^-1 v, w = exp(tau cos(k, mean query) + bias) over the largest"
    growth = grows(compress="n L d^2")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys", "values")

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"capkv: window must be at least 1, not {self.window}")

    @property
    def needs(self) -> Stats:
        return Stats(queries=self.window)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        keys, real = prefill.keys(layer), prefill.mask(layer)
        queries, _ = prefill.newest_queries(layer, self.window)
        group = queries.shape[1] // keys.shape[1]
        anchor = F.normalize(queries.double().sum(2, keepdim=True), dim=-1)  # of the mean's direction
        unit = F.normalize(keys.double(), dim=-1).repeat_interleave(group, 1)
        logits = self.tau * (unit @ anchor.mT).squeeze(-1)  # [B, Hq, S]
        if prefill.standing is not None:
            logits = logits + prefill.standing[layer]
        logits = logits.masked_fill(~real, -torch.inf)
        top = logits.amax(-1, keepdim=True) if logits.shape[-1] else 0.0
        weight = torch.where(real, (logits - top).exp(), 0.0)
        v = prefill.values(layer).double().repeat_interleave(group, 1)
        eye = torch.eye(v.shape[-1], dtype=v.dtype, device=v.device)
        v = v.masked_fill(~real.unsqueeze(-1), 0.0)
        root = torch.linalg.cholesky(eye + (v * weight.unsqueeze(-1)).mT @ v)
        score = weight * torch.linalg.solve_triangular(root, v.mT, upper=False).square().sum(2)  # [B, Hq, S]
        return score.unflatten(1, (-1, group)).mean(2).to(keys.dtype)

    def flops(self, state: UserState, of: Sources) -> int:
        """Cosines, the capacity matrix and a triangular system of each query head; no Cholesky factor."""
        keys, values = ([layer[0].fields[name].shape[3] for layer in state.layers] for name in ("keys", "values"))
        return sum(x.events * x.queries * (2 * d + 3 * wide**2) for x, d, wide in zip(of, keys, values))
