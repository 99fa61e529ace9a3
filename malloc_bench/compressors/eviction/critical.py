"""Half of the budget by another method's score, half by what slots do to the layer's output."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, as_compressor, grows
from malloc_bench.compressors.selection import Eviction, beside_slots, chosen, filled, ranked
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState, unhalved


@register("critical")
@dataclass(frozen=True)
class Critical(Eviction):
    """Keeps k/2 slots that another method would, and of the rest those of the largest score times |W_o v|.

    inner: the method that scores, a name or {name: {parameter: value}}; what it forces stays first. Behind HSTU, whose
    mixture is normed and gated before W_o, |W_o v| is of the values as they are.
    """

    inner: Any = "snapkv"

    grid = {"inner": ("snapkv", "h2o", "expected_attention", "keydiff")}
    family = "eviction"
    paper = "CriticalKV, Feng et al., Identify Critical KV Cache in LLM Inference, arXiv 2502.03805"
    formula = "k/2 by the inner score s, the rest by (s + 0.0001) |W_o v|_1"
    growth = grows(compress="w n L d + n L d^2")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("values",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.inner, Eviction) or not self.inner.per_head:
            raise ValueError(f"critical: an inner method that scores slots head by head is needed, not {self.inner}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs | Stats(outputs=True)

    def supports(self, backbone: Any) -> str | None:
        return super().supports(backbone) or self.inner.supports(backbone)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        """Of the second half."""
        values, maps = unhalved(prefill.values(layer)), prefill.output_map(layer)
        group = maps.shape[0] // values.shape[1]
        sizes = [(values[:, h // group] @ each.to(values.dtype)).norm(p=1, dim=-1) for h, each in enumerate(maps)]
        size = torch.stack(sizes, 1).unflatten(1, (-1, group)).mean(2)  # [B, H, S]
        return (self._inner(prefill, layer) + 1e-4) * size

    def _inner(self, prefill: Prefill, layer: int) -> Tensor:
        return prefill.remember(("scores", self.inner, layer), lambda: self.inner.scores(prefill, layer))

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        count = prefill.slots(layer).count.long()
        first = prefill.remember(("order", self.inner, layer), lambda: ranked(self._inner(prefill, layer), count))
        then = prefill.remember(("order", self, layer), lambda: ranked(self.scores(prefill, layer), count))
        half = (k // 2).clamp(min=1).minimum(k)
        early = chosen(first, count, half, *self.inner.forced(half))  # [B, H, max half]
        beyond = torch.arange(early.shape[-1], device=k.device) >= beside_slots(half)
        kept = torch.zeros(*then.shape[:2], then.shape[2] + 1, dtype=torch.bool, device=k.device)
        kept.scatter_(2, early.masked_fill(beyond, then.shape[2]), True)
        return filled(then, kept[..., :-1].gather(2, then), k)

    def flops(self, state: UserState, of: Sources) -> int:
        """Every value through its head's part of the output map, as wide as all heads."""
        widths = [layer[0].fields["values"].shape[3] for layer in state.layers]
        mapped = sum(2 * x.events * x.queries * d * x.asking * d for x, d in zip(of, widths))
        return super().flops(state, of) + mapped
