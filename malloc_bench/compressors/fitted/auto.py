"""Which method, and how many bytes, each layer gets: where they save most of what the model's output loses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, Sources, as_compressor, grows, said
from malloc_bench.compressors.fitted.allocation import Curves
from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget
from malloc_bench.registry import register
from malloc_bench.state import Ask, Fitted, Layer, Prefill, Sample, Stats, UserState

GRID = tuple(2.0**-i for i in range(1, 10))  # of a layer's bytes, that curves are measured at
USERS = 16  # of a chunk of training users, who have histories of like length: whom curves are measured on
FITTED = {"probes": 256, "which": "top", "rounds": 30}


@register("auto")
@dataclass(frozen=True)
class Auto(Compressor):
    """Divides a budget over layers, and takes for each the candidate that loses least there with the bytes it gets.

    candidates: methods that take a budget, or lists of steps as `compose` has them; what they learn they learn of each
    layer alone. For each layer, each candidate and a row of sizes, `fit` compresses that layer alone of training users
    and measures what probes, `Probes.readers`, then come out of the whole stack with: the length of the gap to what
    they do over the full state, as a share of that, its mean over probes and users (lists lose in proportion to it; a
    mean of squares would be that of the worst alone). Taking it that squared gaps of layers add up, bytes go where the
    next ones save most, along the lower convex hulls, as a Lagrange multiplier would have it.
    One fit serves every budget; all users have one plan, see `planned`. tests: probes measured with, of the first
    candidate's kind; a third or more of them are behind those that it is fitted to.
    What is merged is for backbones that keep one vector of an event, where a fitted slot stores two, and for budgets
    that hold every event.
    On plain tensors, which have no stack, each layer's own gap counts. Where layers are alike, equal shares do as well.
    """

    candidates: tuple[Any, ...] = (
        ({"fit_keys": FITTED}, {"mxint": {"bits": 4}}),
        ({"fit_keys": FITTED}, {"mxint": {"bits": 6}}),
        ({"fit_keys": FITTED}, "gain_shape"),
        *(("kmeans", {"mxint": {"bits": bits}}) for bits in (4, 6, 8)),
    )
    tests: int = 32

    version = 5
    family = "fitted"
    paper = "ours; hulls and multipliers: Shoham and Gersho, IEEE TASSP 36, 1988"
    formula = "min over candidate and bytes of each layer: sum over layers of (E |output gap|)^2, within the budget"
    growth = grows(compress="p n L d + h p k n L + h p k^2 L", read="n L d")
    stores = "what the candidate of each layer stores; fixed bytes: the curves, and what candidates learned"

    def __post_init__(self) -> None:
        made = tuple(
            as_compressor({"compose": {"steps": list(each)}} if isinstance(each, list | tuple) else each)
            for each in self.candidates
        )
        object.__setattr__(self, "candidates", made)
        if self.tests < 1 or not made or any(not m.takes_budget or m.structural for m in made):
            raise ValueError("auto: candidates that take a budget and are not trained are needed, and a test probe")

    @property
    def needs(self) -> Stats:
        asked = Stats(probes=self._ask)
        for each in self.candidates:
            asked |= each.needs
        return asked

    @property
    def fit_needs(self) -> Stats:
        return reduce(Stats.__or__, (each.fit_needs for each in self.candidates if each.fit_parts()), self.needs)

    @property
    def _ask(self) -> Ask:
        asks = [ask for each in self.candidates for ask in each.needs.asks]
        fitted = [ask for ask in asks if ask.kind == asks[0].kind]
        most = max(fitted, key=lambda ask: ask.number) if fitted else Ask(1)
        return replace(most, number=most.number + self.tests)

    def supports(self, backbone: Any) -> str | None:
        return next((why for each in self.candidates if (why := each.supports(backbone))), None)

    def accepts(self, budget: Budget) -> str | None:
        return None if budget.slots is None else "auto divides bytes: give its budget as a fraction or in bytes"

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        """lost, spent [L, candidates, GRID] float64: the squared gap, and bytes as a share of the full state's; full
        []: its mean bytes; under each candidate's number and each layer's what it learned of it."""
        assert isinstance(sample, Sample)
        learned = self._learned(sample)
        lost, spent, full, seen = torch.zeros(()), torch.zeros(()), torch.zeros(()), 0
        for prefill in (_asked(each) for each in sample):
            some = [self._measured(replace(prefill, fitted=learned), layer) for layer in prefill.layers]
            lost, spent = (a + torch.stack(b) for a, b in zip((lost, spent), zip(*some)))
            full = full + prefill.full_bytes().double().sum().cpu()
            seen += len(prefill.users)
        return Fitted({**learned, "lost": (lost / seen).square(), "spent": spent / full, "full": full / seen})

    def _learned(self, sample: Sample) -> Fitted:
        """Of each candidate that learns and each layer, in one pass a layer, of users whom nothing is measured on."""
        learning = [(i, each) for i, each in enumerate(self.candidates) if each.fit_parts()]
        found: dict[str, Fitted] = {}
        for layer in next(iter(sample)).layers if learning else ():
            own = Sample(partial(_layers, sample, layer))
            found |= {f"{i}.{layer}": each.fit(own) for i, each in learning}
        return Fitted.joined(found)

    @torch.no_grad()  # a graph of every stack would be kept until the end
    def _measured(self, prefill: Prefill, layer: int) -> tuple[Tensor, Tensor]:
        """Of one layer, [candidates, GRID] each: the gap, and bytes, summed over users."""
        view, layers = _alone(prefill, layer), prefill.state.layers
        probes, found = prefill.probes(layer, self._ask).readers(self.tests), []
        out = probes.outputs(prefill.state)
        want = probes.target if out is None else out
        for each in self.candidates:
            own = self._informed(view, prefill.fitted, each, layer)
            for part in GRID:
                state = each.compress(own, Budget(part / len(layers)))
                got = probes.outputs(UserState((*layers[:layer], *state.layers, *layers[layer + 1 :]), state.length))
                if got is None:
                    ((segment,),) = state.layers
                    got = probes.mix(probes.weigh(segment)[0], segment)
                gap, size = (x.double().norm(dim=-1).flatten(1).mean(1) for x in (got - want, want))
                found += [(gap / size.clamp(min=1e-20)).sum(), (state.nbytes() - COUNT_BYTES).double().sum()]
        lost, spent = torch.stack(found).cpu().view(len(self.candidates), len(GRID), 2).unbind(-1)
        return lost, spent

    def planned(self, fitted: Fitted, budget: Any) -> tuple[tuple[Compressor, float], ...]:
        """The method of each layer, and its share of the bytes."""
        budget = Budget.parse(budget)
        if why := self.accepts(budget):
            raise ValueError(why)
        part = budget.fraction if budget.bytes is None else budget.bytes / max(float(fitted["full"]), 1.0)
        assert part is not None
        chosen = Curves.of(fitted["lost"], fitted["spent"]).divided(part)
        return tuple((self.candidates[candidate], share) for candidate, share in chosen)

    def explain(self, fitted: Fitted, budget: Any) -> Sequence[str]:
        plan = self.planned(fitted, budget)
        return [f"layer {i}: {share:.1%} of the bytes, {said(method)}" for i, (method, share) in enumerate(plan, 1)]

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if budget is None:
            raise ValueError("auto needs a budget")
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        plan, target = self.planned(fitted, budget), budget.target(prefill.full_bytes())
        assert target is not None
        alone = prefill.remember(("alone", self), lambda: [_alone(prefill, layer) for layer in prefill.layers])
        views = [
            self._informed(view, prefill.fitted, method, layer)
            for layer, (view, (method, _)) in enumerate(zip(alone, plan))
        ]
        floors = [_least(method, view) - COUNT_BYTES for (method, _), view in zip(plan, views)]
        layers: list[Layer] = []
        left = target - COUNT_BYTES  # they have one length
        for i, ((method, share), view) in enumerate(zip(plan, views)):
            rest = sum(share for _, share in plan[i:])
            mine = (left.double() * (share / rest)).floor().long().minimum(left - sum(floors[i + 1 :]))
            # half of twice as much: a budget of its own for each user
            state = method.compress(replace(view, whole=2 * (mine + COUNT_BYTES).clamp(min=1)), Budget(0.5))
            left = left - (state.nbytes() - COUNT_BYTES)
            layers += state.layers
        return UserState(tuple(layers), prefill.state.length)

    def floor(self, prefill: Prefill) -> Tensor:
        """With the largest candidate's smallest state in every layer."""
        total = torch.full_like(prefill.state.length, COUNT_BYTES).long()
        for layer in prefill.layers:
            view = _alone(prefill, layer)
            floors = [each.floor(self._informed(view, prefill.fitted, each, layer)) for each in self.candidates]
            total += torch.stack(floors).amax(0) - COUNT_BYTES
        return total

    def _informed(self, view: Prefill, fitted: Fitted | None, method: Compressor, layer: int) -> Prefill:
        """A layer by itself with what a candidate has learned of it."""
        if fitted is None or not method.fit_parts():
            return view
        learned = fitted.part(f"{self.candidates.index(method)}.{layer}")
        # its memo stays: candidates remember what they share, as slots
        return replace(view, fitted=learned.to(view.state.length.device))

    def flops(self, state: UserState, of: Sources) -> int:
        """Of the candidate that costs most for a layer's slots."""
        alone = [(UserState((layer,), state.length), [x]) for layer, x in zip(state.layers, of)]
        return sum(max(each.flops(one, x) for each in self.candidates) for one, x in alone)


def _least(method: Compressor, prefill: Prefill) -> Tensor:
    """Its `floor`, of a token method by its layout: `Compose` makes the state, which costs as much as a slot's fit."""
    return TokenMethod.floor(method, prefill) if isinstance(method, TokenMethod) else method.floor(prefill)


def _asked(prefill: Prefill, others: bool = False) -> Prefill:
    """`USERS` of a chunk, evenly spaced; others: the rest, or all where there is none."""
    users = torch.arange(len(prefill.users), device=prefill.users.device)
    asked = users % -(-len(users) // USERS) == 0
    return prefill.take(users[~asked] if others and not bool(asked.all()) else users[asked])


def _layers(sample: Sample, layer: int) -> Iterator[Prefill]:
    for prefill in sample:
        yield _alone(_asked(prefill, others=True), layer)


def _alone(prefill: Prefill, layer: int) -> Prefill:
    """A layer by itself, its budgets being shares of the bytes of all."""
    return replace(prefill.only(range(layer, layer + 1)), fitted=None, whole=prefill.full_bytes())
