import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench import files, results
from malloc_bench.results import ResultsError, atomic_write, budget_text, canonical_json, cell_id, read_rows, write_row

ID = cell_id({"dataset": "ml-100k"})
NAMED = {"dataset": "ml-100k", "task": "retrieval", "backbone": "sasrec", "compressor": "h2o", "seed": 0}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def a_row(**values):
    return {"cell_id": ID, "status": "ok", **NAMED, "ndcg@10": 0.1} | values


def backwards(value):
    """The same value with every mapping's keys in the other order."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


@given(VALUES)
def test_identity_does_not_depend_on_key_order(value):
    assert canonical_json(value) == canonical_json(backwards(value))
    assert cell_id(value) == cell_id(backwards(value))


@given(VALUES)
def test_canonical_json_says_the_value(value):
    text = canonical_json(value)
    assert json.loads(text) == value and text.isascii()
    assert canonical_json(json.loads(text)) == text


def test_canonical_json_is_pinned():
    """A change here would make every finished cell of every run unknown."""
    payload = {"b": (1, 2.0), "a": {"é": np.float64(0.5), "n": np.int64(3)}}
    assert canonical_json(payload) == '{"a":{"n":3,"\\u00e9":0.5},"b":[1,2.0]}'
    assert ID == "7afac55af4a740056dd38213696c5c2374826aefe7cae3370f0c39df0091c1cc"


@pytest.mark.parametrize("value", [float("nan"), {"x": float("inf")}, np.array([np.nan])])
def test_identity_refuses_what_json_cannot_say(value):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(value)


def test_budget_text():
    assert [budget_text(b) for b in (None, 0.25, 1, {"slots": 16})] == [None, "0.25", "1.0", '{"slots":16}']


def test_rewrite_is_byte_identical(tmp_path):
    path = write_row(tmp_path, a_row(versions={"b": "1", "a": "2"}))
    first = path.read_bytes()
    write_row(tmp_path, backwards(a_row(versions={"a": "2", "b": "1"})))
    assert path.read_bytes() == first
    assert path.name == f"{ID}.json" and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_row_round_trip_has_every_column_and_null_for_what_does_not_apply(tmp_path):
    write_row(tmp_path, a_row(auc=float("nan"), n_users=np.int64(943), slices={"<50": {"ndcg@10": np.nan}}))
    (row,) = read_rows(tmp_path)
    assert set(row) == set(results.COLUMNS)
    assert row["auc"] is None and row["logloss"] is None and row["n_users"] == 943
    assert row["slices"] == {"<50": {"ndcg@10": None}} and row["schema_version"] == results.SCHEMA_VERSION


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hr10": 0.1}, "no column 'hr10'. Did you mean 'hr@10'"),
        ({"status": "fine"}, "status 'fine' is none of ok, skipped, failed"),
        ({"cell_id": None}, "no cell_id"),
        ({"mrr": "0.2"}, "mrr is '0.2', expected a number from 0 to 1"),
        ({"seed": True}, "seed is True, expected a whole number"),
    ],
)
def test_bad_rows_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        write_row(tmp_path, a_row(**values))
    assert not list(tmp_path.iterdir())


def test_broken_files_are_quarantined_with_a_warning(tmp_path, caplog):
    good = write_row(tmp_path, a_row())
    whole = good.read_text()
    broken = {
        "half": whole[:200],
        "empty": "",
        "list": "[]",
        "old": whole.replace('"schema_version": 2', '"schema_version": 1'),
        "changed": whole.replace('"ndcg@10": 0.1', '"ndcg@10": 0.2'),
        "unsealed": whole.replace('"digest": "', '"digest": "0'),
        "nan": whole.replace('"ndcg@10": 0.1', '"ndcg@10": NaN'),
        "renamed": whole,
        "type": whole.replace('"ndcg@10": 0.1', '"ndcg@10": "much"').replace(ID, "type"),
    }
    for name, text in broken.items():
        (tmp_path / f"{name}.json").write_text(text)
    assert len(read_rows(tmp_path, quarantine=False)) == 1 and (tmp_path / "half.json").exists()
    caplog.clear()
    assert [row["cell_id"] for row in read_rows(tmp_path)] == [ID]
    assert {path.stem for path in (tmp_path / "quarantine").iterdir()} == set(broken)
    assert len(caplog.records) == len(broken) and "schema version 1, this is 2" in caplog.text
    assert len(read_rows(tmp_path)) == 1 and len(caplog.records) == len(broken)


def test_a_row_is_that_of_its_cell(tmp_path):
    cell = {"dataset": "ml-100k"}
    write_row(tmp_path, a_row(cell=cell))
    with pytest.raises(ValueError, match="its cell_id is not that of its cell"):
        write_row(tmp_path, a_row(cell={**cell, "seed": 1}))
    assert len(read_rows(tmp_path)) == 1


def test_a_row_that_lacks_a_newer_column_is_read(tmp_path):
    path = write_row(tmp_path, a_row())
    row = json.loads(path.read_text())
    del row["amp"]
    path.write_bytes(files.sealed(row))
    assert read_rows(tmp_path)[0]["amp"] is None


def test_sealed_files_say_when_they_are_not_what_was_written(tmp_path):
    path = tmp_path / "a.json"
    content = {"b": [1, 2.5, None], "a": {"x": "é", "nan": float("nan")}}
    atomic_write(path, files.sealed(content))
    assert files.read_sealed(path) == {"b": [1, 2.5, None], "a": {"x": "é", "nan": None}}
    whole = path.read_bytes()
    for text in (b"", whole[:40], b"[]", b"[" * 100_000, whole.replace(b"2.5", b"2.6"), b"{}", b"\xff" + whole):
        path.write_bytes(text)
        with pytest.raises(files.Damaged):
            files.read_sealed(path)
    with pytest.raises(FileNotFoundError):
        files.read_sealed(tmp_path / "nothing")
    with pytest.raises(files.Damaged):
        files.read_sealed(tmp_path)


def test_the_advice_names_what_chooses_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    (tmp_path / "home").write_text("no folder")
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(ResultsError, match=r"choose a folder, not a file \(MALLOC_BENCH_HOME\)"):
        atomic_write(tmp_path / "home" / "checkpoints" / "x", b"")
    with pytest.raises(ResultsError, match=r"choose a folder, not a file \(--out\)"):
        atomic_write(tmp_path / "run" / "x", b"")


def test_temporary_files_of_killed_writers_are_ignored_and_cleaned(tmp_path):
    write_row(tmp_path, a_row())
    leftover = tmp_path / f".{ID}.json.123-abcd.tmp"
    leftover.write_text('{"cell_id": "')
    assert len(read_rows(tmp_path)) == 1 and leftover.exists()
    assert results.remove_leftovers(tmp_path) == 1 and not leftover.exists()
    assert len(read_rows(tmp_path)) == 1


def test_kill_9_leaves_whole_rows_only(tmp_path):
    code = (
        "import sys; from malloc_bench.results import write_row\n"
        "for i in range(10**6):\n"
        f"    write_row(sys.argv[1], {NAMED} | {{'cell_id': f'{{i % 50:064x}}', 'status': 'ok', 'reason': 'x' * i}})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, tmp_path], env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    while len(list(tmp_path.glob("*.json"))) < 20:
        assert writer.poll() is None
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(read_rows(tmp_path)) >= 20 and not (tmp_path / "quarantine").exists()


def fails_with(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("code", "advice"),
    [(errno.ENOSPC, "free some disk space"), (errno.EDQUOT, "quota"), (errno.EIO, "check the disk")],
)
def test_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, code, advice):
    path = write_row(tmp_path, a_row())
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", fails_with(code))
    with pytest.raises(ResultsError) as caught:
        write_row(tmp_path, a_row(mrr=0.5))
    text = str(caught.value)
    assert str(path) in text and os.strerror(code) in text and advice in text and "\n" not in text
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_write_that_the_system_cuts_short(tmp_path):
    """A real failed write, not a patched one: the kernel refuses files above 4 KB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ResultsError, match="File too large"):
            atomic_write(tmp_path / "big", b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(ResultsError, match="Permission denied; choose a folder you may write to"):
        write_row(tmp_path, a_row())
    tmp_path.chmod(0o755)


def test_folder_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "open", fails_with(errno.EACCES))
    with pytest.raises(ResultsError, match="Permission denied; choose a folder you may write to"):
        write_row(tmp_path / "rows", a_row())


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "rows").write_text("")
    with pytest.raises(ResultsError, match="choose a folder, not a file"):
        write_row(tmp_path / "rows", a_row())


def test_parquet_has_stable_columns_and_types_even_when_all_is_null(tmp_path):
    write_row(tmp_path / "rows", a_row(status="skipped", reason="no heads"))
    empty = results.frame([]).schema
    found = pl.read_parquet(results.to_parquet(tmp_path)).schema
    assert found == empty and list(found) == list(results.COLUMNS)
    assert found["ndcg@10"] == pl.Float64 and found["seed"] == pl.Int64 and found["slices"] == pl.String


def test_parquet_round_trip(tmp_path):
    params = {"bits": 2, "chain": ["a", {"b": 1}]}
    write_row(
        tmp_path / "rows", a_row(compressor_params=params, structural=False, bytes_mean=3, budget=budget_text(0.5))
    )
    path = results.to_parquet(tmp_path)
    loaded = results.load_results(tmp_path)
    assert loaded.equals(pl.read_parquet(path), null_equal=True)
    one = loaded.row(0, named=True)
    assert json.loads(one["compressor_params"]) == params and one["bytes_mean"] == 3.0 and one["budget"] == "0.5"
    (tmp_path / "rows" / f"{ID}.json").unlink()
    assert results.load_results(tmp_path).equals(loaded)  # a folder that kept the parquet only
    assert results.load_results(tmp_path / "results.parquet").equals(loaded)


def test_a_folder_whose_name_is_not_utf_8_is_read(tmp_path):
    """polars takes no such path."""
    folder = tmp_path / os.fsdecode(b"p\xe9q")
    write_row(folder / "rows", a_row())
    assert results.read_parquet(results.to_parquet(folder))["cell_id"].to_list() == [ID]
    results.write_per_user(folder / "values.parquet", {"user": np.arange(3)})
    for path in (folder / "values.parquet", tmp_path / "plain.parquet"):
        (tmp_path / "plain.parquet").write_bytes((folder / "values.parquet").read_bytes())
        assert pl.read_parquet(files.for_polars(path))["user"].to_list() == [0, 1, 2]


def test_a_parquet_that_is_not_what_was_written_is_refused(tmp_path):
    write_row(tmp_path / "rows", a_row())
    path = results.to_parquet(tmp_path)
    (tmp_path / "rows" / f"{ID}.json").unlink()
    whole = path.read_bytes()
    good = results.load_results(tmp_path)
    pl.read_parquet(path).with_columns(pl.lit(0.2).alias("ndcg@10")).write_parquet(path)
    with pytest.raises(ResultsError, match=r"is not what was written"):
        results.load_results(tmp_path)
    for cut in (0, 100, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(ResultsError, match=r"results.parquet cannot be read"):
            results.load_results(tmp_path)
    path.write_bytes(whole)
    assert results.load_results(tmp_path).equals(good)


def test_a_parquet_of_the_first_schema_version_is_read(tmp_path):
    """It had no digest, and fewer columns."""
    write_row(tmp_path / "rows", a_row())
    path = results.to_parquet(tmp_path)
    (tmp_path / "rows" / f"{ID}.json").unlink()
    old = pl.read_parquet(path).drop("amp", "digest").with_columns(pl.lit(1, pl.Int64).alias("schema_version"))
    old.write_parquet(path)
    found = results.load_results(tmp_path)
    assert found["ndcg@10"][0] == 0.1 and found["amp"][0] is None and set(found.columns) == set(results.COLUMNS)


def test_files_of_a_row_are_told_from_others(tmp_path):
    known = results.write_per_user(tmp_path / "per_user" / "x.parquet", {"rank": np.arange(5)})
    row = a_row(hashes={"files": {"per_user/x.parquet": known}})
    assert results.spoilt(tmp_path, row) is None and results.spoilt(tmp_path, a_row(hashes=None)) is None
    results.write_per_user(tmp_path / "per_user" / "x.parquet", {"rank": np.arange(5) + 1})
    assert results.spoilt(tmp_path, row) == "per_user/x.parquet"
    (tmp_path / "per_user" / "x.parquet").unlink()
    assert results.spoilt(tmp_path, row) is None  # sent without it


def test_loading_changes_nothing_and_needs_results(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no results"):
        results.load_results(tmp_path)
    (tmp_path / "rows" / "bad.json").write_text("{")
    assert results.load_results(tmp_path).is_empty() and (tmp_path / "rows" / "bad.json").exists()


def test_per_user_values(tmp_path):
    columns = {"rank": np.arange(5), "top": np.arange(10).reshape(5, 2), "ndcg@10": np.linspace(0, 1, 5)}
    results.write_per_user(tmp_path / "per_user" / "x.parquet", columns)
    loaded = pl.read_parquet(tmp_path / "per_user" / "x.parquet")
    for name, values in columns.items():
        np.testing.assert_array_equal(loaded[name].to_numpy(), values)


def test_of_one_cell_by_several_versions_the_newest_is_shown(tmp_path, caplog):
    def put(budget=0.5, **versions):
        parts = {name: {"name": name, "version": version} for name, version in versions.items()}
        cell = {"budget": budget, "parts": [parts]}
        return write_row(tmp_path / "rows", a_row(cell=cell, cell_id=cell_id(cell))).stem

    old, new, other = put(h2o=1, sasrec=1), put(h2o=2, sasrec=1), put(0.25, h2o=1, sasrec=1)
    assert set(results.load_results(tmp_path)["cell_id"]) == {new, other}
    assert "1 rows by older versions are not shown" in caplog.text
    assert {row["cell_id"] for row in read_rows(tmp_path / "rows")} == {old, new, other}  # kept all the same
    results.to_parquet(tmp_path)
    assert set(results.read_parquet(tmp_path / "results.parquet")["cell_id"]) == {new, other}
    mixed = put(h2o=1, sasrec=2)  # neither is the newer
    assert set(results.load_results(tmp_path)["cell_id"]) == {new, other, mixed}
