"""The parts that a suite names: their parameters checked one by one, their grids expanded."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

from pydantic import PydanticUserError, TypeAdapter, ValidationError

from malloc_bench.backbones import spelt_out
from malloc_bench.compressors import Budget
from malloc_bench.registry import find, suggest
from malloc_bench.suite.cells import MAX_BACKBONES, Part
from malloc_bench.suite.file import Fault, TrainingKeys, expected, fault, no_twins, shown

MAX_PARTS = 10_000  # of one grid
MAX_LAYERS = 512  # of a backbone, all its blocks together: each is built to see that it can be
MAX_SIZE = 1_000_000  # any other whole number of a backbone
MAX_WEIGHTS = 20_000_000_000


def budgets(values: Iterable[Any], where: str = "budgets") -> tuple[Budget, ...]:
    """The budgets of a list; raises Fault."""
    parsed: list[Budget] = []
    for i, value in enumerate(values):
        try:
            parsed.append(Budget.parse(value))
        except (ValueError, OverflowError) as error:
            raise Fault(f"{where}[{i}]", str(error)) from None
    no_twins(where, [budget.value() for budget in parsed])
    return tuple(parsed)


def parts(kind: str, entries: Sequence[Any]) -> tuple[Part, ...]:
    """The parts of a suite's list, its grids expanded, each of them built once to see that it can be; raises Fault."""
    made: dict[Part, None] = {}
    total = 0
    for i, entry in enumerate(entries):
        where = f"{kind}[{i}]"
        expanded = _expanded(kind, entry, where)
        total += len(expanded)
        if kind == "backbones" and total > MAX_BACKBONES:
            raise Fault(where, f"{total:,} backbones, more than {MAX_BACKBONES:,}: split the suite")
        for part in expanded:
            try:
                (Part.checked if kind == "compressors" else _probe)(part)
            except (ValueError, TypeError, OverflowError) as error:
                raise Fault(f"{where}.{part.name}", str(error).removeprefix(f"{part.name}: ")) from None
            made[part] = None
    return tuple(made)


def _probe(part: Part) -> None:
    """Build a backbone without weights, unless its size alone would take minutes; raises ValueError."""
    config = find("backbones", part.name).Config(**part.params)
    layers = getattr(config, "layers", 1) * getattr(config, "blocks", 1)
    if layers > MAX_LAYERS:
        raise ValueError(f"{layers:,} layers in all, more than {MAX_LAYERS:,}")
    for key, value in dataclasses.asdict(config).items():
        if isinstance(value, int) and value > MAX_SIZE:
            raise ValueError(f"{key} {value:,} is more than {MAX_SIZE:,}")
    for probe in part.probes:
        if (weights := sum(each.numel() for each in probe.parameters())) > MAX_WEIGHTS:
            raise ValueError(f"{weights:,} weights, more than {MAX_WEIGHTS:,}")


def _expanded(kind: str, entry: Any, where: str) -> list[Part]:
    """`name`, `{name: {parameter: value, grid: {parameter: [values]}}}` or `{compose: [steps]}` as parts."""
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, given),) = entry.items()
    else:
        name, given = entry, None
    if not isinstance(name, str):
        raise Fault(where, f"expected a name or {{name: {{parameter: value}}}}, not {shown(entry)}")
    try:
        cls = find(kind, name)
    except ValueError as error:
        raise Fault(where, str(error)) from None
    where = f"{where}.{name}"
    if name == "compose":
        return _chains(given, where)
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise Fault(where, f"expected {{parameter: value}}, not {shown(given)}")
    training = _training(given["training"], f"{where}.training") if kind == "backbones" and "training" in given else {}
    hints = _parameters(cls if kind == "compressors" else cls.Config)
    if kind == "backbones" and cls.presets:
        hints["preset"] = Literal[tuple(cls.presets)]
    grid = _grid(given.get("grid", {}), f"{where}.grid")
    fixed = {
        key: value for key, value in given.items() if key != "grid" and not (key == "training" and kind == "backbones")
    }
    if both := fixed.keys() & grid.keys():
        raise Fault(f"{where}.{min(both, key=str)}", "fixed and in the grid: one of them is meant")
    fixed = {key: _typed(value, key, hints, f"{where}.{key}") for key, value in fixed.items()}
    axes = [
        [(key, _typed(value, key, hints, f"{where}.grid.{key}[{i}]")) for i, value in enumerate(values)]
        for key, values in grid.items()
    ]
    points = [fixed | dict(point) for point in product(*axes)]
    return [Part(name, spelt_out(cls, p) if kind == "backbones" else p, kind, training) for p in points]


def _training(given: Any, where: str) -> dict[str, Any]:
    """A backbone's own training settings."""
    try:
        return TrainingKeys.model_validate(given).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise fault(error, where) from None


def _chains(given: Any, where: str) -> list[Part]:
    """Every chain of a `compose` entry: the product of its steps' own grids, and of a step's alternatives, a list."""
    if isinstance(given, dict) and given.keys() == {"steps"}:
        given, where = given["steps"], f"{where}.steps"
    if not isinstance(given, list) or not given:
        raise Fault(where, f"expected a list of compressors, not {shown(given)}")
    steps = [_alternatives(step, f"{where}[{i}]") for i, step in enumerate(given)]
    _at_most(math.prod(map(len, steps)), where)
    return [
        Part("compose", {"steps": [{s.name: s.params} if s.params else s.name for s in c]}) for c in product(*steps)
    ]


def _alternatives(step: Any, where: str) -> list[Part]:
    """What may stand at one place of a chain: a part, or each of a list of them."""
    if not isinstance(step, list):
        return _expanded("compressors", step, where)
    no_twins(where, step)
    return [part for i, each in enumerate(step) for part in _expanded("compressors", each, f"{where}[{i}]")]


def _grid(grid: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(grid, dict):
        raise Fault(where, f"expected {{parameter: [values]}}, not {shown(grid)}")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise Fault(f"{where}.{key}", f"expected a list of values, not {shown(values)}")
        no_twins(f"{where}.{key}", values)
    _at_most(math.prod(map(len, grid.values())), where)
    return grid


def _at_most(size: int, where: str) -> None:
    if size > MAX_PARTS:
        raise Fault(where, f"a grid of {size:,} points, more than {MAX_PARTS:,}")


def _parameters(cls: type) -> dict[str, Any]:
    """name -> type of a dataclass's parameters; Any where the type cannot be had."""
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # imported for type checkers only
        hints = {}
    return {f.name: hints.get(f.name, Any) for f in dataclasses.fields(cls) if f.init}


def _typed(value: Any, key: Any, hints: Mapping[str, Any], where: str) -> Any:
    """The value as the parameter's type has it (0 for a float is 0.0), in JSON's types; raises Fault."""
    if key not in hints:
        raise Fault(where, f"unknown parameter.{suggest(str(key), hints) if hints else ' It has none.'}")
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise Fault(where, f"expected numbers, text, lists or mappings of them, not {shown(value)}") from None
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hints[key])
    except PydanticUserError:  # a type of the author's own
        return json.loads(text)
    try:
        return adapter.dump_python(adapter.validate_json(text, strict=True), mode="json")
    except ValidationError as error:
        raise Fault(where, expected(error.errors()[0])) from None
