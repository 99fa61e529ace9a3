"""Dataset cards: strict YAML, one file a data set, the file's name is the data set's."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)

from malloc_bench.paths import shipped
from malloc_bench.registry import UnknownName, suggest

from .dataset import DataError
from .world import SyntheticWorld

MAX_CARD_BYTES = 1 << 20


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise ValueError("must be a relative path without '..'")
    return path


FileFormat = Literal["movielens-udata", "movielens-dat", "recbole-inter", "parquet-ordered"]
InnerPath = Annotated[str, AfterValidator(_inside)]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class UrlSource(Strict):
    """A file to download, verified by what its publisher says of it; `member` where it is a zip archive."""

    url: str
    md5: Md5 | None = None
    sha256: Sha256 | None = None
    member: InnerPath | None = None
    format: FileFormat | None = None

    @model_validator(mode="after")
    def _verifiable(self) -> UrlSource:
        if not (self.md5 or self.sha256):
            raise ValueError("needs md5 or sha256: an unverified download is never used")
        return self

    @property
    def file(self) -> str:
        """The data file's name, for messages; so in every source."""
        return self.member or self.url

    def __str__(self) -> str:
        return self.url


class PipSource(Strict):
    """One member of a wheel on the user's package index; nothing is installed."""

    pip: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+$")]
    member: InnerPath
    sha256: Sha256
    format: FileFormat | None = None

    @property
    def file(self) -> str:
        return self.member

    def __str__(self) -> str:
        return f"pip {self.pip}"


class LocalSource(Strict):
    """A file under `MALLOC_BENCH_DATA`."""

    local: InnerPath
    format: FileFormat | None = None

    @property
    def file(self) -> str:
        return self.local

    def __str__(self) -> str:
        return f"local {self.local}"


def _kind(source: Any) -> str | None:
    """The key that tells a source's kind, in YAML's mapping or in the finished model."""
    keys = source if isinstance(source, dict) else getattr(source, "__dict__", {})
    return next((kind for kind in SOURCES if kind in keys), None)


SOURCES: dict[str, type[Strict]] = {"url": UrlSource, "pip": PipSource, "local": LocalSource}
Source = UrlSource | PipSource | LocalSource
AnySource = Annotated[
    Annotated[UrlSource, Tag("url")] | Annotated[PipSource, Tag("pip")] | Annotated[LocalSource, Tag("local")],
    Discriminator(
        _kind,
        custom_error_type="source_kind",
        custom_error_message="a source is a mapping with one of the keys url, pip, local",
    ),
]


class Counts(Strict):
    """What the publisher says the data set holds."""

    users: PositiveInt
    items: PositiveInt
    events: PositiveInt


class Label(Strict):
    """Which events count as liked, for the ranking task: `column` >= `at_least`."""

    column: str
    at_least: float = 1.0


class Card(Strict):
    """A data set: what it is, what it may be used for, where it comes from and what must come out."""

    name: str
    title: str
    description: str
    licence: str
    citation: str
    homepage: str
    format: Literal[FileFormat, "synthetic"]
    sources: list[AnySource] = []
    published: Counts | None = None
    label: Label | None = None
    parameters: SyntheticWorld | None = None

    @model_validator(mode="after")
    def _complete(self) -> Card:
        synthetic = self.format == "synthetic"
        if synthetic != (self.parameters is not None) or synthetic == bool(self.sources):
            raise ValueError("format synthetic needs parameters and no sources, every other format the reverse")
        return self


def list_datasets() -> list[str]:
    """The names of every known data set, sorted."""
    return sorted(card_files())


def load_card(name: str) -> Card:
    """The card of a data set.

    Raises UnknownName with the nearest valid name, DataError with file and key where the card itself is wrong.
    """
    files = card_files()
    if name not in files:
        raise UnknownName(f"no dataset is named '{name}'.{suggest(name, files)}")
    path = files[name]
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            raise DataError(f"{path}: over {MAX_CARD_BYTES} bytes is no card")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise DataError(f"{path}: expected keys and values, found {type(content).__name__}")
        return Card.model_validate({**content, "name": content.get("name", name)})
    except ValidationError as error:
        raise DataError(f"{path}: {_first_problem(error)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from None


def card_files() -> dict[str, Path]:
    """name -> card; ours, then those of installed packages (entry points that hold a folder's path)."""
    folders = [shipped("datasets")]
    folders += [Path(entry.load()) for entry in metadata.entry_points(group="malloc_bench.datasets")]
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            if path.stem in files:
                raise DataError(f"two cards are named '{path.stem}': {files[path.stem]} and {path}")
            files[path.stem] = path
    return files


def _first_problem(error: ValidationError) -> str:
    # a misspelt key first: that another one is missing follows from it
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path = problem["loc"]
    where = ".".join(map(str, path[:2] + path[3:] if path[:1] == ("sources",) else path))  # the third names the kind
    if problem["type"] != "extra_forbidden":
        return f"{where or 'card'}: {problem['msg'].removeprefix('Value error, ')}"
    models: dict[str, type[BaseModel]] = {**SOURCES, "published": Counts, "label": Label, "parameters": SyntheticWorld}
    model: type[BaseModel] = models[str(path[-2])] if len(path) > 1 else Card
    return f"{where}: unknown key.{suggest(str(path[-1]), model.model_fields.keys() - {'name'})}"
