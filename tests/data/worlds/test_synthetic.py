"""The generated world: reproducible, within its parameters, and made as its card says."""

import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from malloc_bench.data import get_dataset, load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.worlds import synthetic
from malloc_bench.data.worlds.synthetic import BREAK, catalogue, generate, histories
from malloc_bench.data.worlds.world import SyntheticWorld

NOTHING = {"call_back": 0.0, "follow": 0.0, "repeat": 0.0, "interest": 0.0, "session": 0.0}


@pytest.fixture(scope="module")
def card():
    return load_card("synthetic")


def world(card, **changes):
    changed = card.model_copy(update={"parameters": card.parameters.model_copy(update=changes)})
    return group(changed, generate(changed.parameters), "test")


def test_the_shipped_world_keeps_the_contract(no_network):
    data = get_dataset("synthetic", offline=True)
    lengths = np.diff(data.offsets)
    assert data.n_users == 300 and 450 <= data.n_items <= 500 and data.has_time
    assert lengths.min() >= 5 and lengths.max() <= 300 and lengths.sum() == data.n_events
    assert data.items.dtype == np.int32 and data.items.min() == 1 and data.items.max() == data.n_items
    for start, end in zip(data.offsets[:-1], data.offsets[1:]):
        assert (np.diff(data.times[start:end]) >= 0).all()


def test_deterministic_and_the_seed_matters(card):
    assert world(card).hash == world(card).hash
    assert world(card).hash != world(card, seed=1).hash


def test_lengths_have_a_long_tail_and_popularity_is_uneven(card):
    data = world(card, users=1500)
    lengths = np.diff(data.offsets)
    assert data.n_users == 1500 and len(set(lengths[:50])) > 10  # more than a block; numbers say nothing of lengths
    assert 30 <= np.median(lengths) <= 50 and lengths.mean() > 1.2 * np.median(lengths) and lengths.max() > 250
    counts = np.sort(np.bincount(data.items)[1:])[::-1]
    assert counts[:50].sum() > 2 * counts[-250:].sum() * 50 / 250


def one_block(card, **changes):
    made = card.parameters.model_copy(update=changes)
    (block,) = histories(made)
    return made, block, np.arange(block.items.shape[1]) < block.length[:, None]


@pytest.mark.parametrize("lag", [1, 25, 2000])
def test_call_backs_reach_as_far_as_they_should(card, lag):
    sizes = {"users": 4, "shortest": 2500, "median": 2500, "longest": 2500}
    made, block, _ = one_block(card, **NOTHING | sizes | {"call_back": 1.0, "lags": {lag: 1.0}})
    called = catalogue(made).moved(block.items[:, :-lag], made.jump)
    np.testing.assert_array_equal(block.items[:, lag:], called)
    assert len(np.unique(block.items[:, :lag])) >= min(lag, 4) // 2  # drawn, before anything can call


def test_followers_come_as_often_as_asked(card):
    made, block, real = one_block(card, **NOTHING | {"follow": 0.6})
    follows = block.items[:, 1:] == catalogue(made).moved(block.items[:, :-1], 1)
    assert follows[real[:, 1:]].mean() == pytest.approx(0.6, abs=0.02)


def test_repeats_are_of_any_earlier_event(card):
    _, block, _ = one_block(card, **NOTHING | {"repeat": 0.7, "zipf": 0.0, "items": 100_000})
    seen = np.array([len(set(row[:50].tolist())) for row in block.items])  # popularity alone hardly repeats anything
    assert 1 - (seen - 1).mean() / 49 == pytest.approx(0.7, abs=0.02)
    far = (np.arange(block.items.shape[1]) - block.parent)[:, 50][block.parent[:, 50] >= 0]
    assert far.min() == 1 and far.max() == 50 and far.mean() == pytest.approx(25.5, rel=0.15)


def test_interests_last_and_are_forgotten(card):
    made, block, _ = one_block(card, **NOTHING | {"interest": 0.8, "drift": 0.05, "shortest": 300})
    parent = block.parent[:, 200:]
    clusters = block.items // (made.items // made.clusters)
    same = np.take_along_axis(clusters, parent.clip(min=0), 1) == clusters[:, 200:]
    assert same[parent >= 0].all() and (parent >= 0).mean() == pytest.approx(0.8, abs=0.02)
    age = (np.arange(200, 300) - parent)[parent >= 0]
    assert age.mean() == pytest.approx(1 / 0.05, rel=0.05)


def test_a_session_stays_in_the_cluster_that_opened_it_and_times_tell_where(card):
    made, block, _ = one_block(card, **NOTHING | {"session": 0.9})
    clusters = block.items // (made.items // made.clusters)
    opens = block.first == np.arange(block.items.shape[1])
    assert 1 / opens[:, 1:].mean() == pytest.approx(made.session_length, rel=0.05)
    goes_on = (np.take_along_axis(clusters, block.first, 1) == clusters)[~opens].mean()
    by_chance = catalogue(made).popularity.reshape(made.clusters, -1).sum(1)
    assert 0.9 < goes_on < 0.9 + 0.1 * by_chance.max() + 0.02
    np.testing.assert_array_equal(np.diff(block.times, axis=1) >= BREAK, opens[:, 1:])


def test_the_last_item_tells_the_next(card):
    """A table of the most frequent next item, made from half of the users, predicts the others; without chains not."""

    def hits(data):
        after = np.zeros((data.n_items + 1, data.n_items + 1))
        pairs = [data.items[a:b] for a, b in zip(data.offsets[:-1], data.offsets[1:])]
        for history in pairs[::2]:
            np.add.at(after, (history[:-1], history[1:]), 1)
        return np.mean(np.concatenate([after[h[:-1]].argmax(1) == h[1:] for h in pairs[1::2]]))

    assert hits(world(card)) > 0.2
    assert hits(world(card, follow=0.0)) < 0.1


def test_users_are_made_block_by_block(card, monkeypatch):
    """Each from its own seed: whatever is drawn for one block, the others stay."""
    monkeypatch.setattr(synthetic, "BLOCK", 100)
    first, second, third = histories(card.parameters)
    assert [len(block.users) for block in (first, second, third)] == [100, 100, 100]
    assert first.length.min() >= second.length.max() and second.items.shape[1] == second.length.max()
    *_, again = histories(card.parameters)
    np.testing.assert_array_equal(third.items, again.items)
    assert sorted(np.concatenate([first.users, second.users, third.users])) == list(range(1, 301))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shortest": 50}, "needs shortest <= median <= longest"),
        ({"items": 501}, "501 items are no multiple of 10 clusters"),
        ({"repeat": 0.5}, "call_back, follow, repeat, interest and session come to more than 1"),
        ({"lags": {10: 0.5}}, "the shares of lags come to 0.5, not to 1"),
        ({"lags": {0: 1.0}}, "greater than 0"),
        ({"drift": 0.0}, "greater than 0"),
    ],
)
def test_a_world_that_cannot_be_says_why(card, changes, message):
    with pytest.raises(ValidationError, match=message):
        SyntheticWorld.model_validate(card.parameters.model_dump() | changes)


def test_no_polars_is_needed():
    code = (
        "import sys; sys.modules['polars'] = sys.modules['pyarrow'] = None\n"
        "from malloc_bench.data import get_dataset; print(get_dataset('synthetic').n_users)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "300"
