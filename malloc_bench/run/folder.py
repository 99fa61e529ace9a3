"""The folder of a run: one writer at a time, chunks of unfinished groups, the manifest."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import socket
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from malloc_bench.evaluation.requests import Values
from malloc_bench.files import Damaged, ResultsError, advice, atomic_write, read_sealed, remove_leftovers, sealed

log = logging.getLogger(__name__)
FOR_NODES = "set_up"  # a file of what a cluster's nodes are given


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
        raise ResultsError(f"{folder}: {error.strerror}; {advice(folder, error)}") from None
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


def kept_whole(folder: Path) -> None:
    """Raises ResultsError where a run into a folder would overwrite a parquet that is all that was kept of another."""
    if (folder / "results.parquet").is_file() and not (folder / "rows").is_dir():
        raise ResultsError(
            f"{folder} holds results.parquet and no rows, as what is committed of a run does, and would lose it: "
            f"choose another folder (--out), or have its rows again first (malloc-bench merge {folder} --out {folder})"
        )


def remove_dead(folder: Path) -> None:
    """Delete what killed runs left half-written in a run folder; only for the holder of its lock.

    A report may be writing tables and figures beside a run, so what lies there must be an hour old.
    """
    for each in ("rows", "per_user", "latency", "partial/*", "checkpoints/*"):
        for owned in folder.glob(each):
            remove_leftovers(owned)
    for shared in (folder, folder / "figures"):
        remove_leftovers(shared, older=3600)
    (folder / FOR_NODES).unlink(missing_ok=True)


def remove_partial(folder: Path, wanted: Collection[str]) -> None:
    """Delete chunks of groups that a whole suite, as it now is, has no undone cells of; wanted: keys of the others."""
    for path in (folder / "partial").glob("*"):
        if path.name not in wanted:
            Chunks(path).drop()


class Chunks:
    """Finished chunks of one group, a file each: what a killed run has already paid for.

    A file is a sha256 of its place and its content, then an .npz. weights: job id -> sha256 of the weights that it
    reads from ("" for all others), without which what was kept of it is not used.
    """

    def __init__(self, folder: Path, weights: Mapping[str, str] | None = None) -> None:
        self.folder, self.weights = folder, weights or {}

    def load(self, chunk: int) -> dict[str, Values]:
        path = self._path(chunk)
        try:
            whole = path.read_bytes()
            head, content = whole[:_HASH], whole[_HASH:]
            if head != self._hash(chunk, content):
                raise ValueError("not what was written")
            done: dict[str, Values] = {}
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                for key in arrays.files:
                    job, weights, column = key.rsplit("/", 2)
                    if weights == self._weights(job):
                        done.setdefault(job, {})[column] = arrays[key]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            log.warning("%s cannot be read (%s) and is computed again", path, error)
            return {}
        return done

    def save(self, chunk: int, done: Mapping[str, Values]) -> None:
        buffer = io.BytesIO()
        arrays: Any = {
            f"{job}/{self._weights(job)}/{column}": array
            for job, values in done.items()
            for column, array in values.items()
        }
        np.savez(buffer, **arrays)
        atomic_write(self._path(chunk), self._hash(chunk, buffer.getvalue()) + buffer.getvalue())

    def drop(self) -> None:
        """Forget the group: its rows are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # only when it is empty

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:05d}.npz"

    def _weights(self, job: str) -> str:
        return self.weights.get(job, self.weights.get("", ""))

    def _hash(self, chunk: int, content: bytes) -> bytes:
        return hashlib.sha256(f"{self.folder.name}/{chunk}/".encode() + content).digest()


_HASH = hashlib.sha256().digest_size


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """manifest.json, sealed, in place of the one before."""
    atomic_write(folder / "manifest.json", sealed(json.loads(json.dumps(manifest, default=str))))


def read_manifest(folder: Path) -> dict[str, Any]:
    """What manifest.json holds; nothing, with a warning, where it is not what was written."""
    try:
        content = read_sealed(folder / "manifest.json")
        if not all(isinstance(content.get(name, {}), dict) for name in ("datasets", "ceilings", "checkpoints")):
            raise Damaged("datasets, ceilings and checkpoints are not keys and values")
        return content
    except FileNotFoundError:
        return {}
    except Damaged as error:
        log.warning("%s/manifest.json is not what was written (%s): it begins anew", folder, error)
        return {}
