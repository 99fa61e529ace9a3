"""The generated world: reproducible, within its parameters, and with something to learn."""

import subprocess
import sys

import numpy as np
import pytest

from malloc_bench.data import get_dataset, load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.synthetic import generate


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
        assert len(set(data.items[start:end])) == end - start, "no history repeats an item"
        assert (np.diff(data.times[start:end]) >= 0).all()


def test_deterministic_and_the_seed_matters(card):
    assert world(card).hash == world(card).hash
    assert world(card).hash != world(card, seed=1).hash


def test_lengths_have_a_long_tail_and_popularity_is_uneven(card):
    data = world(card, users=1000)
    lengths = np.diff(data.offsets)
    assert 30 <= np.median(lengths) <= 50 and lengths.mean() > 1.2 * np.median(lengths) and lengths.max() > 250
    counts = np.sort(np.bincount(data.items)[1:])[::-1]
    assert counts[:50].sum() > 3 * counts[-250:].sum() * 50 / 250


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


def test_no_polars_is_needed():
    code = (
        "import sys; sys.modules['polars'] = sys.modules['pyarrow'] = None\n"
        "from malloc_bench.data import get_dataset; print(get_dataset('synthetic').n_users)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "300"
