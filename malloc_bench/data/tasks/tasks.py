"""The two tasks as a suite names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.errors import DataError
from malloc_bench.data.tasks.impressions import Impressions, expose
from malloc_bench.data.tasks.options import Option, Whole
from malloc_bench.data.tasks.splits import Rule, Split, get_split


class Task(Option, ABC):
    """What a backbone is trained for and asked."""

    kind: ClassVar[str] = "task"

    def settled(self, dataset: Dataset) -> Task:
        """With what the suite leaves open chosen by the data; raises DataError where they do not fit it."""
        return self

    @abstractmethod
    def cut(self, dataset: Dataset, rule: Rule) -> Split | Impressions:
        """The data of the task; raises DataError."""


class Retrieval(Task):
    """Rank the whole catalogue for the next item: HR, NDCG, MRR."""

    name: ClassVar[str] = "retrieval"

    def cut(self, dataset: Dataset, rule: Rule) -> Split:
        return get_split(rule, dataset)


class Ranking(Task):
    """Score given candidates: AUC, GAUC, LogLoss, NDCG, Recall.

    negatives: 0: candidates are the events themselves, liked or not by the card's label; n: each liked event with n
    sampled items. None: 0 where the data have labels of both kinds, else 1. candidates: scored with one state, at most.
    seed: of the sampled items, the same for every method and every seed of a suite.
    """

    name: ClassVar[str] = "ranking"
    negatives: Annotated[int, Field(ge=0)] | None = None
    candidates: Whole = 32
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
