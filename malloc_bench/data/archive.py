"""One named member of a zip archive, read into memory: nothing is ever unpacked to disk."""

from __future__ import annotations

import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from .dataset import DataError

MAX_MEMBER_BYTES = 1 << 30
MAX_RATIO = 100  # unpacked to packed; rating files are near 4, zeros 1000


def read_member(archive: Path, member: str) -> bytes:
    """The bytes of `member`. Raises DataError where the archive or the member is not one to be trusted."""
    try:
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                path = PurePosixPath(info.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts:
                    raise DataError(f"{archive.name} has a member outside its folder: {info.filename!r}")
            return _read(opened, member)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(f"{archive.name} cannot be unpacked: {error}") from None


def _read(archive: zipfile.ZipFile, member: str) -> bytes:
    try:
        info = archive.getinfo(member)
    except KeyError:
        held = ", ".join(archive.namelist()[:5])
        raise DataError(f"no member '{member}'; the archive holds {held}") from None
    if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16) or info.flag_bits & 1:
        raise DataError(f"member '{member}' is a link, a folder or encrypted, not a plain file")
    if info.file_size > MAX_MEMBER_BYTES or info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise DataError(f"member '{member}' unpacks {info.compress_size} bytes to {info.file_size}: a zip bomb?")
    with archive.open(info) as file:
        data = file.read(info.file_size + 1)  # the declared size is the cap, whatever the stream goes on to say
    if len(data) != info.file_size:
        raise DataError(f"member '{member}' has {len(data)} bytes where {info.file_size} are declared")
    return data
