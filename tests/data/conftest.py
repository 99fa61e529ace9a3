"""A world of its own for every test: an empty home, no data folder, cards in a temporary folder, a loopback server."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from malloc_bench.data.sources import cards

UDATA = b"1\t10\t5\t300\n2\t20\t3\t100\n1\t30\t4\t200\n2\t10\t1\t100\n"
CARD = dict.fromkeys(("title", "description", "licence", "citation", "homepage"), "-")
REAL_DATA = os.environ.get("MALLOC_BENCH_DATA")


@pytest.fixture
def udata() -> bytes:
    return UDATA


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MALLOC_BENCH_DATA", raising=False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)  # the loopback server stands behind no proxy


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The folder of real files; the test is skipped where there is none."""
    folder = Path(REAL_DATA or request.config.rootpath.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(folder))
    return folder


@pytest.fixture
def make_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """make_card(format=..., sources=[...]) writes the only card there is, `toy`, and gives its name."""
    folder = tmp_path / "cards"
    folder.mkdir()
    monkeypatch.setattr(cards, "shipped", lambda kind: folder)

    def make(**keys: object) -> str:
        (folder / "toy.yaml").write_text(yaml.safe_dump({**CARD, "format": "movielens-udata", **keys}))
        return "toy"

    return make


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.fixture
def make_zip() -> Callable[..., bytes]:
    return zipped


class Server:
    """Answers GET: `serve(name, body)` a good file, `answers[path] = function(handler)` anything else."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if self.path in outer.answers:
                    outer.answers[self.path](self)
                else:
                    self.send_error(404)

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def serve(self, name: str, body: bytes, declared: int | None = None) -> dict[str, str]:
        """The url and sha256 keys of a source; `declared` is a Content-Length that may be wrong."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(body) if declared is None else declared))
            handler.end_headers()
            handler.wfile.write(body)

        self.answers[f"/{name}"] = answer
        return {"url": f"{self.url}/{name}", "sha256": hashlib.sha256(body).hexdigest()}

    def redirect(self, name: str, to: str) -> str:
        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(302)
            handler.send_header("Location", to)
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        self.answers[f"/{name}"] = answer
        return f"{self.url}/{name}"

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()
