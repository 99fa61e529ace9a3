"""Requests as a store serves them: what is timed, what is written, and what becomes of it when something ends."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from malloc_bench.backbones.sasrec import SASRec
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.eviction.knorm import KNorm
from malloc_bench.measure import STORES, StoreError, Workload, clients, requests, serving
from malloc_bench.measure.clients import rate
from malloc_bench.measure.serving import Request, Served, appended, key, row
from malloc_bench.results import COLUMNS, REQUEST_STEPS
from malloc_bench.state import CodedEvents, ItemFrequencies

SMALL = Workload(users=3, history=20)


def make(max_length=21):
    torch.manual_seed(0)
    return {None: SASRec(SASRec.Config(dim=8, layers=1, max_length=max_length), 30).eval()}


def cells(*names):
    methods = {name: get_compressor(name) for name in names}
    return {name: (m, Budget(0.5) if m.takes_budget else None) for name, m in methods.items()}


@pytest.mark.parametrize("store", list(STORES))
def test_every_cell_is_served(store, installed):
    installed(store)
    names = ("full", "none", "recent", "kivi", "svd", "recompute", "truncate")
    found, failed = requests(make(), cells(*names), SMALL, (1, 5), store, seconds=0.002, repeats=7)
    assert not failed and list(found) == list(names)
    for by_candidates in found.values():
        assert list(by_candidates) == [1, 5]
        for served in by_candidates.values():
            assert served.taken.shape == served.full.shape and len(served.taken) >= 7
            assert served.taken.min() > 0 and served.taken.shape[1] == len(REQUEST_STEPS)
            columns = served.columns()
            assert columns.keys() < COLUMNS.keys() and len(columns) == 3 * 7 + 4 + 2
            assert columns["request_ms_p50"] > columns["request_read_ms_p50"] > 0
            assert columns["request_ms_p99"] is None and columns["requests_per_s_2"] > 0
            assert columns["request_ratio_lo"] <= columns["request_ratio"] <= columns["request_ratio_hi"]
            json.dumps(columns)
    assert not multiprocessing.active_children()


def test_columns_are_those_of_the_times():
    """By hand: six steps of 1 to 6 ms, the full state's of twice as much."""
    taken = np.tile(np.arange(1, 7) / 1000, (500, 1))
    columns = Served(taken, 2 * taken, {1: 40.0, 2: 60.0}, load=0.0).columns()
    assert columns["request_ms_p50"] == columns["request_ms_p99"] == pytest.approx(21)
    steps = [columns[f"request_{step}_ms_p95"] for step in ("load", "unpack", "read", "append", "pack", "write")]
    assert steps == pytest.approx([1, 2, 3, 4, 5, 6])
    assert columns["request_ratio"] == columns["request_ratio_lo"] == columns["request_ratio_hi"] == 0.5
    assert (columns["requests_per_s_1"], columns["requests_per_s_2"]) == (40, 60)
    assert columns["request_timing"] == "ok"
    noise = np.where(np.arange(500) % 2 == 0, 5.0, 1.0)[:, None]
    assert Served(taken * noise, taken, {}, load=1e6).columns()["request_timing"] == "noisy, busy"
    assert Served(taken, taken, {}, load=0.0).columns()["requests_per_s_1"] is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["full", "recent", "kivi", "recompute", "truncate"])
def test_what_is_written_back_is_the_state_with_the_event(name):
    """Unpacked again it reads as one that never left memory; what is loaded stays as it was."""
    model, (method, budget) = make()[None], cells(name)[name]
    history, tokens, new = SMALL.events(30)
    state = method.compress(SMALL.prefill(model), budget)
    store = STORES["dict"]()
    blobs = state.packed(range(3))
    store.put_many({key("a", user): blob for user, blob in enumerate(blobs)})
    request = Request(store, "a", 3, model, state.take(torch.tensor([0])), tokens, new, lambda: None)
    for _ in range(6):
        request()
    assert [store.get(key("a", user)) for user in range(3)] == blobs and len(request.taken) == 6
    grown = appended(model, state, new)
    template = grown.take(torch.tensor([2]))
    again = template.unpack([store.get(key("a+", user)) for user in range(3)])
    assert again.length.tolist() == (state.length + 1).tolist()
    torch.testing.assert_close(model.read(tokens, again), model.read(tokens, grown), rtol=1e-5, atol=1e-5)
    if name in ("full", "recompute"):
        whole = replace(SMALL, history=21)
        rows = [torch.cat([getattr(history, c), getattr(new, c)], 1) for c in ("items", "times", "next_times", "kinds")]
        longer = replace(history, items=rows[0], times=rows[1], next_times=rows[2], kinds=rows[3])
        longer = replace(longer, count=torch.full((3,), whole.history, dtype=torch.int32))
        want = model.read(tokens, model.prefill(longer).state)
        torch.testing.assert_close(model.read(tokens, grown), want, rtol=1e-5, atol=1e-5)


def test_raw_events_grow_behind_each_users_own():
    history, _, new = SMALL.events(30)
    short = replace(history, count=torch.tensor([20, 3, 0], dtype=torch.int32))
    grown = short.then(new)
    assert grown.count.tolist() == [21, 4, 1]
    for user, n in enumerate((20, 3, 0)):
        assert grown.items[user, : n + 1].tolist() == [*history.items[user, :n].tolist(), int(new.items[user, 0])]
    coded = CodedEvents.of(short, ItemFrequencies(torch.ones(30))).then(new)
    items, wrong = coded.table.decode(coded.code, coded.size, coded.count)
    assert not wrong.any()
    assert torch.equal(items[coded.mask()], grown.items[grown.mask()])


# ---- what goes wrong


def test_a_method_that_fails_leaves_the_others(caplog):
    @dataclass(frozen=True)
    class Broken(KNorm):
        def scores(self, prefill, layer):
            raise RuntimeError("no scores\ntoday")

    methods = {"broken": (Broken(), Budget(0.5)), **cells("recent")}
    found, failed = requests(make(), methods, SMALL, (1,), "dict", seconds=0)
    assert list(found) == ["recent"] and failed == {"broken": "RuntimeError: no scores today"}
    assert "requests of 1 cells could not be measured: RuntimeError: no scores today" in caplog.text


def test_a_server_that_dies_in_the_middle_is_one_line_of_every_cell(installed, monkeypatch, caplog):
    installed("redis")
    put, opened = STORES["redis"].put, []

    def dying(self, name, value):
        opened.append(self)
        if len(opened) == 20:
            os.kill(self.pid, signal.SIGKILL)
        put(self, name, value)

    monkeypatch.setattr(STORES["redis"], "put", dying)
    began = time.monotonic()
    found, failed = requests(make(), cells("full", "recent", "recompute"), SMALL, (1, 5), "redis", seconds=0.02)
    assert found == {} and failed.keys() == {"full", "recent", "recompute"}
    assert all(reason.startswith("redis: ") and "\n" not in reason for reason in failed.values())
    assert time.monotonic() - began < 20 and len(caplog.records) <= 2
    assert not Path(opened[0].server.folder).exists()


def test_a_store_that_does_not_start_is_one_line_of_every_cell(monkeypatch):
    def start(self):
        raise StoreError("lmdb: no room")

    monkeypatch.setattr(STORES["lmdb"], "__init__", start)
    assert requests(make(), cells("full", "none"), SMALL, (1,), "lmdb") == (
        {},
        dict.fromkeys(["full", "none"], "lmdb: no room"),
    )


@pytest.fixture
def request_of():
    """A request of the full state, through a dictionary."""
    model, (_, tokens, new) = make()[None], SMALL.events(30)
    state, store = SMALL.prefill(model).state, STORES["dict"]()
    store.put_many({key("a", user): state.pack(user) for user in range(3)})
    with torch.no_grad():
        yield Request(store, "a", 3, model, state.take(torch.tensor([0])), tokens, new, lambda: None)


def test_clients_ask_for_users_of_their_own_and_none_is_left(request_of):
    assert rate(request_of, 1, 0.1) > 0 and rate(request_of, 2, 0.1) > 0
    assert not multiprocessing.active_children() and request_of.taken == []


@pytest.mark.parametrize("how", ["hangs", "fails", "dies"])
def test_a_client_that_does_not_answer_is_ended(how, request_of, monkeypatch):
    monkeypatch.setattr(clients, "PATIENCE", 0.5 if how == "hangs" else 9.0)
    calls = []

    def read(tokens, state):
        calls.append(state)
        if len(calls) > 2:  # beyond the first that warms up
            {"hangs": lambda: time.sleep(60), "fails": lambda: 1 / 0, "dies": lambda: os._exit(1)}[how]()
        return SASRec.read(request_of.backbone, tokens, state)

    monkeypatch.setattr(request_of.backbone, "read", read)
    said = {"hangs": "did not answer within", "fails": "division by zero", "dies": "ended before it was done"}[how]
    began = time.monotonic()
    with pytest.raises(StoreError, match=said):
        rate(request_of, 2, 0.1)
    assert time.monotonic() - began < 10 and not multiprocessing.active_children()


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_an_interrupt_leaves_no_process_and_no_folder(how, installed, tmp_path):
    """In the middle of what two clients do, as `malloc-bench run` takes a signal."""
    installed("redis")
    code = """
        import sys, types
        sys.path.insert(0, sys.argv[1])
        from malloc_bench.cli.ending import end_as_by_ctrl_c
        from malloc_bench.measure import clients, requests
        from test_serving import SMALL, cells, make
        end_as_by_ctrl_c([])
        clients.time = types.SimpleNamespace(perf_counter=lambda: 0.0)  # they go on for ever
        clients.PATIENCE, said = 99, clients._said
        clients._said = lambda *given: [print("clients", flush=True), said(*given)][1]
        requests(make(), cells("full"), SMALL, (1,), sys.argv[2], seconds=0.02)
    """
    for store in ("redis", "lmdb"):
        environment = {**os.environ, "MALLOC_BENCH_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(Path(__file__).parent), store],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout.readline() == b"clients\n"
            time.sleep(0.3)
            os.kill(process.pid, how)
            assert process.wait(20) != 0
        time.sleep(0.2)
        left = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True).stdout
        assert not left and not [each for each in tmp_path.rglob("*") if each.name != "stores"]


def test_reasons_are_one_line():
    try:
        raise StoreError("redis: gone")
    except StoreError:
        assert serving._reason() == "redis: gone"


def test_rows_of_a_batch():
    history, _, _ = SMALL.events(30)
    one = row(history, 2)
    assert torch.equal(one.items, history.items[2:]) and one.count.tolist() == [20]


def test_a_client_dies_with_who_started_it():
    """Else it would hold that one's lock on the run folder."""
    code = """
        import multiprocessing, os, signal, sys, time
        from malloc_bench.measure.clients import _end_with
        def client(parent, pipe):
            _end_with(parent)
            pipe.send(os.getpid())
            time.sleep(60)
        if __name__ == "__main__":
            fork = multiprocessing.get_context("fork")
            ours, theirs = fork.Pipe()
            fork.Process(target=client, args=(os.getpid(), theirs), daemon=True).start()
            print(ours.recv(), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, timeout=60)
    client, until = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 20
    while client.exists() and client.read_text().split()[2] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)
