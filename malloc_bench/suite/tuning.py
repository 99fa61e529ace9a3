"""Parameters chosen on validation users: the trials of every method, and the file that says what was chosen."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from malloc_bench.files import atomic_write, canonical_json, file_digest
from malloc_bench.registry import find, suggest
from malloc_bench.suite import file as suite_file
from malloc_bench.suite import parts as suite_parts
from malloc_bench.suite.cells import Cell, Part
from malloc_bench.suite.file import Measure, SuiteError
from malloc_bench.suite.suite import Suite

log = logging.getLogger(__name__)

TRIALS = 8  # of a method, at most, whatever it is
MAX_BYTES = 1 << 24
_SEAL = "# sha256 of all below: "


def trials(part: Part) -> list[Part]:
    """A compressor at every setting of its grid, as it is first: what the suite fixes stays fixed.

    A chain goes over the grids of its steps in order, as long as all settings together are no more than TRIALS.
    """
    if part.name != "compose":
        return [Part(part.name, params) for params in _settings(part.name, part.params)]
    chains: list[list[Any]] = [[]]
    for step in part.params["steps"]:
        name, params = (step, {}) if isinstance(step, str) else next(iter(step.items()))
        settings = _settings(name, params or {})
        settings = settings if len(chains) * len(settings) <= TRIALS else settings[:1]
        chains = [[*chain, {name: each} if each else name] for each in settings for chain in chains]
    return [Part("compose", {"steps": steps}) for steps in chains]


def _settings(name: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    """Parameters of a method at each point of its grid that makes one, at most TRIALS, those that it has first."""
    cls = find("compressors", name)
    free = {key: values for key, values in cls.grid.items() if key not in params}
    defaults = {f.name: f.default for f in fields(cls)}
    first = {key: defaults[key] for key in free}
    points = [dict(zip(free, values)) for values in product(*free.values())]
    kept = [first, *(point for point in points if point != first)]
    return [params | point for point in kept if _makes(Part(name, params | point))][:TRIALS]


def _makes(part: Part) -> bool:
    try:
        part.build()
    except (ValueError, TypeError):
        return False
    return True


def derived(suite: Suite) -> Suite:
    """The suite whose run tunes another one: every trial of its methods, on validation targets, nothing timed."""
    tried = [each for part in suite.compressors if len(found := trials(part)) > 1 for each in found]
    if not tried:
        raise SuiteError(f"{suite.path}: no compressor of the suite has anything to tune")
    return replace(
        suite,
        name=f"{suite.name}-tune",
        compressors=tuple(dict.fromkeys([Part("full"), Part("none"), *tried])),
        measure=Measure(latency=False, flops=False),
        evaluate="validation",
        tuned=None,
    )


# ---- the file


class Choice(BaseModel):
    """What a compressor of a suite is replaced by where it meets a backbone and data; budget None: at every budget.

    score and default: the metric's mean of what was chosen and of the compressor as it was, over `trials` settings.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    dataset: str
    task: str
    split: str
    backbone: str
    compressor: str
    budget: str | None = None
    use: dict[str, Any]
    score: float
    default: float
    trials: Annotated[int, Field(ge=1)]

    @property
    def key(self) -> tuple[str, ...]:
        return self.dataset, self.task, self.split, self.backbone, self.compressor, self.budget or ""


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    suite: str
    metric: str
    chosen: list[Choice]


class Tuned:
    """A file of chosen parameters; raises SuiteError where it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            keys = _Keys.model_validate(suite_file.read_yaml(path, MAX_BYTES, "file of tuned parameters"))
            self.use = {
                each.key: suite_parts.parts("compressors", [each.use])[0] for each in keys.chosen
            }  # checked as those of a suite are
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                known = (Choice if len(problem["loc"]) > 1 else _Keys).model_fields
                raise SuiteError(f"{path}: {where}: unknown key.{suggest(str(problem['loc'][-1]), known)}") from None
            raise SuiteError(f"{path}: {where}: {suite_file.expected(problem)}") from None
        except ValueError as error:
            raise SuiteError(f"{path}: {error}") from None
        self.path, self.digest = path, file_digest(path)
        if _changed(path.read_bytes()):
            log.warning("%s is not what `malloc-bench tune` wrote: it is used as it is now", path)

    def applied(self, cells: Iterable[Cell]) -> list[Cell]:
        """Settled cells with the parameters that were chosen for them, each cell once; others as they are."""
        found: dict[str, Cell] = {}
        for cell in map(self._applied, cells):
            found.setdefault(canonical_json(cell.payload()), cell)
        return list(found.values())

    def _applied(self, cell: Cell) -> Cell:
        part = self.use.get(key(cell, cell.budget_text)) or self.use.get(key(cell, None))
        return cell if part is None else replace(cell, compressor=part, tuned=self.digest)


def key(cell: Cell, budget: str | None) -> tuple[str, ...]:
    """What a choice is looked up by."""
    split = "" if cell.split is None else cell.split.label
    return cell.dataset, cell.task.label, split, cell.backbone.label, cell.compressor.label, budget or ""


def write(path: Path, suite: str, metric: str, chosen: Sequence[Choice]) -> None:
    """The file of what was chosen, readable and in the order of the suite."""
    head = f"# Chosen on validation targets by `malloc-bench tune {suite}`; use it with `malloc-bench run ... --tuned`."
    lines = [f"- {_flow({k: v for k, v in each.model_dump().items() if v is not None})}" for each in chosen]
    about = [f"suite: {_flow(suite)}", f"metric: {metric}", "chosen:" if lines else "chosen: []"]
    content = "\n".join([*about, *lines, ""]).encode()
    atomic_write(path, f"{head}\n{_SEAL}{hashlib.sha256(content).hexdigest()}\n".encode() + content)


def _changed(data: bytes) -> bool:
    """Whether a file that `write` sealed holds something else now; one that somebody wrote has no seal."""
    _, seal, rest = data.partition(_SEAL.encode())
    written, _, content = rest.partition(b"\n")
    return bool(seal) and hashlib.sha256(content).hexdigest() != written.decode(errors="replace")


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("\n...\n").strip()
