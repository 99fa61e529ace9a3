"""The data files of a download, opened as streams: plain, .gz, a member of .zip or .tar(.gz). Nothing is unpacked."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from malloc_bench.data.errors import DataError

MAX_MEMBER_BYTES = 64 << 30
MAX_RATIO = 100  # unpacked to packed; rating files are near 4, zeros 1000
SMALL = 1 << 20  # bytes that may be unpacked from anything
BLANK = b" \r\n"
PACKED = (b"\x1f\x8b", b"x\x01", b"x^", b"x\x9c", b"x\xda", b"(\xb5/\xfd")  # polars unpacks what begins so, unasked
DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError, NotImplementedError)


@dataclass(frozen=True)
class Part:
    """One data file: its name for messages, how to open it, and its md5 where the publisher gives it."""

    name: str
    open: Callable[[], IO[bytes]]
    md5: str | None = None


@contextmanager
def open_parts(files: Sequence[Path], members: Sequence[str] = ()) -> Iterator[list[Part]]:
    """The files themselves, or with `members` those of the one archive, as parts that can be opened in turn.

    Raises DataError where the archive or a member is not one to be trusted, or is cut.
    """
    with ExitStack() as stack:
        try:
            if members and _is_tar(files[0]):
                opened = stack.enter_context(_opener(files[0])())
                parts = _tar(stack.enter_context(tarfile.open(fileobj=opened, mode="r:")), files[0].name, members)
            elif members:
                parts = _zip(stack.enter_context(_unzipped(files[0])), files[0].name, members)
            else:
                parts = []
                for path in files:
                    if path.suffix.lower() == ".zip":
                        archive = stack.enter_context(_unzipped(path))
                        [part] = _zip(archive, path.name, [_only(path.name, archive.namelist())])
                        parts.append(replace(part, name=f"{path.name}/{part.name}"))
                    else:
                        parts.append(Part(path.name, _opener(path)))
        except DAMAGE as error:
            raise DataError(f"{files[0].name} cannot be unpacked: {error}") from None
        yield parts


def _unzipped(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except ValueError as error:  # names that are not in the encoding they claim
        raise zipfile.BadZipFile(str(error)) from None


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        return cast(IO[bytes], _Gzip(path)) if path.suffix.lower() in {".gz", ".tgz"} else path.open("rb")

    return opened


class _Gzip(gzip.GzipFile):
    """A stream that ends with an error where it unpacks to more than any data do."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.path, self.most = path, max(SMALL, MAX_RATIO * path.stat().st_size)

    def read(self, size: int | None = -1) -> bytes:
        left = self.most + 1 - self.tell()
        data = super().read(left if size is None or not 0 <= size < left else size)
        self._held(self.tell())
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            self._held(offset)
        return super().seek(offset, whence)

    def _held(self, position: int) -> None:
        if position > self.most:
            raise DataError(f"{self.path.name}: over {self.most} bytes from {self.path.stat().st_size}: a gzip bomb?")


def visible(names: Sequence[str]) -> list[str]:
    """The files of an archive without folders and what systems leave there: hidden files, those of __MACOSX/."""
    return [
        name
        for name in names
        if not name.endswith("/")
        and not name.startswith("__MACOSX/")
        and not any(part.startswith(".") and part != "." for part in name.split("/"))
    ]


def _only(archive: str, names: Sequence[str]) -> str:
    """The one data file of an archive."""
    data = visible(names)
    if len(data) != 1:
        raise DataError(f"{archive} holds {len(data)} files: name one as member, of {', '.join((data or names)[:5])}")
    return data[0]


def _is_tar(path: Path) -> bool:
    return path.name.endswith((".tar", ".tar.gz", ".tgz"))


def _safe(archive: str, names: Sequence[str]) -> None:
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{archive} has a member outside its folder: {name!r}")


def _find(member: str, names: Sequence[str]) -> str:
    """The member of that path, or the only one whose path ends so: repackaged archives differ in the folder on top."""
    ends = [name for name in names if name.endswith(f"/{member}")]
    if member in names or len(ends) == 1:
        return member if member in names else ends[0]
    raise DataError(f"no member '{member}'; the archive holds {', '.join(names[:5])}")


def _member(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return opened.open(info)
    except OSError as error:  # an offset before the file
        raise zipfile.BadZipFile(str(error)) from None


def _zip(opened: zipfile.ZipFile, archive: str, members: Sequence[str]) -> list[Part]:
    names = opened.namelist()
    _safe(archive, names)
    parts = []
    for member in members:
        info = opened.getinfo(_find(member, names))
        if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
            raise DataError(f"{archive}: member '{member}' is a link, a folder or encrypted, not a plain file")
        if info.file_size > min(MAX_MEMBER_BYTES, max(SMALL, MAX_RATIO * info.compress_size)):
            raise DataError(
                f"{archive}: member '{member}' unpacks {info.compress_size} bytes to {info.file_size}: a zip bomb?"
            )
        # the declared size is the cap of the stream, whatever it goes on to say; its checksum is held at the end
        parts.append(Part(member, partial(_member, opened, info)))
    return parts


def _tar(opened: tarfile.TarFile, archive: str, members: Sequence[str]) -> list[Part]:
    infos = {info.name.removeprefix("./"): info for info in opened.getmembers()}
    _safe(archive, list(infos))
    parts = []
    for member in members:
        info = infos[_find(member, list(infos))]
        if not info.isreg():
            raise DataError(f"member '{member}' is a link or a folder, not a plain file")
        if info.size > MAX_MEMBER_BYTES:
            raise DataError(f"member '{member}' has {info.size} bytes, more than any data set known here")
        parts.append(Part(member, lambda info=info: opened.extractfile(info)))  # type: ignore[misc, arg-type, return-value]
    return parts


def read_whole(part: Part) -> bytes:
    """The bytes of a part, for formats that cannot be streamed; raises DataError where it is cut or wrong."""
    try:
        with part.open() as file:
            data = file.read()
    except DAMAGE as error:
        raise DataError(f"{part.name} cannot be unpacked: {error}") from None
    _verified(part, hashlib.md5(data, usedforsecurity=False).hexdigest() if part.md5 else None)
    return data


def head(part: Part, size: int) -> bytes:
    """How a part begins; raises DataError where it is damaged."""
    try:
        with part.open() as file:
            return file.read(size)
    except DAMAGE as error:
        raise DataError(f"{part.name} cannot be unpacked: {error}") from None


def blocks(part: Part, size: int, encoding: str = "utf-8") -> Iterator[tuple[bytes, int]]:
    """Whole lines of a part as UTF-8, about `size` bytes at a time, and how many; no blank ones at the end.

    Raises DataError where the part is cut or wrong, with row where it is no text. What is UTF-8 is not looked at.
    """
    rest, row, first, macs = b"", 0, True, False
    digest = hashlib.md5(usedforsecurity=False)
    decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)()
    try:
        with part.open() as file:
            while data := file.read(size):
                if part.md5:
                    digest.update(data)
                if decoder:
                    data = decoder.decode(data).encode()
                if first:
                    data, first = data.removeprefix(codecs.BOM_UTF8), False
                    macs = b"\r" in data.rstrip(BLANK) and b"\n" not in data  # lines end in CR alone
                if macs:
                    data = data.replace(b"\r", b"\n")
                cut = data.rfind(b"\n") + 1
                if not cut:
                    whole, end, rest = b"", 0, rest + data
                else:
                    whole = b"".join((rest, memoryview(data)[:cut]))
                    end = len(whole) if whole[-2:].strip(BLANK) else _end(whole)
                    rest = whole[end:] + data[cut:]
                if len(rest) > 4 * size:
                    raise DataError(f"{part.name}: row {row + 1}: no line ends in {len(rest)} bytes: no text file?")
                if end:
                    lines = whole.count(b"\n", 0, end)
                    yield whole[:end], lines
                    row += lines
            if decoder:
                rest += decoder.decode(b"", True).encode()
    except UnicodeError as error:
        raise DataError(f"{part.name}: after row {row}: is no text of {encoding}: {error}") from None
    except DAMAGE as error:
        raise DataError(f"{part.name}: cut in the middle, after row {row}: {error or 'the stream ends'}") from None
    _verified(part, digest.hexdigest() if part.md5 else None)
    if rest := rest.rstrip(BLANK):
        yield rest, rest.count(b"\n") + 1


def _end(text: bytes) -> int:
    """Where the last line ends that is not blank: blank ones are rows only where more follows."""
    said = len(text.rstrip(BLANK))
    return text.index(b"\n", said) + 1 if said else 0


def _verified(part: Part, found: str | None) -> None:
    if found != part.md5:
        raise DataError(f"{part.name}: wrong md5: {found} where {part.md5} is published")
