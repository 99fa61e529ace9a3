"""Files and folders that are either whole or not there, and what a killed process leaves of them."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from malloc_bench.paths import home

DAY = 86400.0  # seconds after which what another machine began is taken as left behind


@contextmanager
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
    host = socket.gethostname()
    for left in path.parent.glob(f"{_plain(path.name)}.*.part"):
        with suppress(OSError):  # another process may clear up as well
            if _is_left(left, host):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f"{path.name}.{host}-{os.getpid()}-{secrets.token_hex(4)}.part")


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


def with_home(error: OSError) -> str:
    """An error's text, and where it is of our cache, what names that folder."""
    at = os.fspath(error.filename) if isinstance(error.filename, str | os.PathLike) else ""
    ours = at == str(home()) or str(home()).startswith(f"{at}/" if at else "\0") or at.startswith(f"{home()}/")
    return f"{error} (MALLOC_BENCH_HOME names the folder of the cache)" if ours else str(error)
