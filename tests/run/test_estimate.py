"""What a dry run says of this machine: costs of every group, by some steps and users of it, and nothing left behind."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from malloc_bench import load_suite, run_suite
from malloc_bench.cli import main
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.splits import Split, Targets
from malloc_bench.data.tasks.tasks import Retrieval
from malloc_bench.data.tasks.trained import sampled
from malloc_bench.run import estimate
from malloc_bench.run.fits import Fits
from malloc_bench.run.models import fresh
from malloc_bench.suite.cells import Part


@pytest.fixture(autouse=True)
def own_world(tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_a_short_plan_is_not_probed():
    result = run_suite("smoke", dry_run=True)
    assert result.probe is None and len(result.costs) == 1 and result.estimate > 0


def test_a_probe_puts_measured_costs_in_place_of_rough_ones(monkeypatch, capsys):
    suite = dataclasses.replace(load_suite("smoke"), seeds=(0, 1))
    rough = run_suite(suite, dry_run=True)
    monkeypatch.setattr(estimate, "ENOUGH", 0.0)
    monkeypatch.setattr(estimate, "PROBE", 0.1)
    result = run_suite(suite, dry_run=True)
    assert result.probe is not None and 0 < result.probe < 60
    first, second = result.costs.values()
    assert first == second != next(iter(rough.costs.values()))  # one probe serves all seeds
    assert first.train > 0 and first.evaluate > 0 and first.measure == next(iter(rough.costs.values())).measure
    left = [each.name for each in Path("home").rglob("*") if "checkpoints" in each.parts or each.name == "fits"]
    assert not left and not Path("runs").exists()
    assert main(["run", "smoke", "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert (
        said.startswith("10 cells: 0 done, 10 to run: about ") and "training at most" in said and "probed for" in said
    )


def test_what_cannot_be_timed_leaves_the_rough_costs(monkeypatch):
    monkeypatch.setattr(estimate, "ENOUGH", 0.0)

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(estimate, "_epoch", broken)
    result = run_suite("smoke", dry_run=True)
    assert result.probe is None and result.estimate > 0


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test adds them."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def parts():
    """An untrained backbone, its split, its first cell and all of them."""
    plan, data = run_suite("smoke", dry_run=True).plan, get_dataset("synthetic")
    cell = plan[0].cell
    return fresh(cell, data), cell.task.cut(data, cell.split), cell, plan


def test_validation_is_told_by_users_of_one_length_and_not_by_its_first_call(monkeypatch, clock):
    asked = []

    def validated(backbone, split, targets, n):
        clock.seconds += 100.0 * (not asked) + 1.0
        asked.append(targets.at - split.dataset.offsets[targets.users])

    monkeypatch.setattr(estimate, "validation_ndcg", validated)
    length = np.r_[np.full(3000, 2), np.full(300, 30), np.full(700, 50)]  # of root mean square 22
    offsets = np.r_[0, length.cumsum()]
    split = Split("all", SimpleNamespace(offsets=offsets), None, Targets(np.arange(4000), offsets[1:]), None)
    assert estimate._validation(SimpleNamespace(max_length=200), split) == pytest.approx(4000 / 256)
    assert set(asked[-1]) == {30} and len(asked[-1]) == 256


def test_what_an_evaluation_does_once_is_not_done_for_every_user(monkeypatch, clock, tmp_path):
    backbone, split, cell, plan = parts()

    def evaluated(backbone, cut, jobs):
        clock.seconds += 50.0 + len(cut.test) * (1 + 2 * len(jobs))

    monkeypatch.setattr(estimate, "evaluate", evaluated)
    members = [each for each in plan if each.cell.compressor.name in ("full", "none")]
    tests = len(split.test)
    judged = estimate._evaluation(backbone, split, cell, members, tmp_path, 1e9)
    assert judged == pytest.approx(50 + tests + 2 * 2 * tests)
    mqa = dataclasses.replace(plan[0].cell, compressor=Part("mqa"))
    adapted = [*members, *(dataclasses.replace(plan[0], cell=mqa, id=each) for each in "ab")]
    judged = estimate._evaluation(backbone, split, cell, adapted, tmp_path, 1e9)
    assert judged == pytest.approx(2 * (50 + tests) + 4 * 2 * tests)  # one prefill more for both


def test_a_fit_is_told_by_users_or_by_itself(monkeypatch, tmp_path):
    backbone, split, _, plan = parts()
    made = []

    def learned(fits, compressor, budget):
        made.append(fits.users)
        return None, first * (len(made) == 1) + 1.0 + 0.5 * fits.users

    monkeypatch.setattr(Fits, "of", learned)
    fits, first = Fits(backbone, backbone, split, tmp_path, "probe", 0), 2.0
    users = len(sampled(split, fits.users))
    assert estimate._job(fits, plan[0])[1] == pytest.approx(1 + 0.5 * users)  # the first is slow
    assert made == [*estimate.FITTED]
    made.clear()
    first = 90.0  # so few users are no reason
    assert estimate._job(fits, plan[0])[1] == 90 + 1 + 0.5 * estimate.FITTED[0]
    assert made == [estimate.FITTED[0]]


def test_a_checkpoint_that_groups_share_is_trained_once():
    suite = load_suite("smoke")
    tasks = dataclasses.replace(suite, tasks=(Retrieval(), Retrieval(history=5)))
    one, both = (run_suite(each, dry_run=True).costs.values() for each in (suite, tasks))
    assert [cost.epochs for cost in both] == [cost.epochs for cost in one] + [0] == [2, 0]


def test_seeds_that_are_trained_tell_nothing_of_those_that_are_not(monkeypatch):
    suite = dataclasses.replace(load_suite("smoke"), seeds=(0, 1, 2))
    result = run_suite(suite, dry_run=True)
    for n, (key, cost) in enumerate(list(result.costs.items())):
        left = n > 0  # the first seed is trained
        result.costs[key] = dataclasses.replace(cost, train=100.0 * left, epochs=20 * left, evaluate=100.0)
    monkeypatch.setattr(estimate, "_group", lambda *_: (50.0, 200.0, 0.0))
    assert estimate.probed(result, {"synthetic": None}, None, suite.measure) is not None
    assert [cost.train for cost in result.costs.values()] == [0.0, 1000.0, 1000.0]  # of 20 epochs of 50 s
    assert [cost.evaluate for cost in result.costs.values()] == [200.0] * 3


def test_an_epoch_that_cannot_be_timed_leaves_the_rough_cost(monkeypatch):
    suite = load_suite("smoke")
    result = run_suite(suite, dry_run=True)
    rough = next(iter(result.costs.values())).train
    monkeypatch.setattr(estimate, "ENOUGH", 0.0)
    monkeypatch.setattr(estimate, "_group", lambda *_: (float("nan"), 200.0, 0.0))
    estimate.probed(result, {"synthetic": None}, None, suite.measure)
    assert [cost.train for cost in result.costs.values()] == [rough]
