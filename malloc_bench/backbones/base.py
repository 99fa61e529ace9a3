"""The four calls that every backbone answers, for both tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.registry import find, suggest
from malloc_bench.state import Batch, Events, MissingStatistic, Named, Prefill, Probes, Stats, UserState, joined


class Scoring(nn.Module):
    """The head of the ranking task: a linear map of what a candidate read, and a bias for each item."""

    def __init__(self, dim: int, n_items: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, 1)
        self.bias = nn.Parameter(torch.zeros(n_items + 1))

    def forward(self, hidden: Tensor, items: Tensor) -> Tensor:
        return self.linear(self.norm(hidden)).squeeze(-1) + self.bias[items.long()]


class Backbone(nn.Module, ABC):
    """A sequential recommender. A token sees the state and itself; history reaches a token only through the state.

    Attributes for subclasses: `paper`, `version` (raise it when numbers change), `fields` (what the state keeps of an
    event in each layer), `has_slots` (False: a state is one memory a layer, no row of which is an event),
    `only_adds` (False: `append` may also drop or replace slots, so that a state need not grow with the history),
    `uses_positions` and `uses_times` (what `read` needs to know of a slot beside its vectors), `uses_categories` (that
    `categorise` is called before all else), `presets` (published sizes: name -> parameters).
    """

    kind: ClassVar[str] = "backbones"
    name: ClassVar[str]
    paper: ClassVar[str]
    version: ClassVar[int] = 1
    Config: ClassVar[type]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    fields: ClassVar[tuple[str, ...]] = ("keys", "values")
    has_slots: bool = True
    only_adds: bool = True
    uses_positions: bool = False
    uses_times: bool = False
    uses_categories: bool = False
    n_items: int
    max_length: int

    def __init__(self) -> None:
        super().__init__()
        self.scoring: Scoring | None = None

    @property
    def logit_scale(self) -> float:
        """What scores are multiplied by to be logits."""
        return 1.0

    @abstractmethod
    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        """The full state of B histories, with the attention statistics asked for."""

    def probe(
        self, state: UserState, events: Events, stats: Stats, items: Named, tokens: Events | None = None
    ) -> Sequence[Mapping[Hashable, Probes]]:
        """What each layer of the state has seen of the probe tokens of `stats`, as `Prefill.probed` has it.

        events: the newest of the history, with their times. tokens: those that will read, for ceilings. Raises
        MissingStatistic where it cannot tell.
        """
        raise MissingStatistic(f"{self.name} sends no probes through its layers")

    def prepare(
        self,
        events: Events,
        users: Tensor | None = None,
        stats: Stats = Stats(),
        seed: int = 0,
        items: Named | None = None,
        tokens: Events | None = None,
    ) -> Prefill:
        """All that methods with the needs `stats` get: `prefill`, what is known of items, the probes, and of the tokens
        that will read, which ceilings alone ask for."""
        made = self.prefill(events, users, stats, seed)
        probed = self.probe(made.state, events, stats, items or Named({}), tokens) if stats.asks else None
        reader = self.reading(tokens, made.state) if stats.reader and tokens is not None else None
        return replace(made, items=items, probed=probed, reader=reader)

    def watch(self, state: UserState, events: Events, grown: UserState, stats: Stats) -> dict[str, Any]:
        """What new events asked of `grown`, the state with them in it, as `Prefill` has it by name; what cannot be told

        is not there, and a method that reads it there raises MissingStatistic.
        """
        return {}

    def go_on(self, prefill: Prefill, state: UserState, events: Events, stats: Stats = Stats()) -> Prefill:
        """What `update` is given: a compressed state of the prefill's users with new events appended, in one segment,

        and what methods with the needs `stats` can still ask: the new events' attention, probes; not what is not kept.
        """
        grown = joined(self.append(state, events))
        seen = self.watch(state, events, grown, stats)
        if stats.asks:
            seen["probed"] = self.probe(grown, events, stats, prefill.items or Named({}))
        return replace(prefill.over(grown), **seen)

    @abstractmethod
    def read(self, tokens: Events, state: UserState) -> Tensor:
        """Outputs [B, M, d] of M tokens that stand behind the history and do not see one another."""

    def reads(self, tokens: Events, length: Tensor) -> Callable[[UserState], Tensor]:
        """`read` of the same tokens, for many states of the same histories of `length` [B] events: what no state
        changes may be worked out once."""
        return partial(self.read, tokens)

    def reading(self, tokens: Events, state: UserState) -> list[Tensor]:
        """`Prefill.reader`: mean |weight| of the tokens on each slot of the full state, [B, H, S] a layer."""
        raise NotImplementedError(f"{self.name} does not attend to slots")

    def admit(self, events: Events) -> int:
        """How many events the histories have, padding too; raises ValueError beyond `max_length`."""
        if (s := events.items.shape[1]) > self.max_length:
            raise ValueError(f"{self.name} keeps at most max_length={self.max_length} events, the history has {s}")
        return s

    def grown(self, state: UserState, events: Events) -> Tensor:
        """Events of each user once new ones are appended, [B]; raises ValueError where they cannot be."""
        if state.events is not None:
            raise ValueError("a state of raw events grows by its ids alone, not by append")
        length = state.length + events.count
        if len(state) and (total := int(length.max())) > self.max_length:
            raise ValueError(f"{self.name} keeps at most max_length={self.max_length} events, appending makes {total}")
        return length

    @abstractmethod
    def append(self, state: UserState, events: Events) -> UserState:
        """The state with new events added, as a prefill of all has it. Raises ValueError beyond `max_length`."""

    @abstractmethod
    def forward(self, events: Events) -> Tensor:
        """The plain causal pass, [B, S, d]: what `read` over the full state must equal."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Mean training loss over the batch's targets."""

    def carried(self, users: int) -> dict[str, Tensor]:
        """What training on so many users keeps from step to step beside its parameters, by name, anew and empty.

        `loss` changes the tensors in place; a fit saves them at each epoch's end and goes on from them.
        """
        return {}

    @abstractmethod
    def catalogue(self) -> Tensor:
        """[n_items, d]: an output's scores are hidden @ catalogue.T; row i is item i + 1."""

    def categorise(self, categories: Tensor) -> None:
        """Take in the category of each item, [n_items] int64 from 0; raises ValueError where they do not do."""
        raise NotImplementedError(f"{self.name} uses no categories")

    def for_ranking(self) -> Self:
        """Itself with a fresh scoring head: retrieval has none, so its weights do not depend on it."""
        self.scoring = Scoring(self.catalogue().shape[1], self.n_items).to(self.catalogue().device)
        return self

    def score(self, hidden: Tensor, tokens: Events) -> Tensor:
        """Logits [B, M] of candidates from what they read, [B, M, d]; raises ValueError without a scoring head."""
        if self.scoring is None:
            raise ValueError(f"this {self.name} has no scoring head: make it with for_ranking()")
        return self.scoring(hidden, tokens.items)

    def ranking_loss(self, history: Events, tokens: Events, labels: Tensor) -> Tensor:
        """Mean binary cross-entropy over the real candidates of B users; labels [B, M] bool.

        Candidates are read from the full state, as they are when a method is tried: no backbone needs code of its own.
        """
        real = tokens.mask()
        logits = self.score(self.read(tokens, self.prefill(history).state), tokens)
        return F.binary_cross_entropy_with_logits(logits[real].float(), labels[real].float())

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int | None:
        """Matmul-like work of a step for one user, 2 per multiply-add, as the code does it; None: not known.

        tokens: events of the history (prefill, statistics), new events (append), candidates (read). state: what is
        appended to or read. "statistics": what gathering `stats` adds to a blockwise prefill.
        """
        return None


def get_backbone(name: str, n_items: int, has_time: bool = False, **params: Any) -> Backbone:
    """A fresh backbone over a catalogue of n_items; raises UnknownName, or ValueError on an unknown parameter.

    preset="large" stands for the parameters of that name in the backbone's `presets`; others given go before them.
    """
    cls = find("backbones", name)
    params = spelt_out(cls, params)
    valid = {f.name for f in fields(cls.Config)}
    for key in params.keys() - valid:
        raise ValueError(f"backbone {name} has no parameter '{key}'.{suggest(key, valid)}")
    return cls(cls.Config(**params), n_items, has_time)


def spelt_out(cls: type[Backbone], params: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's parameters with what a `preset` among them stands for; raises ValueError where there is no such."""
    if "preset" not in params or not cls.presets:
        return dict(params)
    preset = params["preset"]
    if preset not in cls.presets:
        raise ValueError(f"preset must be one of {', '.join(cls.presets)}, not {preset}")
    return {**cls.presets[preset], **{key: value for key, value in params.items() if key != "preset"}}
