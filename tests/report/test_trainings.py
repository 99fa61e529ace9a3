"""What was trained once among what was trained three times: shown, never called the best."""

import io

import polars as pl
import pytest
from rich.console import Console

from malloc_bench.report import tables
from malloc_bench.report.board import aggregate
from malloc_bench.report.evidence import pareto, significance
from malloc_bench.report.paper import paper
from malloc_bench.report.pareto import pareto_figure
from malloc_bench.report.recommend import Limits, print_recommended, recommend
from malloc_bench.report.site.content import Run, pages
from malloc_bench.results import frame

LUCKY = "knorm"


@pytest.fixture
def rows(row):
    """Three trainings, of which the second's states are much the best: `knorm` ran behind that alone."""

    def cell(name, seed, kept, **values):
        full = (0.1, 0.3, 0.1)[seed]
        value = {"ndcg@10": full * kept, "overlap@10": 1.0 if name == "full" else (0.6, 0.98, 0.6)[seed] * kept}
        value |= {f"delta_ndcg@10{end}": full * (kept - 1) for end in ("", "_lo", "_hi")}
        return row(compressor=name, seed=seed, bytes_full=1000, bytes_fixed=0, read_flops=1e6, **value, **values)

    found = [
        each
        for seed in range(3)
        for each in (
            cell("full", seed, 1.0, family="baseline", bytes_mean=1000, ratio=1.0),
            cell("none", seed, 0.1, family="baseline", bytes_mean=4, ratio=0.004),
            cell("h2o", seed, 0.9, family="eviction", budget=0.25, bytes_mean=250, ratio=0.25),
            cell("snapkv", seed, 0.8, family="eviction", budget=0.25, bytes_mean=250, ratio=0.25),
        )
    ]
    return [*found, cell(LUCKY, 1, 0.7, family="eviction", budget=0.25, bytes_mean=200, ratio=0.2)]


def test_its_mean_is_above_the_others(rows):
    board = aggregate(frame(rows)).filter(pl.col("budget").is_not_null())
    assert board.sort("ndcg@10")["method"].to_list()[-1] == LUCKY


def test_a_paper_ranks_it_nowhere_and_says_how_many(rows):
    ranks = {row["method"]: row["value_rank"] for row in paper(frame(rows)).iter_rows(named=True)}
    assert (ranks["h2o"], ranks["snapkv"], ranks[LUCKY]) == (1, 2, None)
    lines = tables.render_table(frame(rows), "paper").splitlines()
    of = {name: next(line for line in lines if f"| {name} |" in line) for name in ("h2o", LUCKY)}
    assert "0.2100 (1/3)" in of[LUCKY] and "**" not in of[LUCKY] and "**" in of["h2o"] and "/3" not in of["h2o"]


def test_no_test_is_against_it(rows):
    assert set(significance(frame(rows))["best"].drop_nulls()) == {"h2o"}


def test_it_is_on_no_front(rows):
    assert pareto(frame(rows))["compressor"].to_list() == ["h2o", "full"]
    once = frame([each for each in rows if each["seed"] == 1 or each["compressor"] in ("full", "none")])
    assert pareto(once)["compressor"].to_list() == [LUCKY, "h2o", "full"]  # all were trained once
    assert "h2o" in recommend(once, Limits())["compressor"].to_list()


def test_it_is_not_recommended(rows):
    found = recommend(frame(rows), Limits())
    assert LUCKY not in found["compressor"].to_list() and "h2o" in found["compressor"].to_list()
    out = Console(file=io.StringIO(), width=200)
    print_recommended(frame(rows), Limits(), out)
    assert "1 row" in out.file.getvalue() and "fewer trainings" in out.file.getvalue()


def test_the_site_gives_it_no_place_in_its_ranking(rows):
    index, *_ = pages([Run("run", frame(rows))])
    (sheet,) = [each for each in index.sheets if "at 25 %" in each.title]
    assert "h2o" in str(sheet.rows) and LUCKY not in str(sheet.rows)


def test_floors_that_were_trained_more_often_hide_no_method(rows, row):
    floor = [
        row(
            family="fitted",
            compressor="fit_constant",
            seed=s,
            bytes_mean=9,
            ratio=0.009,
            **{"ndcg@10": 0.1, "overlap@10": 0.4},
        )
        for s in range(3)
    ]
    one = [each for each in rows if each["seed"] == 1 or each["compressor"] in ("full", "none")]
    assert pareto(frame(one + floor))["compressor"].to_list() == ["fit_constant", LUCKY, "h2o", "full"]
    assert recommend(frame(one + floor), Limits(size=300))["compressor"][0] == "h2o"


def test_a_figure_of_the_front_names_it_nowhere(rows):
    figure = pareto_figure(aggregate(frame(rows)), "front")
    said = " ".join(each.get_text() for axes in figure.axes for each in axes.texts)
    assert "h2o" in said and LUCKY not in said


def test_no_budget_is_asked_for_as_none(rows, row):
    fixed = row(family="quantization", compressor="int8", seed=0, bytes_mean=600, ratio=0.6, **{"ndcg@10": 0.1})
    text = tables.render_table(frame([*rows, fixed]), "paper", "csv", only={"budget": ["none"]})
    assert set(pl.read_csv(io.StringIO(text))["within"]) == {"no budget"} and "int8" in text
