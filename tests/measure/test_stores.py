"""Stores give back what was put, and nothing of them stays behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import STORES, StoreError, Workload, some_facts
from malloc_bench.measure.stores import redis as redis_store

METHODS = [
    ("full", None), ("none", None), ("recent", 0.3), ("kivi", None), ("mxint", None), ("svd", 0.3), ("kmeans", 0.3),
    ("entropy", None), ("recompute", None), ("ids_coded", None), ("sdim", None),
]  # fmt: skip


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[-1][0] != "Z"


def gone(pid, seconds=10):
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(pid)


@pytest.fixture(params=list(STORES))
def store(request, installed):
    with installed(request.param)() as opened:
        yield opened


@pytest.fixture
def server(installed):
    with installed("redis")() as opened:
        yield opened


def test_what_was_put_is_had(store):
    big = os.urandom(3 << 20)
    store.put(b"a", b"1")
    store.put_many({b"b/%d" % i: bytes([i]) * i for i in range(200)} | {b"big": big})
    assert store.get(b"a") == b"1" and store.get(b"b/0") == b"" and store.get(b"b/199") == bytes([199]) * 199
    assert store.get(b"big") == big
    store.put(b"a", b"22")
    assert store.get(b"a") == b"22"
    with pytest.raises(StoreError, match=f"^{store.name}: no key b'c'$"):
        store.get(b"c")
    assert 3 << 20 < store.at_rest() < 2 * (3 << 20)


def test_a_client_in_another_process_sees_the_same(store):
    store.put(b"a", b"1")
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            client = store.client()
            found = client.get(b"a")
            client.put(b"b", b"2")
            os.write(theirs, found)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(theirs)
    with open(ours, "rb") as pipe:  # noqa: PTH123
        assert pipe.read() == b"1"
    if store.name != "dict":
        assert store.get(b"b") == b"2"


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    backbone = get_backbone("sasrec", 60, heads=2, dim=16, layers=2, max_length=41).eval()
    return backbone, Workload(users=3, history=40)


@torch.no_grad()
def test_packed_states_come_back_bit_for_bit(store, made):
    backbone, work = made
    history, tokens, _ = work.events(backbone.n_items)
    for name, share in METHODS:
        method = get_compressor(name)
        full = backbone.prepare(history, stats=method.needs | method.fit_needs, items=some_facts(60), tokens=tokens)
        full = full.given(method.fit(full)) if method.fit_parts() else full
        state = method.compress(full, None if share is None else Budget(share))
        store.put_many({f"{name}/{user}".encode(): state.pack(user) for user in range(3)})
        blobs = [store.get(f"{name}/{user}".encode()) for user in (2, 0)]
        assert blobs == [state.pack(2), state.pack(0)], name
        again = state.take(torch.tensor([1])).unpack(blobs)  # a template of somebody else
        assert again.packed([0, 1]) == blobs, name
        asked = tokens.take(torch.zeros(3, 1).long(), tokens.count)
        want = backbone.read(asked, state)[[2, 0]]
        chosen = asked.each(lambda x: x[[2, 0]], asked.count[[2, 0]])
        torch.testing.assert_close(backbone.read(chosen, again), want, rtol=1e-5, atol=1e-5)


# ---- what stays behind


def test_a_folder_goes_with_its_store_and_those_of_dead_processes_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path))
    code = "import os; from malloc_bench.measure import STORES; s = STORES['lmdb'](); s.put(b'a', b'1'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    assert len(list((tmp_path / "stores").iterdir())) == 1
    with STORES["lmdb"]() as opened:
        assert list((tmp_path / "stores").iterdir()) == [opened.folder]
    assert not list((tmp_path / "stores").iterdir())


def test_a_full_disk_or_no_permission_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "stores").write_text("a file")
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path))
    with pytest.raises(StoreError, match=r"^lmdb: .*stores"):
        STORES["lmdb"]()


def test_a_server_ends_with_its_store(server):
    pid, folder = server.pid, Path(server.server.folder)
    assert alive(pid) and folder.is_dir()
    assert server.connection.config_get("save") == {"save": ""}
    assert server.connection.config_get("bind") == {"bind": "127.0.0.1"}
    server.close()
    assert gone(pid) and not folder.exists()
    server.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_server_ends_with_its_process_however_that_ends(how, installed):
    installed("redis")
    code = """
        import time
        from malloc_bench.measure import STORES
        with STORES["redis"]() as store:
            print(store.pid, store.server.folder, flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        pid, folder = process.stdout.readline().decode().split()
        process.send_signal(how)
    assert gone(int(pid))
    until = time.monotonic() + 10
    while Path(folder).exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert not Path(folder).exists()


def test_a_server_that_dies_is_one_line(server):
    server.put(b"a", b"1")
    os.kill(server.pid, signal.SIGKILL)
    began = time.monotonic()
    for call in (lambda: server.get(b"a"), lambda: server.put(b"a", b"2"), server.at_rest):
        with pytest.raises(StoreError, match=r"^redis: [^\n]*(refused|closed|reset)"):
            call()
            call()
    assert time.monotonic() - began < 5


def test_a_port_that_is_taken_is_not_used(server, installed, monkeypatch):
    """Another server answers on the first port that is tried: its data are left alone."""
    server.put(b"a", b"1")
    ports, free = [server.server.port], redis_store._free_port
    monkeypatch.setattr(redis_store, "_free_port", lambda: ports.pop() if ports else free())
    with installed("redis")() as other:
        assert not ports and other.server.port != server.server.port
        with pytest.raises(StoreError, match="no key"):
            other.get(b"a")


@pytest.mark.parametrize("then", ["hangs", "closes", "talks nonsense"])
def test_a_server_that_does_not_answer_as_it_should_is_one_line(then, monkeypatch):
    pytest.importorskip("redis")
    monkeypatch.setenv("PATH", f"{Path(__file__).parents[1] / 'faults' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SERVER_ANSWERS", "12")
    monkeypatch.setenv("SERVER_THEN", then)
    monkeypatch.setattr(redis_store, "SECONDS", 0.5)
    with STORES["redis"]() as store, pytest.raises(StoreError, match=r"^redis: [^\n]+$"):
        for _ in range(12):
            store.put(b"a", b"1")


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("echo no such option; exit 3", "with 3: no such option"),
        ("kill -9 $$", "with -9"),
        ("exec sleep 9", "[Rr]efused.*"),
    ],
)
def test_a_server_that_does_not_start_says_why(does, told, tmp_path, monkeypatch):
    pytest.importorskip("redis")
    (stands_in := tmp_path / "redis-server").write_text(f"#!/bin/sh\n{does}\n")
    stands_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(redis_store, "STARTS", 0.3 if "sleep" in does else 10.0)
    with pytest.raises(StoreError, match=rf"^redis: redis-server did not start on any of 5 ports of [^;]*; .*{told}$"):
        STORES["redis"]()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(redis_store.shutil, "which", lambda name: None)
    with pytest.raises(StoreError, match=r"^redis: there is no redis-server: `make services`"):
        STORES["redis"].check()
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(StoreError, match=r"^redis: .* pip install 'malloc-bench\[redis\]'$"):
        STORES["redis"]()
