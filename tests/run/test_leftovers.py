"""What killed runs and full disks leave behind does not stay; a cache that cannot be written says what chooses it."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from malloc_bench.data import get_dataset
from malloc_bench.files import ResultsError
from malloc_bench.report import write_report
from malloc_bench.run.folder import remove_dead
from malloc_bench.run.runner import compare, run_suite
from malloc_bench.suite.plan import checkpoint_folder
from malloc_bench.suite.suite import load_suite

SUITE = """
name: tiny
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 12}}]
compressors: [full, recent]
budgets: [0.25]
training: {epochs: 1, batch_size: 128}
measure: {latency: false, flops: false}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(SUITE)
    return path


def test_temporary_files_are_removed_where_only_the_run_writes(tmp_path: Path) -> None:
    mine = [tmp_path / place / f".x.1-{place[:3]}.tmp" for place in ("rows", "per_user", "latency", "partial/k")]
    mine += [tmp_path / "checkpoints" / "k" / name for name in (".fit.json.1-a.tmp", "model.safetensors.ab12.part")]
    mine += [tmp_path / "set_up"]
    shared = [tmp_path / ".leaderboard.md.1-a.tmp", tmp_path / "figures" / ".a.png.1-b.tmp"]
    kept = [tmp_path / "rows" / "a.json", tmp_path / "figures" / "a.png"]
    for path in (*mine, *shared, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    remove_dead(tmp_path)
    assert [path for path in mine if path.exists()] == [] and all(path.exists() for path in (*shared, *kept))
    for path in shared:  # a report that is being written is younger
        os.utime(path, (time.time() - 4000,) * 2)
    remove_dead(tmp_path)
    assert not any(path.exists() for path in shared) and all(path.exists() for path in kept)


def test_chunks_of_groups_that_the_suite_no_longer_has_are_removed(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (cell, *_) = load_suite(suite).cells()
    needed = checkpoint_folder(cell.settled(get_dataset("synthetic"))).name
    for key in (needed, "synthetic-sasrec-0123456789abcdef"):
        (out / "partial" / key).mkdir(parents=True)
    run_suite(suite, out, only={"compressor": "recent"}, quiet=True)
    assert [path.name for path in (out / "partial").iterdir()] == ["synthetic-sasrec-0123456789abcdef"]
    run_suite(suite, out, quiet=True)
    assert not (out / "partial").exists()


def test_a_comparison_keeps_the_chunks_of_the_suite_itself(suite: Path, tmp_path: Path) -> None:
    run_suite(suite, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "partial" / "other").mkdir(parents=True)
    assert compare("malloc_bench.compressors.windowing.recent:Recent", suite, out=tmp_path / "run").reused == 2
    assert (tmp_path / "run" / "partial" / "other").exists()


def test_halves_in_the_cache_are_removed_and_an_empty_copy_is_made_whole(
    suite: Path, tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_suite(suite, tmp_path / "run", quiet=True)
    (cached,) = (home / "checkpoints").iterdir()
    (cached / ".model.safetensors.1-a.tmp").write_text("half")
    copied = tmp_path / "run" / "checkpoints" / cached.name / "fit.json"
    copied.write_bytes(b"")  # as a full disk leaves it
    assert run_suite(suite, tmp_path / "run", fresh=True, quiet=True).ok == 2
    assert copied.read_bytes() == (cached / "fit.json").read_bytes()
    assert {path.name for path in cached.iterdir()} == {"fit.json", "model.safetensors", "lock"}
    assert len(caplog.records) == 1 and "are made again" in caplog.text


def test_weights_come_back_from_the_run_to_a_lost_cache(
    suite: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained again elsewhere they could be others than those of the rows that are there."""
    run_suite(suite, tmp_path / "run", only={"compressor": "full"}, quiet=True)
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "other"))
    monkeypatch.setattr("malloc_bench.training.fit.training_batches", lambda *args: pytest.fail("trained again"))
    assert run_suite(suite, tmp_path / "run", quiet=True).ok == 1
    (one,), (two,) = (each.glob("checkpoints/*/model.safetensors") for each in (home, tmp_path / "other"))
    assert one.read_bytes() == two.read_bytes()


def test_a_cache_that_cannot_be_written_names_its_variable(suite: Path, tmp_path: Path, home: Path) -> None:
    home.write_text("no folder")
    with pytest.raises(ResultsError, match=r"choose a folder, not a file \(MALLOC_BENCH_HOME\)"):
        run_suite(suite, tmp_path / "run", quiet=True)


def test_a_full_cache_names_its_variable(
    suite: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = os.fsync

    def full(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to(home.resolve()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match=r"No space left on device; free some disk space \(MALLOC_BENCH_HOME\)"):
        run_suite(suite, tmp_path / "run", quiet=True)
    monkeypatch.setattr(os, "fsync", inner)
    assert run_suite(suite, tmp_path / "run", quiet=True).ok == 2


def test_a_report_names_what_is_not_what_was_written(
    suite: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_suite(suite, tmp_path / "run", quiet=True)
    write_report(tmp_path / "run")
    assert not caplog.records
    spoilt = next((tmp_path / "run" / "per_user").iterdir())
    spoilt.write_bytes(spoilt.read_bytes()[:-1] + b"X")
    write_report(tmp_path / "run")
    assert [record.getMessage().startswith(f"{spoilt} is not what") for record in caplog.records] == [True]
    assert run_suite(suite, tmp_path / "run", quiet=True).ok == 1  # made anew
