"""The unit of work, of resume and of the results: a cell, and the parts it is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, Compressor, get_compressor
from malloc_bench.data import DataError, Dataset
from malloc_bench.data.tasks.options import pick
from malloc_bench.data.tasks.splits import RULES, Rule, default_rule
from malloc_bench.data.tasks.tasks import TASKS, Task
from malloc_bench.files import file_digest
from malloc_bench.registry import find, in_a_line, told
from malloc_bench.results import SCHEMA_VERSION, budget_text, canonical_json, cell_id, label
from malloc_bench.suite.source import source_hash
from malloc_bench.training.fit import Training, arithmetic

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

MAX_BACKBONES = 200  # of a suite


@dataclass(frozen=True)
class Part:
    """A compressor or backbone by name, with the parameters that the suite gives it (JSON values only).

    training: a backbone's own settings, in place of the suite's.
    """

    name: str
    params: dict[str, Any] = field(default_factory=dict)
    kind: str = "compressors"
    training: dict[str, Any] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without weightless backbones, which another process makes again."""
        return {key: value for key, value in vars(self).items() if key != "probes"}

    def __hash__(self) -> int:
        return hash((self.kind, self.name, canonical_json([self.params, self.training])))

    @cached_property
    def label(self) -> str:
        """`snapkv(window=16)`; a chain reads `merge_adjacent + kivi(bits=2)`."""
        return label(self.name, json.dumps(self.params))

    @property
    def family(self) -> str | None:
        """The compressor's family; None for a backbone."""
        return getattr(find(self.kind, self.name), "family", None)

    def build(self) -> Compressor:
        """The compressor; raises ValueError as `get_compressor` does."""
        return get_compressor(self.name, **self.params)

    def checked(self) -> Compressor:
        """The compressor; raises ValueError also where it cannot say what a plan asks of each."""
        made, asked = self.build(), replace(self)
        try:
            said = [asked.content, asked.structural, made.takes_budget, asked.family]
        except ValueError:
            raise
        except (Exception, SystemExit) as error:
            raise ValueError(f"{self.name} cannot be planned ({told(error)})") from error
        if not isinstance(asked.family, str | None):
            raise ValueError(f"{self.name}: its family is {asked.family!r}, expected text")
        try:
            canonical_json(said)
        except (TypeError, ValueError) as error:
            what = "expected parameters of numbers, text, lists or mappings of them"
            raise ValueError(f"{self.name}: {what} ({in_a_line(error)})") from None
        return made

    @cached_property
    def content(self) -> dict[str, Any]:
        """What defines its results: name, version and all parameters, defaults too; of each step of a chain.

        A class that is not ours adds the sha256 of its file, and whatever declares `files` that it reads, theirs, as
        they are when first asked for. Raises ValueError where such a file cannot be read.
        """
        if self.kind == "compressors":
            return content(self.build())
        cls = find(self.kind, self.name)
        config = cls.Config(**self.params)
        params = asdict(config)
        return _identity(cls, {name: params[name] for name in _said(config)}, getattr(config, "files", ()))

    @cached_property
    def content_placed(self) -> dict[str, Any]:
        """`content` of a compressor behind a backbone that reads positions."""
        return content(self.build(), placed=True)

    @cached_property
    def structural(self) -> dict[str, Any] | None:
        """The content of what the backbone is adapted by and trained with; None: by nothing."""
        return content(self.build().structural)

    @cached_property
    def probes(self) -> list[Backbone]:
        """The backbone without weights, for data without and with times: to be asked what fits it.

        Empty where it cannot be made without weights. Raises ValueError or TypeError where the parameters make none.
        """
        return _probes(find(self.kind, self.name), json.dumps(self.params), canonical_json(self.content))  # type: ignore[arg-type]


@lru_cache(MAX_BACKBONES)  # hundreds take seconds, and a run lists its cells several times
def _probes(cls: type, params: str, content: str) -> list[Backbone]:
    try:
        with torch.device("meta"), _Unfilled():
            made = json.loads(params)
            return [get_backbone(cls.name, 1, has_time, **made) for has_time in (False, True)]  # type: ignore[attr-defined]
    except (ValueError, TypeError):
        raise
    except (Exception, SystemExit):  # torch's refusal to look into a tensor without data, or a fault: its rows say
        return []


class _Unfilled(TorchFunctionMode):
    """Lets tensors without data be: to fill one with noise, torch imports its compiler, which takes seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        filled = next(iter((*args, *(kwargs or {}).values())), None)
        noise = getattr(func, "__name__", "").endswith(("normal_", "uniform_"))  # xavier's and kaiming's too
        return filled if noise and getattr(filled, "is_meta", False) else func(*args, **(kwargs or {}))


def content(value: Any, placed: bool = False) -> Any:
    """Name, version and all parameters of a compressor and its parts, see `Part.content`; plain values as they are.

    placed: for a backbone that reads the positions of slots, of which a method may have a version of its own.
    """
    if isinstance(value, Compressor):
        params = {name: content(getattr(value, name), placed) for name in _said(value)}
        later = {
            "version_placed": value.version_placed if placed else 1,
            "version_settled": getattr(value, "version_settled", 1),
        }
        about = _identity(type(value), params, value.files)
        return about | {name: version for name, version in later.items() if version > 1}
    return [content(each, placed) for each in value] if isinstance(value, list | tuple) else value


def _said(part: Any) -> list[str]:
    """A dataclass's parameters; one that came later says by which value rows from before it stay what they were."""
    return [f.name for f in fields(part) if getattr(part, f.name) != f.metadata.get("unsaid", MISSING)]


def _identity(cls: type, params: dict[str, Any], files: Iterable[str | Path]) -> dict[str, Any]:
    known = {"name": cls.name, "version": cls.version}  # type: ignore[attr-defined]
    if cls.__module__.split(".")[0] != "malloc_bench":
        known["source"] = source_hash(cls)
    if hashes := {str(path): _content_hash(cls.name, path) for path in files}:  # type: ignore[attr-defined]
        known["files"] = list(hashes.values())
        params = {key: _without_paths(value, hashes) for key, value in params.items()}
    return {**known, "params": params}


def _content_hash(name: str, path: str | Path) -> str:
    if (found := file_digest(path)) is None:
        raise ValueError(f"{name} reads the file {path}, which is not there or cannot be read")
    return found


def _without_paths(value: Any, hashes: Mapping[str, str]) -> Any:
    """A parameter as it is, or the hash of the file that it names: where a file lies changes no number."""
    if isinstance(value, list | tuple):
        return [_without_paths(each, hashes) for each in value]
    if not isinstance(value, str | Path):
        return value
    known = {str(Path(path).absolute()): found for path, found in hashes.items()}
    return known.get(str(Path(value).expanduser().absolute()), value)


@dataclass(frozen=True)
class Cell:
    """dataset x task x split x backbone x compressor x budget x seed, with the settings that its numbers depend on."""

    suite: str
    dataset: str
    task: Task
    split: Rule | None  # None: to be settled by the data
    backbone: Part
    compressor: Part
    budget: Budget | None
    seed: int
    training: dict[str, Any]
    filter_seen: bool = True
    impossible: str | None = None  # why it cannot run: its row is skipped with this reason
    data: dict[str, Any] | None = None  # `Dataset.identity`, and categories that the backbone uses; None: not settled,
    # as while the data cannot be had or do not fit: such a cell is skipped, and tried again by every run
    items: str | None = None  # a hash of the categories of items where the method asks for them
    evaluate: str = "test"  # or validation
    tuned: str | None = None  # sha256 of the file that the compressor's parameters were chosen by; in no id

    def __str__(self) -> str:
        where = f"{self.dataset}, {self.task}, {self.split}, {self.backbone.label}, {self.compressor.label}"
        return f"{where}{f' at {self.budget_text}' if self.budget else ''}, seed {self.seed}"

    @property
    def budget_text(self) -> str | None:
        """The `budget` column of its row."""
        return None if self.budget is None else budget_text(self.budget.value())

    @property
    def split_text(self) -> str | None:
        """The `split` column of its row: validation targets are told from those of the test."""
        late = ", validation" if self.evaluate == "validation" else ""
        return None if self.split is None else self.split.label + late

    @property
    def plain(self) -> Cell:
        """The full state of the backbone as it is: what the cell is compared with."""
        return replace(self, compressor=Part("full"), budget=None, items=None)

    def payload(self) -> dict[str, Any]:
        """What defines the cell's results: no name of a suite, no key order, no omitted default."""
        return {
            "schema_version": SCHEMA_VERSION,
            "dataset": self.dataset,
            "data": self.data,
            "task": self.task.value(),
            "split": self.split and self.split.value(),
            "backbone": self.backbone.content,
            "compressor": self.compressor.content_placed if self._by_place else self.compressor.content,
            "budget": None if self.budget is None else self.budget.value(),
            "seed": self.seed,
            "training": self.training,
            "evaluation": {
                "filter_seen": self.filter_seen,
                **({} if self.evaluate == "test" else {"on": self.evaluate}),
            },
            **({} if self.items is None else {"items": self.items}),
        }

    def settled(self, dataset: Dataset, device: torch.device | None = None) -> Cell:
        """The cell with what its suite leaves open: by the data, and the arithmetic of training by the device.

        Raises DataError where the data do not fit it.
        """
        split = self.split or default_rule(dataset)
        split.check(dataset)
        self.task.check(split, self.evaluate)
        training = {**self.training, "amp": arithmetic(self.training["amp"], device or torch.device("cpu"))}
        uses = not self.backbone.probes or any(probe.uses_categories for probe in self.backbone.probes)  # or who knows
        data = {**dataset.identity(), **({"categories": _categories(dataset)} if uses else {})}
        items = _categories(dataset) if self._asks_categories else None
        return replace(self, split=split, task=self.task.settled(dataset), training=training, data=data, items=items)

    @property
    def _by_place(self) -> bool:
        return any(probe.uses_positions for probe in self.backbone.probes)

    @property
    def _asks_categories(self) -> bool:
        try:
            return asks_categories(self.compressor.build())
        except (Exception, SystemExit):  # a part that fails is for its own rows to say
            return False

    @property
    def id(self) -> str:
        """The name of its row: sha256 of the payload."""
        return cell_id(self.payload())

    @staticmethod
    def of_row(row: Mapping[str, Any]) -> Cell:
        """The cell of a row as `results.read_rows` gives it; raises ValueError where its `cell` is not the payload."""
        payload, budget = row["cell"], row["budget"]
        try:
            Training(**payload["training"])
            return Cell(
                suite=row["suite"],
                dataset=row["dataset"],
                task=pick(payload["task"], TASKS),
                split=payload["split"] and pick(payload["split"], RULES),
                backbone=Part(row["backbone"], row["backbone_params"] or {}, "backbones"),
                compressor=Part(row["compressor"], row["compressor_params"] or {}),
                budget=None if budget is None else Budget.parse(json.loads(budget)),
                seed=row["seed"],
                training=payload["training"],
                filter_seen=payload["evaluation"]["filter_seen"],
                evaluate=payload["evaluation"].get("on", "test"),
                data=payload["data"],
                items=payload.get("items"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = "expected task, split, training, evaluation and data as a run writes them: run its suite again"
            raise ValueError(f"row {row['cell_id']}: its cell cannot be read ({told(error)}); {what}") from error


def asks_categories(compressor: Compressor) -> bool:
    """Whether a method reads the categories of items, or learns from them."""
    learned = (part.fit_needs for part in compressor.fit_parts().values())
    return any(needs.categories for needs in (compressor.needs, *learned))


def _categories(dataset: Dataset) -> str | None:
    """A hash of the category of each item; None where there are none, or no source answers: training then says so."""
    try:
        found = dataset.categories
    except DataError:
        return None
    return None if found is None else hashlib.sha256(found.astype("<i8").tobytes()).hexdigest()
