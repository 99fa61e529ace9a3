"""The tables of LSRM's tasks and their figures, from rows made by hand."""

import pytest

from malloc_bench.report import tables
from malloc_bench.report.task_figures import task_figures


def rows_of(row, **changes):
    """The full state, a method at two budgets whose states may be one, a floor."""
    base = {"family": "windowing", "compressor": "recent", "n_users": 10, "overlap@10": 0.5, "ndcg@10": 0.05} | changes
    return [
        row(**base | {"family": "baseline", "compressor": "full", "ndcg@10": 0.1, "overlap@10": 1.0}),
        row(**base | {"family": "baseline", "compressor": "none", "ndcg@10": 0.01, "overlap@10": 0.1}),
        row(**base, budget=0.5, bytes_mean=50.0),
        row(**base | {"ndcg@10": 0.04}, budget=0.25, bytes_mean=25.0),
    ]


def cut(name, frame):
    return {
        (r["compressor"], r["budget"] or "", r["key"]): r for r in tables.table(frame, name).iter_rows(named=True)
    }  # fmt: skip


def test_robustness_holds_each_method_against_itself_with_all_known(row, board_of):
    spoilt = rows_of(row, task="retrieval(delete=0.3)", **{"ndcg@10": 0.03})
    frame = board_of(rows_of(row), spoilt, rows_of(row, task="retrieval(history=5)"), rows_of(row, task="ranking"))
    found = cut("robustness", frame)
    assert [k for c, b, k in found if (c, b) == ("recent", "50 %")] == ["all", "newest 5", "30 % deleted"]
    assert found["recent", "50 %", "30 % deleted"]["kept"] == pytest.approx(0.03 / 0.05 - 1)
    assert found["recent", "25 %", "30 % deleted"]["kept"] == pytest.approx(0.0)
    text = tables.render_table(frame, "robustness")
    assert "| windowing | recent | 50 % | +0.0 | +0.0 | -40.0 |" in text and "ranking" not in text
    assert "Nothing here" in tables.render_table(board_of(rows_of(row)), "robustness"), "one task is no comparison"


def test_one_state_under_two_budgets_is_a_row_of_each(row, board_of):
    same = {"bytes_mean": 4.0, "values_digest": "a"}
    apart, one = rows_of(row), [r | same | {"ndcg@10": 0.02} for r in rows_of(row, task="retrieval(history=5)")[2:]]
    full = rows_of(row, task="retrieval(history=5)")[:2]
    found = cut("robustness", board_of(apart, full, one))
    assert found["recent", "50 %", "newest 5"]["ndcg@10"] == found["recent", "25 %", "newest 5"]["ndcg@10"] == 0.02


def test_targets_that_tie_are_told_apart(row, board_of):
    of = {"later than the event before": 0.19, "tied with it": 0.39}
    slices = {key: {"n_users": 5, "ndcg@10": x / 2, "hr@10": x, "overlap@10": 0.3} for key, x in of.items()}
    frame = board_of(rows_of(row, slices=slices))
    assert tables.table(frame, "ties").filter(compressor="full")["hr@10"].to_list() == list(of.values())
    assert "tied with it" in tables.render_table(frame, "ties")
    assert "Nothing here" in tables.render_table(board_of(rows_of(row)), "ties")


def test_popularity_and_transfer_read_the_slices(row, board_of):
    slices = {
        f"popularity {q}/4": {"n_users": q, "ndcg@10": q / 100, "hr@10": 0.2, "overlap@10": 0.3} for q in range(1, 5)
    }
    of = {
        f"of {name}": {"n_users": 7, "ndcg@10": x, "hr@10": 0.2, "overlap@10": 0.4}
        for name, x in (("a", 0.2), ("b", 0.3))
    }
    mixed, alone = rows_of(row, dataset="a+b", slices=slices | of), rows_of(row, dataset="a", slices=slices)
    frame = board_of(mixed, alone, rows_of(row, dataset="c"))
    found = tables.table(frame, "popularity")
    assert found.filter(compressor="full", dataset="a")["ndcg@10"].to_list() == [0.01, 0.02, 0.03, 0.04]
    assert "popularity 4/4 (4 users)" in tables.render_table(frame, "popularity")
    moved = tables.table(frame, "transfer").filter(compressor="recent", budget="50 %")
    assert moved.select("dataset", "key", "ndcg@10").rows() == [
        ("a", "alone", 0.05), ("a", "with others", 0.2), ("b", "with others", 0.3),
    ]  # fmt: skip
    assert {name for name, _, _ in task_figures(frame, 7.0)} == {"popularity", "transfer"}


def test_trajectories_step_by_step_and_in_a_figure(row, board_of):
    def step(n):
        return {"n_users": 100 - n} | {
            f"{way}_{x}@10": 0.5 / n for way in ("true", "own") for x in ("hr", "ndcg", "overlap")
        }

    frame = board_of(rows_of(row, task="retrieval(steps=10)", steps={str(n): step(n) for n in (1, 10, 2)}))
    found = tables.table(frame, "trajectory")
    assert found["key"].unique(maintain_order=True).to_list() == ["1", "2", "10"]
    odd = board_of(rows_of(row, task="retrieval(steps=10)", steps={"1": step(1), "²": step(2)}))  # no number to int()
    assert tables.table(odd, "trajectory")["key"].unique().to_list() == ["1"]
    text = tables.render_table(frame, "trajectory")
    assert (
        "HR@10 of the next items, fed what the model ranks first" in text and "| 2 (98 users) | 10 (90 users) |" in text
    )
    (name, _, figure), *rest = task_figures(frame, 7.0)
    assert name == "trajectory" and not rest and len(figure.axes) == 4
    lines = {line.get_gid(): line.get_ydata().tolist() for line in figure.axes[1].lines}
    assert lines["line:recent"] == [0.5, 0.25, 0.05]
