"""The two tasks as a suite names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.errors import DataError
from malloc_bench.data.tasks.impressions import Impressions, expose
from malloc_bench.data.tasks.known import knowing
from malloc_bench.data.tasks.options import Option, Whole
from malloc_bench.data.tasks.splits import LeaveOneOut, Rule, Share, Split, get_split


class Task(Option, ABC):
    """What a backbone is trained for and asked."""

    kind: ClassVar[str] = "task"

    def settled(self, dataset: Dataset) -> Task:
        """With what the suite leaves open chosen by the data; raises DataError where they do not fit it."""
        return self

    @property
    def trained(self) -> Task:
        """The task as training knows it: without what only a request is."""
        return self

    def check(self, rule: Rule, evaluate: str) -> None:
        """Raises DataError where a split, or the targets of `evaluate`, have not what the task asks for."""

    @abstractmethod
    def cut(self, dataset: Dataset, rule: Rule) -> Split | Impressions:
        """The data of the task; raises DataError."""


class Retrieval(Task):
    """Rank the whole catalogue for the next item: HR, NDCG, MRR. Settings are of test histories; training has none.

    history: only the newest so many events of a user are known, the one that reads among them. delete, replace: that
    share of them is gone, or has items in its place that are drawn by how often they train; see `known.knowing`. steps:
    so many next items are asked for, each when the one before has gone into the state: the true one, or, apart, the one
    that the model ranks first of those its user has not met.
    """

    name: ClassVar[str] = "retrieval"
    history: Whole | None = None
    delete: Share | None = None
    replace: Share | None = None
    steps: Annotated[int, Field(ge=2, le=50)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Retrieval:
        if self.delete and self.replace:
            raise ValueError("delete and replace are two tasks: name each by itself")
        return self

    @property
    def trained(self) -> Retrieval:
        return Retrieval()

    def check(self, rule: Rule, evaluate: str) -> None:
        if self.steps is None:
            return
        if evaluate != "test":
            raise DataError(f"{self}: steps go on into what is tested, so they cannot be asked of validation")
        if isinstance(rule, LeaveOneOut) and (rule.last or 1) < self.steps:
            what = f"{{leave_one_out: {{last: {self.steps}}}}}"
            raise DataError(f"{self}: the split {rule} holds out {rule.last or 1} of a user's events: name it {what}")

    def cut(self, dataset: Dataset, rule: Rule) -> Split:
        split = replace(get_split(rule, dataset), steps=self.steps or 1)
        if self.history or self.delete or self.replace:
            return knowing(split, self.history, self.delete or 0.0, self.replace or 0.0)
        return split


class Ranking(Task):
    """Score given candidates: AUC, GAUC, LogLoss, NDCG, Recall.

    negatives: 0: candidates are the events themselves, liked or not by the card's label; n: each liked event with n
    sampled items. None: 0 where the data have labels of both kinds, else 1. candidates: scored with one state, at most.
    seed: of the sampled items, the same for every method and every seed of a suite.
    """

    name: ClassVar[str] = "ranking"
    negatives: Annotated[int, Field(ge=0, le=10_000)] | None = None
    candidates: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _room(self) -> Ranking:
        if self.candidates < 1 + (self.negatives or 0):
            raise ValueError(f"{self.candidates} candidates have no room for an event and {self.negatives} negatives")
        return self

    @property
    def label(self) -> str:
        plain = self if self.negatives else self.model_copy(update={"negatives": None})  # labels are the usual thing
        return super(Ranking, plain).label

    def settled(self, dataset: Dataset) -> Ranking:
        labels = dataset.labels()
        if self.negatives == 0 and labels is None:
            raise DataError(f"{dataset.name} has no labels (from {dataset.source}): give ranking negatives, such as 1")
        both = labels is not None and bool(labels.any()) and not labels.all()
        chosen: Any = self.model_dump() | {"negatives": 1 - both if self.negatives is None else self.negatives}
        return Ranking(**chosen)

    def cut(self, dataset: Dataset, rule: Rule) -> Impressions:
        settled = self.settled(dataset)
        assert settled.negatives is not None
        return expose(dataset, rule, settled.negatives, settled.candidates, settled.seed)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Retrieval, Ranking)}
