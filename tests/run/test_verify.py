"""Every kind of damage to a run's folder is found and named, and a folder in order is one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from malloc_bench.cli import main
from malloc_bench.results import cell_id, to_parquet, write_per_user, write_row
from malloc_bench.run import runner
from malloc_bench.run.folder import write_manifest
from malloc_bench.run.verify import sample, verify

SUITE = """
name: tiny
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 30}}]
compressors: [full, recent]
budgets: [0.5]
training: {epochs: 1, batch_size: 64}
measure: {latency: false, flops: false}
"""


def put(folder: Path, name: str, **values: object) -> str:
    cell = cell_id(name)
    path = f"per_user/{cell}.parquet"
    known = write_per_user(folder / path, {"user": np.arange(3), "overlap": np.ones(3)})
    files = {"hashes": {"files": {path: known}}, "per_user": path}
    named = {"dataset": "ml-100k", "task": "retrieval", "backbone": "sasrec", "compressor": name, "seed": 0}
    write_row(folder / "rows", {"cell_id": cell, **named, "status": "ok", "ndcg@10": 0.5, **files, **values})
    return cell


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("full", "h2o"):
        put(tmp_path, name)
    to_parquet(tmp_path)
    write_manifest(tmp_path, {"suite": {"name": "tiny"}})
    return tmp_path


def test_a_run_in_order_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == "2 rows, 4 files: all as written\n"


def test_a_parquet_alone_is_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in [*(run / "rows").iterdir(), *(run / "per_user").iterdir()]:
        path.unlink()
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out == "2 rows, 2 files, without per_user/ (2 files): all as written\n"


def test_a_manifest_that_is_gone_is_missed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "manifest.json").unlink()
    assert main(["verify", str(run)]) == 1
    assert "manifest.json: gone" in capsys.readouterr().out


def first(folder: Path) -> Path:
    return min(folder.iterdir())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


def revalue(path: Path) -> None:
    """Another number under the old digest."""
    known = pl.read_parquet_metadata(path)["digest"]
    pl.read_parquet(path).with_columns(pl.lit(0.6).alias("ndcg@10")).write_parquet(path, metadata={"digest": known})


ROW, USERS, PARQUET, MANIFEST = (
    lambda run: first(run / "rows"), lambda run: first(run / "per_user"), lambda run: run / "results.parquet",
    lambda run: run / "manifest.json",
)  # fmt: skip


@pytest.mark.parametrize(
    ("where", "how", "said"),
    [
        (ROW, truncate, "not readable"),
        (ROW, lambda path: path.write_text("[1]"), "not a row"),
        (ROW, lambda path: edit(path, **{"ndcg@10": 0.6}), "its digest does not match"),
        (ROW, lambda path: edit(path, **{"ndcg@10": "much"}), "expected a number from 0 to 1"),
        (ROW, lambda path: edit(path, schema_version=1), "schema version 1"),
        (ROW, lambda path: path.rename(path.with_stem("f" * 64)), "its name is not its cell id"),
        (ROW, Path.unlink, "gone (results.parquet has it)"),
        (USERS, flip, "not what was written"),
        (USERS, truncate, "not what was written"),
        (USERS, Path.unlink, "gone"),
        (PARQUET, revalue, "results.parquet: is not what was written"),
        (PARQUET, truncate, "results.parquet: cannot be read"),
        (MANIFEST, lambda path: edit(path, suite=None), "manifest.json: its digest does not match"),
        (MANIFEST, truncate, "manifest.json: not readable"),
    ],
)
def test_damage_is_found(
    run: Path, where: Callable, how: Callable, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = where(run)
    how(path)
    assert main(["verify", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("damaged: ") and said in lines[0]
    assert path.stem in lines[0] or path.stem in lines[1]  # a file under another name is also gone from its own
    assert lines[-1].endswith(" damaged")


def test_every_bit_of_a_row_counts(run: Path) -> None:
    path = first(run / "rows")
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert verify(run).damaged, place
    path.write_bytes(whole)
    assert not verify(run).damaged


def test_a_parquet_of_other_rows_is_told(run: Path) -> None:
    put(run, "h2o", **{"mrr": 0.1})
    (line,) = verify(run).damaged
    assert line.startswith("results.parquet: has another row than rows/")
    to_parquet(run)
    assert not verify(run).damaged


def test_no_folder_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_draw_is_of_ok_cells_and_the_seeds(run: Path) -> None:
    put(run, "tova", status="failed")
    ok = sorted([cell_id("full"), cell_id("h2o")])
    assert sorted(sample(run, 9)) == ok and len(sample(run, 1)) == 1
    assert sample(run, 2, seed=3) == sample(run, 2, seed=3)
    assert {sample(run, 1, seed=seed)[0] for seed in range(20)} == set(ok)
    to_parquet(run)
    shutil.rmtree(run / "rows")
    assert sorted(sample(run, 9)) == ok


def test_recompute_says_what_differs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = sample(run, 2)[1]
    monkeypatch.setattr(runner, "reproduce", lambda _, cell: ["mrr: 1 then, 2 now"] if cell == wrong else [])
    assert main(["verify", str(run), "--recompute", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "2 rows, 4 files: all as written",
        f"{sample(run, 2)[0][:12]}: reproduced",
        f"{wrong[:12]}: mrr: 1 then, 2 now",
    ]


def test_a_real_run_is_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    (tmp_path / "tiny.yaml").write_text(SUITE)
    runner.run_suite(tmp_path / "tiny.yaml", tmp_path / "run", quiet=True)
    assert main(["verify", str(tmp_path / "run"), "--recompute", "1", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 rows, ") and "all as written\n" in said and ": reproduced\n" in said
