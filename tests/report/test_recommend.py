"""What to use within limits: the best, what ties with it, what is smaller or cheaper to read; by hand."""

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from malloc_bench.files import file_digest
from malloc_bench.report import leaderboard as lb
from malloc_bench.report.board import aggregate
from malloc_bench.report.recommend import Limits, best_per_budget, print_recommended, recommend, share
from malloc_bench.report.users import Users
from malloc_bench.results import size


def state(row, name, overlap, kb, ms, *, ndcg=0.19, family="eviction", budget=0.25, **values):
    """A method that keeps `overlap` in `kb` of 100 and is read in `ms`."""
    measured = {"overlap@10": overlap, "bytes_mean": kb * 1e3, "ratio": kb / 100, "read_ms_p50": ms, "ndcg@10": ndcg}
    delta = {f"delta_ndcg@10{end}": ndcg - 0.2 + by for end, by in (("", 0), ("_lo", -0.0005), ("_hi", 0.01))}
    return row(family=family, compressor=name, budget=budget, **measured, **delta, **values)


def rows_of(row):
    return [
        state(row, "full", 1.0, 100, 10, ndcg=0.2, family="baseline", budget=None),
        state(row, "none", 0.1, 0, 1, ndcg=0.1, family="baseline", budget=None),
        state(row, "good", 0.9, 20, 5, ndcg=0.195),
        state(row, "good", 0.8, 4, 2, ndcg=0.18, budget=0.04),
        state(row, "worse", 0.85, 21, 6),
        state(row, "smaller", 0.7, 10, 5.2, ndcg=0.15),
        state(row, "quick", 0.6, 22, 1),
        state(row, "beaten", 0.5, 22, 6),
        state(row, "ids", 1.0, 1, 50, family="recompute", ndcg=0.2, budget=None),
        state(row, "knows", 0.99, 20, 5, family="ceiling"),
        state(row, "fit", 0.99, 20, 5, compressor_params={"which": "candidates"}),
    ]


def standings(found):
    return dict(found.select("compressor", "standing").iter_rows())


def test_what_no_other_beats(row, board_of):
    frame = board_of(rows_of(row))
    found = recommend(frame, Limits(size=25e3))
    assert standings(found) == {"good": "best", "smaller": "smaller", "quick": "cheaper read", "ids": "rebuilds"}
    assert found["bytes_mean"][0] == 20e3 and found["tested"].to_list() == [False] * 4
    assert standings(recommend(frame, Limits())) == {
        "full": "best", "good": "smaller", "smaller": "smaller", "quick": "smaller", "ids": "rebuilds",
    }  # fmt: skip
    assert standings(recommend(frame, Limits(share=0.05)))["good"] == "best"  # by its smaller state
    assert standings(recommend(frame, Limits(read_ms=1.5))) == {"quick": "best"}
    kept = recommend(frame, Limits(size=25e3, at_least=0.97))
    assert standings(kept) == {"good": "best", "ids": "rebuilds"}
    assert recommend(frame, Limits(size=10)).is_empty()
    only = recommend(frame, Limits(size=25e3), only={"compressor": ["worse", "beaten"]})
    assert standings(only) == {"worse": "best"}


def test_a_wide_interval_keeps_nothing_surely(row, board_of):
    frame = board_of(state(row, "wide", 0.9, 20, 5, ndcg=0.21), state(row, "full", 1, 100, 9, ndcg=0.2, budget=None))
    frame = frame.with_columns(pl.when(pl.col("compressor") == "wide").then(-0.05).alias("delta_ndcg@10_lo"))
    assert standings(recommend(frame, Limits(size=25e3, at_least=0.75))) == {"wide": "best"}
    assert recommend(frame, Limits(size=25e3, at_least=0.76)).is_empty()


def test_reads_are_compared_by_their_ratio_to_the_full_states_of_the_same_round(row, board_of):
    """Milliseconds of a busy machine say otherwise: 9 against 2."""
    rows = [state(row, "full", 1.0, 100, 10, budget=None, read_ratio=1.0)]
    rows += [state(row, "a", 0.9, 20, 9, read_ratio=0.5, timing="busy"), state(row, "b", 0.8, 20, 2, read_ratio=1.4)]
    frame = board_of(rows)
    assert dict(aggregate(frame).select("method", "read_ms").iter_rows()) == {"full": 10, "a": 5, "b": 14}
    assert standings(recommend(frame, Limits(share=0.5))) == {"a": "best"}
    assert standings(recommend(frame, Limits(read_ms=6))) == {"a": "best"}


def test_costs_that_differ_by_noise_do_not_make_a_method_unbeaten(row, board_of):
    frame = board_of(state(row, "good", 0.9, 20, 5), state(row, "near", 0.5, 19.5, 4.9), state(row, "far", 0.5, 18, 5))
    assert standings(recommend(frame, Limits())) == {"good": "best", "far": "smaller"}


def test_reads_that_differ_within_their_intervals_do_not_either(row, board_of):
    """`near` is read in .9 of the time, but surely only where the intervals of the two are apart."""
    rows = [state(row, "full", 1.0, 100, 10, budget=None, read_ratio=1.0, read_ratio_lo=1.0, read_ratio_hi=1.0)]
    rows.append(state(row, "good", 0.9, 20, 5, read_ratio=0.5, read_ratio_lo=0.46, read_ratio_hi=0.56))
    for high, found in ((0.46, {"good": "smaller"}), (0.43, {"good": "smaller", "near": "smaller"})):
        near = state(row, "near", 0.5, 20, 4.5, read_ratio=0.42, read_ratio_lo=0.4, read_ratio_hi=high)
        assert standings(recommend(board_of([*rows, near]), Limits())) == {"full": "best", **found}


def test_ties_are_told_by_the_users(row, board_of, with_users, tmp_path):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.5, 0.9, 200)
    rows = [
        with_users(state(row, "best", 0, 20, 5), base + 0.011),
        with_users(state(row, "tied", 0, 25, 6), base + np.tile([0.11, -0.09], 100)),
        with_users(state(row, "worse", 0, 25, 6), base - 0.02),
    ]
    frame = board_of(rows)
    found = recommend(frame, Limits(), tmp_path)
    assert standings(found) == {"best": "best", "tied": "ties"} and found["tested"].all()
    assert found["p_best"].to_list()[1] > 0.05
    (file,) = tmp_path.glob(f"{rows[1]['per_user']}")
    file.write_bytes(file.read_bytes() + b"x")  # values that are not what was written are no evidence
    again = recommend(frame, Limits(), tmp_path)
    assert standings(again) == {"best": "best"} and again["p_best"].is_null().all()


def test_seeds_are_pooled_and_users_count_once(row, board_of, with_users, tmp_path):
    """Two seeds whose differences cancel: no difference is seen in the mean by user."""
    up, down = np.full(50, 0.6), np.full(50, 0.4)
    rows = [with_users(state(row, "a", 0, 20, 5, seed=s), v) for s, v in enumerate((up, down))]
    rows += [with_users(state(row, "b", 0, 20, 5, seed=s), v) for s, v in enumerate((down, up))]
    found = recommend(board_of(rows), Limits(), tmp_path)
    assert standings(found) == {"a": "best", "b": "ties"} and found["p_best"].to_list() == [None, 1.0]


def test_best_of_each_budget(row, board_of):
    frame, empty = board_of(rows_of(row)), board_of([])
    found = best_per_budget(frame, Users(frame, None))
    said = found.select("within", "compressor", "bytes_mean").rows()
    assert said == [("25 %", "good", 20e3), ("4 %", "good", 4e3)]
    assert best_per_budget(empty, Users(empty, None)).is_empty()


def test_what_is_printed_says_how_to_see_more_and_what_comes_near(row, board_of, capsys):
    frame = board_of(rows_of(row), [state(row, "far", 0.5, 50, 3, backbone="hstu", ndcg=0.1)])
    console = Console(width=100)
    print_recommended(frame, Limits(size=25e3, at_least=0.96), console, "runs/x", stores=lambda name: f"{name}'s slots")
    out = " ".join(capsys.readouterr().out.split())
    cell = frame.filter((pl.col("compressor") == "good") & (pl.col("ratio") == 0.2))["cell_id"][0]
    assert f"good: stores good's slots. More: malloc-bench show good; malloc-bench reproduce runs/x {cell[:12]}" in out
    assert "nothing within 25 KB, surely keeping 96 % of its accuracy; the smallest state: far, 50 KB" in out
    assert (
        "Best, keeps most: keeps most of the full state's order" in out and "Ties were not" not in out
    )  # one method: no tie
    kept = frame.filter((pl.col("backbone") == "sasrec") & (pl.col("family") != "recompute"))
    for limits, near in (
        (Limits(size=25e3, at_least=0.999), "good surely keeps 97.2 % in 20 KB"),
        (Limits(read_ms=0.1), "the fastest read: quick, 1 ms"),
    ):
        print_recommended(kept, limits, console)
        assert near in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("text", "value"),
    [("5KB", 5000), ("5 kb", 5000), ("300", 300), ("300B", 300), ("1.5MiB", 1.5 * 2**20), ("2k", 2000)],
)
def test_sizes(text, value):
    assert size(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("1/32", 1 / 32), ("3.125%", 0.03125), (".5", 0.5), ("98 %", 0.98), ("1", 1)]
)
def test_shares(text, value):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "KB", "-5KB", "0", "5XB", "1e3", "nan", "5 5", "5KB5", 400 * "9" + "GB"])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="is no size: expected bytes above 0, such as 5KB"):
        size(text)


@pytest.mark.parametrize("text", ["", "0", "2", "101%", "1/0", "1/", "x", "-1/2", "1//2", "nan"])
def test_what_is_no_share(text):
    with pytest.raises(ValueError, match="is no share: expected one above 0 and at most 1"):
        share(text)


def test_what_rebuilds_does_not_stand_for_a_kept_state_where_no_read_was_measured(row, board_of):
    rows = [{**each, "read_ms_p50": None} for each in rows_of(row)]
    found = standings(recommend(board_of(rows), Limits(size=25e3)))
    assert found == {"good": "best", "smaller": "smaller", "ids": "rebuilds"}


def test_ties_are_not_tested_where_one_rival_has_no_values(row, board_of, with_users, tmp_path):
    rows = [with_users(state(row, name, 0, 20, 5), np.full(20, x)) for name, x in (("a", 0.9), ("b", 0.8))]
    found = recommend(board_of(rows, state(row, "c", 0.85, 20, 5)), Limits(), tmp_path)
    assert not found["tested"].any()


def test_a_seed_may_be_asked_for(row, board_of):
    rows = [state(row, "good", 0.9, 20, 5, seed=0), state(row, "good", 0.7, 20, 5, seed=1)]
    frame = board_of(rows)
    assert recommend(frame, Limits(), only={"seed": ["1"]})["overlap@10"].to_list() == [0.7]
    assert recommend(frame, Limits(), only={"seed": ["0", "1"], "budget": ["1/4"]})["seeds"].to_list() == [2]
    with pytest.raises(ValueError, match=r"--only seed=2: no row has it. Valid: 0, 1."):
        recommend(frame, Limits(), only={"seed": ["2"]})


def test_values_by_user_that_cannot_be_had_are_named(row, board_of, with_users, tmp_path, capsys):
    rows = [with_users(state(row, name, 0.0, 20, 5), np.linspace(0, 1, 9)) for name in ("a", "b", "c", "d")]
    gone, spoilt, odd = (tmp_path / each["per_user"] for each in rows[:3])
    gone.unlink()
    spoilt.write_bytes(spoilt.read_bytes()[:-9])
    pl.DataFrame({"user": ["x"]}).write_parquet(odd)
    rows[2]["hashes"] = {"files": {rows[2]["per_user"]: file_digest(odd)}}
    print_recommended(board_of(rows), Limits(), Console(width=200), tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "Ties were not all tested: per_user/" in out and ", and 2 more (run the suite to have values by user)" in out
    lb.print_leaderboard(board_of(rows), Console(width=200), tmp_path)
    assert "Ties were not all tested: per_user/" in " ".join(capsys.readouterr().out.split())
    users = Users(board_of(rows), tmp_path)
    assert [users.of(row["cell_id"]) for row in rows[1:3]] == [None, None] and users.of(rows[3]["cell_id"]) is not None
    assert users.lacking() == f"{rows[1]['per_user']} is not what was written, and 1 more"


def test_nothing_measured_is_said(row, board_of, capsys):
    none = state(row, "none", 0.1, 0, 1, family="baseline", budget=None)
    print_recommended(board_of(none), Limits(), Console(width=100))
    assert "no method's state was measured" in " ".join(capsys.readouterr().out.split())
    print_recommended(board_of([]), Limits(), Console(width=100))
    assert "No finished cells yet." in capsys.readouterr().out


def test_without_headroom_accuracy_is_no_limit_and_ids_alone_are_said_to_be(row, board_of):
    def printed(rows, limits):
        console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        print_recommended(board_of(rows), limits, console)
        return console.export_text()

    rows = rows_of(row)
    strict = Limits(size=25e3, at_least=0.99)
    text = printed(rows, strict)
    assert "No kept state is within 25 KB, surely keeping 99 % of its accuracy" in text and "left aside" not in text
    rows[1] = state(row, "none", 0.1, 0, 1, ndcg=0.199, family="baseline", budget=None)
    assert "--at-least was left aside" in (text := printed(rows, strict)) and "No kept state" not in text
    assert "surely keeping" not in text  # what was left aside heads no table
    assert standings(recommend(board_of(rows), strict))["good"] == "best"
    assert "cannot judge methods by it: overlap says who keeps" in text and "keeps most" in text.split("Best, ")[0]
    assert "best" not in text and "[95 % interval]" not in text  # where differences say nothing, nothing is best
