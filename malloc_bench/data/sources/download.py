"""A verified download over https: a bar, a hash, and one clear reason where it fails."""

from __future__ import annotations

import hashlib
import time
import urllib.error
import urllib.request
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import urlsplit

from malloc_bench.data.errors import DataError
from malloc_bench.files import whole_file, with_home

SILENCE = 6.0  # seconds without an answer, to connect and between any two reads
STALL = 30.0  # seconds in which at least STALL_BYTES must come
STALL_BYTES = 30_000
MAX_REDIRECTS = 5
MAX_BYTES = 32 << 30
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def download(url: str, target: Path, hashes: dict[str, str], *, progress: bool = True) -> None:
    """Fetch `url` to `target`, which appears only once it is complete and every hash (name -> hex digest) agrees.

    Raises DataError with the reason: refused, timed out, stalled, HTTP status, redirects, truncated, wrong hash.
    """
    if not _allowed(url):
        raise DataError("only https is used")
    try:
        opener = urllib.request.build_opener(_Redirects)
        request = urllib.request.Request(url, headers={"User-Agent": "malloc-bench"})
        with opener.open(request, timeout=SILENCE) as response, whole_file(target) as file:
            found = _stream(response, file, target.name, list(hashes), progress)
            for kind, digest in hashes.items():
                if found[kind] != digest:
                    raise DataError(f"wrong {kind}: {found[kind]} where {digest} is published")
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(" ".join(f"HTTP {error.code} {error.reason}".split())) from None
    except TimeoutError:
        raise DataError(f"no answer for {SILENCE:g} s") from None
    except (OSError, HTTPException, ValueError) as error:  # ValueError: an address that is none
        if getattr(error, "filename", None) is not None and not isinstance(error, urllib.error.URLError):
            raise DataError(with_home(error)) from None  # type: ignore[arg-type]
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise DataError(f"no connection within {SILENCE:g} s") from None
        raise DataError(f"{getattr(reason, 'strerror', None) or reason or type(error).__name__}") from None


def file_hash(path: Path, kind: str) -> str:
    """Hex digest of a file, `kind` as hashlib names it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _stream(response: HTTPResponse, file: BinaryIO, name: str, kinds: list[str], progress: bool) -> dict[str, str]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    length = response.headers.get("Content-Length", "")
    expected = int(length) if length.isdecimal() else None
    hashes = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    got, mark, marked = 0, 0, time.monotonic()
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task(name, total=expected)
        while chunk := response.read1(1 << 16):  # read() would wait for a full buffer, however slowly it fills
            file.write(chunk)
            for digest in hashes.values():
                digest.update(chunk)
            got += len(chunk)
            bar.update(task, completed=got)
            if got > MAX_BYTES:
                raise DataError(f"over {MAX_BYTES} bytes")
            now = time.monotonic()
            if now - marked > STALL:
                if got - mark < STALL_BYTES:
                    raise DataError(f"stalled: {got - mark} bytes in {STALL:g} s")
                mark, marked = got, now
    if expected is not None and got != expected:
        raise DataError(f"truncated: {got} of {expected} bytes")
    return {kind: digest.hexdigest() for kind, digest in hashes.items()}


def _allowed(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)  # loopback: tests


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = max_repeats = MAX_REDIRECTS

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme != req.type or not _allowed(newurl):
            raise DataError(f"redirected to {newurl}; only https is used")
        return super().redirect_request(req, fp, code, msg, headers, newurl)  # type: ignore[arg-type]
