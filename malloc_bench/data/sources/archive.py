"""The data files of a download, opened as streams: plain, .gz, a member of .zip or .tar(.gz). Nothing is unpacked."""

from __future__ import annotations

import gzip
import hashlib
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from malloc_bench.data.errors import DataError

MAX_MEMBER_BYTES = 64 << 30
MAX_RATIO = 100  # unpacked to packed; rating files are near 4, zeros 1000
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
            if not members:
                parts = [Part(path.name, _opener(path)) for path in files]
            elif _is_tar(files[0]):
                parts = _tar(stack.enter_context(tarfile.open(files[0])), files[0].name, members)
            else:
                parts = _zip(stack.enter_context(zipfile.ZipFile(files[0])), files[0].name, members)
        except DAMAGE as error:
            raise DataError(f"{files[0].name} cannot be unpacked: {error}") from None
        yield parts


def _opener(path: Path) -> Callable[[], IO[bytes]]:
    def opened() -> IO[bytes]:
        return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")

    return opened


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


def _zip(opened: zipfile.ZipFile, archive: str, members: Sequence[str]) -> list[Part]:
    names = opened.namelist()
    _safe(archive, names)
    parts = []
    for member in members:
        info = opened.getinfo(_find(member, names))
        if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
            raise DataError(f"member '{member}' is a link, a folder or encrypted, not a plain file")
        if info.file_size > MAX_MEMBER_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1):
            raise DataError(f"member '{member}' unpacks {info.compress_size} bytes to {info.file_size}: a zip bomb?")
        # the declared size is the cap of the stream, whatever it goes on to say; its checksum is held at the end
        parts.append(Part(member, lambda info=info: opened.open(info)))  # type: ignore[misc]
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
    """The bytes of a small part, for formats that cannot be streamed; raises DataError where it is cut."""
    try:
        with part.open() as file:
            return file.read()
    except DAMAGE as error:
        raise DataError(f"{part.name} cannot be unpacked: {error}") from None


def blocks(part: Part, size: int) -> Iterator[tuple[bytes, int]]:
    """Whole lines of a part, about `size` bytes at a time, and how many; DataError where the part is cut or wrong."""
    rest, row = b"", 0
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with part.open() as file:
            while data := file.read(size):
                if part.md5:
                    digest.update(data)
                cut = data.rfind(b"\n") + 1
                if not cut:
                    rest += data
                    if len(rest) > 4 * size:
                        raise DataError(f"{part.name}: row {row + 1}: no line ends in {len(rest)} bytes: no text file?")
                    continue
                block = b"".join((rest, memoryview(data)[:cut]))
                rest = data[cut:]
                lines = block.count(b"\n")
                yield block, lines
                row += lines
    except DAMAGE as error:
        raise DataError(f"{part.name}: cut in the middle, after row {row}: {error or 'the stream ends'}") from None
    if part.md5 and digest.hexdigest() != part.md5:
        raise DataError(f"{part.name}: wrong md5: {digest.hexdigest()} where {part.md5} is published")
    if rest:
        yield rest, 1
