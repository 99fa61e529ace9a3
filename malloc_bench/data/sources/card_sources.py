"""Where a card's files may come from: a download, a wheel on the package index, the user's own folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    ValidationInfo,
    model_validator,
)

from malloc_bench.data.formats.formats import LAYOUTS
from malloc_bench.registry import suggest


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _inside(path: str) -> str:
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path:
        raise ValueError("must be a relative path without '..'")
    return path


def _local(path: str, info: ValidationInfo) -> str:
    """A card of the user's own may name any file; others must stay in the folder that the user has named."""
    return path if (info.context or {}).get("folder") else _inside(path)


def known_format(name: str) -> str:
    if name not in LAYOUTS:
        raise ValueError(f"no format is named '{name}'.{suggest(name, LAYOUTS)}")
    return name


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


FileFormat = Annotated[str, AfterValidator(known_format)]
InnerPath = Annotated[str, AfterValidator(_inside)]
Paths = Annotated[list[InnerPath], BeforeValidator(_list), Field(min_length=1)]  # one file, or its parts in order
LocalPaths = Annotated[list[Annotated[str, AfterValidator(_local)]], BeforeValidator(_list), Field(min_length=1)]
Md5 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class UrlSource(Strict):
    """A file to download; `member` where it is an archive.

    It is verified by what its publisher says of it: `md5` or `sha256` of the download, or `file_md5` of the data files
    in it. Where there is no such word the card must say `sha256: none-published`; then the published counts must come
    out, and the hash of the first download is written down beside it, told, and held against every later use.
    """

    url: str
    md5: Md5 | None = None
    sha256: Sha256 | Literal["none-published"] | None = None
    file_md5: list[Md5] | None = None
    member: Paths | None = None
    format: FileFormat | None = None

    @model_validator(mode="after")
    def _verifiable(self) -> UrlSource:
        if not (self.md5 or self.sha256 or self.file_md5):
            raise ValueError("needs md5, sha256 or file_md5, or says sha256: none-published")
        return self

    @property
    def files(self) -> list[str]:
        return self.member or [self.url]

    def __str__(self) -> str:
        return self.url


class PipSource(Strict):
    """One member of a wheel on the user's package index; nothing is installed."""

    pip: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+$")]
    member: InnerPath
    sha256: Sha256
    format: FileFormat | None = None

    def __str__(self) -> str:
        return f"pip {self.pip}"


class LocalSource(Strict):
    """A file under `MALLOC_BENCH_DATA`, or its parts; `member` where it is an archive.

    In a card of the user's own the paths begin at the card's folder; what is not there may be in the other.
    """

    local: LocalPaths
    member: Paths | None = None
    file_md5: list[Md5] | None = None
    format: FileFormat | None = None
    _folder: Path | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._folder = (context or {}).get("folder")

    @property
    def folder(self) -> Path | None:
        """The folder of the user's own card."""
        return self._folder

    def __str__(self) -> str:
        more = f" and {len(self.local) - 1} more" if len(self.local) > 1 else ""
        return f"local {self.local[0]}{more}"


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
