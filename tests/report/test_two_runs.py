"""Two runs that have not the same trainings, budgets, backbones or settings of a method."""

import pytest
from rich.console import Console

from malloc_bench.report.two_runs import print_two_runs, two_runs
from malloc_bench.results import cell_id, write_row


@pytest.fixture
def run(row, tmp_path):
    def written(name, *rows):
        for each in rows:
            made = row(**{"bytes_mean": 250.0, "ratio": 0.25, "family": "eviction", **each})
            cell = {key: made[key] for key in ("seed", "budget", "backbone_params")} | {
                "compressor": made.pop("settings", {})
            }
            write_row(tmp_path / name / "rows", {**made, "cell": cell, "cell_id": cell_id(cell)})
        return tmp_path / name

    return written


def h2o(seed, ndcg, **values):
    return {"compressor": "h2o", "budget": 0.25, "seed": seed, "ndcg@10": ndcg, "overlap@10": ndcg, **values}


def test_trainings_that_one_run_has_alone_do_not_count(run, capsys):
    found = two_runs(run("a", h2o(0, 0.1), h2o(1, 0.3)), run("b", h2o(1, 0.29), h2o(2, 0.9)))
    (one,) = found.iter_rows(named=True)
    assert one["main"] == pytest.approx(-0.01) and one["alike"] == pytest.approx(-0.01) and one["seeds"] == "1"
    print_two_runs(found, Console(width=200))
    assert "h2o: over the trainings that both have (seed 1)" in capsys.readouterr().out


def test_no_training_in_common_is_no_difference(run):
    (one,) = two_runs(run("a", h2o(0, 0.1)), run("b", h2o(1, 0.1))).iter_rows(named=True)
    assert (one["main"], one["alike"], one["seeds"], one["equal"]) == (None, None, "", None)


def test_bytes_and_what_is_equal_are_of_the_trainings_that_both_have(run):
    rows = [h2o(seed, 0.1 + seed / 7, bytes_mean=250.0 + seed, read_ratio=1.0 + seed) for seed in range(3)]
    (one,) = two_runs(run("a", *rows), run("b", *rows[:2])).iter_rows(named=True)
    assert one["equal"] and (one["bytes_ratio"], one["read_ratio"], one["main"]) == (1, 1, 0)


def test_budgets_that_share_a_state_are_compared_one_by_one(run):
    several = [h2o(0, 0.1, budget=budget, values_digest="x", p_value=0.5) for budget in (0.5, 0.25)]
    found = two_runs(run("a", *several), run("b", h2o(0, 0.2)))
    assert found["budget"].to_list() == ["25 %"] and found["main"].to_list() == [pytest.approx(0.1)]
    assert found.select("only_one", "only_other").row(0) == (1, 0)


def test_a_run_of_one_variant_meets_a_run_of_several(run):
    small, large = ({"backbone_params": {"layers": n}} for n in (2, 4))
    found = two_runs(run("a", h2o(0, 0.1, **small), h2o(0, 0.2, **large)), run("b", h2o(0, 0.3, **large)))
    (one,) = found.iter_rows(named=True)
    assert one["main"] == pytest.approx(0.1) and (one["only_one"], one["only_other"]) == (1, 0)


def test_what_a_method_is_set_to_otherwise_is_said(run, capsys):
    sides = [run(name, h2o(0, 0.1, settings={"version": n})) for n, name in enumerate("ab", 1)]
    found = two_runs(*sides)
    assert found["equal"].item() and "version 1, then 2" in found["settings"].item()
    print_two_runs(found, Console(width=200))
    assert "h2o is not the same method: " in capsys.readouterr().out
