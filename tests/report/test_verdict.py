"""A method against others, by hand: paired differences, areas between curves, sentences, and two runs."""

import json

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from malloc_bench.report.two_runs import print_two_runs, two_runs
from malloc_bench.report.verdict import print_verdict, sentences, verdict
from malloc_bench.results import cell_id, write_row

USERS = 120


def made(row, name, budget, kb, values, with_users, **more):
    measured = {"bytes_mean": kb * 1e3, "ratio": kb / 100, "ndcg@10": 0.1, "read_ms_p50": 1.0}
    one = row(family="eviction", compressor=name, budget=budget, **measured, **more)
    return with_users(one, values, rank=np.where(values > 0.5, 0, 20), length=np.where(np.arange(USERS) < 90, 10, 60))


@pytest.fixture
def rows(row, with_users):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.2, 0.8, USERS)
    put = [
        ("mine", 0.25, 25, base + 0.1), ("mine", 0.0625, 6, base),
        ("other", 0.25, 25, base), ("other", 0.0625, 6, base - 0.04),
        ("alike", 0.25, 25, base + 0.1 + rng.normal(0, 0.05, USERS)),
        ("alike", 0.0625, 6, base + rng.normal(0, 0.05, USERS)),
        ("coded", None, 12, base + 0.2), ("large", None, 80, base), ("none", None, 0.001, base - 0.2),
    ]  # fmt: skip
    return [made(row, *each, with_users) for each in put]


def test_pairs_by_hand(rows, board_of, tmp_path):
    found = verdict(board_of(rows), tmp_path, "mine", ["other", "coded", "none", "large", "alike"])
    at = {(each["against"], each["budget"]): each for each in found.iter_rows(named=True)}
    assert at["other", "25 %"]["alike"] == pytest.approx(0.1, abs=1e-6)
    assert at["other", "6.25 %"]["alike"] == pytest.approx(0.04, abs=1e-6)
    one = at["other", "25 %"]
    assert (one["wins"], one["losses"], one["users"]) == (USERS, 0, USERS)
    assert one["by_length"] == "<50: 90/0; 50-199: 30/0"
    assert one["alike_lo"] <= one["alike"] <= one["alike_hi"] and one["p_holm"] < 0.001
    share = np.log(12 / 6) / np.log(25 / 6)  # of the way from the smaller budget to the larger, in log bytes
    assert at["coded", None]["alike"] == pytest.approx(0.1 * share - 0.2, abs=1e-6)
    assert at["none", None]["alike"] == pytest.approx(0.2, abs=1e-6)  # beside the smallest state
    assert ("large", None) not in at  # no state of mine is as large
    assert at["other", "all"]["alike"] == pytest.approx((0.1 + 0.04) / 2, abs=1e-6)  # linear in log bytes between two
    assert at["alike", "25 %"]["p_holm"] > 0.05
    ranks = {
        name: np.where(np.asarray(v) > 0.5, 1.0, 0.0)
        for name, v in (("a", _overlap(rows[0], tmp_path)), ("b", _overlap(rows[2], tmp_path)))
    }
    assert one["main"] == pytest.approx((ranks["a"] - ranks["b"]).mean())


def _overlap(row, folder):
    return pl.read_parquet(folder / row["per_user"])["overlap"].to_numpy()


def test_areas_are_taken_where_both_have_states(row, board_of, with_users, tmp_path):
    flat = np.linspace(0.2, 0.6, USERS)
    mine = [(0.5, 64, flat + 0.3), (0.25, 16, flat + 0.2), (0.125, 4, flat + 0.1)]
    theirs = [(0.25, 32, flat + 0.1), (0.0625, 1, flat)]
    rows = [made(row, name, *each, with_users) for name, states in (("mine", mine), ("b", theirs)) for each in states]
    found = verdict(board_of(rows), tmp_path, "mine", ["b"]).filter(pl.col("budget") == "all")
    xs = np.linspace(np.log(4), np.log(32), 100_001)
    of_mine = np.interp(xs, np.log([4, 16, 64]), [0.1, 0.2, 0.3])
    of_b = np.interp(xs, np.log([1, 32]), [0, 0.1])
    assert found["alike"][0] == pytest.approx((of_mine - of_b).mean(), abs=1e-4)


def test_sentences_are_made_from_the_numbers(rows, board_of, tmp_path, capsys):
    frame = board_of(rows)
    found = verdict(frame, tmp_path, "mine", ["other", "coded", "alike"])
    first, second = sentences(found)
    assert first.startswith(
        "At equal bytes mine keeps the full state's order better than other at 2 of 2 sizes (+0.040 to +0.100)"
    )
    assert "worse than coded at its only size (" in first and "not to be told apart from alike's at 2 sizes" in first
    assert second.startswith("Over the whole range of bytes that is, on average, ") and "+0.070 [" in second
    print_verdict(found, Console(width=80))
    out = capsys.readouterr().out
    assert "mine" in out and "(Holm)" in out and max(map(len, out.splitlines())) <= 80
    print_verdict(verdict(frame, tmp_path / "gone", "mine", ["other"]), Console(width=80))
    assert "nothing to compare" in capsys.readouterr().out


def test_a_table_without_headroom_gets_no_verdict(row, with_users, board_of, tmp_path, capsys):
    change = {"delta_ndcg@10": -0.001, "delta_ndcg@10_lo": -0.003, "delta_ndcg@10_hi": 0.001}
    base = np.full(USERS, 0.5)
    frame = board_of(
        made(row, "mine", 0.25, 25, base + 0.1, with_users), made(row, "other", 0.25, 25, base, with_users),
        made(row, "none", None, 0.001, base, with_users, **change),
    )  # fmt: skip
    found = verdict(frame, tmp_path, "mine", ["other"])
    print_verdict(found, Console(width=200))
    text = capsys.readouterr().out
    assert text.startswith("No headroom: ") and "+0.100" in text and "At equal bytes" not in text


def test_two_runs(row, with_users, tmp_path, capsys, board_of):
    rng = np.random.default_rng(1)
    base = rng.uniform(0.2, 0.8, USERS)
    folders = []
    for name, change in (("a", 0.0), ("b", 0.3)):
        folder = tmp_path / name
        rows = [
            made(row, "same", 0.25, 25, base, with_users),
            made(row, "new", 0.25, 25 - change, base - change, with_users),
        ]
        for each in rows:
            cell = {"compressor": each["compressor"], "run": name}
            each = {**each, "cell": cell, "cell_id": cell_id(cell), "budget": json.dumps(0.25)}
            write_row(folder / "rows", each)
            (folder / "per_user").mkdir(exist_ok=True)
            (folder / each["per_user"]).write_bytes((tmp_path / each["per_user"]).read_bytes())
        folders.append(folder)
    found = {each["compressor"]: each for each in two_runs(*folders).iter_rows(named=True)}
    assert found["same"]["alike"] == 0 and found["same"]["main"] == 0 and found["same"]["bytes_ratio"] == 1
    assert found["new"]["alike"] == pytest.approx(-0.3, abs=1e-6) and found["new"]["p_holm"] < 0.05
    assert found["new"]["bytes_ratio"] == pytest.approx(24.7 / 25)
    assert (found["new"]["only_one"], found["new"]["only_other"]) == (0, 0)
    print_two_runs(two_runs(*folders), Console(width=80))
    assert "2 rows in both, 1 equal, 1 surely of another accuracy" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="no row has it"):
        two_runs(*folders, {"compressor": ["gone"]})
    gone = next(path for path in (folders[1] / "rows").iterdir() if json.loads(path.read_text())["compressor"] == "new")
    gone.unlink()
    print_two_runs(two_runs(*folders), Console(width=120))
    assert "Not compared: 1 rows of the first run and 0 of the second" in " ".join(capsys.readouterr().out.split())


def test_two_runs_are_tested_within_each_table_and_null_is_not_equal(row, with_users, tmp_path, capsys):
    rng = np.random.default_rng(2)
    base = rng.uniform(0.2, 0.8, USERS)
    for name, change in (("a", 0.0), ("b", 0.05)):
        folder = tmp_path / name
        for backbone in ("sasrec", "hstu"):
            one = made(row, "same", 0.25, 25, base + change * rng.normal(1, 2, USERS), with_users, backbone=backbone)
            write_row(folder / "rows", {**one, "budget": json.dumps(0.25)})
            (folder / "per_user").mkdir(exist_ok=True)
            (folder / one["per_user"]).write_bytes((tmp_path / one["per_user"]).read_bytes())
        write_row(folder / "rows", row(compressor="blank", budget=0.5))
        write_row(folder / "rows", row(compressor="half", budget=0.5, **({"bytes_mean": 5.0} if change else {})))
    found = two_runs(tmp_path / "a", tmp_path / "b")
    tested = found.drop_nulls("p")
    assert len(tested) == 2 and tested["p_holm"].to_list() == tested["p"].to_list()  # one test a table
    assert dict(found.filter(backbone="sasrec").select("compressor", "equal").iter_rows()) == {
        "same": False, "blank": None, "half": False,
    }  # fmt: skip
    print_two_runs(found, Console(width=200))
    assert "3 rows in both, 0 equal, " in (out := capsys.readouterr().out) and "1 with nothing to compare" in out
