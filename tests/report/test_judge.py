"""What tables say of headroom, losses and doubles, on rows made up for the purpose and on the rows that we ship."""

from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from malloc_bench.report import leaderboard as lb
from malloc_bench.report import tables
from malloc_bench.results import load_results

MANY = 160_000  # bytes
SHIPPED = [
    pytest.param(path, at, marks=[pytest.mark.slow] if path.stat().st_size > MANY else [], id=path.parent.name)
    for at, path in enumerate(sorted(Path(__file__).parents[2].glob("results/*/results.parquet")))
]
DELTA = ("delta_ndcg@10", "delta_ndcg@10_lo", "delta_ndcg@10_hi")
GAUC = ("delta_gauc", "delta_gauc_lo", "delta_gauc_hi")


def cell(row, name, ndcg=0.2, error=0.001, **values):
    measured = {"ndcg@10": ndcg, "bytes_mean": 40_000 * values.get("ratio", 0.25), "ratio": 0.25}
    measured |= dict(zip(DELTA, (ndcg - 0.2, ndcg - 0.2 - error, ndcg - 0.2 + error)))
    return row(**{"family": "eviction", "compressor": name, **measured, **values})


def full(row, **values):
    return cell(row, "full", family="baseline", ratio=1.0, **{"overlap@10": 1.0}, **values)


def none(row, ndcg, error=0.001, overlap=0.2, **values):
    return cell(row, "none", ndcg, error, family="baseline", ratio=0.0, **{"overlap@10": overlap}, **values)


def printed(frame):
    console = Console(width=240, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    lb.print_leaderboard(frame, console)
    return console.export_text()


def test_popularity_stands_above_every_table_and_is_said_aloud_where_it_is_no_worse(row, board_of):
    floors = {"popular_ndcg@10": 0.05, "popular_7d_ndcg@10": 0.21}
    frame = board_of(full(row, **floors), none(row, 0.1), cell(row, "h2o", budget=0.25, **floors))
    plain = "Popularity alone: NDCG@10 0.0500 (of all training events), 0.2100 (of their last 7 days)."
    aloud = "Popularity of their last 7 days reaches an NDCG@10 of 0.2100, the full state 0.2000."
    for text in (lb.to_markdown(frame), printed(frame)):
        assert plain in text and aloud in text
    assert f"> **{aloud}**" in lb.to_markdown(frame)
    better = board_of(full(row, **floors | {"popular_7d_ndcg@10": 0.19}), none(row, 0.1))
    assert "0.1900 (of their last 7 days)" in lb.to_markdown(better) and "reaches" not in lb.to_markdown(better)
    unknown = board_of(full(row), none(row, 0.1))
    assert "Popularity" not in lb.to_markdown(unknown) + printed(unknown)


def test_a_table_without_headroom_says_so_everywhere_and_calls_nothing_lossless(row, board_of):
    frame = board_of(full(row), none(row, 0.199, 0.002), cell(row, "h2o", budget=0.25))
    said = (
        "No headroom: the full state's NDCG@10 (0.2000) is not significantly above that of no history (0.1990), so "
        "this table cannot judge methods by it: overlap says who keeps the full state's order, not that it is good."
    )
    board = lb.leaderboard(frame)
    assert board["headroom"].to_list() == [False] * 3 and board["lossless"].to_list() == [None] * 3
    assert board["note"].to_list() == [said] * 3 and said in lb.to_csv(frame)
    assert f"users)\n\n> **{said}**\n\n| compressor" in lb.to_markdown(frame)
    assert said.replace("%", r"\%") in lb.to_latex(frame).split(r"\begin{tabular}")[0]
    assert said in printed(frame).split("compressor")[0]
    for name in ("accuracy", "resources", "taxonomy", "slices"):
        assert said in tables.render_table(frame, name, "md"), name
        assert said in tables.render_table(frame, name, "csv") and said in tables.render_table(frame, name, "latex")


@pytest.mark.parametrize(("rest", "headroom"), [([0.1], True), ([], None)])
def test_with_headroom_or_without_a_floor_nothing_is_said(row, board_of, rest, headroom):
    frame = board_of(full(row), cell(row, "h2o", budget=0.25), [none(row, n) for n in rest])
    board = lb.leaderboard(frame)
    assert set(board["headroom"]) == {headroom} and set(board["note"]) == {None}
    assert board.filter(pl.col("compressor") == "h2o")["lossless"].to_list() == [True]
    assert "headroom" not in lb.to_markdown(frame) + printed(frame)


def test_ranking_has_headroom_in_gauc(row, board_of):
    def ranked(name, gauc, hi, **values):
        return cell(row, name, task="ranking", gauc=gauc, **dict(zip(GAUC, (gauc - 0.7, gauc - 0.72, hi))), **values)

    frame = board_of(
        ranked("full", 0.7, 0.0, agreement=1.0), ranked("none", 0.69, 0.001, agreement=0.6),
        ranked("h2o", 0.698, 0.01, agreement=0.9, budget=0.25),
    )  # fmt: skip
    board = lb.leaderboard(frame)
    assert "state's GAUC (0.7000)" in board["note"][0] and "(0.6900)" in board["note"][0]
    found = dict(zip(board["compressor"], board["fidelity"]))
    assert found == pytest.approx({"full": 1.0, "none": 0.0, "h2o": 0.75})


def test_fidelity_is_overlap_above_that_of_no_history(row, board_of):
    rows = full(row), none(row, 0.1), cell(row, "h2o", budget=0.25, **{"overlap@10": 0.6})
    board = lb.leaderboard(board_of(*rows))
    assert dict(zip(board["compressor"], board["fidelity"])) == pytest.approx({"full": 1, "none": 0, "h2o": 0.5})
    assert "| fidelity |" in lb.to_markdown(board_of(*rows))
    assert set(lb.leaderboard(board_of(rows[0], rows[2]))["fidelity"]) == {None}  # no floor, no scale
    same = none(row, 0.1, overlap=1.0)
    assert set(lb.leaderboard(board_of(rows[0], same))["fidelity"]) == {None}


@pytest.mark.parametrize(("error", "needed"), [(0.02, False), (0.001, True)])
def test_what_lies_above_a_constant_needs_the_query(row, board_of, error, needed):
    constant = cell(row, "fit_constant", 0.19, error, family="fitted", ratio=0.01, **{"overlap@10": 0.7})
    frame = board_of(
        full(row), none(row, 0.1), constant, cell(row, "h2o", budget=0.25, p_noninferior=1e-6, **{"overlap@10": 0.85})
    )
    board = lb.leaderboard(frame)
    found = dict(zip(board["compressor"], board["above_constant"]))
    assert found == pytest.approx({"full": 1, "none": 1 - 0.8 / 0.3, "fit_constant": 0, "h2o": 0.5})
    assert set(board["query_headroom"]) == {needed} and set(board["headroom"]) == {True}
    said = (
        "No headroom above a constant: the full state's NDCG@10 (0.2000) is not significantly above that of "
        "fit_constant (0.1900)"
    )
    assert (said in lb.to_markdown(frame)) == (said in printed(frame)) == (not needed)
    assert board.filter(pl.col("compressor") == "h2o")["lossless"].item()  # that table judges: of what is lost at all


def test_lossless_is_tested_with_holm_over_the_table(row, board_of):
    def lossless(*p):
        rows = [cell(row, f"m{i}", budget=0.25, p_noninferior=x, ratio=0.1 + i / 10) for i, x in enumerate(p)]
        board = lb.aggregate(board_of(full(row), rows)).sort("method")
        return board.filter(pl.col("method") != "full")["lossless"].to_list()

    assert lossless(0.02) == [True] and lossless(0.03) == [False]
    assert lossless(0.02, 0.5) == [False, False]  # twice 0.02 is above 0.025
    assert lossless(0.012, 0.02, 0.001) == [True, True, True]
    mark = board_of(full(row), cell(row, "h2o", budget=0.25, p_noninferior=1e-6))
    assert "| ✓ NDCG@10 |" in lb.to_markdown(mark)


def test_p_of_older_rows_follows_from_their_interval(row, board_of):
    board = lb.aggregate(board_of(full(row), cell(row, "h2o", 0.1995, 0.00098, budget=0.25)))
    p = board.filter(pl.col("method") == "h2o")["p_noninferior"][0]
    assert p == pytest.approx(0.00135, rel=0.02)  # margin .002, lost .0005, standard error .0005: three of them


def test_p_over_seeds_is_twice_the_mean(row, board_of):
    rows = [cell(row, "h2o", budget=0.25, p_noninferior=p, seed=seed) for seed, p in enumerate((0.01, 0.03))]
    assert lb.aggregate(board_of(full(row), rows)).filter(pl.col("method") == "h2o")["p_lossless"].to_list() == [0.04]


def test_one_state_is_one_line_that_names_its_budgets(row, board_of):
    def chain(budget, ratio=0.1, p=0.02, digest="a", **values):
        return cell(
            row, "compose", 0.19, compressor_params={"steps": ["recent", "int8"]}, family="chain", budget=budget,
            ratio=ratio, p_value=p, values_digest=digest, **values,
        )  # fmt: skip

    frame = board_of(full(row), chain(0.25), chain(0.5), chain(0.125, share_at_floor=0.5), chain(0.0625, 0.05))
    board = lb.leaderboard(frame)
    assert board["budget"].to_list() == [None, "50, 25, 12.5 %", "6.25 %"]
    assert board["p_holm"].to_list() == [None, 0.04, 0.04] and board["share_at_floor"].to_list() == [None, 0.5, None]
    assert "| 50, 25, 12.5 % |" in lb.to_markdown(frame)
    assert tables.taxonomy(frame)["states"].to_list() == [2]
    slots = board_of(full(row), chain({"slots": 8}), chain({"slots": 64}), chain({"bytes": 9}, 0.05))
    assert lb.leaderboard(slots)["budget"].to_list() == [None, "64, 8 slots", "9 bytes"]
    mixed = board_of(full(row), chain({"slots": 8}), chain(0.5))
    assert lb.leaderboard(mixed)["budget"].to_list() == [None, "50 %, 8 slots"]


def test_like_numbers_of_other_values_stay_apart(row, board_of):
    one, other = (cell(row, "h2o", budget=b, values_digest=d) for b, d in ((0.5, "a"), (0.25, "b")))
    assert len(lb.leaderboard(board_of(full(row), one, other))) == 3
    assert len(lb.leaderboard(board_of(full(row), one, {**other, "values_digest": "a"}))) == 2
    seeds = [
        {**each, "seed": seed, "created_at": f"2026-11-22T1{at}:00:00+00:00", "values_digest": digest}
        for each, at, seed, digest in ((one, 0, 0, "a"), (one, 1, 1, "b"), (other, 3, 0, "a"), (other, 2, 1, "b"))
    ]
    assert len(lb.leaderboard(board_of(full(row), seeds))) == 2  # whatever the order in which seeds were run
    assert len(lb.leaderboard(board_of(full(row), one, {**other, "compressor": "knorm", "values_digest": "a"}))) == 3


def test_what_a_budget_counts_and_how_times_were_taken_is_shown(row, board_of):
    rows = [
        cell(row, "truncate", budget=0.25, budget_unit="events", read_ratio=3.21, timing="noisy", ratio=0.01),
        cell(row, "h2o", budget=0.25, budget_unit="bytes", timing="ok", seed=0),
        cell(row, "knorm", budget=0.25, timing="busy", seed=0, ratio=0.2),
        cell(row, "knorm", budget=0.25, timing="noisy, busy", seed=1, ratio=0.2),
    ]
    text, board = lb.to_markdown(board_of(rows)), lb.leaderboard(board_of(rows))
    assert "| 25 % | events |" in text and "| 3.21 | noisy |" in text and "| ok |" not in text
    assert "bytes |" not in text and set(board["budget_unit"]) == {"events", "bytes", None}
    assert dict(zip(board["compressor"], board["timing"])) == {
        "truncate": "noisy", "h2o": "ok", "knorm": "noisy, busy",
    }  # fmt: skip


def test_against_float16_every_state_is_half_as_small(row, board_of):
    board = lb.leaderboard(board_of(full(row), cell(row, "h2o", budget=0.25)))
    assert board["smaller_x"].to_list() == [1, 4] and board["smaller_f16_x"].to_list() == [0.5, 2]


@pytest.mark.parametrize("path, at", SHIPPED)
def test_shipped_results_are_still_read(path, at):
    """Older ones lack columns: those are blank. Every table is made of a few of them, and of all large ones."""
    frame = load_results(path.parent)
    board = lb.leaderboard(frame)
    assert len(board) and board["timing"].null_count() <= len(board)
    large = path.stat().st_size > MANY
    for name in list(tables.TABLES)[0 if large else at % 4 :: 1 if large else 4]:
        assert tables.render_table(frame, name)
    if path.parent.name == "recurrent":
        assert not board["headroom"].all() and "cannot judge" in lb.to_markdown(frame)
    notes = board.filter(pl.col("headroom").fill_null(True))["note"].drop_nulls().to_list()
    assert all(note.startswith("No headroom above a constant") for note in notes)
