"""A table never compares rows of different weights, data or protocol."""

import polars as pl
import pytest
from rich.console import Console

from malloc_bench.report import leaderboard as lb
from malloc_bench.report.site.content import Run, pages
from malloc_bench.report.tables import TABLES, render_table
from malloc_bench.report.two_runs import print_two_runs, two_runs
from malloc_bench.results import cell_id, write_row


def cell(epochs=12, label=4, data="a" * 64):
    meaning = {"hash": data, "label": {"column": "rating", "at_least": label}}
    return {"dataset": "ml-1m", "data": meaning, "training": {"epochs": epochs}, "schema_version": 2}


def pair(row, ndcg=0.2, loss=0.01, weights="1" * 64, seed=0, only=None, hour=12, **protocol):
    """The full state and a method that loses `loss`, of one protocol."""
    shared = {
        "seed": seed, "cell": cell(**protocol), "hashes": {"reference": weights},
        "created_at": f"2026-11-22T{hour}:00:00+00:00",
    }  # fmt: skip
    full = row(**shared, family="baseline", compressor="full", bytes_mean=8.0, ratio=1.0, **{"ndcg@10": ndcg})
    delta = {f"delta_ndcg@10{end}": -loss for end in ("", "_lo", "_hi")}
    values = {"ndcg@10": ndcg - loss, "bytes_mean": 2.0, "ratio": 0.25, **delta}
    method = row(**shared, family="eviction", compressor="snapkv", budget=0.25, **values)
    return [one for one in (full, method) if only in (None, one["compressor"])]


def by_backbone(board):
    return {name: dict(zip(group["compressor"], group["ndcg@10"])) for (name,), group in board.group_by("backbone")}


def test_one_protocol_needs_no_word(row, board_of):
    board = lb.leaderboard(board_of(pair(row), pair(row, seed=1, weights="2" * 64)))
    assert set(board["backbone"]) == {"sasrec"} and board["seeds"].to_list() == [2, 2]


def test_a_suite_that_was_edited_between_two_runs(row, board_of):
    """Epochs 1, then 12 with the full state alone: -.037 against the other weights, -.010 against its own."""
    frame = board_of(pair(row, ndcg=0.1, epochs=1), pair(row, ndcg=0.127, epochs=12, only="full", weights="2" * 64))
    board = lb.leaderboard(frame)
    assert by_backbone(board) == {
        "sasrec [training.epochs=1]": {"full": 0.1, "snapkv": pytest.approx(0.09)},
        "sasrec [training.epochs=12]": {"full": 0.127},
    }
    assert board.filter(compressor="snapkv")["delta_ndcg@10"].to_list() == [-0.01]
    assert "sasrec [training.epochs=1]" in lb.to_markdown(frame) and "training.epochs=12" in lb.to_latex(frame)
    for name in TABLES:
        if name in ("accuracy", "resources", "taxonomy", "paper", "significance"):  # nothing else was measured
            assert "training.epochs=1]" in render_table(frame, name, "md"), name


def test_who_leaves_an_option_at_its_default_says_nothing_of_it(row, board_of):
    drawn = pair(row, ndcg=0.3, weights="2" * 64)
    for each in drawn:
        each["cell"] = {**each["cell"], "training": {**each["cell"]["training"], "negatives": 256}}
    found = by_backbone(lb.leaderboard(board_of(pair(row), drawn)))
    assert {name: methods["full"] for name, methods in found.items()} == {
        "sasrec": 0.2, "sasrec [training.negatives=256]": 0.3,
    }  # fmt: skip


def test_other_data_and_another_label_are_apart(row, board_of):
    board = lb.leaderboard(board_of(pair(row), pair(row, label=3), pair(row, data="b" * 64)))
    assert set(board["backbone"]) == {
        "sasrec [data.hash=aaaaaaaa, data.label.at_least=4]",
        "sasrec [data.hash=aaaaaaaa, data.label.at_least=3]",
        "sasrec [data.hash=bbbbbbbb, data.label.at_least=4]",
    }


def test_weights_that_were_trained_again_are_apart(row, board_of):
    """Most rows need no word; of as many, the newest."""
    again = pair(row, ndcg=0.3, weights="2" * 64, only="snapkv", hour=13)
    board = lb.leaderboard(board_of(pair(row), again, pair(row, seed=1, weights="3" * 64)))
    found = {name: group["seeds"].to_list() for (name,), group in board.group_by("backbone")}
    assert found == {"sasrec": [2, 2], "sasrec [weights=22222222]": [1]}
    twice = lb.leaderboard(board_of(pair(row), pair(row, ndcg=0.3, weights="2" * 64, hour=13)))
    assert by_backbone(twice)["sasrec"]["full"] == 0.3
    failed = {**pair(row, only="full")[0], "compressor": "none", "status": "failed", "reason": "no", "hashes": None}
    assert lb.problems(board_of(pair(row), failed)) == ["failed: ml-1m, retrieval, sasrec, none, seed 0: no"]


def test_a_word_is_given_once(row, board_of):
    frame = board_of(pair(row, epochs=1), pair(row, epochs=2))
    assert lb.newest(lb.newest(frame)).equals(lb.newest(frame))
    assert lb.leaderboard(lb.newest(frame)).equals(lb.leaderboard(frame))
    assert lb.newest(board_of([])).is_empty() and isinstance(frame, pl.DataFrame)


def test_brackets_reach_the_terminal(row, board_of, capsys):
    from rich.console import Console

    lb.print_leaderboard(board_of(pair(row, epochs=1), pair(row, epochs=2)), Console(width=200))
    assert "[training.epochs=2]" in capsys.readouterr().out


def test_backbones_on_other_data_do_not_stand_side_by_side(row, board_of):
    """Of one data set's name, as in the table of models; what one backbone alone reads of the data is no difference."""
    other = [{**each, "backbone": "hstu"} for each in pair(row, data="b" * 64, weights="2" * 64)]
    table = render_table(board_of(pair(row), other), "models", "md")
    assert "sasrec [data.hash=aaaaaaaa]" in table and "hstu [data.hash=bbbbbbbb]" in table
    same = [{**each, "backbone": "climber"} for each in pair(row)]
    for each in same:
        each["cell"] = {**each["cell"], "data": {**each["cell"]["data"], "categories": "c" * 64}}
    assert "[" not in render_table(board_of(pair(row), same), "models", "md")


def test_runs_of_other_training_or_sizes_are_other_tables_of_a_site(row, board_of):
    small, large = ({"backbone_params": {"dim": d}} for d in (50, 64))
    runs = [
        Run("a", board_of(*([{**each, **small} for each in pair(row, epochs=n)] for n in (12,)))),
        Run("b", board_of([{**each, **small} for each in pair(row, epochs=20, weights="2" * 64)])),
        Run("c", board_of([{**each, **large} for each in pair(row, epochs=12, weights="3" * 64)])),
        Run("d", board_of([{**each, **small} for each in pair(row, epochs=12, weights="4" * 64)])),
    ]
    (index, *_) = pages(runs)
    (listed,) = (sheet for sheet in index.sheets if sheet.title == "Backbones")
    assert {line[0].text for line in listed.rows} == {
        "sasrec(dim=50) [training.epochs=12]", "sasrec(dim=50) [training.epochs=20]", "sasrec(dim=64)",
    }  # fmt: skip


def test_two_runs_of_other_training_say_so(row, board_of, tmp_path, capsys):
    for name, epochs in (("a", 1), ("b", 12), ("c", 12), ("both", 1), ("both", 12)):
        for each in pair(row, epochs=epochs):
            own = {**each["cell"], "compressor": {"name": each["compressor"]}}
            write_row(tmp_path / name / "rows", {**each, "cell_id": cell_id(own), "cell": own})
    assert set(two_runs(tmp_path / "a", tmp_path / "b")["protocol"]) == {"training.epochs 1, then 12"}
    assert two_runs(tmp_path / "b", tmp_path / "c")["protocol"].null_count() == 2
    for runs in (("a", "both"), ("both", "a"), ("both", "c")):  # of several protocols the same one
        found = two_runs(*(tmp_path / name for name in runs))
        assert found["protocol"].null_count() == len(found) == 2
        assert sorted(found.select("only_one", "only_other").row(0)) == [0, 2]
    print_two_runs(two_runs(tmp_path / "a", tmp_path / "b"), Console(width=200))
    assert capsys.readouterr().out.count("Not the methods alone differ: training.epochs 1, then 12") == 1
