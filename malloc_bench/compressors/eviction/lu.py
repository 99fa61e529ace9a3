"""What a head loses with each slot, learned of training users, says how much it keeps."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.division import Divided
from malloc_bench.compressors.selection import ranked
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Fitted, Prefill, Sample, Stats

POINTS = 32  # of a curve


@register("lu")
@dataclass(frozen=True)
class LU(Divided):
    """Buys slots where training users lost most without them: a curve of loss over the share kept for every head.

    inner: the method that scores, head by head, a name or {name: {parameter: value}}. A head's loss at a share is the
    squared length of what the slots dropped added to its mixture, for the newest `window` queries, over that of all
    heads of the layer. Curves are made convex. Ours, in the spirit of the paper, whose curves are of a language
    model's answers and whose code only masks.
    """

    inner: Any = "snapkv"
    window: int = 16

    heads = True
    growth = grows(compress="w n L d")
    paper = "after LU-KV, as kvpress has it: per-head budgets fitted offline"
    formula = "next slot to the head with the steepest fitted E |sum over dropped slots of w v|^2 / E |mixtures|^2"
    reads = ("values",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.inner.needs.reader:
            raise ValueError(f"lu: window >= 1 and an inner method that scores training users are needed, not {self}")

    @property
    def needs(self) -> Stats:
        return self.inner.needs | Stats(window=self.window)

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        lost: dict[str, Tensor] = {}
        for prefill in sample:
            for layer in prefill.layers:
                lost[str(layer)] = lost.get(str(layer), 0) + self._lost(prefill, layer)
        return Fitted({name: _slopes(x / x[:, 0].sum().clamp(min=1e-30)) for name, x in lost.items()})

    def _lost(self, prefill: Prefill, layer: int) -> Tensor:
        """Squared loss of each head at a share of 0, 1 / POINTS ... 1, summed over users and queries: [H, P + 1]."""
        values, count = prefill.values(layer).double(), prefill.slots(layer).count.long()
        weights = prefill.newest_attention(layer, self.window).double()  # [B, H, W, S]
        order = ranked(self.inner.scores(prefill, layer), count).expand(-1, values.shape[1], -1)
        real = prefill.mask(layer).unsqueeze(2)
        part = torch.where(real, weights, 0.0).gather(3, order.unsqueeze(2).expand_as(weights))  # best slots first
        kept = (torch.arange(POINTS + 1, device=count.device) * count / POINTS).round()  # [B, P + 1]
        rank = torch.arange(order.shape[-1], device=count.device)
        rows = torch.where(real.mT, values, 0.0).gather(2, order.unsqueeze(-1).expand_as(values))
        losses = []
        for k in kept.unbind(1):
            dropped = part * (rank >= k[:, None])[:, None, None]
            losses.append((dropped @ rows).square().sum((0, 2, 3)))
        return torch.stack(losses, 1)

    def order(self, prefill: Prefill) -> Tensor:
        assert prefill.fitted is not None
        found = []
        for layer in prefill.layers:
            slopes = prefill.fitted[str(layer)].to(prefill.state.length.device)  # [H, POINTS]
            n = prefill.slots(layer).count.long().unsqueeze(-1)  # [B, H or 1, 1]
            width = prefill.segment(layer).width
            share = (torch.arange(width, device=n.device) * POINTS // n.clamp(min=1)).clamp(max=POINTS - 1)
            share = share.expand(-1, slopes.shape[0], -1)
            slope = slopes.expand(len(n), -1, -1).gather(2, share) / n.clamp(min=1)  # of one slot
            found.append(-slope)
        heads, width = max(x.shape[1] for x in found), max(x.shape[2] for x in found)
        return torch.stack([F.pad(x, (0, width - x.shape[2], 0, heads - x.shape[1])) for x in found], 1).double()


def _slopes(loss: Tensor) -> Tensor:
    """What each further share saves, [H, P] from [H, P + 1], of the largest convex curves below: falling, >= 0."""
    curve = loss.cummin(1).values
    points = torch.arange(curve.shape[1], dtype=curve.dtype, device=curve.device)
    fall = (curve[:, :, None] - curve[:, None]) / (points[None] - points[:, None]).clamp(min=1)  # [H, from, to]
    heads = torch.arange(len(curve), device=curve.device)
    out, at = torch.zeros_like(curve[:, 1:]), torch.zeros_like(heads)
    for to in range(1, curve.shape[1]):  # the steepest way down from where the hull stands
        steps = fall[heads, at].masked_fill(points <= at[:, None], -torch.inf)
        best, end = steps.max(1)
        out[:, to - 1] = best
        at = torch.where(end == to, end, at)
    return out
