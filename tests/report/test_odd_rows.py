"""Rows that are what was written, by their digests, and hold what no row may: each is named in one line."""

from __future__ import annotations

import io
import json
import logging

import pytest

from malloc_bench.cli import main
from malloc_bench.files import DIGEST, ResultsError, atomic_write, digest, sealed
from malloc_bench.results import COLUMNS, SCHEMA_VERSION, budget_asked, frame, load_results, read_rows
from malloc_bench.results.labels import spelled

MEASURED = {
    "ndcg@10": 0.2,
    "delta_ndcg@10": 0.0,
    "bytes_mean": 100.0,
    "ratio": 1.0,
    "overlap@10": 1.0,
    "measured_history": 9,
}
ODD = [
    ("budget", "often", "budget is 'often', expected a share such as 0.25"),
    ("budget", [0.5], "budget is [0.5], expected a share"),
    ("budget", '{"slots":"many"}', "expected a share such as 0.25, or slots or bytes with a whole number"),
    ("compressor_params", [1, 2], "compressor_params is [1, 2], expected keys and values"),
    ("hashes", "abc", "hashes is 'abc', expected keys and values"),
    ("hashes", {"files": {"../../home/x": "1"}}, "a key of hashes.files is '../../home/x', expected a path below"),
    ("hashes", {"files": None}, "hashes.files is 'null', expected keys and values"),
    ("per_user", "/etc/passwd", "per_user is '/etc/passwd', expected a path below the run's folder"),
    ("slices", {"<50": 0.5}, "slices.<50 is 0.5, expected keys and values"),
    ("slices", {"<50": {"ndcg@10": "good"}}, "slices.<50.ndcg@10 is 'good', expected a number of at least 0"),
    ("requests", {"many": {}}, "a key of requests is 'many', expected a whole number"),
    ("requests", {"8": {"request_ms_p50": "fast"}}, "requests.8.request_ms_p50 is 'fast', expected a number"),
    ("ndcg@10", "0.2", "ndcg@10 is '0.2', expected a number from 0 to 1"),
    ("ndcg@10", None, "delta_ndcg@10 is 0.0, but ndcg@10 is missing"),
    ("bytes_mean", -1, "bytes_mean is -1, expected a number of at least 0"),
    ("bytes_mean", 1e300, "bytes_mean is 1e+300, expected a number of at least 0"),
    ("seed", 2**70, "expected a whole number of at least 0"),
    ("n_users", 0.5, "n_users is 0.5, expected a whole number"),
    ("status", "fine", "status 'fine' is none of ok, skipped, failed"),
    ("status", ["ok"], "status ['ok'] is none of"),
    ("dataset", None, "dataset is missing"),
    ("compressor", "\ud800", "compressor is '\\ud800', expected text"),
    ("structural", "no", "structural is 'no', expected true or false"),
    ("cell_id", 5, "no cell_id"),
]


def put(folder, row):
    """A row's file as a run writes it, whatever it holds."""
    whole = dict.fromkeys(COLUMNS) | row | {"schema_version": SCHEMA_VERSION}
    atomic_write(folder / "rows" / f"{row['cell_id']}.json", sealed(whole))


@pytest.mark.parametrize(("column", "value", "said"), ODD)
def test_an_odd_row_is_left_out_and_named(column, value, said, row, tmp_path, caplog):
    put(tmp_path, row(compressor="full", **MEASURED))
    put(tmp_path, row(compressor="odd", **MEASURED) | {column: value})
    with caplog.at_level(logging.WARNING):
        (good,) = read_rows(tmp_path / "rows", quarantine=False)
    (warned,) = [record.getMessage() for record in caplog.records]
    assert good["compressor"] == "full" and str(tmp_path / "rows") in warned
    assert said in warned and warned.endswith("(run its suite again to have it)") and "\n" not in warned


def test_a_number_that_is_none_hides_behind_no_missing_digest(row, tmp_path, caplog):
    text = sealed(dict.fromkeys(COLUMNS) | row(compressor="odd", cell={"x": 1.5}) | {"schema_version": SCHEMA_VERSION})
    odd = {**json.loads(text), "cell_id": "a", "cell": None, "versions": {"x": float("nan")}, DIGEST: None}
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.json").write_text(json.dumps(odd))
    assert read_rows(tmp_path / "rows", quarantine=False) == [] and "versions is {'x': nan}" in caplog.text


def written(rows, path):
    """A parquet as a run writes it."""
    buffer = io.BytesIO()
    rows.write_parquet(buffer, metadata={DIGEST: digest(rows.to_dict(as_series=False))})
    atomic_write(path, buffer.getvalue())


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("budget", "often", "budget is 'often', expected a share"),
        ("compressor_params", "[1]", "compressor_params is [1], expected keys and values"),
        ("hashes", "no json", "hashes is 'no json', expected keys and values"),
        ("bytes_mean", -1.0, "bytes_mean is -1.0, expected a number of at least 0"),
        ("status", "fine", "status 'fine' is none of"),
        ("overlap@10", 1.5, "overlap@10 is 1.5, expected a number from 0 to 1"),
        ("measured_history_long", 1, "measured_history_long is 1, less than measured_history"),
    ],
)
def test_a_parquet_with_an_odd_row_is_refused_and_named(column, value, said, row, tmp_path):
    rows = frame([row(compressor="full", **MEASURED), row(compressor="odd", **MEASURED)])
    odd = rows.with_columns(rows[column].scatter(1, value))
    written(odd, tmp_path / "results.parquet")
    with pytest.raises(ResultsError) as error:
        load_results(tmp_path)
    id_ = odd["cell_id"][1][:12]
    assert str(error.value).startswith(f"{tmp_path / 'results.parquet'}: row {id_}: {said}") and "again" in str(
        error.value
    )


def test_a_parquet_of_other_types_is_refused(row, tmp_path):
    rows = frame([row(compressor="full", **MEASURED)])
    written(rows.cast({"seed": str}), tmp_path / "results.parquet")
    with pytest.raises(ResultsError, match=r"results.parquet: column seed is String, expected Int64"):
        load_results(tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        ["leaderboard", "{}"], ["recommend", "{}"], ["tables", "{}", "--table", "accuracy"], ["verify", "{}"],
        ["compare", "{}", "{}"], ["reproduce", "{}", "compressor=gone"], ["site", "{}", "--out", "{}/site"],
        ["plan", "{}", "--users", "1", "--events", "9", "--requests-per-second", "1", "--appends-per-second", "1"],
        ["merge", "{}", "--out", "{}/out"],
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_every_command_names_an_odd_row_and_goes_on(command, row, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("malloc_bench.report.figures.write_figures", lambda *_: [])
    put(tmp_path, row(compressor="full", **MEASURED))
    put(tmp_path, odd := row(compressor="odd", **MEASURED) | {"slices": {"<50": 0.5}})
    assert main([word.format(tmp_path) for word in command]) in (0, 1, 2)
    out, err = capsys.readouterr()
    assert f"{odd['cell_id']}.json: slices.<50 is 0.5, expected keys and values" in out + err
    assert "Traceback" not in out + err


def test_what_a_row_may_lack_costs_no_table(row, tmp_path, capsys):
    """No family, no split, no date, and a size of next to nothing."""
    for name in ("full", "h2o"):
        put(tmp_path, row(compressor=name, split=None, created_at=None, **MEASURED | {"bytes_mean": 5e-324}))
    put(tmp_path, row(compressor="svd", split=None, status="skipped", reason="a\nb"))
    for words in (["leaderboard"], ["tables", "--format", "latex"], ["tables"], ["compare", "{}"]):
        command, *more = words
        assert main([command, str(tmp_path), *(word.format(tmp_path) for word in more)]) == 0
    out = capsys.readouterr().out
    assert "ml-1m · retrieval · sasrec (6,040 users)" in out and "None" not in out


def test_a_budget_is_asked_for_in_any_way_of_writing_it():
    for text in ("0.5", "50%", "50 %", "0.50", "1/2", ".5", "5e-1"):
        assert budget_asked(text) == "50 %", text
    assert [budget_asked(text) for text in ("1/8", "12.5%", "0.125")] == ["12.5 %"] * 3
    assert [budget_asked(text) for text in ('{"slots":16}', "16 slots", "none", "1/0", "x")] == [
        "16 slots", "16 slots", "none", "1/0", "x",
    ]  # fmt: skip
    assert budget_asked("1e999") == "1e999"  # no number


def test_labels_are_spelled_alike_whatever_the_order_and_however_deep():
    assert spelled("a(b=c(d=1,e=2),f=3)") == spelled("a( f=3, b=c(e=2,d=1))") != spelled("a(b=c(d=2,e=1),f=3)")
    assert spelled("a(x=[1, 2],b=0)") == spelled("a(b=0,x=[1,2])") != spelled("a(b=0,x=[2,1])")
