"""Coded ids: the same ids come back, in as many bytes as the entropy says, and nothing else is taken for them."""

import math

import pytest
import torch

from malloc_bench.state import CodedEvents, Events, ItemFrequencies, UserState

COUNTS = (0, 1, 2, 17, 300)


def drawn(n_items, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / torch.arange(1, n_items + 1).double()
    items = torch.multinomial(weights, len(COUNTS) * max(COUNTS), replacement=True, generator=generator) + 1
    count = torch.tensor(COUNTS, dtype=torch.int32)
    items = items.view(len(COUNTS), -1).int() * (torch.arange(max(COUNTS)) < count[:, None])
    return Events(items, count), weights * 1e6


def state_of(events, table):
    return UserState((), events.count, CodedEvents.of(events, table))


@pytest.mark.parametrize("n_items", [1, 2, 60, 5000])
def test_ids_come_back_in_the_bytes_that_entropy_allows(n_items):
    events, counts = drawn(n_items)
    table = ItemFrequencies(counts)
    assert int(table.freq.sum()) == 1 << 24 and int(table.freq.min()) >= 0 and int(table.freq[:-1].min()) >= 1
    state = state_of(events, table)
    blobs = [state.pack(user) for user in range(len(COUNTS))]
    for user, n in enumerate(COUNTS):
        bits = sum(math.log2((1 << 24) / int(table.freq[item - 1])) for item in events.items[user, :n].tolist())
        assert len(blobs[user]) == int(state.nbytes()[user]) <= 8 + 5 + bits / 8
        assert n == 0 or len(blobs[user]) > 8 + 4 + bits / 8 - 0.01  # the coder's state and whole bytes, no more
    others, _ = drawn(n_items, seed=1)
    back = state_of(others, table).take(torch.tensor([4, 0, 1])).unpack(blobs[::-1])
    assert back.events is not None
    for user, n in enumerate(reversed(COUNTS)):
        assert back.events.items[user, :n].tolist() == events.items[len(COUNTS) - 1 - user, :n].tolist()
    assert [back.pack(user) for user in range(len(COUNTS))] == blobs[::-1]


def test_other_bytes_are_refused():
    events, counts = drawn(60)
    state = state_of(events, ItemFrequencies(counts))
    blobs = [state.pack(user) for user in range(len(COUNTS))]
    for at in range(4, len(blobs[3])):
        spoilt = bytearray(blobs[3])
        spoilt[at] ^= 64
        with pytest.raises(ValueError, match="packed state of user 0"):
            state.unpack([bytes(spoilt)])
    for wrong in (blobs[3][:-1], blobs[3] + b"!", b"\xff\xff\xff\x7f" + blobs[3][4:]):
        with pytest.raises(ValueError, match="packed state of user 0"):
            state.unpack([wrong])


def test_rare_ids_cost_more():
    table = ItemFrequencies(torch.tensor([1e9, 1.0, 0.0]))
    events = [Events(torch.full((1, 100), item, dtype=torch.int32), torch.tensor([100]).int()) for item in (1, 2, 3)]
    common, rare, never = (int(state_of(each, table).nbytes()) for each in events)
    assert common <= 8 + 5 + 100 / 8 + 1 < rare <= never <= 8 + 5 + 100 * 24 / 8
    with pytest.raises(ValueError, match="ids are coded of 1 to"):
        ItemFrequencies(torch.zeros(0))
