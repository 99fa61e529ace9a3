"""What a history gives on average: no slot, no query."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.fitted.fitting import Asking, without_slots
from malloc_bench.compressors.fitted.solving import evened, rows_of
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Dense, Prefill, Probes, Segment, UserState

_ROUNDS = 5  # of Gauss and Newton


@register("fit_constant")
@dataclass(frozen=True)
class FitConstant(Asking):
    """One fitted vector a layer and head, the same for every query: the floor above which reading a history depends on
    who reads it. With softmax it has a fitted weight beside the token itself, as a slot with a key of zeros.

    probes, which, horizon: as in `fit_recent`.
    """

    probes: int = 64
    which: str = "drawn"
    horizon: int | tuple[int, ...] = (0,)

    family = "fitted"
    paper = "ours: a floor, as `none` is one"
    formula = (
        "softmax: logit b with sigmoid(b - own logit) ~ the history's weight, o = what explains A V best beside the "
        "token itself; SiLU: o = the mean of A V over probes"
    )
    growth = grows(memory="L d", compress="p n L d + L d^2", read="0")
    stores = "one vector a layer and head and, with softmax, its logit; no slot, no position"

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: Any) -> str | None:
        return without_slots(backbone)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers = []
        for layer, (segment, *_) in enumerate(prefill.state.layers):  # that have new events behind, if it is an update
            heads = next(iter(segment.fields.values())).shape[1]
            fields = constant(prefill.probes(layer, self.ask), heads)
            kind = next(iter(segment.fields.values())).dense().dtype
            layers.append((Segment({name: Dense(x.to(kind)) for name, x in fields.items()}, None),))
        return UserState(tuple(layers), prefill.state.length)


def constant(probes: Probes, heads: int) -> dict[str, Tensor]:
    """`constant` [B, H, 1, D] and, where weights are normalised, `weight` [B, H, 1, 1]; see `folded.summed`."""
    even, target = (rows_of(x.float(), heads) for x in (evened(probes), probes.target))
    if probes.total is None:
        counted = even.square()
        return {"constant": (target * counted).sum(2, keepdim=True) / counted.sum(2, keepdim=True).clamp(min=1e-30)}
    own = probes.own_values().float().expand(-1, probes.target.shape[1], -1, -1)
    share, total, own = (rows_of(x.float(), heads) for x in (probes.share, probes.total, own))
    rest = (1 - share).clamp(min=1e-6)
    itself, logit = total + share.clamp(min=1e-30).log(), (total + rest.log()).mean(2, keepdim=True)
    for _ in range(_ROUNDS):  # of sigmoid(logit - itself) ~ rest
        weight = torch.sigmoid(logit - itself)
        slope = weight * (1 - weight)
        step = ((rest - weight) * slope).sum(2, keepdim=True) / slope.square().sum(2, keepdim=True).clamp(min=1e-20)
        logit = logit + step.clamp(-1, 1)
    weight = torch.sigmoid(logit - itself)
    wanted = target + (share - (1 - weight)) * own
    value = (weight * wanted).sum(2, keepdim=True) / weight.square().sum(2, keepdim=True).clamp(min=1e-20)
    return {"constant": value, "weight": logit}
