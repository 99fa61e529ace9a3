"""Which method, and how many bytes, each layer gets: where training users lose least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, as_compressor
from malloc_bench.compressors.fitted.fitting import evened
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget
from malloc_bench.registry import register
from malloc_bench.state import Ask, Fitted, Prefill, Sample, Segment, Stats, UserState

GRID = tuple(2.0 ** (i / 2) for i in range(-4, 4))  # of an equal share of the bytes
USERS = 128  # in training, whom curves are measured on: no fewer, where there are as many


@register("auto")
@dataclass(frozen=True)
class Auto(Compressor):
    """Divides a budget over layers, and takes for each the candidate that loses least there with the bytes it gets.

    candidates: methods that take a budget, or lists of steps as `compose` has them. For each layer, each candidate and
    some sizes around an equal share of the budget, `fit` measures on training users how wrong what held-out probes get
    is: squares of the gap over squares of what the full state gives. Of each layer's best curve the convex hull is
    kept, and bytes go where the next ones help most, as a Lagrange multiplier would have it. tests: probes held out,
    drawn after those that candidates are fitted to.
    """

    candidates: tuple[Any, ...] = (
        ({"fit_omp": {"probes": 128}}, {"mxint": {"bits": 4}}),
        ({"fit_omp": {"probes": 128}}, {"mxint": {"bits": 3}}),
        ({"fit_omp": {"probes": 128}}, "int8"),
        ({"fit_recent": {"probes": 128}}, {"mxint": {"bits": 4}}),
        {"svd": {"dtype": "int8"}},
        {"svd": {"dtype": "int4"}},
    )
    tests: int = 64

    family = "fitted"
    paper = "ours; hulls and multipliers: Shoham and Gersho, IEEE TASSP 36, 1988"
    formula = (
        "min over candidate and bytes of each layer: sum of E |gap|^2 / E |full|^2 of probes, all within the budget"
    )
    stores = "what the candidate of each layer stores"
    fit_uses_budget = True

    def __post_init__(self) -> None:
        made = tuple(
            as_compressor({"compose": {"steps": list(each)}} if isinstance(each, list | tuple) else each)
            for each in self.candidates
        )
        object.__setattr__(self, "candidates", made)
        if self.tests < 1 or not made or any(not m.takes_budget or m.fit_parts() or m.structural for m in made):
            raise ValueError("auto: candidates that take a budget and learn nothing are needed, and a test probe")

    @property
    def _ask(self) -> Ask:
        """The probes that candidates are fitted to, and those held out behind them."""
        fitted = [ask.number for each in self.candidates for ask in each.needs.asks if ask.kind == Ask(1).kind]
        return Ask(max(fitted, default=0) + self.tests)

    @property
    def needs(self) -> Stats:
        asked = Stats(probes=self._ask)
        for each in self.candidates:
            asked |= each.needs
        return asked

    def supports(self, backbone: Any) -> str | None:
        return next((why for each in self.candidates if (why := each.supports(backbone))), None)

    def accepts(self, budget: Budget) -> str | None:
        return None if budget.slots is None else "auto divides bytes: give its budget as a fraction or in bytes"

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        """choice [L] int64: the candidate of each layer; share [L] float64: its part of all bytes."""
        assert isinstance(sample, Sample) and budget is not None
        lost, seen = torch.zeros(1), 0
        for prefill in sample:
            lost = lost + torch.stack(
                [self._lost(view, portion(budget, 1 / len(prefill.layers))) for view in alone(prefill)]
            )
            seen += len(prefill.users)
            if seen >= USERS:
                break
        best, which = lost.min(1)
        at = divided(best)
        share = torch.tensor(GRID, dtype=torch.float64)[at]
        return Fitted({"choice": which.gather(1, at[:, None])[:, 0], "share": share / share.sum()})

    def _lost(self, view: Prefill, equal: Budget) -> Tensor:
        """Of one layer with parts of an equal share, summed over users: [candidates, GRID]."""
        probes = view.probes(0, self._ask)
        held, even = probes.last(self.tests), evened(probes)[:, :, -self.tests :]
        own = held.share * held.own_values()
        want = (held.target + own) * even
        size = want.square().sum((1, 2, 3)).clamp(min=1e-30)
        found = []
        for each in self.candidates:
            for part in GRID:
                (segments,) = each.compress(view, portion(equal, part)).layers
                got = _answer(held, segments) * even
                found.append(((got - want).square().sum((1, 2, 3)) / size).sum())
        return torch.stack(found).view(len(self.candidates), len(GRID)).cpu()

    def planned(self, fitted: Fitted) -> Planned:
        """What it comes to with a fit."""
        return Planned(tuple(self.candidates[i] for i in fitted["choice"].tolist()), tuple(fitted["share"].tolist()))

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if budget is None:
            raise ValueError("auto needs a budget")
        if why := self.accepts(budget):
            raise ValueError(why)
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        return self.planned(fitted).compress(prefill, budget)

    def floor(self, prefill: Prefill) -> Tensor:
        assert prefill.fitted is not None
        return self.planned(prefill.fitted).floor(prefill)

    def given(self, fitted: Fitted | None) -> Compressor:
        return self if fitted is None else self.planned(fitted)

    def flops(self, state: UserState, history: int) -> int:
        """That of each layer's candidate, see `given`."""
        return 0


@dataclass(frozen=True)
class Planned(Compressor):
    """The method of each layer, and its share of the bytes."""

    methods: tuple[Compressor, ...]
    shares: tuple[float, ...]

    name = "planned"
    family = "fitted"

    def __str__(self) -> str:
        each = enumerate(zip(self.shares, self.methods), start=1)
        return "; ".join(f"layer {i}: {share:.0%} of the bytes, {method}" for i, (share, method) in each)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        assert budget is not None
        parts = zip(self.methods, self.shares, alone(prefill))
        layers = tuple(method.compress(view, portion(budget, share)).layers[0] for method, share, view in parts)
        return UserState(layers, prefill.state.length)

    def floor(self, prefill: Prefill) -> Tensor:
        each = [method.floor(view) for method, view in zip(self.methods, alone(prefill))]
        return torch.stack(each).sum(0) - COUNT_BYTES * (len(each) - 1)  # they have one length

    def work(self, state: UserState, history: int, heads: Sequence[int]) -> int:
        parts = zip(self.methods, state.layers, heads)
        return sum(method.work(UserState((layer,), state.length), history, [h]) for method, layer, h in parts)


def alone(prefill: Prefill) -> tuple[Prefill, ...]:
    """Each layer by itself, its budgets being shares of the bytes of all."""

    def views() -> tuple[Prefill, ...]:
        whole = prefill.full_bytes()
        return tuple(replace(prefill.only(range(i, i + 1)), fitted=None, whole=whole) for i in prefill.layers)

    return prefill.remember("alone", views)


def portion(budget: Budget, share: float) -> Budget:
    """A part of a budget that is in bytes or a fraction."""
    if budget.bytes is not None:
        return Budget(bytes=max(int(budget.bytes * share), 1))
    assert budget.fraction is not None
    return Budget(fraction=min(budget.fraction * share, 0.999999))  # 1 means: as it is


def divided(lost: Tensor) -> Tensor:
    """Which point of GRID each layer gets, [L], of its curve of losses [L, G], for the least total within L.

    From each curve's lower convex hull the steps that save most a byte are taken first, while they fit.
    """
    at = [0] * len(lost)
    steps: list[tuple[float, int, int]] = []  # what a byte of it saves, layer, where it ends
    for layer, curve in enumerate(lost.tolist()):
        here = 0
        while here < len(GRID) - 1:
            slope, there = max(
                ((curve[here] - curve[i]) / (GRID[i] - GRID[here]), i) for i in range(here + 1, len(GRID))
            )
            if slope <= 0:
                break
            steps.append((slope, layer, there))
            here = there
    spent = GRID[0] * len(lost)
    for _, layer, there in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        more = GRID[there] - GRID[at[layer]]
        if spent + more <= len(lost) + 1e-9:
            at[layer], spent = there, spent + more
    return torch.tensor(at)


def _answer(probes: Any, segments: Sequence[Segment]) -> Tensor:
    """What a layer gives to probes, their own values among it, [B, Hq, M, D]."""
    (segment,) = segments
    weights, share = probes.weigh(segment)
    return probes.mix(weights, segment) + share * probes.own_values()
