"""Groups as tasks of a Ray cluster of two nodes on loopback: nodes and drivers die, and nothing is computed twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from nodes import Nodes

from malloc_bench.cli import main
from malloc_bench.results import ResultsError, Row, read_rows
from malloc_bench.run.executors.base import WorkerError
from malloc_bench.run.executors.worker import Task
from malloc_bench.run.runner import run_suite
from malloc_bench.suite.plan import RunResult

SUITE = """
name: clustered
datasets: [synthetic]
split: leave_one_out
backbones:
  - sasrec: {layers: 1, dim: 8, max_length: 30}
compressors: [full, knorm, waits]
budgets: [0.25]
seeds: [0, 1]
training: {epochs: 1, batch_size: 64}
measure: {latency: false, flops: false}
"""
SCRIPT = """
import sys
from malloc_bench.cli.commands import main
from malloc_bench.registry import load_part
load_part(sys.argv[1] + ":Waits")
sys.exit(main(["run", *sys.argv[2:], "--quiet", "--workers", "2", "--executor", "ray"]))
"""
TIMES = ("created_at", "digest", "train_seconds")


def test_without_ray_it_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "s.yaml").write_text(SUITE.replace(", waits", ""))
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["run", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "run"), "--quiet", "--executor", "ray"]) == 2
    assert capsys.readouterr().err == "malloc-bench: ray is not installed: pip install 'malloc-bench[ray]'\n"


def test_without_a_cluster_it_is_one_line(tmp_path: Path, capsys) -> None:
    pytest.importorskip("ray")
    (tmp_path / "s.yaml").write_text(SUITE.replace(", waits", ""))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = ["--out", str(tmp_path / "run"), "--quiet", "--executor", "ray", "--address", address]
    assert main(["run", str(tmp_path / "s.yaml"), *words]) == 2
    said = capsys.readouterr().err
    assert f"no Ray cluster answers at {address} (`ray start --head` begins one)" in said and said.count("\n") == 1


class Gone(Exception):
    """A node's, of the cluster that is made up."""


class Failed(Exception):
    """A task's."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class MadeUp:
    """What a run asks of ray, done at once in this process; fate(attempt, task, done): what becomes of a task."""

    exceptions = SimpleNamespace(RayError=Gone, RayTaskError=Failed)

    def __init__(self, fate: Callable[[int, Task, Callable[[Task], tuple]], tuple], cpus: float = 4.0) -> None:
        self.fate, self.cpus, self.attempts, self.options = fate, cpus, list[Task](), dict[str, object]()

    def init(self, address: str, **settings: object) -> None:
        self.environment = settings["runtime_env"]

    def shutdown(self) -> None:
        pass

    def nodes(self) -> list[dict]:
        return [{"Alive": True, "Resources": {"CPU": self.cpus}}, {"Alive": False, "Resources": {"CPU": 64.0}}]

    def remote(self, work: Callable[..., tuple]) -> SimpleNamespace:
        def begin(set_up: str, task: Task, alone: set) -> partial:
            self.attempts.append(task)
            return partial(self.fate, len(self.attempts), task, lambda some: work(set_up, some, alone))

        def options(**asked: object) -> SimpleNamespace:
            self.options = asked
            return SimpleNamespace(remote=begin)

        return SimpleNamespace(options=options)

    def wait(self, running: list[partial], timeout: float) -> tuple[list[partial], list[partial]]:
        return running[:1], running[1:]

    def get(self, ready: partial) -> tuple:
        return ready()


@pytest.fixture
def made_up(methods_file: Path, tmp_path: Path, monkeypatch) -> Callable[..., tuple[RunResult, MadeUp]]:
    """made_up(fate, ...): a run of `full` and `knorm` on a made-up cluster."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "suite.yaml").write_text(SUITE.replace(", waits", "").replace("[0, 1]", "[0]"))

    def run(*what) -> tuple[RunResult, MadeUp]:
        monkeypatch.setitem(sys.modules, "ray", ray := MadeUp(*what))
        return run_suite(tmp_path / "suite.yaml", tmp_path / "run", quiet=True, executor="ray"), ray

    return run


def test_rows_of_a_node_that_died_are_not_made_again(made_up, tmp_path: Path, caplog) -> None:
    left: list[Row] = []

    def fate(attempt: int, task: Task, done: Callable[[Task], tuple]) -> tuple:
        if attempt == 1:
            done(replace(task, members=task.members[:1]))
            left.extend(read_rows(tmp_path / "run" / "rows"))
            raise Gone("the node is gone\nat length")
        return done(task)

    result, ray = made_up(fate)
    assert (result.ok, result.failed) == (2, 0) and [len(task.members) for task in ray.attempts] == [2, 1]
    assert "the node is gone; its group is run again: synthetic, sasrec(" in caplog.text
    assert ray.options == {"num_cpus": 1, "num_gpus": 0, "max_retries": 0}
    assert ray.environment["env_vars"]["MALLOC_BENCH_HOME"] == os.environ["MALLOC_BENCH_HOME"]
    rows = read_rows(tmp_path / "run" / "rows")
    assert len(rows) == 2 and left[0] in rows  # digest, moment and all


def test_a_group_is_given_up_when_its_nodes_go_on_dying(made_up, tmp_path: Path) -> None:
    def fate(*what) -> tuple:
        raise Gone("the node is gone")

    result, ray = made_up(fate)
    assert (result.ok, result.failed, len(ray.attempts)) == (0, 2, 4)
    reasons = {row["reason"] for row in read_rows(tmp_path / "run" / "rows")}
    assert reasons == {"its group was given up: 4 nodes died of it, the last: the node is gone"}
    assert not (tmp_path / "run" / "set_up").exists()


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (ResultsError("the disk is full"), "^the disk is full$"),
        (
            FileNotFoundError(2, "No such file"),
            "a node failed: FileNotFoundError: .* same path on every node$",
        ),
    ],
)
def test_what_a_node_cannot_do_is_one_line(made_up, cause: Exception, said: str) -> None:
    def fate(*what) -> tuple:
        raise Failed(cause)

    with pytest.raises((ResultsError, WorkerError), match=said):
        made_up(fate)


def test_a_cluster_that_has_too_little_is_said_at_once(made_up) -> None:
    with pytest.raises(WorkerError, match=r"no node of the Ray cluster has 1 CPU, which a group needs"):
        made_up(lambda *what: (), 0.5)


def test_an_address_is_of_ray_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "s.yaml").write_text(SUITE.replace(", waits", ""))
    assert main(["run", str(tmp_path / "s.yaml"), "--address", "10.0.0.1:6379"]) == 2
    assert "address 10.0.0.1:6379 is of a Ray cluster: expected executor ray beside it" in capsys.readouterr().err
    assert main(["run", str(tmp_path / "s.yaml"), "--executor", "ray", "--address", ""]) == 2
    assert "address: expected HOST:PORT of a Ray cluster, not nothing" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"executor 'rey' is not there\. Did you mean 'ray'"):
        run_suite(tmp_path / "s.yaml", tmp_path / "run", executor="rey")


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """A head; more can be started."""
    pytest.importorskip("ray")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with closing(Nodes()) as found:
        found.start()
        yield found


@pytest.fixture
def driver(methods_file: Path, tmp_path: Path, nodes: Nodes, monkeypatch) -> Callable[[], subprocess.Popen]:
    """driver(): a run of the suite begins, whose second chunks wait for the file `go`."""
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    (tmp_path / "suite.yaml").write_text(SUITE)
    words = [methods_file, tmp_path / "suite.yaml", "--out", tmp_path / "run", "--address", nodes.address]

    def begin() -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, words)], stderr=subprocess.PIPE, text=True)

    return begin


def calls(folder: Path) -> Counter[tuple[int, int]]:
    """How often a chunk of so many users was begun, by (seed, users)."""
    return Counter(tuple(map(int, path.name.split("-")[:2])) for path in (folder / "waits").glob("*-*-*"))


def by_id(folder: Path) -> dict[str, Row]:
    return {row["cell_id"]: {k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "rows")}


def check(tmp_path: Path) -> None:
    """The rows are those of one process."""
    rows = by_id(tmp_path / "run")
    run_suite(tmp_path / "suite.yaml", tmp_path / "one", quiet=True)
    assert rows == by_id(tmp_path / "one") and len(rows) == 6 and {row["status"] for row in rows.values()} == {"ok"}
    assert not (tmp_path / "run" / "partial").exists() and not (tmp_path / "run" / "set_up").exists()


@pytest.mark.slow
def test_a_node_dies_and_its_group_goes_on_elsewhere(tmp_path: Path, nodes: Nodes, driver, wait_for) -> None:
    second = nodes.start()
    process = driver()
    wait_for(lambda: len(list((tmp_path / "waits").glob("*-44-*"))) == 2, 300)  # both groups are in their last chunks
    nodes.kill(second)
    (tmp_path / "waits" / "go").touch()
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    begun = calls(tmp_path)
    assert {begun[seed, 256] for seed in (0, 1)} == {1}
    assert sorted(begun[seed, 44] for seed in (0, 1)) == [1, 2]  # once on the node that died
    check(tmp_path)


@pytest.mark.slow
def test_the_driver_dies_and_another_goes_on(tmp_path: Path, nodes: Nodes, driver, wait_for, alive) -> None:
    nodes.start()
    process = driver()
    wait_for(lambda: len(list((tmp_path / "waits").glob("*-44-*"))) == 2, 300)
    process.kill()
    process.communicate()
    workers = [int(path.name.split("-")[2]) for path in (tmp_path / "waits").glob("*-44-*")]
    wait_for(lambda: not any(map(alive, workers)))  # tasks of a dead driver end
    (tmp_path / "waits" / "go").touch()
    process = driver()
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert calls(tmp_path) == {(seed, users): n for seed in (0, 1) for users, n in ((256, 1), (44, 2))}
    check(tmp_path)
