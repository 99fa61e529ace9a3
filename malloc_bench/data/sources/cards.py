"""Dataset cards: strict YAML, one file a data set, the file's name is the data set's.

A card is shipped, comes with an installed package, or is the user's own file, which is named by its path.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt, ValidationError, field_validator, model_validator

from malloc_bench.data.errors import DataError
from malloc_bench.data.formats.formats import LAYOUTS, Layout
from malloc_bench.data.formats.policies import POLICIES
from malloc_bench.data.formats.table import Table
from malloc_bench.data.sources import card_file
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
from malloc_bench.registry import UnknownName, clipped, suggest

log = logging.getLogger(__name__)

__all__ = ["Card", "Counts", "Label", "LocalSource", "PipSource", "Source", "SyntheticWorld", "UrlSource"]

ABOUT_ITEMS = [name for name, layout in LAYOUTS.items() if layout.category]
# what a card of the user's own need not say
UNSAID = {"description": "", "licence": "not stated", "citation": "", "homepage": ""}
_NAME = re.compile(r"[^\W_][\w.+-]*")  # it names folders and stands in tables


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
    table: Table | None = None  # of format table: its columns and how it is written
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
        return name if name in ("synthetic", "table") else known_format(name)

    @field_validator("on_bad", mode="before")  # the answers are named also where one is no text
    @classmethod
    def _policies(cls, on_bad: Any) -> Any:
        for case, answer in on_bad.items() if isinstance(on_bad, dict) else ():
            if case not in POLICIES:
                raise ValueError(f"no policy is named '{case}'.{suggest(str(case), POLICIES)}")
            if answer not in POLICIES[case]:
                raise ValueError(f"{case} can be answered with {', '.join(POLICIES[case])}, not {answer!r}")
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
        if (self.format == "table") != (self.table is not None):
            raise ValueError("format table needs the key table with its columns, every other format has none")
        again = self.on_bad.get("duplicates", "keep")
        if again != "keep" and not any(self.layout(each).clocked for each in self.sources):
            raise ValueError(
                f"on_bad.duplicates: {again} needs a time, or a column of the order: what is without is new"
            )
        names = set() if synthetic else {*self.layout().feedback.values()}
        for name in self.keep or []:
            if name not in names:
                raise ValueError(f"keep: format {self.format} has no feedback '{name}'.{suggest(name, names)}")
        known = names.union(*(self.layout(source).feedback.values() for source in self.sources))
        if self.label and self.label.column not in known:
            raise ValueError(
                f"label: no feedback is called '{clipped(self.label.column)}'.{suggest(self.label.column, known)}"
            )
        if self.keep is not None and self.label and self.label.column not in self.keep:
            raise ValueError(f"keep has not the label's column '{self.label.column}'")
        return self

    def layout(self, source: Source | None = None) -> Layout:
        """How the files are read, those of a source that has a format of its own by that; not of synthetic data."""
        name = (source and source.format) or self.format
        return LAYOUTS[name] if self.table is None or name != "table" else self.table.layout()


def list_datasets() -> list[str]:
    """The names of every known data set, sorted."""
    return sorted(card_files())


def is_path(name: str | Path) -> bool:
    """Whether a data set is named by its card's file: `./mylog.yaml`, or `./mylog.yaml:variant`."""
    text = os.fspath(name)
    return isinstance(name, Path) or "/" in text or os.sep in text or text.partition(":")[0].endswith((".yaml", ".yml"))


def load_card(name: str | Path, files: Mapping[str, Path] | None = None) -> Card:
    """The card of a data set by name, or of a card's file by path; `files` is what `card_files` gives, if at hand.

    Raises UnknownName with the nearest valid name, DataError with file and key where the card itself is wrong.
    """
    if is_path(name):
        return _own(os.fspath(name), card_files() if files is None else files)
    name, files = str(name), card_files() if files is None else files
    if name not in files and os.path.isfile(name):  # noqa: PTH113 - Path.is_file raises where a name is too long
        raise UnknownName(
            f"no dataset is named '{clipped(name)}', a file here: `malloc-bench data card {name}` writes a card for it"
        )
    if name not in files:
        raise UnknownName(f"no dataset is named '{clipped(name)}'.{suggest(name, files)}")
    return _card(files[name], name, {})


def _own(spec: str, known: Mapping[str, Path]) -> Card:
    """The card of the user's own file, which may leave out what only a published one needs."""
    at = spec.find(":", spec.rfind(os.sep) + 1)
    path, variant = (Path(spec), "") if at < 0 else (Path(spec[:at]), spec[at + 1 :])
    try:
        found = path.is_file()
    except OSError:  # a name that no file can have
        found = False
    if not found:
        raise DataError(f"{clipped(str(path), 200)}: no such card")
    stems, name = card_file.variants(card_file.content(path)), f"{path.stem}-{variant}" if variant else path.stem
    if (variant or stems) and variant not in stems:
        told = f"name one of its variants, as in {path.name}:{stems[0]}" if stems else f"it has no variant '{variant}'"
        raise DataError(f"{path}: {clipped(told, 200)}")
    if name in known and not path.samefile(known[name]):
        raise DataError(f"{path}: the name '{name}' belongs to {known[name]} already; rename the file")
    return _card(path, name, {"title": name, **UNSAID}, path.parent)


def _card(path: Path, name: str, unsaid: Mapping[str, Any], folder: Path | None = None) -> Card:
    """The card `name` of a file; `folder`: where files of the user's own may lie beside it."""
    keys = card_file.content(path)
    try:
        keys = card_file.variant(keys, name.removeprefix(path.stem).removeprefix("-"))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if odd := sorted({"name", "family"} & set(keys)):
        raise DataError(f"{path}: {odd[0]}: unknown key. The file's name is the data set's")
    if folder is not None and "local" in keys:  # the short form of an own card
        if "sources" in keys:
            raise DataError(f"{path}: local is short for one of the sources: leave out one of the two keys")
        keys["sources"] = [{"local": keys.pop("local")}]
    return _valid(str(path), name, {**unsaid, **keys, "family": path.stem}, folder)


def card_of(name: str, keys: Mapping[str, Any]) -> Card:
    """A card that lies in no file: of data in memory. Raises DataError."""
    return _valid(clipped(name), name, {"title": name, **UNSAID, **keys, "family": name})


def _valid(where: str, name: str, keys: Mapping[str, Any], folder: Path | None = None) -> Card:
    if not _NAME.fullmatch(name) or len(name) > 100:
        raise DataError(
            f"{where}: a data set is named by letters, digits, '.', '+', '_' and '-', not {clipped(repr(name))}"
        )
    try:
        return Card.model_validate({**keys, "name": name}, context={"folder": folder and folder.resolve()})
    except ValidationError as error:
        raise DataError(f"{where}: {card_file.first_problem(error, Card, MODELS)}") from None


MODELS: dict[str, type[BaseModel]] = {
    **SOURCES, "published": Counts, "label": Label, "table": Table, "parameters": SyntheticWorld,
}  # fmt: skip


def card_files() -> dict[str, Path]:
    """name -> card; ours, then those of installed packages (entry points that hold a folder's path).

    A card with `variants` stands for `<file>-<variant>`, one data set each. What a package has wrong is one warning.
    """
    files: dict[str, Path] = {}
    for folder in (shipped("datasets"), *_package_folders()):
        for path in sorted(folder.glob("*.yaml")):
            for name in _names(path):
                if name in files:
                    _warn(f"two cards are named '{name}': {files[name]} is used, {path} is not")
                files.setdefault(name, path)
    return files


def _package_folders() -> list[Path]:
    folders = []
    for entry in metadata.entry_points(group="malloc_bench.datasets"):
        try:
            folder = Path(entry.load())
            next(folder.iterdir(), None)  # whether it is a folder, and can be read
        except (Exception, SystemExit) as error:  # somebody else's package must not stop ours
            why = clipped(" ".join(str(error).split()) or type(error).__name__, 300)
            _warn(f"datasets '{entry.name}' of {entry.value} is left out: {why}")
        else:
            folders.append(folder)
    return folders


@lru_cache(maxsize=256)
def _warn(message: str) -> None:
    """Once: the cards are asked for many times."""
    log.warning(message)


def _names(path: Path) -> list[str]:
    try:
        found = card_file.variants(card_file.content(path))
    except DataError:  # it is said when the card is asked for
        found = []
    return [f"{path.stem}-{each}" for each in found] or [path.stem]
