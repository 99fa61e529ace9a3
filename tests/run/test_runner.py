"""Runs as a user makes them: resumed, killed, locked, failing, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from malloc_bench import registry
from malloc_bench.cli import main
from malloc_bench.compressors import TokenMethod, get_compressor
from malloc_bench.compressors.base import Compressor
from malloc_bench.evaluation import evaluate as evaluation
from malloc_bench.registry import register
from malloc_bench.report.leaderboard import to_markdown
from malloc_bench.results import ResultsError, load_results, read_rows, write_row
from malloc_bench.run import folder as run_folder
from malloc_bench.run import runner, session
from malloc_bench.run.folder import LockedError, locked
from malloc_bench.run.runner import compare, reproduce, run_suite
from malloc_bench.run.verify import verify
from malloc_bench.state import UserState
from malloc_bench.training import fit as training

SUITE = """
name: tiny
datasets: [synthetic]
tasks: [retrieval]
split: leave_one_out
backbones:
  - sasrec: {layers: 1, dim: 8, max_length: 30}
compressors: [full, recent, knorm, int8]
budgets: [0.25]
training: {epochs: 2, batch_size: 64}
measure: {latency: false, flops: false}
"""


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for the tests of a worker: the tiny backbone is trained once."""
    folder = tmp_path_factory.getbasetemp() / "home"
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(folder))
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture
def methods():
    """Names registered by a test are gone after it."""
    before = dict(registry._parts["compressors"])
    yield
    registry._parts["compressors"].clear()
    registry._parts["compressors"].update(before)


def rows_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "rows").glob("*.json")}


def in_process(code: str, *words: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, words)], env=os.environ, **options)


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.05)


def test_a_run_leaves_rows_and_derived_files_and_a_second_one_changes_nothing(
    suite: Path, tmp_path: Path, reports: None
) -> None:
    out = tmp_path / "run"
    first = run_suite(suite, out, quiet=True)
    assert (first.ok, first.failed, first.skipped, first.reused, first.exit_code) == (4, 0, 0, 0, 0)
    for name in ("results.parquet", "leaderboard.md", "leaderboard.csv", "leaderboard.tex", "manifest.json"):
        assert (out / name).stat().st_size > 0, name
    figures = {path.name.split("-synthetic")[0] for path in (out / "figures").glob("*.png")}
    assert figures == {"pareto", "bytes-by-part", "popularity"}
    assert len(list((out / "per_user").glob("*.parquet"))) == 4
    assert not (out / "partial").exists()
    before = rows_of(out)
    times = {path: path.stat().st_mtime_ns for path in (out / "rows").glob("*.json")}
    second = run_suite(suite, out, quiet=True)
    assert (second.ok, second.reused) == (0, 4)
    assert rows_of(out) == before
    assert times == {path: path.stat().st_mtime_ns for path in (out / "rows").glob("*.json")}


def test_rows_have_what_laws_are_fitted_to(suite: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "run", SUITE.replace("[full, recent, knorm, int8]", "[full, recent]")
    suite.write_text(text)
    run_suite(suite, out, quiet=True)
    assert {row["loss"] for row in read_rows(out / "rows")} == {None}
    suite.write_text(text.replace("flops: false}", "flops: false, loss: true}"))  # asked for later
    assert run_suite(suite, out, quiet=True).ok == 2
    full, recent = sorted(read_rows(out / "rows"), key=lambda row: row["compressor"])
    assert full["params_embedding"] == 8 * (500 + 1 + 31)  # items and places, width 8
    assert full["train_epochs"] == 2 and full["train_events"] > 10 * full["n_users"]
    assert 0 < full["loss"] < 20 and full["loss"] != recent["loss"]
    values = pl.read_parquet(out / full["per_user"])
    assert values["loss"].mean() == pytest.approx(full["loss"], rel=1e-6)
    assert (values.sort("rank")["loss"].head(20).mean() or 0) < (values.sort("rank")["loss"].tail(20).mean() or 0)
    assert reproduce(out, full["cell_id"]) == []


def test_a_generated_data_set_is_judged_by_its_ceilings(suite: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []
    plain = training.validation_ndcg
    monkeypatch.setattr(training, "validation_ndcg", lambda *a, **k: asked.append(k["filter_seen"]) or plain(*a, **k))
    suite.write_text(SUITE + "filter_seen: false\n")
    run_suite(suite, tmp_path / "run", quiet=True)
    rows = {row["compressor"]: row for row in read_rows(tmp_path / "run" / "rows")}
    assert set(asked) == {False}  # the best epoch is chosen as the test asks
    table = json.loads((tmp_path / "run" / "manifest.json").read_text())["ceilings"]["synthetic"]
    assert table["targets"] == 300
    for row in rows.values():
        assert row["cell"]["evaluation"] == {"filter_seen": False}
        for known in ("none", "full"):
            for name, (mean, _) in table[known].items():
                assert row[f"ceiling_{known}_{name}"] == pytest.approx(mean)
        assert row["ceiling_none_hr@10"] < row["ceiling_window_hr@10"] <= row["ceiling_full_hr@10"]
    windows = [rows[name]["ceiling_window_hr@10"] for name in ("recent", "full")]
    assert windows[0] < windows[1] < rows["full"]["ceiling_full_hr@10"]  # the state holds 29 events, histories more
    assert "HR@10 of its ceiling (%)" in to_markdown(load_results(tmp_path / "run"))


def test_rows_say_what_they_are(suite: Path, tmp_path: Path) -> None:
    run_suite(suite, tmp_path / "run", quiet=True)
    rows = {row["compressor"]: row for row in read_rows(tmp_path / "run" / "rows")}
    full, recent = rows["full"], rows["recent"]
    assert full["overlap@10"] == 1 and full["ratio"] == 1 and full["p_value"] is None and full["budget"] is None
    assert recent["bytes_full"] == full["bytes_mean"] and recent["ratio"] <= 0.25 + recent["share_at_floor"]
    assert recent["n_users"] == 300 and recent["read_ms_p50"] is None and recent["read_flops"] is None
    assert recent["delta_ndcg@10"] == pytest.approx(recent["ndcg@10"] - full["ndcg@10"])
    assert recent["delta_ndcg@10_lo"] <= recent["delta_ndcg@10"] <= recent["delta_ndcg@10_hi"]
    assert rows["int8"]["ratio"] < 0.4 and rows["int8"]["overlap@10"] > 0.9
    assert {row["hashes"]["checkpoint"] for row in rows.values()} == {full["hashes"]["checkpoint"]}
    assert set(recent["slices"]) >= {"<50"}
    assert recent["ceiling_full_hr@10"] is None  # seen items were filtered: the ceilings are of another question


def test_only_and_dry_run(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    plan = run_suite(suite, out, dry_run=True)
    assert len(plan.plan) == 4 and not any(each.done for each in plan.plan) and plan.estimate > 0
    assert not out.exists()
    assert run_suite(suite, out, only={"compressor": "knorm"}, quiet=True).ok == 1
    again = run_suite(suite, out, dry_run=True)
    assert [each.cell.compressor.name for each in again.plan if each.done] == ["knorm"]


def test_measuring_later_fills_in_what_was_not_measured(suite: Path, tmp_path: Path) -> None:
    only = {"compressor": "recent"}
    assert run_suite(suite, tmp_path / "run", only=only, quiet=True).ok == 1
    suite.write_text(SUITE.replace("latency: false, flops: false", "latency: true, flops: true, history: 20"))
    assert run_suite(suite, tmp_path / "run", only=only, quiet=True).ok == 1
    (row,) = read_rows(tmp_path / "run" / "rows")
    assert row["read_ms_p50"] > 0 and row["read_flops"] > 0 and row["peak_bytes"] > 0 and row["measured_history"] == 20
    assert run_suite(suite, tmp_path / "run", only=only, quiet=True).reused == 1
    suite.write_text(suite.read_text().replace("history: 20", "history: 30"))  # other times are wanted
    assert run_suite(suite, tmp_path / "run", only=only, quiet=True).ok == 1
    (row,) = read_rows(tmp_path / "run" / "rows")
    assert row["measured_history"] == 30
    suite.write_text(suite.read_text().replace(", history: 30", ""))  # any length of the data will do
    assert run_suite(suite, tmp_path / "run", only=only, quiet=True).reused == 1


def test_methods_of_ours_are_asked_about_one_untrained_backbone(
    suite: Path, tmp_path: Path, monkeypatch, methods
) -> None:
    """Somebody else's may change what it is asked about, and gets its own."""

    @register("theirs")
    @dataclass(frozen=True)
    class Theirs(Compressor):
        def supports(self, backbone):
            backbone.spoilt = True

        @property
        def takes_budget(self):
            return False

        def compress(self, prefill, budget=None, fitted=None):
            return prefill.state

    drawn: list[str] = []
    monkeypatch.setattr(session, "read_alone", lambda method: None)
    monkeypatch.setattr(
        session, "made", lambda cell, data, made=session.made: drawn.append(str(cell)) or made(cell, data)
    )
    suite.write_text(SUITE.replace("[full, recent", "[full, theirs, recent"))
    result = run_suite(suite, tmp_path / "run", quiet=True)
    assert result.ok == 5 and len(drawn) == 2, drawn


def test_fresh_runs_everything_again(suite: Path, tmp_path: Path) -> None:
    run_suite(suite, tmp_path / "run", quiet=True)
    assert run_suite(suite, tmp_path / "run", fresh=True, quiet=True).ok == 4


def test_a_kill_costs_one_chunk(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    code = """
        import sys, time
        from malloc_bench.evaluation import evaluate as evaluation
        from malloc_bench.run import folder as run_folder
        from malloc_bench.run import runner
        evaluation._USERS = 64
        save = run_folder.Chunks.save
        def slow(self, chunk, done):
            if chunk == 2:
                time.sleep(300)
            save(self, chunk, done)
        run_folder.Chunks.save = slow
        runner.run_suite(sys.argv[1], sys.argv[2], quiet=True)
    """
    process = in_process(code, suite, out)
    wait_for(lambda: len(list(out.glob("partial/*/*.npz"))) == 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob("rows/*.json"))
    paid = {path: path.read_bytes() for path in out.glob("partial/*/*.npz")}

    numbers: list[int] = []
    save = run_folder.Chunks.save

    def counted(self, chunk, done) -> None:
        numbers.append(chunk)
        assert all(path.read_bytes() == content for path, content in paid.items())
        save(self, chunk, done)

    monkeypatch.setattr(evaluation, "_USERS", 64)
    monkeypatch.setattr(run_folder.Chunks, "save", counted)
    result = run_suite(suite, out, quiet=True)
    assert result.ok == 4 and numbers == [2, 3, 4]
    monkeypatch.setattr(run_folder.Chunks, "save", save)
    run_suite(suite, tmp_path / "whole", quiet=True)
    once, resumed = ({row["cell_id"]: row for row in read_rows(f / "rows")} for f in (tmp_path / "whole", out))
    for each, row in once.items():
        assert {k: resumed[each][k] for k in row if k not in ("created_at", "digest")} == {
            k: v for k, v in row.items() if k not in ("created_at", "digest")
        }


def test_a_torn_chunk_is_computed_again(suite: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = run_folder.Chunks(tmp_path)
    store.save(0, {"a": {name: torch.zeros(3).numpy() for name in evaluation.SIZES}})
    whole = (tmp_path / "00000.npz").read_bytes()
    assert store.load(0).keys() == {"a"}
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        (tmp_path / "00000.npz").write_bytes(whole[:size])
        assert store.load(0) == {}
    assert "computed again" in caplog.text


def test_chunks_are_of_the_weights_that_they_were_read_from(tmp_path: Path) -> None:
    values = {name: torch.zeros(3).numpy() for name in evaluation.SIZES}
    run_folder.Chunks(tmp_path, {"": "plain", "b": "adapted"}).save(0, {"a": values, "b": values})
    found = [run_folder.Chunks(tmp_path, {"": plain, "b": own}).load(0).keys() for plain, own in (
        ("plain", "adapted"), ("again", "adapted"), ("plain", "again"))]  # fmt: skip
    assert found == [{"a", "b"}, {"b"}, {"a"}]
    (tmp_path / "00000.npz").rename(tmp_path / "00001.npz")
    assert run_folder.Chunks(tmp_path, {"": "plain", "b": "adapted"}).load(1) == {}  # of another chunk of users


def test_a_half_written_row_is_set_aside_and_computed_again(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_suite(suite, out, quiet=True)
    victim = sorted((out / "rows").glob("*.json"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    result = run_suite(suite, out, quiet=True)
    assert (result.ok, result.reused) == (1, 3)
    assert json.loads(victim.read_text())["status"] == "ok"
    assert list((out / "rows" / "quarantine").iterdir())


def test_a_killed_training_goes_on(suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = [tmp_path / "killed", tmp_path / "whole"]
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(homes[0]))
    code = """
        import sys, time
        from malloc_bench.training import fit as training
        from malloc_bench.run import runner
        score, calls = training.validation_ndcg, []
        def slow(*args, **settings):
            calls.append(1)
            if len(calls) == 2:
                time.sleep(300)
            return score(*args, **settings)
        training.validation_ndcg = slow
        runner.run_suite(sys.argv[1], sys.argv[2], quiet=True)
    """
    process = in_process(code, suite, tmp_path / "run")
    wait_for(lambda: list(homes[0].glob("checkpoints/*/resume.json")))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_suite(suite, tmp_path / "run", quiet=True).ok == 4
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(homes[1]))
    run_suite(suite, tmp_path / "other", quiet=True)
    weights = [next(home.glob("checkpoints/*/model.safetensors")).read_bytes() for home in homes]
    assert weights[0] == weights[1]


def test_two_runs_on_one_folder_the_second_is_told_who_has_it(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with locked(out), pytest.raises(LockedError, match=rf"pid {os.getpid()} on \S+"):
        run_suite(suite, out, quiet=True)
    assert run_suite(suite, out, quiet=True).ok == 4  # let go of, it is free


@pytest.mark.parametrize(("asks", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_being_asked_to_end_keeps_what_is_finished(suite: Path, tmp_path: Path, asks: int, code: int) -> None:
    out = tmp_path / "run"
    run_suite(suite, out, only={"compressor": "full"}, quiet=True)
    before = rows_of(out)
    script = """
        import sys, time
        from malloc_bench.evaluation import evaluate as evaluation
        from malloc_bench.cli.commands import main
        def slow(*args, **settings):
            open(sys.argv[2] + "/started", "w").close()
            time.sleep(300)
        evaluation._chunk = slow
        sys.exit(main(["run", sys.argv[1], "--out", sys.argv[2], "--quiet"]))
    """
    process = in_process(script, suite, out, stderr=subprocess.PIPE, text=True)
    wait_for((out / "started").exists)
    process.send_signal(asks)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in said
    assert rows_of(out) == before
    assert run_suite(suite, out, quiet=True).reused == 1


@dataclass(frozen=True)
class _Broken(Compressor):
    """Raises for users it does not like."""

    family = "eviction"
    paper = formula = stores = "a test"

    def compress(self, prefill, budget=None, fitted=None) -> UserState:
        raise RuntimeError("this method is broken")


@dataclass(frozen=True)
class _Greedy(TokenMethod):
    """Keeps twice what it may."""

    family = "windowing"
    paper = formula = stores = "a test"

    def layout(self, prefill):
        return get_compressor("recent").layout(prefill)

    def keep(self, prefill, k):
        return get_compressor("recent").keep(prefill, (2 * k).minimum(prefill.state.length.long()))


@dataclass(frozen=True)
class _Wordy(_Broken):
    """Says much, in several lines."""

    def compress(self, prefill, budget=None, fitted=None) -> UserState:
        raise RuntimeError("first\n  second\n\nValueError: not this\n" + "x" * 9999)


@dataclass(frozen=True)
class _Picky(_Broken):
    def supports(self, backbone) -> str:
        return "it has no taste for this backbone" if backbone.uses_times is False and backbone.n_items > 1 else None


def test_a_failing_cell_is_a_failed_row_and_the_others_go_on(suite: Path, tmp_path: Path, methods) -> None:
    register("broken")(_Broken)
    register("greedy")(_Greedy)
    register("picky")(_Picky)
    register("wordy")(_Wordy)
    suite.write_text(SUITE.replace("int8]", "int8, broken, greedy, picky, wordy]"))
    out = tmp_path / "run"
    result = run_suite(suite, out, quiet=True)
    assert (result.ok, result.failed, result.skipped, result.exit_code) == (4, 3, 1, 1)
    rows = {row["compressor"]: row for row in read_rows(out / "rows")}
    assert rows["broken"]["reason"] == "RuntimeError: this method is broken"
    assert "in compress" in rows["broken"]["traceback"] and rows["broken"]["ndcg@10"] is None
    assert "the budget allows" in rows["greedy"]["reason"]
    assert rows["wordy"]["reason"].startswith("RuntimeError: first second ValueError: not this xxx")
    assert len(rows["wordy"]["reason"]) == 500 and "first\n  second" in rows["wordy"]["traceback"]
    assert (rows["picky"]["status"], rows["picky"]["reason"]) == ("skipped", "it has no taste for this backbone")
    again = run_suite(suite, out, quiet=True)
    assert (again.ok, again.failed, again.skipped, again.reused) == (0, 3, 0, 5)  # failed cells are tried again


def test_a_backbone_that_cannot_be_trained_fails_its_cells(suite: Path, tmp_path: Path, monkeypatch) -> None:
    from malloc_bench.run import session

    def fails(*args, **kwargs):
        raise MemoryError("no room for the weights")

    monkeypatch.setattr(session, "fit", fails)
    result = run_suite(suite, tmp_path / "run", quiet=True)
    assert (result.ok, result.failed) == (0, 4)
    assert "no room" in read_rows(tmp_path / "run" / "rows")[0]["traceback"]


def test_a_backbone_that_reads_categories_needs_a_card_that_has_them(tmp_path: Path, monkeypatch) -> None:
    from malloc_bench.data.dataset import Dataset

    wants = "climber: {layers: 1, dim: 8, max_length: 30, blocks: 2, strategy: category}"
    text = SUITE.replace("sasrec: {layers: 1, dim: 8, max_length: 30}", wants).replace("false", "true")
    (tmp_path / "tiny.yaml").write_text(text)
    result = run_suite(tmp_path / "tiny.yaml", tmp_path / "without", quiet=True)
    assert (result.ok, result.failed) == (0, 4)
    reasons = {row["reason"] for row in read_rows(tmp_path / "without" / "rows")}
    assert reasons == {"ValueError: climber reads categories of items, and the card of synthetic has none"}
    monkeypatch.setattr(Dataset, "categories", property(lambda data: np.arange(data.n_items) % 3))
    result = run_suite(tmp_path / "tiny.yaml", tmp_path / "with", quiet=True)
    assert (result.ok, result.failed) == (4, 0)
    (weights,) = (tmp_path / "with" / "checkpoints").glob("*/model.safetensors")
    blocks = load_file(weights)["block_of"][1:].numpy()
    assert set(blocks) == {0, 1} and all(len(set(blocks[category::3])) == 1 for category in range(3))


def test_a_full_disk_is_one_clear_error_and_loses_nothing(suite: Path, tmp_path: Path, monkeypatch) -> None:
    import errno

    out = tmp_path / "run"
    run_suite(suite, out, only={"compressor": "full"}, quiet=True)
    before = rows_of(out)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match=r"No space left on device.*free some disk space"):
        run_suite(suite, out, quiet=True)
    monkeypatch.undo()
    assert rows_of(out) == before
    os.environ["MALLOC_BENCH_HOME"] = str(tmp_path / "home")


def test_rows_that_are_gone_again_are_said(suite: Path, tmp_path: Path, monkeypatch) -> None:
    out, write, written = tmp_path / "run", runner.Session._write, []

    def moving(session, each, columns) -> None:
        write(session, each, columns)
        written.append(each)
        if len(written) == 1:
            out.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patch:
        patch.setattr(runner.Session, "_write", moving)
        with pytest.raises(ResultsError, match="run: 1 of 4 rows are gone again: was it moved"):
            run_suite(suite, out, quiet=True)
    result = run_suite(suite, out, quiet=True)
    assert (result.ok, result.reused) == (1, 3)


@pytest.mark.parametrize("killed", [False, True])
def test_a_row_whose_files_were_moved_away_before_it_goes_too(killed, suite: Path, tmp_path: Path, monkeypatch) -> None:
    out, write, written = tmp_path / "run", session.write_row, []

    def moving(folder, row):
        if not written:
            out.rename(tmp_path / "elsewhere")
        written.append(row)
        return write(folder, row)

    with monkeypatch.context() as patch:
        patch.setattr(session, "write_row", moving)
        if killed:  # before all rows are looked at again
            patch.setattr(runner, "_check_there", lambda *given: sys.exit(1))
        why = {"match": "run: 1 of 4 rows are gone again: was it moved"} if not killed else {}
        with pytest.raises(SystemExit if killed else ResultsError, **why):
            run_suite(suite, out, quiet=True)
    result = run_suite(suite, out, quiet=True)
    assert (result.ok, result.reused) == (1, 3) and not verify(out).damaged


def test_a_folder_that_cannot_be_written_is_one_clear_error(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ResultsError, match=r"file.*--out"):
        run_suite(suite, tmp_path / "file", quiet=True)


def test_reproduce_says_when_the_weights_are_others(
    suite: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    run_suite(suite, out, quiet=True)
    row = next(row for row in read_rows(out / "rows") if row["compressor"] == "knorm")
    assert reproduce(out, row["cell_id"]) == [] and "other weights" not in caplog.text
    write_row(out / "rows", {**row, "hashes": {**row["hashes"], "weights": "0" * 64}})
    reproduce(out, row["cell_id"])
    assert f"other weights, {'0' * 12} then, {row['hashes']['weights'][:12]} now" in caplog.text


def test_reproduce_finds_no_difference_and_tells_ids_apart(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_suite(suite, out, quiet=True)
    rows = read_rows(out / "rows")
    row = next(row for row in rows if row["compressor"] == "knorm")
    assert reproduce(out, row["cell_id"][:12]) == []
    write_row(out / "rows", {**row, "hr@10": 0.9})
    assert reproduce(out, row["cell_id"]) == [f"hr@10: 0.9 then, {row['hr@10']} now"]
    with pytest.raises(ValueError, match="4 rows have an id that begins with ''"):
        reproduce(out, "")


MINE = """
from dataclasses import dataclass, replace
from malloc_bench import register
from malloc_bench.compressors import Eviction

@register("mine")
@dataclass(frozen=True)
class Mine(Eviction):
    family, paper, formula, stores = "eviction", "none", "score = |v|", "k events"

    def scores(self, prefill, layer):
        return prefill.values(layer).norm(dim=-1)
"""


def test_compare_runs_only_what_is_new_and_sees_a_changed_file(
    suite: Path, tmp_path: Path, methods, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    monkeypatch.setattr(runner, "broken_within", lambda *args: [])  # takes seconds
    run_suite(suite, quiet=True)
    first = compare("mine.py:Mine", suite, ["recent", "knorm"])
    assert (first.ok, first.reused) == (2, 3)  # and no history, which the suite does not ask for
    assert (compare("mine.py:Mine", suite, ["recent"]).ok, compare("mine.py:Mine", suite).reused) == (0, 3)
    Path("mine.py").write_text(MINE.replace("norm(dim=-1)", "norm(dim=-1).neg()"))
    changed = compare("mine.py:Mine", suite, ["recent"])
    assert (changed.ok, changed.reused) == (1, 3)
    rows = [row for row in read_rows(Path("runs/tiny/rows")) if row["compressor"] == "mine"]
    assert len(rows) == 2 and rows[0]["cell"] != rows[1]["cell"]
    with pytest.raises(ValueError, match="Did you mean 'recent'"):
        compare("mine.py:Mine", suite, ["recnt"])
    with pytest.raises(ValueError, match="no such file"):
        compare("nowhere.py:Mine", suite)
    with pytest.raises(ValueError, match="no compressor or backbone class 'Yours'"):
        compare("mine.py:Yours", suite)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def __init__(self, k): pass", "missing 1 required positional argument: 'k'"),
        ("def __init__(self): 1 / 0", "ZeroDivisionError: division by zero"),
        ("def __init__(self): raise SystemExit(3)", "SystemExit: 3"),
        ("scores = 5", "Can't instantiate abstract class"),
    ],
)
def test_a_class_that_cannot_be_made_is_one_line(suite, tmp_path, methods, monkeypatch, capsys, body, said) -> None:
    monkeypatch.chdir(tmp_path)
    base = "Compressor" if body.startswith("scores") else "Eviction"
    head = "from dataclasses import dataclass\nfrom malloc_bench.compressors import Compressor, Eviction\n"
    Path("odd.py").write_text(f"{head}@dataclass(frozen=True)\nclass Odd({base}):\n    family = ''\n    {body}\n")
    for words in (["compare", "odd.py:Odd", "--suite", str(suite)], ["check", "odd.py:Odd"]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith(f"malloc-bench: Odd of {tmp_path / 'odd.py'} cannot be made without parameters")
            and said in err
        )
        assert err.count("\n") == 1


def test_a_device_that_is_not_there(suite: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device 'cuda' is not there"):
        run_suite(suite, tmp_path / "run", device="cuda", quiet=True)


def test_both_tasks_in_one_run_with_the_split_that_the_data_allow(suite: Path, tmp_path: Path) -> None:
    """The synthetic world has times and no labels: temporal, and a sampled negative for each event."""
    both = "tasks: [retrieval, {ranking: {candidates: 8}}]"
    suite.write_text(SUITE.replace("tasks: [retrieval]", both).replace("split: leave_one_out\n", ""))
    result = run_suite(suite, tmp_path / "run", quiet=True)
    assert (result.ok, result.failed, result.skipped) == (8, 0, 0)
    rows = read_rows(tmp_path / "run" / "rows")
    assert {(row["task"], row["split"]) for row in rows} == {
        ("retrieval", "temporal"),
        ("ranking(negatives=1, candidates=8)", "temporal"),
    }
    assert len({row["hashes"]["checkpoint"] for row in rows}) == 2
    for row in rows:
        assert row["n_targets"] > row["n_users"] and row["state_between"] == "rebuilt"
        ranking = row["task"] != "retrieval"
        assert (row["gauc"] is not None) == (row["delta_auc"] is not None) == ranking == (row["hr@10"] is None)
        assert row["cell"]["split"] == {"temporal": {"valid": 0.1, "test": 0.1}}
    one = next(row["cell_id"] for row in rows if row["gauc"] and row["compressor"] == "knorm")
    assert reproduce(tmp_path / "run", one) == []
    assert run_suite(suite, tmp_path / "run", quiet=True).reused == 8
    text = to_markdown(load_results(tmp_path / "run"))
    assert "ΔGAUC" in text and "ΔNDCG@10" in text and "agreement" in text


def test_a_near_tie_of_one_user_is_reproduced_and_said(caplog):
    """Of 100 users one may turn; bytes, and what one lacks, may not differ at all."""
    row = {"n_users": 100, "mrr": 0.5, "ndcg@10": 0.2, "bytes_mean": 40.0, "gauc": None}
    again = {**row, "mrr": 0.5 + 2e-8, "ndcg@10": 0.22, "bytes_mean": 40.0001, "gauc": 0.5}
    found = runner.differing_values(row, again, list(row))
    assert [line.split(":")[0] for line in found] == ["ndcg@10", "bytes_mean", "gauc"]
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("a near tie was turned by rounding: mrr: 0.5 then")
