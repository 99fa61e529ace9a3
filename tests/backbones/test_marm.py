"""MARM against SASRec's stack of the same weights, its search against loops, its cache against what was written."""

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.measure import count_flops
from malloc_bench.state import Dense, Events, Segment, Slots, Stats, UserState
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
