"""Dataset cards: strict YAML, one file a data set, the file's name is the data set's."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, PositiveInt, ValidationError, field_validator, model_validator

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.formats import LAYOUTS
from malloc_bench.data.formats.policies import POLICIES
from malloc_bench.data.sources.card_sources import (
    SOURCES,
    AnySource,
    LocalSource,
    PipSource,
    Source,
    Strict,
    UrlSource,
    known_format,
)
from malloc_bench.data.worlds.world import SyntheticWorld
from malloc_bench.paths import shipped
from malloc_bench.registry import UnknownName, suggest

__all__ = ["Card", "Counts", "Label", "LocalSource", "PipSource", "Source", "SyntheticWorld", "UrlSource"]

MAX_CARD_BYTES = 1 << 20
ABOUT_ITEMS = [name for name, layout in LAYOUTS.items() if layout.category]
# what a variant may say for itself
VARIANT = ("title", "description", "published", "keep", "label", "on_bad", "sources", "categories", "format")


class Counts(Strict):
    """What the publisher says the data set holds, of what it says."""

    users: PositiveInt | None = None
    items: PositiveInt | None = None
    events: PositiveInt | None = None


class Label(Strict):
    """Which events count as liked, for the ranking task: `column` >= `at_least`."""

    column: str
    at_least: float = 1.0


class Card(Strict):
    """A data set: what it is, what it may be used for, where it comes from and what must come out."""

    name: str
    family: str  # the card file's name: its data sets share their downloads
    title: str
    description: str
    licence: str
    citation: str
    homepage: str
    format: str
    sources: list[AnySource] = []
    published: Counts | None = None
    label: Label | None = None
    keep: list[str] | None = None  # of the format's feedback, which columns; all without it
    categories: list[AnySource] = []  # files about the items, each with its format
    on_bad: dict[str, str] = {}  # by the names in policies.py
    parameters: SyntheticWorld | None = None

    @field_validator("format")
    @classmethod
    def _format(cls, name: str) -> str:
        return name if name == "synthetic" else known_format(name)

    @field_validator("on_bad")
    @classmethod
    def _policies(cls, on_bad: dict[str, str]) -> dict[str, str]:
        for case, answer in on_bad.items():
            if case not in POLICIES:
                raise ValueError(f"no policy is named '{case}'.{suggest(case, POLICIES)}")
            if answer not in POLICIES[case]:
                raise ValueError(f"{case} can be answered with {', '.join(POLICIES[case])}, not '{answer}'")
        return on_bad

    @field_validator("categories")
    @classmethod
    def _about_items(cls, sources: list[Source]) -> list[Source]:
        if any(source.format not in ABOUT_ITEMS for source in sources):
            raise ValueError(f"each source needs a format that names categories: {', '.join(ABOUT_ITEMS)}")
        return sources

    @model_validator(mode="after")
    def _complete(self) -> Card:
        synthetic = self.format == "synthetic"
        for name in (self.format, *(source.format for source in self.sources)):
            if name in ABOUT_ITEMS:
                raise ValueError(f"format {name} is of files about items: it belongs to categories")
        if synthetic != (self.parameters is not None) or synthetic == bool(self.sources):
            raise ValueError("format synthetic needs parameters and no sources, every other format the reverse")
        names = set() if synthetic else {*LAYOUTS[self.format].feedback.values()}
        for name in self.keep or []:
            if name not in names:
                raise ValueError(f"keep: format {self.format} has no feedback '{name}'.{suggest(name, names)}")
        if self.keep is not None and self.label and self.label.column not in self.keep:
            raise ValueError(f"keep has not the label's column '{self.label.column}'")
        return self


def list_datasets() -> list[str]:
    """The names of every known data set, sorted."""
    return sorted(card_files())


def load_card(name: str, files: Mapping[str, Path] | None = None) -> Card:
    """The card of a data set; `files` is what `card_files` gives, where it is at hand.

    Raises UnknownName with the nearest valid name, DataError with file and key where the card itself is wrong.
    """
    files = card_files() if files is None else files
    if name not in files:
        raise UnknownName(f"no dataset is named '{name}'.{suggest(name, files)}")
    path = files[name]
    try:
        content = _variant(_content(path), name.removeprefix(path.stem).removeprefix("-"))
        return Card.model_validate({**content, "name": name, "family": path.stem})
    except ValidationError as error:
        raise DataError(f"{path}: {_first_problem(error)}") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def card_files() -> dict[str, Path]:
    """name -> card; ours, then those of installed packages (entry points that hold a folder's path).

    A card with `variants` stands for `<file>-<variant>`, one data set each.
    """
    folders = [shipped("datasets")]
    folders += [Path(entry.load()) for entry in metadata.entry_points(group="malloc_bench.datasets")]
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            for name in _names(path):
                if name in files:
                    raise DataError(f"two cards are named '{name}': {files[name]} and {path}")
                files[name] = path
    return files


def _names(path: Path) -> list[str]:
    try:
        variants = _content(path).get("variants")
    except DataError:  # it is said when the card is asked for
        return [path.stem]
    return [f"{path.stem}-{each}" for each in variants] if isinstance(variants, dict) and variants else [path.stem]


def _content(path: Path) -> dict[str, Any]:
    try:
        state = path.stat()
        if state.st_size > MAX_CARD_BYTES:
            raise DataError(f"{path}: over {MAX_CARD_BYTES} bytes is no card")
        content = _read(path, state.st_mtime_ns, state.st_size)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected keys and values, found {type(content).__name__}")
    return content


@lru_cache(maxsize=256)
def _read(path: Path, changed: int, size: int) -> Any:
    """Cards stand for dozens of data sets each, and are asked for by name: one parse a file."""
    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _variant(content: dict[str, Any], variant: str) -> dict[str, Any]:
    """A card's content with a variant's keys in it, its sources after the common ones, its other words for {names}."""
    own = (content.get("variants") or {}).get(variant)
    if own is None:
        return content
    if not isinstance(own, dict):
        raise ValueError(f"variants.{variant}: expected keys and values")
    words = {key: value for key, value in own.items() if key not in VARIANT}

    def put(value: Any) -> Any:
        if isinstance(value, str):
            for key, word in words.items():
                value = value.replace(f"{{{key}}}", str(word))
            return value
        if isinstance(value, dict):
            return {key: put(each) for key, each in value.items()}
        return [put(each) for each in value] if isinstance(value, list) else value

    keys = {key: value for key, value in content.items() if key != "variants"}
    keys |= {key: value for key, value in own.items() if key in VARIANT}
    if "sources" in own:
        keys["sources"] = [*content.get("sources", []), *own["sources"]]
    return put(keys)


def _first_problem(error: ValidationError) -> str:
    # a misspelt key first: that another one is missing follows from it
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path = problem["loc"]
    listed = path[:1] in (("sources",), ("categories",))  # the third names the kind
    where = ".".join(map(str, path[:2] + path[3:] if listed else path))
    if problem["type"] != "extra_forbidden":
        return f"{where or 'card'}: {problem['msg'].removeprefix('Value error, ')}"
    models: dict[str, type[BaseModel]] = {**SOURCES, "published": Counts, "label": Label, "parameters": SyntheticWorld}
    model: type[BaseModel] = models[str(path[-2])] if len(path) > 1 else Card
    return f"{where}: unknown key.{suggest(str(path[-1]), model.model_fields.keys() - {'name'})}"
