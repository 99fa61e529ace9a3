"""Ceilings against brute force: Bayes' rule over every history that a tiny world can make."""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.data import DataError, get_dataset, load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.tasks.splits import Targets, leave_one_out
from malloc_bench.data.worlds.ceilings import Ceilings, expected
from malloc_bench.data.worlds.synthetic import catalogue, generate
from malloc_bench.data.worlds.world import SyntheticWorld
from malloc_bench.evaluation.evaluate import Job, chunks, evaluate
from malloc_bench.run.rows import ceilings as ceiling_columns
from malloc_bench.training.fit import Training, fit

STEPS = 4  # events before the target of the tiny world
TINY = SyntheticWorld(
    users=20_000, items=6, seed=1, clusters=2, zipf=1.0, shortest=STEPS + 1, median=STEPS + 1, longest=STEPS + 1,
    call_back=0.35, lags={2: 0.6, 3: 0.4}, jump=2, follow=0.15, repeat=0.15, interest=0.15, drift=0.3, session=0.1,
    session_length=1e9,
)  # fmt: skip


def made(world: SyntheticWorld):
    card = load_card("synthetic").model_copy(update={"parameters": world})
    return group(card, generate(world), "test")


def probabilities(world: SyntheticWorld, past: list[int], opened: int) -> np.ndarray:
    """The next item's distribution by the definition of the world, event by event; items are codes."""
    items = catalogue(world)
    p, size, now = items.popularity, items.size, len(past)

    def only(item):
        return np.eye(world.items)[item]

    def of_cluster(item):
        inside = np.where(np.arange(world.items) // size == item // size, p, 0.0)
        return inside / inside.sum()

    def on(item, places):
        return item // size * size + (item + places - item // size * size) % size

    total = np.zeros(world.items)
    for lag, share in world.lags.items():
        total += world.call_back * share * (only(on(past[now - lag], world.jump)) if lag <= now else p)
    total += world.follow * (only(on(past[-1], 1)) if past else p)
    total += world.repeat * (np.mean([only(item) for item in past], axis=0) if past else p)
    goes_on = opened < now
    ages = [world.drift * (1 - world.drift) ** (now - 1 - step) for step in range(now)]
    interest = sum((a * of_cluster(item) for a, item in zip(ages, past)), np.zeros(world.items)) + (1 - sum(ages)) * p
    total += (world.interest + world.session * (not goes_on)) * interest
    total += world.session * of_cluster(past[opened]) if goes_on else 0
    return total + (1 - sum(world.shares)) * p


@pytest.fixture(scope="module")
def every_history():
    """history -> (its probability, the next item's distribution), for all that TINY can make."""
    found = {(): 1.0}
    for _ in range(STEPS):
        found = {
            (*past, item): chance * p
            for past, chance in found.items()
            for item, p in enumerate(probabilities(TINY, list(past), 0))
        }
    return {past: (chance, probabilities(TINY, list(past), 0)) for past, chance in found.items()}


@pytest.fixture(scope="module")
def tiny():
    data = made(TINY)
    return Ceilings(data, leave_one_out(data).test, limit=TINY.users, hits=(1, 2))


def given(every_history, steps) -> dict[tuple[int, ...], np.ndarray]:
    """items at `steps` -> joint probability of them and each next item."""
    joint: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(TINY.items))
    for past, (chance, following) in every_history.items():
        joint[tuple(past[step] for step in steps)] += chance * following
    return joint


def best(every_history, steps) -> dict[str, float]:
    """What nobody who knows the items at `steps` can beat, and who knows Bayes' rule reaches."""
    joint = np.stack(list(given(every_history, steps).values()))
    return {name: float(values.sum()) for name, values in expected(joint, joint, hits=(1, 2)).items()}


def assert_between(low, exact, high, slack=4.0):
    """Means of per-target values around an exact number, give or take `slack` standard errors."""
    for name, value in exact.items():
        for values, sign in ((low, 1), (high, -1)):
            if values is not None:
                error = slack * values[name].std() / len(values[name]) ** 0.5
                assert sign * (values[name].mean() - value) <= error + 1e-9, (name, value, values[name].mean())


def test_expected_values_by_definition():
    rng = np.random.default_rng(0)
    scores, truth = rng.permuted(np.tile(np.arange(7.0), (5, 1)), axis=1), rng.dirichlet(np.ones(7), 5)
    found = expected(scores, truth, hits=(2,))
    for s, p, hits, auc in zip(scores, truth, found["hr@2"], found["auc"]):
        assert hits == pytest.approx(sum(p[i] for i in range(7) if sum(s > s[i]) < 2))
        pairs = [p[i] * (s[i] > s[j]) / 6 for i in range(7) for j in range(7) if i != j]
        assert auc == pytest.approx(sum(pairs))


def test_all_chances_are_counted(every_history):
    assert sum(chance for chance, _ in every_history.values()) == pytest.approx(1)


def test_the_whole_history_and_nothing_are_exact(tiny, every_history):
    assert len(tiny.rows) == TINY.users
    full = best(every_history, range(STEPS))
    assert_between(tiny.full(), full, tiny.full())
    floor = best(every_history, ())
    assert full["hr@1"] > floor["hr@1"] + 0.1
    assert_between(tiny.floor(), floor, tiny.floor())


@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_a_window_lies_between_what_is_reached_and_at_most(tiny, every_history, count):
    exact = best(every_history, range(STEPS - count, STEPS))
    assert_between(tiny.window_reached(count), exact, tiny.window(count))
    most = {name: values.mean() for name, values in tiny.window(count).items()}
    assert all(most[name] <= exact[name] + 0.1 for name in exact), "the genie gives too much away"
    assert all(most[name] <= values.mean() + 4e-3 for name, values in tiny.full().items())


@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_no_choice_of_events_beats_the_oracle(tiny, every_history, count):
    for steps in itertools.combinations(range(STEPS), count):
        assert_between(None, best(every_history, steps), tiny.oracle(count))
    (steps,) = {tuple(np.flatnonzero(row)) for chunk in tiny.chunks for row in chunk.weightiest(count)[:3]}
    assert len(steps) == count
    assert_between(tiny.oracle_reached(count), best(every_history, steps), None)


@pytest.mark.parametrize("count", range(STEPS + 1))
def test_the_genie_is_right_on_average(tiny, every_history, count):
    """Over users with the same window, its predictions average to Bayes' rule without it."""
    exact = given(every_history, range(STEPS - count, STEPS))
    seen: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for chunk in tiny.chunks:
        for row, p in zip(chunk.items[:, STEPS - count : STEPS], chunk.predictive(chunk.newest(count))):
            seen[tuple(row.tolist())].append(p)
    common = [window for window, found in seen.items() if len(found) > 400]
    assert common
    for window in common:
        found = np.stack(seen[window])
        error = 5 * found.std(0) / len(found) ** 0.5 + 1e-9
        assert (np.abs(found.mean(0) - exact[window] / exact[window].sum()) <= error).all(), window


@pytest.fixture(scope="module")
def small():
    data = get_dataset("synthetic")
    return data, leave_one_out(data).test


def test_the_truth_is_the_definition_of_the_world(small):
    known = Ceilings(*small)
    world = known.chunks[0].world
    checked = 0
    for chunk in known.chunks:
        for row in range(0, len(chunk.at), 29):
            at = chunk.at[row]
            want = probabilities(world, chunk.items[row, :at].tolist(), int(chunk.opened[row]))
            np.testing.assert_allclose(chunk.truth[row], want, atol=1e-12)
            checked += chunk.opened[row] < at
    assert checked > 5  # sessions that go on, too


def test_targets_come_as_often_as_predicted():
    """The realised hits of the best ranking are its ceiling, up to chance."""
    data = get_dataset("synthetic-callback")
    test = leave_one_out(data).test
    known = Ceilings(data, test)
    numbers = catalogue(data.card.parameters).numbers
    target = dict(zip(data.user_ids.tolist(), data.item_ids[data.items[test.at] - 1].tolist()))
    hits = []
    users = iter(data.user_ids[test.users[known.rows]].tolist())
    for chunk in known.chunks:
        for p in chunk.truth:
            hits.append(target[next(users)] in numbers[np.argsort(-p, kind="stable")[:10]])
    full = known.full()["hr@10"]
    assert abs(np.mean(hits) - full.mean()) < 4 * np.sqrt((full * (1 - full)).sum()) / len(full)
    floor, window = known.floor()["hr@10"].mean(), known.window(16)["hr@10"].mean()
    assert full.mean() > floor + 0.2 and window < (floor + full.mean()) / 2


def test_a_window_of_everything_is_everything(small):
    known = Ceilings(*small)
    longest = max(int(chunk.at.max()) for chunk in known.chunks)
    per_user = np.concatenate([chunk.at for chunk in known.chunks])
    for count in (longest, per_user):
        for name, values in known.window(count).items():
            np.testing.assert_allclose(values, known.full()[name], atol=1e-12)
    means = [known.window(count)["hr@10"].mean() for count in (1, 4, 16, 64, longest)]
    assert means == sorted(means)


def test_fewer_targets_give_the_same_values(small):
    every, some = Ceilings(*small), Ceilings(*small, limit=40)
    assert len(some.rows) == 40
    place = {int(row): i for i, row in enumerate(every.rows)}
    index = [place[int(row)] for row in some.rows]
    np.testing.assert_allclose(some.full()["auc"], every.full()["auc"][index], atol=1e-12)


def test_any_place_in_a_history_is_a_target(small):
    data, _ = small
    users = np.arange(0, data.n_users, 3)
    first = Ceilings(data, Targets(users, data.offsets[users]))
    np.testing.assert_allclose(first.full()["hr@10"], first.floor()["hr@10"], atol=1e-12)  # popularity is all there is


def test_the_table_says_all_of_it(small):
    table = Ceilings(*small).table()
    assert table["targets"] == 300 and [*table["window"]] == ["1", "2", "4", "8", "16", "32", "64", "128", "256"]
    for known in ("window", "oracle"):
        for bounds in table[known].values():
            for name, (most, error) in bounds["at_most"].items():
                assert bounds["reached"][name][0] <= most + 1e-9 and 0 < error < 0.1


def test_only_generated_worlds_have_ceilings(small):
    data, test = small
    plain = data.card.model_copy(update={"parameters": None})
    with pytest.raises(DataError, match=r"synthetic: only a generated data set \(format: synthetic\) has ceilings"):
        Ceilings(replace(data, card=plain), test)
    for change in ({"seed": 1}, {"jump": 3}, {"users": 200}, {"longest": 100}):
        other = data.card.model_copy(update={"parameters": data.card.parameters.model_copy(update=change)})
        with pytest.raises(DataError, match="its events are not those that its card's parameters generate"):
            Ceilings(replace(data, card=other), test)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of work, more on a busy machine
def test_a_trained_backbone_comes_near_the_ceiling_and_a_window_stays_under_its_own(tmp_path):
    data = get_dataset("synthetic-callback")
    split = leave_one_out(data)
    torch.manual_seed(0)
    backbone = get_backbone("hstu", data.n_items, data.has_time, dim=48, max_length=140, dropout=0.0)
    started = time.process_time()
    fit(backbone, split, Training(epochs=16, batch_size=32, lr=4e-3, patience=16), 0, tmp_path, filter_seen=False)
    assert time.process_time() - started < 300
    windows = [
        Job(f"{name} {count}", get_compressor(name), Budget.parse({"slots": count - 1}))
        for name in ("recent", "truncate")
        for count in (8, 16, 32, 64)
    ]
    jobs = [Job("full", get_compressor("full")), Job("none", get_compressor("none")), *windows]
    result = evaluate(backbone, split, jobs, filter_seen=False)
    assert not result.failed
    order = np.concatenate(chunks(backbone, split))
    known = Ceilings(data, Targets(split.test.users[order], split.test.at[order]))
    rows = ceiling_columns(known, result, [job.id for job in jobs])
    hits = {job.id: float((result.values[job.id]["rank"] < 10).mean()) for job in jobs}
    floor, full = rows["full"]["ceiling_none_hr@10"], rows["full"]["ceiling_full_hr@10"]
    chance = 3 * (full * (1 - full) / len(order)) ** 0.5
    assert full >= floor + 0.2 and rows["recent 16"]["ceiling_window_hr@10"] < (floor + full) / 2
    assert floor + 0.8 * (full - floor) <= hits["full"] <= full + chance
    assert hits["none"] <= rows["none"]["ceiling_window_hr@10"] + chance
    for count in (8, 16, 32, 64):
        most = rows[f"recent {count}"]["ceiling_window_hr@10"]
        assert most == pytest.approx(known.window(count)["hr@10"].mean())
        for name in ("recent", "truncate"):
            assert hits[f"{name} {count}"] <= most + chance
    assert hits["recent 16"] < rows["recent 16"]["ceiling_window_hr@10"] < hits["full"]
