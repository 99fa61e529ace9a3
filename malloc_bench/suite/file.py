"""A suite's file: YAML that is read strictly, and faults that say where they are and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from malloc_bench.compressors import Budget
from malloc_bench.data import DataError, list_datasets
from malloc_bench.data.joined import parts_of
from malloc_bench.data.sources.cards import is_path, load_card
from malloc_bench.data.tasks.options import O, pick
from malloc_bench.data.tasks.splits import RULES, Rule
from malloc_bench.data.tasks.tasks import TASKS, Task
from malloc_bench.paths import shipped
from malloc_bench.registry import UnknownName, clipped, suggest
from malloc_bench.results import size
from malloc_bench.strict_yaml import YamlError, number_hint, read_yaml
from malloc_bench.training.fit import Training

MAX_BYTES = 1 << 18
MIN_MEMORY = 1 << 28


class SuiteError(ValueError):
    """A suite that cannot run; the message is one line: file, key path, what was expected, the nearest valid name."""


class Fault(ValueError):
    """What is wrong at a key path; `load_suite` adds the file."""

    def __init__(self, where: str, what: str) -> None:
        where = clipped(where, 200)
        super().__init__(clipped(" ".join((f"{where}: {what}" if where else what).split()), 1000))


@dataclass(frozen=True)
class Measure:
    """What is measured beside accuracy and bytes, and the workload of latency.

    history: events of each generated user; None: the median and the longest history of the data that are evaluated.
    users: in a batch; candidates: tokens that a read answers, the first of them where one number is measured; store:
    through which requests are measured, with each of `candidates`; None: they are not. seconds: of measuring per cell
    and length, three times as many at most where the ratio to the full state is not sure before, thirty times for the
    500 requests that a p99 takes. budgets: only cells of these are measured, and those without one; None: all. drift,
    of such cells too: after how many appended events a state is held against one that is compressed from scratch. loss:
    in retrieval the cross-entropy of the targets too, which laws of size are about.
    """

    latency: bool = True
    flops: bool = True
    history: int | None = None
    users: int = 8
    candidates: tuple[int, ...] = (1,)
    store: str | None = None
    seconds: float = 0.3
    budgets: tuple[Budget, ...] | None = None
    drift: tuple[int, ...] = ()
    loss: bool = False

    def covers(self, budget: Budget | None) -> bool:
        """Whether cells of this budget are measured."""
        return budget is None or self.budgets is None or budget in self.budgets


@dataclass(frozen=True)
class Limits:
    """What one cell may take, beyond which its row fails and the others go on; None: no limit.

    seconds: of its method's own work, learning and all chunks of users together, and each turn where time is measured;
    memory: bytes in the memory of the process that evaluates it, data that processes share not counted.
    """

    seconds: float | None = None
    memory: int | None = None


# ---- the schema

Whole = Annotated[int, Field(ge=1, le=10_000_000)]
Users = Annotated[int, Field(ge=1, le=100_000)]  # at a time
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Names = Annotated[list[str], Field(min_length=1)]
Entries = Annotated[list[Any], Field(min_length=1)]


def _listed(value: Any) -> Any:
    """One value as a list of it."""
    return value if isinstance(value, list) else [value]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TrainingKeys(_Strict):
    epochs: Whole = Training.epochs
    batch_size: Whole = Training.batch_size
    lr: Positive = Training.lr
    patience: Annotated[int, Field(ge=0)] = Training.patience
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Training.weight_decay
    amp: Literal["auto", "bf16", "fp32"] = "auto"
    optimizer: Literal["adam", "adam_then_sgd"] = Training.optimizer
    sgd_lr: Positive = Training.sgd_lr
    window: Literal["newest"] | None = Training.window
    negatives: Whole | None = Training.negatives
    stochastic_length: Annotated[float, Field(gt=1, le=2)] | None = Training.stochastic_length
    logq: bool = Training.logq


class MeasureKeys(_Strict):
    latency: bool = Measure.latency
    flops: bool = Measure.flops
    history: Whole | None = Measure.history
    users: Users = Measure.users
    candidates: Annotated[tuple[Whole, ...], BeforeValidator(_listed), Field(strict=False, min_length=1)] = (
        Measure.candidates
    )
    store: Literal["lmdb", "redis", "dict"] | None = None
    seconds: Seconds = Measure.seconds
    budgets: Entries | None = None
    drift: Annotated[tuple[Literal[1, 5, 10, 20, 50, 100], ...], Field(strict=False)] = ()
    loss: bool = False


def _bytes(value: Any) -> Any:
    """Bytes from a number, or text such as 8GB."""
    if value is None:
        return None
    if type(value) not in (int, str):
        raise ValueError(f"expected bytes such as 8GB, not {shown(value)}")
    if (found := int(size(value)) if isinstance(value, str) else value) < MIN_MEMORY:
        raise ValueError(f"expected at least 256MiB, which a process takes that does nothing, not {shown(value)}")
    return found


class LimitKeys(_Strict):
    seconds: Seconds | None = None
    memory: Annotated[int | None, BeforeValidator(_bytes)] = None


class SuiteKeys(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    datasets: Names
    tasks: Entries = ["retrieval"]
    split: Any = None
    backbones: Entries
    compressors: Entries
    budgets: Entries = []
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0]
    training: TrainingKeys = TrainingKeys()
    measure: MeasureKeys = MeasureKeys()
    limits: LimitKeys = LimitKeys()
    filter_seen: bool = True
    evaluate: Literal["test", "validation"] = "test"
    tuned: str | None = None


# ---- reading


def locate(path: str | Path) -> Path:
    """The file of a suite that is given by path or by the name of a shipped one; raises SuiteError."""
    path = Path(path)
    if path.is_file():
        return path
    folder = shipped("suites")
    ours = folder / f"{path.stem if path.suffix == '.yaml' else path.name}.yaml"
    if str(path.parent) in (".", "suites") and ours.is_file():
        return ours
    raise SuiteError(
        f"{path}: neither a file nor a shipped suite.{suggest(path.stem, (p.stem for p in folder.glob('*.yaml')))}"
    )


def read(file: Path) -> SuiteKeys:
    """The file's keys, of the right types; raises Fault."""
    try:
        keys = SuiteKeys.model_validate(read_yaml(file, MAX_BYTES, "suite"))
    except ValidationError as error:
        raise fault(error) from None
    except YamlError as error:
        raise Fault("", str(error)) from None
    for where in ("datasets", "backbones", "compressors", "seeds"):
        no_twins(where, getattr(keys, where))
    return keys


def cards(names: Sequence[str], folder: Path) -> dict[str, str]:
    """The data sets of a suite in `folder`: the name of each -> the name or the card's file that it is had by.

    Raises Fault.
    """
    valid, found = list_datasets(), {}
    for i, given in enumerate(names):
        name = asked = given
        if is_path(given):
            asked = str((folder / given).resolve())
            try:
                name = load_card(asked).name
            except DataError as error:
                raise Fault(f"datasets[{i}]", str(error)) from None
        else:
            try:
                joined = parts_of(given, valid)
            except (UnknownName, DataError) as error:
                raise Fault(f"datasets[{i}]", str(error)) from None
            if given not in valid and not joined:
                raise Fault(f"datasets[{i}]", f"no dataset is named '{clipped(given)}'.{suggest(given, valid)}")
        if name in found:
            raise Fault(f"datasets[{i}]", f"'{name}' is there twice")
        found[name] = asked
    return found


def tasks(values: Sequence[Any]) -> tuple[Task, ...]:
    """The tasks of a suite, each once; raises Fault."""
    found = tuple(option(value, TASKS, f"tasks[{i}]") for i, value in enumerate(values))
    no_twins("tasks", [task.value() for task in found])
    return found


def splits(value: Any) -> tuple[Rule | None, ...]:
    """The split that a suite names, or each of a list, None where it names none; raises Fault."""
    if not isinstance(value, list):
        return (None if value is None else option(value, RULES, "split"),)
    if not value:
        raise Fault("split", "expected at least one value, not an empty list")
    found = tuple(option(each, RULES, f"split[{i}]") for i, each in enumerate(value))
    no_twins("split", [rule.value() for rule in found])
    return found


def option(value: Any, options: Mapping[str, type[O]], where: str) -> O:
    """One of the options, from `name` or `{name: {setting: value}}`; raises Fault."""
    try:
        return pick(value, options)
    except ValidationError as error:
        problem = _gravest(error)
        ((name, _),) = value.items()
        at = ".".join([where, name, *map(str, problem["loc"])])
        if problem["type"] == "extra_forbidden":
            raise Fault(at, f"unknown setting.{suggest(str(problem['loc'][-1]), options[name].model_fields)}") from None
        raise Fault(at, expected(problem)) from None
    except ValueError as error:
        raise Fault(where, str(error)) from None


def no_twins(where: str, values: Sequence[Any]) -> None:
    """Raises Fault where a list has a value twice."""
    seen = set()
    for i, value in enumerate(values):
        key = repr(value) if isinstance(value, list | dict) else value
        if key in seen:
            raise Fault(f"{where}[{i}]", f"{shown(value)} is there twice")
        seen.add(key)


# ---- words


def fault(error: ValidationError, under: str = "") -> Fault:
    """The gravest problem of a suite's keys, or of the training settings `under` a key path."""
    problem = _gravest(error)
    missing = [str(each["loc"][0]) for each in error.errors() if each["type"] == "missing" and len(each["loc"]) == 1]
    if problem["type"] == "missing" and len(missing) > 1:
        return Fault(under, f"missing: {', '.join(missing)}")
    where = under + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in problem["loc"])
    where = where.removeprefix(".")
    if problem["type"] != "extra_forbidden":
        return Fault(where, expected(problem))
    models: dict[str, type[BaseModel]] = {"training": TrainingKeys, "measure": MeasureKeys, "limits": LimitKeys}
    model: type[BaseModel] = SuiteKeys if not under else TrainingKeys
    if len(problem["loc"]) > 1:
        model = models[str(problem["loc"][0])]
    return Fault(where, f"unknown key.{suggest(str(problem['loc'][-1]), model.model_fields)}")


def _gravest(error: ValidationError) -> Any:
    """A misspelt key first: that another one is missing follows from it."""
    return min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")


_WORDS = (("a valid integer", "an integer"), ("a valid array", "a list"), ("a valid dictionary", "keys and values"))


def expected(problem: Any) -> str:
    """pydantic's message in this project's words."""
    kind, value = problem["type"], problem["input"]
    if kind == "missing":
        return "missing"
    if kind == "too_short":
        return "expected at least one value, not an empty list"
    if kind == "string_pattern_mismatch":
        return f"expected letters, digits, '.', '_' and '-', a letter or digit first, not {shown(value)}"
    if kind == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    if kind == "model_type":
        return f"expected keys and values, not {shown(value)}"
    text = problem["msg"].removeprefix("Input should be ")
    for old, new in (*_WORDS, ("a valid ", "a ")):
        text = text.replace(old, new)
    near = suggest(value, _choices(text)) if kind == "literal_error" and isinstance(value, str) else ""
    hint = number_hint(value) if kind.startswith("float") else ""
    return f"expected {text}, not {shown(value)}{hint}{'.' + near if 'Did' in near else ''}"


def _choices(text: str) -> list[str]:
    return text.split("'")[1::2]


def shown(value: Any) -> str:
    """A value as it stands in a message."""
    return clipped(repr(value))
