"""A suite: a YAML file that describes a grid of cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from malloc_bench.compressors import Budget
from malloc_bench.data import DataError
from malloc_bench.data.tasks.splits import Rule
from malloc_bench.data.tasks.tasks import Task
from malloc_bench.registry import suggest
from malloc_bench.results import budget_asked, budget_label, canonical_json
from malloc_bench.results.labels import bare, spelled
from malloc_bench.suite import file as suite_file
from malloc_bench.suite import parts as suite_parts
from malloc_bench.suite.cells import Cell, Part
from malloc_bench.suite.file import Limits, Measure, SuiteError
from malloc_bench.training.fit import Training

__all__ = ["Cell", "Measure", "Part", "Suite", "SuiteError", "load_suite", "only"]

MAX_CELLS = 1_000_000


@dataclass(frozen=True)
class Suite:
    """What a suite's file says, checked; `path` is that file.

    cards: for data sets of the user's own, by name, the card's file that `get_dataset` takes.
    remarks: by compressor, what its sound rows give as their `reason`; not from the file, and in no cell's id.
    limits: of each cell, in no cell's id; None: nobody looks.
    evaluate: on which targets, `test` or `validation`. tuned: a file of chosen parameters (`tuning.Tuned`).
    """

    name: str
    path: Path
    datasets: tuple[str, ...]
    tasks: tuple[Task, ...]
    splits: tuple[Rule | None, ...]  # None: as each data set allows
    backbones: tuple[Part, ...]
    compressors: tuple[Part, ...]
    budgets: tuple[Budget, ...]
    seeds: tuple[int, ...]
    training: Training
    measure: Measure
    filter_seen: bool = True
    cards: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)
    evaluate: str = "test"
    tuned: Path | None = None
    limits: Limits | None = None

    def cells(self) -> list[Cell]:
        """Every cell once, by dataset, task, split, backbone and seed; within each, compressors in order, then budgets.

        A compressor that takes no budget is one cell. A pair that makes no sense is a cell with the reason in
        `impossible`.
        """
        backbones, compressors = map(_anew, (self.backbones, self.compressors))
        methods: dict[str, tuple[int, Part, Budget | None, str | None]] = {}
        for i, part in enumerate(compressors):
            for budget in self._budgets(part):
                content = canonical_json([part.content, budget and budget.value()])
                methods.setdefault(content, (i, part, budget, _refusal(part, budget)))
        senseless = {id(backbone): [refused(backbone, part) for part in compressors] for backbone in backbones}
        cells: dict[str, list[Cell]] = {}  # by what all methods share: texts of a few hundred groups, not of each cell
        grid = product(self.datasets, self.tasks, self.splits, backbones, self.seeds)
        for dataset, task, split, backbone, seed in grid:
            training = replace(self.training, **backbone.training).content()
            full = Cell(
                self.name, dataset, task, split, backbone, Part("full"), None, seed, training, self.filter_seen,
                evaluate=self.evaluate,
            )  # fmt: skip
            cells.setdefault(canonical_json(full.payload()), [
                replace(full, compressor=part, budget=budget, impossible=why or senseless[id(backbone)][i])
                for i, part, budget, why in methods.values()
            ])  # fmt: skip
        return [cell for group in cells.values() for cell in group]

    def _budgets(self, part: Part) -> Sequence[Budget | None]:
        return self.budgets if part.build().takes_budget else (None,)


def _anew(parts: Sequence[Part]) -> list[Part]:
    """The same parts, which have not yet looked at any file."""
    return [replace(part) for part in parts]


def _refusal(part: Part, budget: Budget | None) -> str | None:
    return None if budget is None else _said(part.build().accepts, budget)


def _said(question: Callable[[Any], str | None], of: Any) -> str | None:
    """The answer; None also where there is none because the part fails: that is for its own rows to say."""
    try:
        return question(of)
    except (Exception, SystemExit):
        return None


def refused(backbone: Part, compressor: Part) -> str | None:
    """Why a compressor makes no sense with a backbone whatever the data, or None."""
    method = compressor.build()
    reasons = [_said(method.supports, probe) for probe in backbone.probes]
    return reasons[0] if reasons and all(reasons) else None


# ---- from a file


def load_suite(path: str | Path) -> Suite:
    """The suite of a file, or a shipped one by name (`quick`, also as `suites/quick.yaml` far from a checkout).

    Raises SuiteError: one line with file, key path, what was expected and the nearest valid name.
    """
    file = suite_file.locate(path)
    try:
        content = suite_file.read(file)
        cards = suite_file.cards(content.datasets, file.parent)
        suite = Suite(
            name=content.name,
            path=file,
            datasets=tuple(cards),
            cards=cards,
            tasks=suite_file.tasks(content.tasks),
            splits=suite_file.splits(content.split),
            backbones=suite_parts.parts("backbones", content.backbones),
            compressors=suite_parts.parts("compressors", content.compressors),
            budgets=suite_parts.budgets(content.budgets),
            seeds=tuple(content.seeds),
            training=Training(**content.training.model_dump()),
            measure=_measure(content.measure),
            limits=_limits(content.limits),
            filter_seen=content.filter_seen,
            evaluate=content.evaluate,
            tuned=None if content.tuned is None else file.parent / content.tuned,
        )
        _check(suite)
    except suite_file.Fault as fault:
        raise SuiteError(f"{file}: {fault}") from None
    return suite


def _limits(keys: suite_file.LimitKeys) -> Limits | None:
    given = keys.model_dump()
    return Limits(**given) if any(given.values()) else None


def _measure(keys: suite_file.MeasureKeys) -> Measure:
    given = keys.model_dump()
    if keys.budgets is not None:
        given["budgets"] = suite_parts.budgets(keys.budgets, "measure.budgets")
    suite_file.no_twins("measure.candidates", keys.candidates)
    if keys.store is None and len(keys.candidates) > 1:
        raise suite_file.Fault("measure.candidates", "several are for requests: name a store, such as store: lmdb")
    return Measure(**given)


def _check(suite: Suite) -> None:
    """That every compressor and task can run somewhere, and that the grid has a size one can mean."""
    for i, (task, rule) in enumerate(product(suite.tasks, filter(None, suite.splits))):
        try:
            task.check(rule, suite.evaluate)
        except DataError as error:
            raise suite_file.Fault(f"tasks[{i // len(suite.splits)}]", str(error)) from None
    takers = [part for part in suite.compressors if part.build().takes_budget]
    if takers and not suite.budgets:
        raise suite_file.Fault("budgets", f"missing: {takers[0].label} takes one, such as 0.25")
    for part in suite.backbones:
        settings = replace(suite.training, **part.training)
        if settings.logq and settings.negatives is None:
            raise suite_file.Fault(
                "training.logq", f"{part.name} draws no negatives to correct: give `negatives: 256` too"
            )
    size = math.prod(map(len, (suite.datasets, suite.tasks, suite.splits, suite.backbones, suite.seeds)))
    size *= sum(len(suite._budgets(part)) for part in suite.compressors)
    if size > MAX_CELLS:
        raise suite_file.Fault("", f"{size:,} cells, more than {MAX_CELLS:,}: split the suite")
    for part in suite.compressors:
        reasons = [_refusal(part, budget) for budget in suite._budgets(part)]
        pairs = [refused(backbone, part) for backbone in suite.backbones]
        if all(reasons) or all(pairs):
            why = reasons[0] or pairs[0]
            raise suite_file.Fault(f"compressors.{part.name}", f"none of its cells can run: {why}")


# ---- a part of a suite

_KEYS = {
    "dataset": lambda cell: {cell.dataset},
    "task": lambda cell: {cell.task.name, cell.task.label},
    "split": lambda cell: {cell.split.label} if cell.split else set(),
    "backbone": lambda cell: {cell.backbone.name, cell.backbone.label},
    "compressor": lambda cell: {cell.compressor.name, cell.compressor.label, bare(cell.compressor.label)},
    "family": lambda cell: {cell.compressor.family or "none"},
    "budget": lambda cell: {budget_label(cell.budget_text) or "none"},
    "seed": lambda cell: {str(cell.seed)},
}


def only(cells: Sequence[Cell], wanted: Mapping[str, str | Sequence[str]]) -> list[Cell]:
    """The cells that have, of each key, the value wanted or one of several: a name or a label, parameters in any order,

    a budget in any way of writing it (`none` without one). Raises SuiteError for an unknown key or what no cell has.
    """
    every = list(cells)
    for key, asked in wanted.items():
        values = [asked] if isinstance(asked, str) else list(asked)
        if key not in _KEYS:
            raise SuiteError(f"--only {key}={','.join(values)}: unknown key.{suggest(key, _KEYS)}")
        valid = {spelled(each): each for cell in every for each in _KEYS[key](cell)}
        meant = [budget_asked(value) if key == "budget" else value for value in values]
        for value, each in zip(values, meant):
            if spelled(each) not in valid:
                raise SuiteError(f"--only {key}={value}: no cell of the suite has it.{suggest(each, valid.values())}")
        chosen = {*map(spelled, meant)}
        cells = [cell for cell in cells if not chosen.isdisjoint(map(spelled, _KEYS[key](cell)))]
    return list(cells)
