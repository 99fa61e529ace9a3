"""The commands: what they pass on, what they print, and the exit code of every ending."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from malloc_bench import load_run, registry, results
from malloc_bench.cli import commands as cli
from malloc_bench.cli.arguments import pairs
from malloc_bench.cli.machines import machines
from malloc_bench.cli.reports import reports
from malloc_bench.data import DataError
from malloc_bench.registry import UnknownName
from malloc_bench.results import ResultsError
from malloc_bench.run import runner
from malloc_bench.run.folder import LockedError
from malloc_bench.suite.plan import Cost, Planned, RunResult
from malloc_bench.suite.suite import SuiteError, load_suite

COMMANDS = (
    ["run"], ["tune"], ["list"], ["show"], ["compare"], ["tables"], ["merge"], ["report"], ["reproduce"], ["check"],
    ["verify"], ["site"], ["env"], ["data"], ["recommend"], ["leaderboard"], ["fit"], ["train"], ["submit"],
    ["data", "list"], ["data", "card"], ["data", "get"], ["data", "verify"], ["data", "stats"],
)  # fmt: skip

METHOD = """
from dataclasses import dataclass
from malloc_bench.compressors.windowing.recent import Recent

@dataclass(frozen=True)
class Newest(Recent):
    pass
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def smoke(tmp_path: Path) -> tuple[Path, list[Planned]]:
    """A run folder with a made-up row for each cell of the smoke suite, and the plan."""
    plan = [Planned(cell, cell.id, False) for cell in load_suite("smoke").cells()]
    for place, each in enumerate(plan):
        results.write_row(
            tmp_path / "runs" / "smoke" / "rows",
            {
                "cell_id": each.id, "suite": "smoke", "dataset": "synthetic", "task": "retrieval",
                "split": "leave_one_out", "backbone": "sasrec", "backbone_params": {}, "seed": 0, "status": "ok",
                "family": each.cell.compressor.family, "compressor": each.cell.compressor.name, "n_users": 300,
                "compressor_params": each.cell.compressor.params, "budget": each.cell.budget_text,
                "ndcg@10": 0.1 - 0.01 * place, "delta_ndcg@10": -0.01 * place, "bytes_mean": 900.0 / (place + 1),
                "ratio": 1 / (place + 1), "read_flops": 1e6, "overlap@10": 1 - 0.1 * place,
            },
        )  # fmt: skip
    return tmp_path / "runs" / "smoke", plan


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """fake(name, outcome) puts a recorder in the runner's place; it returns the calls, made as (args, kwargs)."""

    def put(name: str, outcome: Any) -> list[Any]:
        calls: list[Any] = []

        def recorder(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setattr(runner, name, recorder)
        return calls

    return put


# ---- help


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_of_every_command(command: list[str], capsys: Capture) -> None:
    assert cli.main([*command, "--help"]) == 0
    assert "Usage: malloc-bench" in capsys.readouterr().out


def test_every_command_is_known_here() -> None:
    groups = [(["data"], cli.data), ([], cli.app), ([], reports), ([], machines)]
    found = [
        [*prefix, command.name or command.callback.__name__]
        for prefix, app in groups
        for command in app.registered_commands
    ]  # type: ignore[union-attr]
    assert sorted([*found, ["data"]]) == sorted(COMMANDS)


def test_no_command_is_help_and_version_is_the_packages(capsys: Capture) -> None:
    assert cli.main([]) == 0
    assert "compare" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.count(".") >= 2


def test_help_is_fast_because_it_imports_little() -> None:
    heavy = "torch numpy polars yaml matplotlib"
    code = (
        "import sys; from malloc_bench import cli; cli.main(['run', '--help']); "
        f"print([m for m in {heavy.split()} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


# ---- run


def test_run_passes_everything_on(fake: Any, smoke: Any, capsys: Capture) -> None:
    folder, plan = smoke
    calls = fake("run_suite", RunResult(folder, plan[:2], ok=2, reused=1, seconds=4.2))
    words = "run smoke --out there --only backbone=sasrec --only budget=0.25 --fresh --offline --device cpu --workers 3"
    assert cli.main(words.split()) == 0
    ((args, kwargs),) = calls
    assert args == ("smoke", Path("there"))
    assert kwargs == {
        "only": {"backbone": ["sasrec"], "budget": ["0.25"]}, "dry_run": False, "fresh": True, "offline": True,
        "device": "cpu", "quiet": False, "tuned": None, "shard": None, "workers": 3,
        "executor": "local", "address": None,
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "synthetic · retrieval · sasrec" in shown
    assert "none" in shown
    assert "recent" not in shown  # not among the cells that were asked for
    assert f"2 ok, 0 skipped, 0 failed, 1 done before, in 4 s: {folder}/leaderboard.md" in shown


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ("--only dataset=ml-1m,family=eviction", {"dataset": ["ml-1m"], "family": ["eviction"]}),
        ("--only family=eviction --only family=merging", {"family": ["eviction", "merging"]}),
        ("--only family=eviction,merging,seed=0", {"family": ["eviction", "merging"], "seed": ["0"]}),
        ("--only seed=0 --only dataset=a,b", {"seed": ["0"], "dataset": ["a", "b"]}),
        ("--only compressor=snapkv(window=8,kernel=1),kivi", {"compressor": ["snapkv(window=8,kernel=1)", "kivi"]}),
    ],
)
def test_slices_by_commas_and_by_repeating(words: str, asked: Any, fake: Any) -> None:
    calls = fake("run_suite", RunResult(Path("nowhere")))
    assert cli.main(["run", "smoke", "--dry-run", *words.split()]) == 0
    assert calls[0][1]["only"] == asked


def test_quiet_prints_one_line(fake: Any, smoke: Any, capsys: Capture) -> None:
    fake("run_suite", RunResult(smoke[0], smoke[1], ok=9))
    assert cli.main(["run", "smoke", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_dry_run_prints_the_plan(fake: Any, smoke: Any, tmp_path: Path, capsys: Capture) -> None:
    plan = [Planned(each.cell, each.id, place == 0) for place, each in enumerate(smoke[1])]
    calls = fake("run_suite", RunResult(tmp_path / "nowhere", plan, reused=1, costs={0: Cost(100.0, 40.0, 10.0)}))
    assert cli.main(["run", "smoke", "--dry-run"]) == 0
    assert calls[0][1]["dry_run"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"done  {plan[0].id[:12]}  {plan[0].cell}"
    assert lines[1].startswith("run   ")
    assert lines[-1] == "10 cells: 1 done, 9 to run: very roughly 2 min on 2 cores"
    assert not (tmp_path / "nowhere").exists()


def test_failed_cells_are_listed_and_the_code_is_1(fake: Any, smoke: Any, capsys: Capture) -> None:
    folder, plan = smoke
    path = folder / "rows" / f"{plan[4].id}.json"
    row = json.loads(path.read_text())
    results.write_row(folder / "rows", {**row, "status": "failed", "reason": "ValueError: too small"})
    fake("run_suite", RunResult(folder, plan, ok=9, failed=1))
    assert cli.main(["run", "smoke"]) == 1
    assert "failed: synthetic, retrieval, sasrec, snapkv(window=8) at 25 %, seed 0: ValueError: too small" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("run", "Missing argument 'SUITE'."),
        ("rnu", "No such command 'rnu'. Did you mean 'run'?"),
        ("run smoke --offlin", "No such option: --offlin (Possible options: --offline)"),
        ("run smoke --device tpu", "Invalid value for '--device': 'tpu' is not one of 'auto', 'cpu', 'cuda'."),
        ("run smoke --only backbone", "--only backbone: expected KEY=VALUE, as in dataset=ml-1m,family=eviction"),
        ("run smoke --only seed=0,1", "--only seed=1: no cell of the suite has it. Valid: 0."),
        ("run smoke --only family=evict", "--only family=evict: no cell of the suite has it. Did you mean 'eviction'?"),
        ("run smoke --only sed=0", "--only sed=0: unknown key. Did you mean 'seed'?"),
        ("run smok", "smok: neither a file nor a shipped suite. Did you mean 'smoke'?"),
        ("run bad.yaml", "bad.yaml: budgts: unknown key. Did you mean 'budgets'?"),
        ("list x", "Invalid value for 'kind': 'x' is not one of 'datasets', 'backbones', 'compressors', 'suites'."),
        ("show snapkw", "nothing is named 'snapkw'. Did you mean 'snapkv', 'capkv' or 'sampled'?"),
        ("tables nowhere", "nowhere holds no results: there is no such folder, nor runs/nowhere"),
        ("tables runs/smoke --table acuracy", "no table is named 'acuracy'. Did you mean 'accuracy'?"),
        ("report runs/nowhere", "runs/nowhere holds no results: there is no such folder"),
        (
            "compare mine --suite smoke",
            "'mine' names no class; expected my_method.py:MyMethod or my_package.my_module:MyMethod",
        ),
        ("compare mine.py:Mine --suite smoke", "mine.py: no such file"),
        ("check mine.py:Mine", "mine.py: no such file"),
        ("data get ml-100", "no dataset is named 'ml-100'. Did you mean 'ml-100k'?"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line_and_code_2(words: str, message: str, smoke: Any, capsys: Capture) -> None:
    Path("bad.yaml").write_text("budgts: [0.5]\n")
    assert cli.main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == f"malloc-bench: {message}\n"


@pytest.mark.parametrize(
    "error",
    [SuiteError("s"), DataError("d"), UnknownName("u"), ResultsError("r"), LockedError("pid 3"), ValueError("v"),
     PermissionError(13, "Permission denied", "/x")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_the_user_can_mend_is_one_line(error: Exception, fake: Any, capsys: Capture) -> None:
    fake("run_suite", error)
    assert cli.main(["run", "smoke"]) == 2
    assert capsys.readouterr().err == f"malloc-bench: {error}\n"
    with pytest.raises(type(error)):
        cli.main(["run", "smoke", "--debug"])
    with pytest.raises(type(error)):
        cli.main(["--debug", "run", "smoke"])


def test_a_fault_of_ours_shows_its_traceback(fake: Any) -> None:
    fake("run_suite", RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["run", "smoke"])


def test_an_interrupt_is_130(fake: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("run_suite", KeyboardInterrupt())
    assert cli.main(["run", "smoke"]) == 130
    assert "finished cells are kept" in capsys.readouterr().err

    def stopped(run: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("malloc_bench.results.load_results", stopped)
    assert cli.main(["fit", "run", "--law", "model"]) == 130 and "finished cells" not in capsys.readouterr().err


# ---- the others


def test_compare_shows_what_it_ran(fake: Any, smoke: Any, capsys: Capture) -> None:
    folder, plan = smoke
    calls = fake("compare", RunResult(folder, plan[3:5], ok=2))
    words = ["compare", "mine.py:Mine", "--suite", "smoke", "--against", "snapkv,recent", "--only", "seed=0", "--fresh"]
    assert cli.main(words) == 0
    options = {"only": {"seed": ["0"]}, "dry_run": False, "fresh": True, "device": "auto"}
    assert calls == [(("mine.py:Mine", "smoke", ["snapkv", "recent"], None), options)]
    shown = capsys.readouterr().out
    assert "snapkv" in shown and "int8" not in shown
    assert cli.main(["compare", "mine.py:Mine", "--dry-run"]) == 0
    assert "2 cells: 0 done, 2 to run" in capsys.readouterr().out


def test_compare_of_two_runs(smoke: Any, capsys: Capture) -> None:
    shutil.copytree("runs/smoke", "runs/again")
    assert cli.main(["compare", "runs/smoke", "again"]) == 0
    assert "10 rows in both, 10 equal, 0 surely of another accuracy" in capsys.readouterr().out
    assert cli.main(["compare", "runs/smoke", "runs/gone"]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_reproduce(fake: Any, smoke: Any, capsys: Capture) -> None:
    folder, plan = smoke
    row = {**results.read_rows(folder / "rows")[0], "cell": plan[0].cell.payload()}
    found = fake("one_row", row)
    calls = fake("reproduce", [])
    assert cli.main(["reproduce", "runs/smoke", "compressor=snapkv,budget=0.25"]) == 0
    assert found == [((Path("runs/smoke"), {"compressor": ["snapkv"], "budget": ["0.25"]}), {})]
    assert calls == [((Path("runs/smoke"), row["cell_id"]), {})]
    said = capsys.readouterr().out
    assert said.startswith(f"{row['cell_id'][:12]}: synthetic, retrieval") and "reproduced: bytes and every" in said
    fake("reproduce", ["mrr: 1 then, 2 now", "hr@5: 0 then, 1 now"])
    assert cli.main(["reproduce", "runs/smoke", "ab12"]) == 1
    assert found[-1] == ((Path("runs/smoke"), "ab12"), {})
    assert "differs: mrr: 1 then, 2 now\ndiffers: hr@5: 0 then, 1 now\n" in capsys.readouterr().out


def test_recommend(smoke: Any, capsys: Capture) -> None:
    limits = ["--bytes", "1KB", "--at-least", "50%", "--only", "family=eviction"]
    assert cli.main(["recommend", "runs/smoke", *limits]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "within 1 KB, surely keeping 50 % of its accuracy" in shown and "snapkv" in shown and "stores" in shown
    for wrong, said in (
        (["--bytes", "5XB"], "--bytes: '5XB' is no size"),
        (["--budget", "1/0"], "--budget: '1/0' is no share"),
        (["--at-least", "200%"], "--at-least: '200%' is no share"),
        (["--read-ms", "-1"], "greater than or equal to 0"),
        (["--only", "family=evction"], "Did you mean 'eviction'"),
    ):
        assert cli.main(["recommend", "runs/smoke", *wrong]) == 2
        assert said in capsys.readouterr().err


def test_leaderboard(smoke: Any, capsys: Capture) -> None:
    assert cli.main(["leaderboard", "smoke", "--sort", "bytes_mean", "--columns", "compressor, bytes_mean"]) == 0
    shown = capsys.readouterr().out
    assert "bytes_mean" in shown and "fidelity" not in shown.split("Overlap")[0]
    assert cli.main(["leaderboard", "smoke"]) == 0
    assert "best per budget" in capsys.readouterr().out
    assert cli.main(["leaderboard", "smoke", "--sort", "bites"]) == 2
    assert "no column 'bites'" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["datasets", "backbones", "compressors", "suites"])
def test_list(kind: str, capsys: Capture) -> None:
    assert cli.main(["list", kind]) == 0
    expected = {"datasets": "ml-100k", "backbones": "sasrec", "compressors": "snapkv", "suites": "quick"}
    shown = capsys.readouterr().out
    assert expected[kind] in shown
    assert "malloc-bench" in shown or kind == "suites"
    assert all("\t" in line for line in shown.splitlines())  # a pipe gets whole names, and every one
    assert len(shown.splitlines()) > 200 or kind != "datasets"
    assert cli.main(["list", kind, expected[kind], "--json"]) == 0
    assert expected[kind] in [each["name"] for each in json.loads(capsys.readouterr().out)]
    assert cli.main(["list", kind, "zzz"]) == 2
    assert f"{kind} has 'zzz'. Did you mean " in capsys.readouterr().err


def test_a_terminal_gets_many_variants_as_one_line(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["list", "datasets"]) == 0
    shown = capsys.readouterr().out
    assert "amazon-2023-..." in shown and "amazon-2023-books" not in shown and len(shown.splitlines()) < 60
    assert cli.main(["list", "datasets", "amazon-2023", "books"]) == 0
    assert "amazon-2023-books" in capsys.readouterr().out


def test_what_has_no_such_name_is_near_three(capsys: Capture) -> None:
    assert cli.main(["show", "amazon"]) == 2
    said = capsys.readouterr().err
    assert said.count("'amazon-") == 3 and len(said) < 200
    assert cli.main(["show", "snapkv", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["kind"] == "compressor" and ["family", "eviction"] in found["lines"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("snapkv", ["SnapKV, Li et al.", "eviction", "score = pool_5", "newest 16 queries", "by the budget"]),
        ("snapkv", ["window: int = 16", "keys and values of k events"]),
        ("kivi", ["bit-packed codes", "one cell, no budget", "bits: int = 4", "none that is matmul-like"]),
        ("h2o", ["attention that each slot received"]),
        ("keydiff", ["slots by lot .785", "nothing stands for what most keys share"]),
        ("svd", ["Gram matrix", "rank: int | None = None"]),
        ("compose", ["depends on its parameters", "steps: "]),
        ("hstu", ["Zhai et al.", "head: Literal['cosine', 'dot'] = 'cosine'", "keys, values of every event"]),
        ("ml-100k", ["943 users", "grouplens.org", "research only", "recbole==1.2.1"]),
        ("synthetic", ["seed 0"]),
        ("quick", ["malloc-bench run quick", "cells", "merge_adjacent + kivi(bits=2)", "0.0625"]),
    ],
)  # fmt: skip
def test_show(name: str, words: list[str], capsys: Capture) -> None:
    assert cli.main(["show", name]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert [word for word in words if word not in shown] == []


def test_every_part_can_be_shown(capsys: Capture) -> None:
    for name in (*registry.names("compressors"), *registry.names("backbones")):
        assert cli.main(["show", name]) == 0
    assert "see its file" not in capsys.readouterr().out


def test_tables(smoke: Any, capsys: Capture) -> None:
    assert cli.main(["tables", "runs/smoke"]) == 0
    shown = capsys.readouterr().out
    assert all(f"# {name}" in shown for name in ("Accuracy", "Resources", "Taxonomy", "Slices"))
    assert cli.main(["tables", "runs/smoke", "--table", "taxonomy", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("dataset,task,split,backbone,family,method")
    assert cli.main(["tables", "smoke", "--table", "taxonomy", "--only", "compressor=snapkv"]) == 0
    shown = capsys.readouterr().out
    assert "snapkv" in shown and "recent" not in shown
    assert cli.main(["tables", "runs/smoke", "--table", "papr"]) == 2
    assert capsys.readouterr().err == "malloc-bench: no table is named 'papr'. Did you mean 'paper'?\n"
    assert cli.main(["tables", "runs/smoke", "--format", "latex"]) == 0
    assert capsys.readouterr().out.count(r"\begin{table}") >= 6


def test_report(smoke: Any, capsys: Capture) -> None:
    assert cli.main(["report", "runs/smoke"]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert {"leaderboard.md", "results.parquet"} <= {path.name for path in written}
    assert all(path.is_file() for path in written)


def test_a_report_of_a_parquet_alone_leaves_it_as_it_is(smoke: Any, capsys: Capture) -> None:
    """As in results/, where reference runs are kept without their rows."""
    folder, _ = smoke
    results.to_parquet(folder)
    shutil.rmtree(folder / "rows")
    before = (folder / "results.parquet").read_bytes()
    for run in ("runs/smoke", "runs/smoke/results.parquet"):
        assert cli.main(["report", run]) == 0
    assert (folder / "results.parquet").read_bytes() == before
    assert "snapkv" in (folder / "leaderboard.md").read_text()


def test_env_names_the_machine(capsys: Capture) -> None:
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("torch", "threads", "load", "git_commit"))


def test_data(capsys: Capture, tmp_path: Path) -> None:
    assert cli.main(["data", "get", "synthetic", "--offline"]) == 0
    assert capsys.readouterr().out.startswith("synthetic: 300 users, 500 items, ")
    assert cli.main(["data", "verify", "synthetic"]) == 0
    assert capsys.readouterr().out == "synthetic: nothing is published\n"
    assert cli.main(["data", "stats", "synthetic", "--figure", str(tmp_path / "lengths.png")]) == 0
    shown = capsys.readouterr().out
    assert "length_p50" in shown and "repeat_rate" in shown and f"histogram of lengths: {tmp_path}" in shown
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["data", "list"]) == 0
    assert "1,000,209" in capsys.readouterr().out


def test_data_that_is_not_as_published_is_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("malloc_bench.data.verify", lambda name, offline: ["3 users where 4 are published"])
    assert cli.main(["data", "verify", "synthetic"]) == 1
    assert capsys.readouterr().out == "3 users where 4 are published\n"


@pytest.mark.parametrize("broken", [False, True])
def test_check(broken: bool, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def check() -> None:
        assert not broken, "too many bytes\nlong story"

    monkeypatch.setattr("malloc_bench.testing.part_checks", lambda cls: [check, lambda: None])
    assert cli.main(["check", "malloc_bench.compressors.windowing.recent:Recent"]) == int(broken)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{2 - broken} of 2 promises kept"
    assert len(lines) == 1 + broken
    assert all("AssertionError: too many bytes" in line for line in lines[:-1])


# ---- the whole way


def test_from_a_suite_to_a_leaderboard(capsys: Capture, monkeypatch: pytest.MonkeyPatch, reports: None) -> None:
    """As a user would, with the real runner, on the smoke suite with fewer epochs."""
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    suite = yaml.safe_load(load_suite("smoke").path.read_text())
    suite["training"]["epochs"], suite["measure"] = 1, {"latency": False}
    Path("mine.yaml").write_text(yaml.safe_dump(suite))
    assert cli.main(["run", "mine.yaml", "--dry-run"]) == 0
    assert "10 cells: 0 done, 10 to run" in capsys.readouterr().out
    assert not Path("runs").exists()

    started = time.monotonic()
    assert cli.main(["run", "mine.yaml"]) == 0
    assert time.monotonic() - started < 60
    shown = capsys.readouterr().out
    assert "10 ok, 0 skipped, 0 failed, 0 done before" in shown
    assert {path.name for path in Path("runs/smoke").iterdir()} >= {"leaderboard.md", "results.parquet", "figures"}
    assert "merge_adjacent + kivi(bits=2)" in shown
    before = {path: path.read_bytes() for path in Path("runs/smoke/rows").iterdir()}
    monkeypatch.setattr(runner, "write_report", lambda folder: [])  # once is enough

    assert cli.main(["run", "mine.yaml"]) == 0
    assert "0 ok, 0 skipped, 0 failed, 10 done before" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path("runs/smoke/rows").iterdir()} == before

    cell = min(path.stem for path in before)
    assert cli.main(["reproduce", "runs/smoke", cell[:12]]) == 0
    assert cli.main(["tables", "runs/smoke", "--table", "accuracy"]) == 0
    assert "snapkv(window=8)" in capsys.readouterr().out

    loaded = load_run("smoke")
    assert len(loaded.rows) == 10
    found = loaded.states({"compressor": "snapkv", "budget": "0.25"}, users=8)
    row = results.load_results("runs/smoke").filter(pl.col("compressor") == "snapkv").row(0, named=True)
    kept = dict(pl.read_parquet(Path("runs/smoke") / row["per_user"], columns=["user", "bytes"]).iter_rows())
    ids = loaded.split(loaded.cell(row["cell_id"])).dataset
    sizes = {int(each): int(size) for each, size in zip(found.prefill.users, found.state.nbytes())}
    rows = {int(each): i for i, each in enumerate(ids.user_ids)}
    assert {ids.original_user([rows[each]])[0]: size for each, size in sizes.items()}.items() <= kept.items()
    assert found.backbone.read(found.tokens, found.state).shape[0] == 8 and len(repr(found)) < 1000
    with pytest.raises(ValueError, match="rows have backbone=sasrec; give what is unique"):
        loaded.backbone({"backbone": "sasrec"})

    Path("mine.py").write_text(METHOD)
    assert cli.main(["compare", "mine.py:Newest", "--suite", "mine.yaml", "--against", "snapkv"]) == 0
    shown = capsys.readouterr().out
    assert "1 ok, 0 skipped, 0 failed, 3 done before" in shown  # the full state, no history, snapkv
    assert "newest" in shown
    assert "int8" not in shown
    assert "so this table cannot judge methods by it" in shown and "At equal bytes" not in shown  # 1 epoch of training


def test_the_installed_script_has_the_exit_code(tmp_path: Path) -> None:
    script = shutil.which("malloc-bench", path=str(Path(sys.executable).parent))
    if script is None:
        pytest.skip("the package is not installed here")
    done = subprocess.run([script, "rnu"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (
        2, "", "malloc-bench: No such command 'rnu'. Did you mean 'run'?\n",
    )  # fmt: skip


def test_a_comma_parts_labels_outside_of_brackets_only() -> None:
    nested = "auto(tests=3,candidates=fit_keys(rounds=30,which=top) + mxint)"
    assert pairs([f"compressor={nested}, seed=1"]) == {"compressor": [nested], "seed": ["1"]}
    assert pairs(["compressor=kivi(bits=2,tail=0),kivi(bits=4),h2o", "budget=1/8"]) == {
        "compressor": ["kivi(bits=2,tail=0)", "kivi(bits=4)", "h2o"], "budget": ["1/8"],
    }  # fmt: skip
