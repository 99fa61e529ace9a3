"""Probes: catalogue items sent through the stack over a state, so that a layer is known by what will read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from malloc_bench.state.user_state import Segment, UserState
from malloc_bench.state.vectors import unhalved

KINDS = ("drawn", "even", "popular", "own", "top", "candidates")


@dataclass(frozen=True)
class Ask:
    """Which probes a method needs, so many of them: `which` are "drawn" from training events, or "even", from all
    items of training alike, the most "popular" items, the user's "own" newest ones, those that the model ranks at
    the "top" for the user (in ranking, where nobody ranks items that are no candidates, drawn ones), the
    "candidates" that will read (a ceiling: nobody has them when a state is made), or the items given by id. Where
    the user has fewer they come again. They stand, by turns, at the positions of the requests that `horizon` names,
    0 the next one: 1 is the one after that, when one more event has come."""

    number: int
    which: str | tuple[int, ...] = "drawn"
    horizon: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        given = isinstance(self.which, tuple) and len(self.which) >= self.number
        if self.number < 1 or not (given or self.which in KINDS):
            raise ValueError(
                f"at least one probe, of {', '.join(KINDS)} or as many item ids, not {self.number} of {self.which!r}"
            )
        if not self.horizon or min(self.horizon) < 0:
            raise ValueError(f"a horizon is one offset from 0 or more, not {self.horizon!r}")

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for asks of which one has the first probes of the other."""
        return self.which, self.horizon

    def in_ranking(self) -> Ask:
        """What it comes to in ranking."""
        return replace(self, which="drawn") if self.which == "top" else self


_MOST = 20.0  # of a slot of the state's own it is 0 at most; of slots that somebody has made anything
GIVEN = ("given",)  # the kind of probes that plain tensors come with: they answer whatever is asked


def merged(one: tuple[Ask, ...], other: tuple[Ask, ...]) -> tuple[Ask, ...]:
    """All of both, of each kind the most, in an order of their own."""
    most: dict[tuple[Any, ...], Ask] = {}
    for ask in (*one, *other):
        if ask.kind not in most or most[ask.kind].number < ask.number:
            most[ask.kind] = ask
    return tuple(sorted(most.values(), key=repr))


@dataclass(frozen=True, eq=False)
class Probes:
    """What M probe tokens of each of B users asked of one layer and got. A probe sees the state and itself.

    queries: [B, Hq, M, D], as they multiply keys. own: the token's own vectors, field -> [B, H, M, D]; none on plain
    tensors. target: [B, Hq, M, D'], what it got of the history: sum of weight x value, its own value apart.
    share: [B, Hq, M, 1], the weight that fell to the token itself; its own value counts so much.
    total: [B, Hq, M, 1], the logarithm of what its weights were divided by; None where they are not (`normalised`).
    length: [B], events in the history.
    weights: [B, Hq, M, S], what the slots of `over`, all that the state had, weighed; None: to be worked out.
    ranked: whether those that are likelier to read come first.

    As it stands: softmax of q.k, of plain tensors. Behind a backbone a subclass asks the layer (its bias, temperature,
    search and normaliser).
    """

    queries: Tensor
    target: Tensor
    share: Tensor
    total: Tensor | None
    length: Tensor
    own: Mapping[str, Tensor] = field(default_factory=dict)
    over: Segment | None = None
    weights: Tensor | None = None
    ranked: bool = field(default=False, kw_only=True)

    def first(self, number: int) -> Self:
        """The first so many."""
        return self if number >= self.queries.shape[2] else self._some(slice(number))

    def last(self, number: int) -> Self:
        """The last so many."""
        return self if number >= self.queries.shape[2] else self._some(slice(self.queries.shape[2] - number, None))

    def readers(self, number: int) -> Self:
        """So many at most that stand for those who will read: the last ones, which nothing need be fitted to. Of ranked
        ones two thirds are from before these, at ranks that grow by a factor: the rank of who reads does, too."""
        m = self.queries.shape[2]
        if not self.ranked or number >= m:
            return self.last(number)
        held = -(-number // 3)
        likely = torch.logspace(0, math.log10(m - held), number - held, dtype=torch.float64).round().long() - 1
        return self._some(torch.cat([likely.unique(), torch.arange(m - held, m)]).to(self.queries.device))

    def _some(self, rows: slice | Tensor) -> Self:
        cut: dict[str, Any] = {name: x[:, :, rows] for name, x in self._by_probe().items()}
        return replace(self, own={name: x[:, :, rows] for name, x in self.own.items()}, **cut)

    def _by_probe(self) -> dict[str, Tensor]:
        """Fields with a row for each probe, M third."""
        names = ("queries", "target", "share", "total", "weights")
        known = {name: getattr(self, name) for name in names}
        return {name: x for name, x in known.items() if x is not None}

    @property
    def normalised(self) -> bool:
        """Whether a token's weights, its own among them, sum to 1."""
        return self.total is not None

    @property
    def normaliser(self) -> float:
        """What SiLU weights are divided by, the same for all."""
        return 1.0

    def asking(self) -> Tensor:
        """Queries such that q.k is the logit, a bias apart, [B, Hq, M, D]."""
        return self.queries

    def logits(self, segment: Segment) -> Tensor:
        """[B, Hq, M, S] before masking."""
        return self.queries @ _each(segment.fields["keys"].dense().to(self.queries.dtype), self.queries.shape[1]).mT

    def weigh(self, segment: Segment) -> tuple[Tensor, Tensor]:
        """Weights of the segment's slots [B, Hq, M, S] and of the token itself [B, Hq, M, 1], if it is all there is."""
        assert segment.slots is not None
        logits = self.logits(segment)
        if segment.slots.mass is not None:
            logits = logits + _each(segment.slots.mass.clamp(min=1e-6).log(), logits.shape[1]).unsqueeze(2)
        mask = _each(segment.slots.mask(segment.width), logits.shape[1]).unsqueeze(2)
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
        return weights, torch.zeros_like(self.share)

    def mix(self, weights: Tensor, segment: Segment) -> Tensor:
        """[B, Hq, M, S] -> [B, Hq, M, D']"""
        return weights @ _each(segment.fields["values"].dense().to(weights.dtype), weights.shape[1])

    def columns(self, segment: Segment) -> Tensor:
        """What each of the segment's slots weighed, or would have, among all that the state had: [B, Hq, M, S], 0 where
        there is none."""
        assert segment.slots is not None
        if segment is self.over and self.weights is not None:
            return self.weights
        mask = _each(segment.slots.mask(segment.width), self.queries.shape[1]).unsqueeze(2)
        if self.total is None:
            return self.weigh(segment)[0]
        logits = self.logits(segment) - self.total
        if segment.slots.mass is not None:
            logits = logits + _each(segment.slots.mass.clamp(min=1e-6).log(), logits.shape[1]).unsqueeze(2)
        return logits.clamp(max=_MOST).masked_fill(~mask, -torch.inf).exp()

    def outputs(self, state: UserState) -> Tensor | None:
        """What the probes come out of the whole stack with, read from another state of the users, [B, M, d]; None on
        plain tensors, which have no stack."""
        return None

    def own_values(self) -> Tensor:
        """The token's own value by query head, [B, Hq, M, D']; zeros on plain tensors."""
        if not self.own:
            return torch.zeros_like(self.target)
        return _each(self.own.get("values", next(iter(self.own.values()))), self.queries.shape[1])


def plain(queries: Tensor, segment: Segment, length: Tensor) -> Probes:
    """Of queries [B, Hq, M, D] over a layer of plain tensors: softmax of q.k over the root of D."""
    q = queries.float() / queries.shape[-1] ** 0.5
    nothing = torch.zeros_like(q[..., :1])
    asked = Probes(q, nothing, nothing, nothing, length)
    assert segment.slots is not None
    mask = _each(segment.slots.mask(segment.width), q.shape[1]).unsqueeze(2)
    total = asked.logits(segment).masked_fill(~mask, -torch.inf).logsumexp(-1, keepdim=True)
    total = total.masked_fill(~total.isfinite(), 0.0)  # no slot at all
    return Probes(q, asked.mix(asked.weigh(segment)[0], segment), nothing, total, length)


def _each(x: Tensor, heads: int) -> Tensor:
    """What is stored by head, [B, H, ...], for each query head, neighbours sharing one."""
    x = unhalved(x)
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], 1)
