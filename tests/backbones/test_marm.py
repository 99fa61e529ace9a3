"""MARM against SASRec's stack of the same weights, its search against loops, its cache against what was written."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.marm_cache import MemoryCache
from malloc_bench.backbones.marm_stream import read_gap, slices, stream
from malloc_bench.data.tasks.batches import window
from malloc_bench.measure import count_flops
from malloc_bench.state import Batch, Dense, Events, Segment, Slots, Stats, UserState
from malloc_bench.testing import check_backbone, histories
from malloc_bench.testing.worlds import LENGTHS, close

SEARCHES = [{"search": "dot", "top_k": 4}, {"search": "group", "top_k": 4, "groups": 4}]


def like(other, name="marm", **params):
    """A backbone with the weights of another one of the same sizes."""
    c = other.config
    sizes = {"layers": c.layers, "heads": c.heads, "dim": c.dim, "max_length": c.max_length, "dropout": 0.0}
    made = get_backbone(name, other.n_items, **{**sizes, **params})
    made.load_state_dict(other.state_dict())
    return made.eval().requires_grad_(False)


@pytest.mark.parametrize("case", ["marm", "marm-2-heads"])
def test_with_a_fresh_cache_it_is_the_masked_self_attention_stack(case, trained):
    """Plain forward, and a read over the cached outputs of each layer, against attention over keys and values."""
    backbone = trained(case)
    stack = like(backbone, "sasrec")
    history, tokens = histories(backbone, LENGTHS)
    close(backbone(history), stack(history), "plain pass", 1e-5)
    fresh, full = backbone.prefill(history).state, stack.prefill(history).state
    close(backbone.read(tokens, fresh), stack.read(tokens, full), "read", 1e-5)
    numbers = backbone.config.layers * backbone.config.dim * torch.tensor(LENGTHS)
    assert torch.equal(fresh.nbytes() - fresh.nbytes()[0], 4 * numbers)
    assert torch.equal(full.nbytes() - full.nbytes()[0], 8 * numbers)


def test_layer_0_is_the_item_itself(trained):
    backbone = trained("marm")
    history, _ = histories(backbone, LENGTHS)
    other = Events(history.items.flip(1), history.count)
    other.items[:, 7] = history.items[:, 7]
    mine, theirs = (backbone.prefill(events).state.layers for events in (history, other))
    for layer in range(2):
        a, b = (x[layer][0].fields["hidden"].dense()[-1, 0, 7] for x in (mine, theirs))
        assert torch.equal(a, b) == (layer == 0)


@pytest.mark.parametrize("case", ["marm", "marm-2-heads"])
def test_statistics_are_means_over_heads(case, trained):
    backbone = trained(case)
    history, _ = histories(backbone, LENGTHS)
    stats = Stats(column_sum=True, window=3)
    ours, stack = (b.prefill(history, stats=stats) for b in (backbone, like(backbone, "sasrec")))
    for layer in ours.layers:
        mean = stack.attention_received(layer).mean(1, keepdim=True)
        close(ours.attention_received(layer), mean, "received", 1e-5)
        mean = stack.newest_attention(layer, 3).mean(1, keepdim=True)
        close(ours.newest_attention(layer, 3), mean, "newest", 1e-5)


@pytest.mark.parametrize("case", ["marm", "marm-2-heads"])
@pytest.mark.parametrize("search", SEARCHES, ids=lambda p: p["search"])
def test_a_search_keeps_every_promise(search, case, trained):
    check_backbone(like(trained(case), **search).requires_grad_(True))


@pytest.mark.parametrize("search", SEARCHES, ids=lambda p: p["search"])
def test_each_head_of_each_layer_finds_its_own_slots(search, trained):
    """One layer of 40 stored vectors, in loops: which slots are found, and softmax over them alone."""
    block, k = like(trained("marm-2-heads"), **search).blocks[1], search["top_k"]
    x = torch.randn(1, 41, 16, generator=torch.Generator().manual_seed(0))
    q, own, _ = block.project(x)
    hidden = own["hidden"]
    past = Segment({"hidden": Dense(hidden[:, :, :40])}, Slots(torch.tensor([[40]])))
    token = Segment({"hidden": Dense(hidden[:, :, 40:])}, None)
    real, alone = torch.ones(1, 1, 1, 40, dtype=torch.bool), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    logits = [block.logits(q[:, :, 40:], s, None, None) for s in (past, token)]
    weights = block.weigh(logits, [real, alone], [None, None])
    assert block._gathers(past) and not block._gathers(token)
    mixed = block.mix(weights[0], past) + block.mix(weights[1], token)
    for head in range(2):
        dots = hidden[0, 0] @ q[0, head, 40, :16]
        if search["search"] == "dot":
            found = dots.argsort(descending=True)[:k]
        else:
            axis = hidden[0, 0, :, :2].abs().argmax(1)
            group = [(int(a), bool(h[a] > 0)) for a, h in zip(axis, hidden[0, 0])]
            found = torch.tensor([i for i in range(41) if group[i] == group[40]][-k:])
        assert len(found) == k
        expected = dots[found].softmax(0) @ hidden[0, 0, found]
        close(mixed[0, head, 0], expected, f"head {head}", 1e-5)


@pytest.mark.parametrize("search", SEARCHES, ids=lambda p: p["search"])
def test_a_search_that_finds_everything_changes_nothing(search, trained):
    backbone = trained("marm")
    history, tokens = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    for top_k, same in ((64, search["search"] == "dot"), (2, False)):
        searching = like(backbone, **{**search, "top_k": top_k})
        moved = float((searching.read(tokens, state) - backbone.read(tokens, state)).abs().max())
        assert (moved < 1e-5) == same


@pytest.mark.parametrize("history", [20, 300])
@pytest.mark.parametrize("search", SEARCHES, ids=lambda p: p["search"])
def test_flops_of_a_search_are_what_the_counter_counts(search, history):
    backbone = get_backbone("marm", 60, dim=16, heads=2, max_length=320, **search).eval()
    events, tokens = histories(backbone, (history,))
    with torch.inference_mode():
        state = backbone.prefill(events).state
        assert backbone.flops("prefill", history) == count_flops(lambda: backbone.prefill(events))
        assert backbone.flops("read", 2, state) == count_flops(lambda: backbone.read(tokens, state))
        assert backbone.flops("append", 2, state) == count_flops(lambda: backbone.append(state, tokens))
        raw = UserState((), events.count, events)
        assert backbone.flops("read", 2, raw) == count_flops(lambda: backbone.read(tokens, raw))
        dense = get_backbone("marm", 60, dim=16, heads=2, max_length=320).eval()
        saved = dense.flops("read", 2, state) - backbone.flops("read", 2, state)
        assert saved == (2 * 2 * 2 * 2 * (history - 4) * 16 if history == 300 else 0)


def test_a_read_is_linear_in_the_history():
    backbone = get_backbone("marm", 60, dim=16, max_length=1024).eval()
    with torch.inference_mode():
        states = [backbone.prefill(histories(backbone, (n,))[0]).state for n in (256, 512, 1024)]
    a, b, c = (backbone.flops("read", 1, state) for state in states)
    assert c - b == 2 * (b - a) > 0


@pytest.mark.parametrize(
    "params, said",
    [({"search": "sim"}, "search must be"), ({"top_k": 0}, "top_k must be"), ({"groups": 3}, "groups must be")],
    ids=str,
)
def test_a_config_that_makes_no_search_is_refused(params, said):
    with pytest.raises(ValueError, match=said):
        get_backbone("marm", 5, **params)


def remembered(backbone, users=6, refresh=1):
    """A copy of the backbone, an empty memory, histories of users 0..5 and their tokens."""
    history, tokens = histories(backbone, LENGTHS)
    return like(backbone), MemoryCache(users, backbone.config, refresh), torch.arange(len(LENGTHS)), history, tokens


def test_a_cache_of_todays_outputs_is_the_stack(trained):
    """Empty, half full and full: what is missing is built and written back, what is there is not built again."""
    backbone, memory, users, history, tokens = remembered(trained("marm-2-heads"))
    backbone.memory = memory
    whole = backbone.prefill(history).state  # no users: built, not looked up
    assert not memory.items.any() and memory.hit_rate != memory.hit_rate
    for found in (0, sum(LENGTHS)):
        memory.asked = memory.found = 0
        state = backbone.prefill(history, users).state
        assert (memory.asked, memory.found) == (sum(LENGTHS), found)
        close(backbone.read(tokens, state), backbone.read(tokens, whole), f"{found} found", 1e-5)
        assert torch.equal(state.nbytes(), whole.nbytes())
    assert count_flops(lambda: backbone.prefill(history, users)) == 0 < count_flops(lambda: backbone.prefill(history))
    memory.items[4, 5] = memory.items[4, 6]  # another item at user 4's sixth place
    memory.asked = memory.found = 0
    close(backbone.read(tokens, backbone.prefill(history, users).state), backbone.read(tokens, whole), "again", 1e-5)
    assert memory.hit_rate == (sum(LENGTHS) - 1) / sum(LENGTHS)
    stats = Stats(column_sum=True)
    close(backbone.prefill(history, users, stats).attention_received(1),
          backbone.prefill(history, stats=stats).attention_received(1), "statistics", 1e-6)  # fmt: skip


def test_layers_above_the_items_are_read_from_the_cache(trained):
    """Each entry matters, and only to its own user; what is read of layer 0 is the item of today."""
    backbone, memory, users, history, tokens = remembered(trained("marm"))
    clean = backbone.read(tokens, backbone.recall(memory, users, history))
    memory.vectors[4] += torch.randn(memory.vectors[4].shape, generator=torch.Generator().manual_seed(0))
    stale = backbone.recall(memory, users, history)
    moved = (backbone.read(tokens, stale) - clean).flatten(1).norm(dim=1)
    assert moved[4] > 0.01 and not moved[[0, 1, 2, 3, 5]].any()
    with torch.no_grad():
        backbone.items.weight += 1
    renewed = backbone.recall(memory, users, history)
    for layer, same in ((0, False), (1, True)):
        a, b = (s.layers[layer][0].fields["hidden"].dense() for s in (stale, renewed))
        assert torch.equal(a, b) == same


def test_results_are_written_back(trained):
    """New events attend to the cached outputs, and their own become entries with the step of the time."""
    backbone, memory, users, history, tokens = remembered(trained("marm"))
    state = backbone.append(backbone.recall(memory, users, history), tokens)
    longer = Events(torch.zeros(6, 42, dtype=torch.int32), history.count + 2)
    longer.items[:, :40] = history.items
    for m in range(2):
        longer.items.scatter_(1, history.count.long()[:, None] + m, tokens.items[:, m : m + 1])
    memory.now = 7
    memory.write(users, longer, state, ~memory.held(users, longer))
    assert memory.held(users, longer).sum() == sum(LENGTHS) + 12 == (memory.items > 0).sum()
    assert (memory.steps == 7).sum() == 12
    close(backbone.read(tokens, backbone.recall(memory, users, longer)),
          backbone.read(tokens, backbone.prefill(longer).state), "written back", 1e-5)  # fmt: skip


def test_more_events_than_places_are_refused(trained):
    backbone, memory, users, *_ = remembered(trained("marm"))
    history, _ = histories(backbone, (65,) * 6)
    with pytest.raises(ValueError, match="max_length=64 places a user, the history has 65"):
        backbone.recall(memory, users, history)


@pytest.fixture(scope="module")
def streamed(synthetic):
    """A model after six epochs of a log, and memories renewed in every epoch, in every other one, and never."""
    data, epochs = synthetic.dataset, 6
    users = np.flatnonzero(synthetic.train_end - data.offsets[:-1] >= 12)[:200]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = get_backbone("marm", data.n_items, dim=16, max_length=64, dropout=0.0)
        log = window(data, users, synthetic.train_end[users], 32)
        memories = {name: MemoryCache(len(users), backbone.config, n) for name, n in (("1", 1), ("2", 2), ("never", 0))}
        optimizer = torch.optim.Adam(backbone.parameters(), 1e-2)
        stream(backbone, log, optimizer, list(memories.values()), epochs=epochs, chunk=800)
    return backbone, memories, log, epochs


def test_a_step_is_the_next_events_of_all_users_in_time():
    """Events of one time stay together; without times users go side by side."""
    times = torch.tensor([[1, 2, 3, 9, 9, 9], [2, 4, 9, 10, 0, 0], [5, 5, 5, 5, 5, 5]])
    log = Events(torch.ones(3, 6, dtype=torch.int32), torch.tensor([6, 4, 0], dtype=torch.int32), times)
    assert slices(log, 5).tolist() == [[3, 2, 0], [6, 4, 0]]
    assert slices(log, 6).tolist() == [[6, 3, 0], [6, 4, 0]]
    assert slices(replace(log, times=None), 4).tolist() == [[2, 2, 0], [4, 4, 0], [6, 4, 0]]


def test_the_older_the_entries_the_wider_the_gap(streamed):
    backbone, memories, log, epochs = streamed
    users = torch.arange(len(log.count))
    tokens = Events(log.items[users.flip(0), :2], torch.full_like(log.count, 2))
    fresh = MemoryCache(len(users), backbone.config)
    backbone.recall(fresh, users, log)
    gaps = [read_gap(backbone, m, users, log, tokens) for m in (fresh, *memories.values())]
    now, one, two, never = gaps
    assert now.error < 1e-5 and now.overlap == 1 and now.age == 0
    assert 1e-3 < one.error < two.error < never.error
    assert 1 > one.overlap > two.overlap > never.overlap
    steps = memories["1"].now // epochs
    assert two.age == pytest.approx(one.age + steps) and never.age == pytest.approx(one.age + (epochs - 1) * steps)
    assert {gap.hit_rate for gap in gaps} == {1.0}


def test_unseen_events_are_no_hits(streamed):
    backbone, memories, log, _ = streamed
    users = torch.arange(len(log.count))
    later = Events(log.items.clone(), log.count)
    later.items[users, log.count.long() - 1] = 1 + log.items[users, log.count.long() - 1] % backbone.n_items
    tokens = Events(log.items[:, :1], torch.ones_like(log.count))
    memory = copy.deepcopy(memories["1"])
    gap = read_gap(backbone, memory, users, later, tokens)
    assert gap.hit_rate == pytest.approx(1 - len(users) / int(log.count.sum()))
    assert read_gap(backbone, memory, users, later, tokens).hit_rate == 1  # written back


def trains_on(backbone, memory, events):
    """Outputs of the cached pass with nothing written."""
    users = torch.arange(len(events.count))
    return backbone._over_entries(memory, users, events, torch.zeros_like(events.mask()))


@pytest.mark.parametrize("search", [{"search": "none"}, *SEARCHES], ids=lambda p: p["search"])
def test_training_over_entries_of_today_is_the_stack(search, trained):
    """Missing and fresh entries alike; of both the gradient stops at what is kept."""
    backbone, memory, users, history, _ = remembered(trained("marm-2-heads"))
    backbone = like(backbone, **search, cached=True)
    plain = backbone(history)
    for _ in range(2):
        close(trains_on(backbone, memory, history), plain, "over entries", 1e-5)
        backbone.recall(memory, users, history)


def test_an_event_trains_on_its_own_past_alone(trained):
    """By loops: a read of each event over the entries of those before it, stale ones, is what the pass gives."""
    backbone, memory, users, history, _ = remembered(trained("marm-2-heads"))
    backbone.recall(memory, users, history)
    memory.vectors += torch.randn(memory.vectors.shape, generator=torch.Generator().manual_seed(0))
    found = trains_on(backbone, memory, history)
    for user, n in ((3, 3), (4, 23)):
        for at in (0, 1, n - 1):
            past = Events(history.items[user : user + 1, :at], torch.tensor([at], dtype=torch.int32))
            token = Events(history.items[user : user + 1, at : at + 1], torch.ones(1, dtype=torch.int32))
            read = backbone.read(token, backbone.recall(memory, users[user : user + 1], past))
            close(found[user, at], read[0, 0], f"user {user}, event {at}", 1e-5)


def test_no_gradient_passes_through_what_is_kept(trained):
    """Of the last event's output: an earlier item is reached in layer 0 only, as it is in a stack of one layer."""
    backbone, memory, _, history, _ = remembered(trained("marm"))
    backbone.requires_grad_(True)
    for width, reached in ((1, False), (2, True)):
        backbone.zero_grad()
        events = Events(history.items[4:5, :width].clone(), torch.tensor([width], dtype=torch.int32))
        events.items[0] = torch.arange(1, width + 1)
        with torch.enable_grad():
            trains_on(backbone, memory, events)[0, -1].sum().backward()
        assert bool(backbone.items.weight.grad[1].any()) and bool(backbone.items.weight.grad[2].any()) == reached
    backbone.zero_grad()
    with torch.enable_grad(), pytest.MonkeyPatch.context() as patch:  # nothing of layer 0 either: nothing is left
        patch.setattr(type(backbone.blocks[0]), "causal", lambda self, q, own, *_: own["hidden"].detach())
        trains_on(backbone, memory, events)[0, -1].sum().backward()
    assert not backbone.items.weight.grad[1].any()


def test_a_step_writes_what_it_trained_on(trained):
    backbone = like(trained("marm"), cached=True)
    history, _ = histories(backbone, LENGTHS)
    targets = torch.where(history.mask(), history.items.roll(-1, 1).clamp(min=1), 0)
    targets[:, 30:] = 0
    carried = backbone.carried(10)
    users = torch.arange(len(LENGTHS)) + 2
    plain = backbone.loss(Batch(history, targets))
    assert not carried["items"].any()
    for step in (1, 2):
        close(backbone.loss(Batch(history, targets, users=users)), plain, "loss", 1e-5)
        assert int(carried["now"]) == step and carried["steps"].unique().tolist() == [0, step]
    assert (carried["items"] > 0).sum(1).tolist() == [0, 0, *(min(n, 30) for n in LENGTHS), 0, 0]
    assert backbone.entries.nbytes().tolist() == [(16 * 4 + 4) * n for n in (carried["items"] > 0).sum(1).tolist()]
    assert like(trained("marm")).carried(10) == {}


def test_a_stream_trains_over_its_first_memory(synthetic):
    """Of a cached model the loss is over entries, whose ages are counted once; of another none is looked at."""
    data = synthetic.dataset
    users = np.flatnonzero(synthetic.train_end - data.offsets[:-1] >= 12)[:40]
    log, found = window(data, users, synthetic.train_end[users], 20), {}
    for cached in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = get_backbone("marm", data.n_items, dim=16, max_length=64, dropout=0.0, cached=cached)
            memories = [MemoryCache(len(users), backbone.config, n) for n in (1, 0)]
            stream(backbone, log, torch.optim.Adam(backbone.parameters(), 1e-2), memories, epochs=2, chunk=200)
        found[cached] = backbone.items.weight.detach()
        assert backbone.entries is (memories[0] if cached else None)
        assert [int(memory.now) for memory in memories] == [2 * len(slices(log, 200))] * 2
        assert memories[0].held(torch.arange(len(users)), log).sum() == log.count.sum()
    assert not torch.equal(found[True], found[False])
