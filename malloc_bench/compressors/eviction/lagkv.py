"""What stands out against the events right behind it stays."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.selection import Eviction, ascending
from malloc_bench.registry import register
from malloc_bench.state import Prefill, by_heads


@register("lagkv")
@dataclass(frozen=True)
class LagKV(Eviction):
    """Keeps slots whose keys and values vary most once scaled by the range of the next stretch of events.

    The history is cut into stretches of `lag` slots behind the `sinks` oldest; a slot's score is its rank within its
    stretch, so each gives up alike. Sinks stay as far as half of the slots go; then the last whole stretch and what
    follows come first, the newest before others. The paper's lag is 128; histories of recommenders are shorter. A
    channel that is constant in the next stretch tells nothing and is left out, where public code divides by zero.
    """

    lag: int = 16
    sinks: int = 4

    grid = {"lag": (8, 16, 32, 64), "sinks": (0, 4)}
    family = "eviction"
    paper = "LagKV, Liang et al., arXiv 2504.04704"
    note = "overlap@10 at 1/4 on ML-100K, SASRec / HSTU: .714 / .710, slots by lot .785 / .758: it looks at no weight"
    formula = "score = rank in the stretch of softmax(std over channels of (x - min') / (max' - min')), mean of K and V"
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys", "values")

    def __post_init__(self) -> None:
        if self.lag < 1 or self.sinks < 0:
            raise ValueError(f"lagkv: lag >= 1 and sinks >= 0 are needed, not {self.lag} and {self.sinks}")

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        keys, values, count = prefill.keys(layer), prefill.values(layer), prefill.slots(layer).count.long()
        width = keys.shape[2]
        stretches = (width - self.sinks) // self.lag
        score = torch.ones(keys.shape[:3], dtype=keys.dtype, device=keys.device)
        if stretches < 2:
            return score
        both = [by_heads(partial(self._varying, stretches), x) for x in (keys, values)]
        told = torch.stack(both).mean(0)  # [B, H, C - 1, lag]
        order, place = ascending(told), torch.arange(self.lag, device=told.device)
        rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order)) / self.lag
        known = (torch.arange(stretches - 1, device=count.device) + 2) * self.lag + self.sinks <= count[..., None]
        rank = torch.where(known[..., None], rank, 1.0).flatten(2).to(score.dtype)
        score[:, :, self.sinks : self.sinks + rank.shape[2]] = rank
        return score

    def _varying(self, stretches: int, x: Tensor) -> Tensor:
        """x [n, S, D] -> [n, stretches - 1, lag]."""
        x = x[:, self.sinks : self.sinks + stretches * self.lag].unflatten(1, (stretches, self.lag))
        own, after = x[:, :-1], x[:, 1:]
        low, high = after.amin(2, keepdim=True), after.amax(2, keepdim=True)
        span = high - low
        scaled = (own - low).mul_(torch.where(span > 0, span.reciprocal(), 0.0))
        spread = scaled.sub_(scaled.mean(-1, keepdim=True)).norm(dim=-1) / max(1, x.shape[-1] - 1) ** 0.5
        return F.softmax(spread, dim=-1)

    def forced(self, k: Tensor) -> tuple[Tensor, int]:
        return (k // 2).clamp(max=self.sinks), 0
