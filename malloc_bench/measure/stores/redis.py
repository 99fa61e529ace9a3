"""Redis: a server of our own on this machine, asked over loopback."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from malloc_bench.measure.stores.base import Store, StoreError

SECONDS = 10.0  # that an answer may take
STARTS = 10.0  # that a server may take until it listens
_TRIES = 5  # ports: another process may take one first
_AT_ONCE = 1 << 24  # bytes on their way

#: ends the server when our end of its stdin closes, however we end; ends with the server, and removes its folder
_KEEPER = """
import os, shutil, subprocess, sys, threading
server = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
def wait():
    sys.stdin.buffer.read()
    server.kill()
threading.Thread(target=wait, daemon=True).start()
server.wait()
shutil.rmtree(sys.argv[1], ignore_errors=True)
os._exit(server.returncode % 256)
"""


class Redis(Store):
    """A server without persistence on a free port of the loopback, ended by `close`, or with this process.

    It serves on cores that the clients use too.
    """

    name = "redis"

    def __init__(self, server: _Server | None = None) -> None:
        self.owns = server is None
        self.server = server or _started()
        self.connection = _connected(self.server.port)
        self.empty = self._used() if self.owns else 0

    @classmethod
    def check(cls) -> None:
        try:
            import redis  # noqa: F401
        except ImportError:
            raise StoreError("redis: its Python client is missing: pip install 'malloc-bench[redis]'") from None
        if shutil.which("redis-server") is None:
            raise StoreError("redis: there is no redis-server: `make services`, or your system's package redis-server")

    def get(self, key: bytes) -> bytes:
        with _told():
            found = self.connection.get(key)
        if found is None:
            raise StoreError(f"redis: no key {key!r}")
        return bytes(found)

    def put(self, key: bytes, value: bytes) -> None:
        with _told():
            self.connection.set(key, value)

    def put_many(self, values: Mapping[bytes, bytes]) -> None:
        waiting, size = self.connection.pipeline(transaction=False), 0
        with _told():
            for key, value in values.items():
                waiting.set(key, value)
                size += len(value)
                if size > _AT_ONCE:
                    waiting.execute()
                    size = 0
            waiting.execute()

    def at_rest(self) -> int:
        """What the server's allocator gave, beyond what it takes when it is empty."""
        return self._used() - self.empty

    def _used(self) -> int:
        self.connection.close()  # the server's buffers of a client that has sent much are no state's bytes
        with _told():
            return int(self.connection.info("memory")["used_memory"])

    @property
    def pid(self) -> int:
        """The server's."""
        with _told():
            return int(self.connection.info("server")["process_id"])

    def client(self) -> Redis:
        return Redis(self.server)

    def close(self) -> None:
        self.connection.close()
        if self.owns:
            self.server.end()


class _Server:
    """A redis-server and its keeper; nothing it has survives `end`."""

    def __init__(self, port: int) -> None:
        self.port, self.folder = port, tempfile.mkdtemp(prefix="malloc-bench-redis-")
        given = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": self.folder}
        options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 - until `end`
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", _KEEPER, self.folder, "redis-server", *options],
            stdin=subprocess.PIPE, stdout=self.words, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def silent(self) -> str:
        """Why it does not answer on its port within STARTS, or another server does; empty where it does."""
        connection, until = _connected(self.port), time.monotonic() + STARTS
        while self.process.poll() is None:
            try:
                with _told():
                    answered = connection.config_get("dir").get("dir")
                return "" if answered == self.folder else "another server answers there"
            except StoreError as error:
                if time.monotonic() > until:
                    return str(error)
            time.sleep(0.02)
        self.words.seek(0)
        *_, last = ["", *self.words.read().decode(errors="replace").split("\n")[:-1]]
        code = (self.process.returncode + 128) % 256 - 128  # negative: by a signal
        return f"it ended by itself with {code}{last and f': {last.strip()}'}"

    def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.words.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _started() -> _Server:
    Redis.check()
    for _ in range(_TRIES):
        server = _Server(_free_port())
        try:
            if not (why := server.silent()):
                return server
        except BaseException:
            server.end()
            raise
        server.end()
    raise StoreError(f"redis: redis-server did not start on any of {_TRIES} ports of 127.0.0.1; {why}")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _connected(port: int) -> Any:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    once = Retry(NoBackoff(), 0)
    return redis.Redis(
        "127.0.0.1", port, socket_timeout=SECONDS, socket_connect_timeout=SECONDS, retry=once, decode_responses=False
    )


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # where a server talks nonsense its client raises anything
        raise StoreError(f"redis: {' '.join(str(error).split())}") from None
