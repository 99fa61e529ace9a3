"""The folder of a run: one writer at a time, chunks of unfinished groups, the manifest."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import shutil
import socket
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from malloc_bench.evaluation.requests import Values
from malloc_bench.results import ResultsError, atomic_write

log = logging.getLogger(__name__)


class LockedError(RuntimeError):
    """Another process is writing to the folder; the message has its pid and host."""


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the folder for this process. The system lets go of the lock when the process ends, however it ends.

    Raises LockedError, or ResultsError where the folder cannot be written.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as error:
        raise ResultsError(f"{folder}: {error.strerror}; choose a folder you may write to (--out)") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise LockedError(
                f"{folder} is in use by {holder}; wait for it, or choose another folder (--out)"
            ) from None
        handle.seek(0)
        handle.truncate()
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield


class Chunks:
    """Finished chunks of one group, an .npz each: what a killed run has already paid for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, chunk: int) -> dict[str, Values]:
        path = self._path(chunk)
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                done: dict[str, Values] = {}
                for key in arrays.files:
                    job, column = key.rsplit("/", 1)
                    done.setdefault(job, {})[column] = arrays[key]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be read (%s) and is computed again", path, error)
            return {}
        return done

    def save(self, chunk: int, done: Mapping[str, Values]) -> None:
        buffer = io.BytesIO()
        arrays: Any = {f"{job}/{column}": array for job, values in done.items() for column, array in values.items()}
        np.savez(buffer, **arrays)
        atomic_write(self._path(chunk), buffer.getvalue())

    def drop(self) -> None:
        """Forget the group: its rows are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # only when it is empty

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.npz"


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """manifest.json, in place of the one before."""
    atomic_write(folder / "manifest.json", (json.dumps(manifest, indent=1, default=str) + "\n").encode())
