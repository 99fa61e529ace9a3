"""Shards of a suite, made one by one and merged, are the run."""

import json
from pathlib import Path

import pytest

from malloc_bench.cli import main
from malloc_bench.results import ResultsError, load_results, read_rows, write_row
from malloc_bench.run import merge as merging
from malloc_bench.run.folder import read_manifest
from malloc_bench.run.merge import merge
from malloc_bench.run.runner import one_row, run_suite
from malloc_bench.run.verify import verify

SUITE = """
name: tiny
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 30}}]
compressors: [full, none, recent, knorm, int8]
budgets: [0.5, 0.25]
training: {epochs: 1, batch_size: 64}
measure: {latency: false, flops: false}
"""
MOMENTS = ("created_at", "digest", "load", "train_seconds")


@pytest.fixture
def shards(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    suite = tmp_path / "tiny.yaml"
    suite.write_text(SUITE)
    for i in (1, 2, 3):
        run_suite(suite, tmp_path / f"part{i}", shard=(i, 3), quiet=True)
    run_suite(suite, tmp_path / "whole", quiet=True)
    return [tmp_path / f"part{i}" for i in (1, 2, 3)]


def test_merged_shards_are_the_run(shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Path] = []
    monkeypatch.setattr(merging, "write_report", reported.append)
    assert main(["merge", *map(str, shards), "--out", str(tmp_path / "merged")]) == 0
    got, want = read_rows(tmp_path / "merged" / "rows"), read_rows(tmp_path / "whole" / "rows")
    assert [row["cell_id"] for row in got] == [row["cell_id"] for row in want] and len(want) == 7
    for one, other in zip(got, want):
        assert one["bytes_mean"] == other["bytes_mean"] and one["ndcg@10"] == pytest.approx(other["ndcg@10"])
        assert (tmp_path / "merged" / one["per_user"]).exists()
    assert len(load_results(tmp_path / "merged")) == 7
    assert reported == [tmp_path / "merged"]
    again = run_suite(tmp_path / "tiny.yaml", tmp_path / "merged", quiet=True)
    assert (again.reused, again.ok) == (7, 0)


def test_what_is_committed_of_a_run_is_merged_and_reproduced(shards: list[Path], tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("results.parquet", "manifest.json"):
        (kept / name).write_bytes((shards[0] / name).read_bytes())
    whole = load_results(merge(shards, tmp_path / "joined"))
    some = merge([kept, *shards[1:]], tmp_path / "some")
    assert load_results(some).drop("hashes", "digest").equals(whole.drop("hashes", "digest"))
    assert verify(some).damaged == []  # values by user that were not kept are not missed beside the others'
    row = whole.filter(status="ok", compressor="recent").row(0, named=True)
    where = next(each for each in (kept, *shards[1:]) if row["cell_id"] in load_results(each)["cell_id"].to_list())
    assert one_row(where, row["cell_id"])["digest"] == row["digest"]


@pytest.mark.parametrize("how", [["run"], ["run", "--fresh"], ["run", "--dry-run"]])
def test_what_is_committed_of_a_run_is_not_overwritten(shards, tmp_path, how, capsys):
    kept = tmp_path / "kept"
    kept.mkdir()
    before = (shards[0] / "results.parquet").read_bytes()
    (kept / "results.parquet").write_bytes(before)
    assert main([how[0], str(tmp_path / "tiny.yaml"), *how[1:], "--out", str(kept)]) == 2
    said = capsys.readouterr().err
    assert "kept holds results.parquet and no rows" in said.replace("\n", "") and "merge" in said
    assert (kept / "results.parquet").read_bytes() == before
    merge([kept], kept)
    assert len(read_rows(kept / "rows")) == len(load_results(shards[0]))


def test_rows_of_another_suite_are_told(shards, tmp_path, caplog):
    (tmp_path / "other.yaml").write_text((tmp_path / "tiny.yaml").read_text().replace("name: tiny", "name: other"))
    run_suite(tmp_path / "other.yaml", shards[0], only={"compressor": "full"}, quiet=True)
    assert "holds a run of tiny: rows of other go beside its own" in caplog.text
    merge([*shards], tmp_path / "both")
    told = [(shards[0], ["tiny", "other"]), (shards[1], ["tiny"]), (tmp_path / "both", ["other", "tiny"])]
    for run, names in told:
        known = read_manifest(run)
        assert [each["name"] for each in known.get("suites", [known["suite"]])] == names
        assert known["suite"]["name"] == names[-1]


def test_what_two_runs_have_must_agree(shards: list[Path], tmp_path: Path) -> None:
    merge([tmp_path / "whole", *shards], tmp_path / "twice")
    row = {k: v for k, v in read_rows(shards[0] / "rows")[0].items() if k != "digest"}
    assert sum(row["bytes_by_part"].values()) == pytest.approx(row["bytes_mean"])
    write_row(shards[0] / "rows", {**row, "bytes_by_part": None})  # as an older version wrote it
    merge([tmp_path / "whole", *shards], tmp_path / "older")
    write_row(shards[0] / "rows", {**row, "ndcg@10": 0.9})
    with pytest.raises(ResultsError, match=r"other results for cell .*ndcg@10 is .* and 0.9"):
        merge([tmp_path / "whole", *shards], tmp_path / "other")
    assert not (tmp_path / "other" / "rows").exists()


def test_what_is_merged_into_a_run_takes_nothing_from_it(shards: list[Path], tmp_path: Path) -> None:
    into = merge(shards[:1], tmp_path / "into")
    mine = {row["cell_id"]: row for row in read_rows(into / "rows")}
    sessions = read_manifest(into)["sessions"]
    assert read_manifest(merge([*shards[:1], *shards[:1]], into))["sessions"] == sessions
    lost = {key: None if key.startswith(("ndcg", "delta", "per_user")) else value
            for key, value in next(iter(mine.values())).items() if key != "digest"}  # fmt: skip
    write_row(tmp_path / "failed" / "rows", {**lost, "status": "failed", "reason": "it took 601 s", "hashes": None})
    merge([tmp_path / "failed", shards[1]], into)
    found = {row["cell_id"]: row for row in read_rows(into / "rows")}
    assert mine.items() <= found.items() and len(found) == len(mine) + len(read_rows(shards[1] / "rows"))
    assert read_manifest(into)["sessions"][: len(sessions)] == sessions
    row = {**next(iter(mine.values())), "ndcg@10": 0.9}
    write_row(shards[0] / "rows", {key: value for key, value in row.items() if key != "digest"})
    with pytest.raises(ResultsError, match=r"part1 and .*into have other results for cell .*--out"):
        merge(shards, into)
    assert mine.items() <= {row["cell_id"]: row for row in read_rows(into / "rows")}.items()


def test_spoilt_files_and_empty_folders_are_refused(shards: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="nothing holds no rows"):
        merge([tmp_path / "nothing"], tmp_path / "out")
    next((shards[1] / "per_user").glob("*.parquet")).write_bytes(b"rotten")
    with pytest.raises(ResultsError, match="is not what was written"):
        merge(shards, tmp_path / "out")


def test_the_exit_code_says_that_a_row_was_left_out(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = next((shards[1] / "rows").glob("*.json"))
    spoilt.write_text(json.dumps({**json.loads(spoilt.read_text()), "n_users": 301}))
    asked = ["merge", *map(str, shards), "--out"]
    assert main([*asked, str(tmp_path / "some")]) == 1
    err = capsys.readouterr().err
    assert f"{spoilt}: its digest does not match" in err and "1 of 7 rows were left out, as warned above" in err
    assert len(read_rows(tmp_path / "some" / "rows")) == 6
    assert main([*asked, str(tmp_path / "all"), str(tmp_path / "whole")]) == 0  # another run has it
    assert main(["merge", str(shards[0]), "--out", str(shards[1])]) == 1  # it stays where it lies


def test_runs_of_spoilt_rows_alone_are_refused_in_a_line_that_names_them(tmp_path: Path, capsys) -> None:
    (tmp_path / "bad" / "rows").mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / "bad" / "rows" / f"{name}.json").write_text("{")
    assert main(["merge", str(tmp_path / "bad"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"malloc-bench: {tmp_path / 'bad'} has no row that is as written (a.json: not readable")
    assert err.endswith("run that suite again first\n") and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["3", "0/4", "5/4", "a/b", "1/0", "٣/٤", "³/4", "1/4\n"])
def test_a_shard_is_one_of_n(tmp_path: Path, shard: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(SUITE)
    assert main(["run", str(tmp_path / "tiny.yaml"), "--shard", shard, "--out", str(tmp_path / "x")]) == 2
    assert "expected I/N" in capsys.readouterr().err


def test_no_shard_is_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(SUITE)
    assert main(["run", str(tmp_path / "tiny.yaml"), "--shard", "1/8", "--out", str(tmp_path / "x")]) == 2
    assert "there are 7 cells, expected at most as many parts" in capsys.readouterr().err
