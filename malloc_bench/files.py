"""Files that are whole or not there, and that are told apart from what was written.

Everything is written to a temporary file beside its place, synced, and renamed: a reader sees a whole file or none.
What may rot or be swapped on the disk carries a digest, and is made again where that does not match.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from malloc_bench.paths import home

DAY = 86400.0  # seconds after which what another machine began is taken as left behind
DIGEST = "digest"  # the key under which a JSON file says the sha256 of all else in it


class ResultsError(RuntimeError):
    """A file could not be written, or is not what was written: one line with the path, the reason and what to do."""


class Damaged(ValueError):
    """A file is not what was written; the message says in what."""


# ---- what is in a file


def for_polars(path: Path) -> Path | BytesIO:
    """What polars reads a file by: it takes no path that is not UTF-8, so such a file is read for it."""
    try:
        str(path).encode()
        return path
    except UnicodeEncodeError:
        return BytesIO(path.read_bytes())


def plain(obj: Any) -> Any:
    """`obj` in Python's own types, with text keys."""
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [plain(value) for value in obj]
    return plain(obj.tolist()) if hasattr(obj, "tolist") else obj


def finite(obj: Any) -> Any:
    """A plain value with NaN and infinity, which JSON cannot say, as null."""
    if isinstance(obj, dict):
        return {key: finite(value) for key, value in obj.items()}
    if isinstance(obj, list):
        return [finite(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj


def canonical_json(obj: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII; numpy scalars as numbers, tuples as lists.

    Raises ValueError for NaN and infinity, TypeError for what JSON has no word for.
    """
    return json.dumps(plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(obj: Any) -> str:
    """sha256 (64 hex digits) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(obj).encode()).hexdigest()


def file_digest(path: str | Path) -> str | None:
    """sha256 (64 hex digits) of a file's bytes; None where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def sealed(content: Mapping[str, Any]) -> bytes:
    """The text of a JSON file with `content` and its digest; NaN and infinity become null."""
    whole = finite(plain({key: value for key, value in content.items() if key != DIGEST}))
    return (json.dumps({**whole, DIGEST: digest(whole)}, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def unsealed(data: bytes) -> dict[str, Any]:
    """The content of a JSON file that `sealed` made; raises Damaged."""
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise Damaged("not keys and values")
        if content.pop(DIGEST, None) != digest(content):
            raise Damaged("its digest does not match")
    except Damaged:
        raise
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not readable ({error})") from None
    return content


def read_sealed(path: str | Path) -> dict[str, Any]:
    """The content of a JSON file that was written sealed; raises Damaged, FileNotFoundError where there is none."""
    try:
        return unsealed(Path(path).read_bytes())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"not readable ({error})") from None


# ---- how it gets there

_ADVICE = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your disk quota",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.ENOTDIR: "choose a folder, not a file",
    errno.EEXIST: "choose a folder, not a file",
}


def advice(path: Path, error: OSError) -> str:
    """What to do about a file that cannot be written, and what chooses its folder."""
    what = _ADVICE.get(error.errno or 0, "check the disk")
    choice = "MALLOC_BENCH_HOME" if path.absolute().is_relative_to(home().absolute()) else "--out"
    return f"{what} ({choice})"


def atomic_write(path: str | Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all, on disk when this returns; makes the folders above it.

    Raises ResultsError (disk full, no permission ...); what was at `path` is then still there.
    """
    path = Path(path)
    try:
        with whole_file(path) as file:
            file.write(data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResultsError(
            f"cannot write {path}: {reason}; {advice(path, error)}, then run again: finished cells are kept"
        ) from error
    _sync_folder(path.parent)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write beside `path`; synced and renamed to it when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = new_part(path)
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def new_part(path: Path) -> Path:
    """A name beside `path` for what is not whole yet, of this process alone; what dead ones have left is removed."""
    remove_parts(path)
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.part")


def remove_parts(path: Path) -> None:
    """Delete what processes that are dead have begun beside `path`."""
    host = socket.gethostname()
    for left in path.parent.glob(f"{_plain(path.name)}.*.part"):
        with contextlib.suppress(OSError):  # another process may clear up as well
            if _is_left(left, host):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _is_left(part: Path, host: str) -> bool:
    """Whether the process that made it is dead; of another machine's, and of old names, whether it is a day old."""
    owner, _, pid = part.name.removesuffix(".part").rpartition("-")[0].rpartition("-")
    if not owner.endswith(f".{host}") or not pid.isdecimal():
        return time.time() - part.stat().st_mtime > DAY
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _plain(name: str) -> str:
    """A name as `glob` takes it literally."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: str | Path, older: float = 0.0) -> int:
    """Delete temporary files that killed writers left in `folder`; how many. Only for the holder of its lock.

    older: of so many seconds, where others may be writing too.
    """
    leftovers = [each for pattern in (".*.tmp", "*.part") for each in Path(folder).glob(pattern) if each.is_file()]
    gone = 0
    for path in leftovers:
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= older:
                path.unlink()
                gone += 1
    return gone


def with_home(error: OSError) -> str:
    """An error's text, and where it is of our cache, what names that folder."""
    at = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else ""
    ours = at == str(home()) or str(home()).startswith(f"{at}/" if at else "\0") or at.startswith(f"{home()}/")
    return f"{error} (MALLOC_BENCH_HOME names the folder of the cache)" if ours else str(error)
