"""Trained variants: an adapted backbone keeps what backbones promise, its state holds what it says, and no more."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.folded import alone
from malloc_bench.backbones.hstu import HSTUBlock
from malloc_bench.compressors import get_compressor
from malloc_bench.measure import Workload, closed_form, count_flops
from malloc_bench.measure.workload import some_facts
from malloc_bench.state import Batch, Dense, Pooled, Segment, Stats
from malloc_bench.testing import Check, histories
from malloc_bench.testing.backbones import BACKBONE_PROMISES, read_needs_every_field
from malloc_bench.testing.worlds import LENGTHS, lively

METHODS = [
    ("longformer", {"window": 5, "globals": 2}),
    ("longformer", {"window": 3, "globals": 0}),
    ("linformer", {"slots": 3}),
    ("seeds", {"seeds": 3}),
    ("reformer", {"buckets": 4}),
    ("beacon", {"chunk": 4}),
    ("beacon", {"chunk": 7}),
    ("rec2pm", {"memories": 2, "segment": 5}),
    ("longer", {"merge": 3, "recent": 4}),
    ("kuaiformer", {"large": 6, "small": 3, "middle": 1, "recent": 4}),
    ("collectivekv", {"own": 3, "pool": 12}),
]
KINDS = [("sasrec", False), ("hstu", False), ("hstu", True)]


def build(name, has_time=False, **sizes):
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "dim": 16, "max_length": 64, "dropout": 0.0, **sizes}
    return lively(get_backbone(name, 60, has_time, **sizes)).eval()


def adapted(part, params, name, has_time=False, **sizes):
    """Adapted, with large weights: fresh ones hide mistakes."""
    return lively(get_compressor(part, **params).adapted(build(name, has_time, **sizes))).eval()


PROMISES = [promise for promise in BACKBONE_PROMISES if promise is not read_needs_every_field]  # for trained weights


def matrix():
    """Every promise of every method behind one kind of backbone, `make test-slow`: behind all."""
    for at, (method, promise) in enumerate(product(METHODS, PROMISES)):
        for i, kind in enumerate(KINDS):
            marks = [] if i == (at + at // len(PROMISES)) % len(KINDS) else [pytest.mark.slow]
            yield pytest.param(*method, *kind, promise, marks=marks, id=f"{method[0]}-{kind}-{promise.__name__}")


@pytest.mark.parametrize("part, params, name, has_time, promise", list(matrix()))
def test_backbone_promise(part, params, name, has_time, promise):
    Check(promise, (adapted(part, params, name, has_time),), part)()


@pytest.mark.parametrize("name, has_time", KINDS)
@pytest.mark.parametrize("part, params", METHODS, ids=str)
@torch.no_grad()
def test_noise_in_any_layer_and_field_moves_the_output(part, params, name, has_time):
    made = adapted(part, params, name, has_time)
    history, tokens = histories(made, (23, 40))
    state = made.prefill(history).state
    clean = made.read(tokens, state)
    for at, (segment,) in enumerate(state.layers):
        for field, vectors in segment.fields.items():
            x = vectors.dense()
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * x.std()
            broken = (Segment({**segment.fields, field: Dense(x + noise)}, segment.slots),)
            moved = made.read(tokens, replace(state, layers=(*state.layers[:at], broken, *state.layers[at + 1 :])))
            assert (moved - clean).norm() > 1e-3 * clean.norm(), f"layer {at}, {field}"


@pytest.mark.parametrize("name, has_time", KINDS)
@pytest.mark.parametrize("part, params", METHODS, ids=str)
@torch.no_grad()
def test_what_is_asked_for_beside_a_prefill_does_not_change_it(part, params, name, has_time):
    made = adapted(part, params, name, has_time)
    history, _ = histories(made, LENGTHS)
    alone, observed = (made.prefill(history, stats=s).state for s in (Stats(), Stats(True, 4, inputs=True, alike=True)))
    for got, want in zip(observed.segments(), alone.segments()):
        for field, vectors in want.fields.items():
            real = want.real(vectors.dense()).unsqueeze(-1)
            assert torch.allclose(got.fields[field].dense() * real, vectors.dense() * real, atol=1e-4), field


@pytest.mark.parametrize("part", sorted({part for part, _ in METHODS}))
def test_other_backbones_are_refused_in_a_word(part):
    for name in ("marm", "climber"):
        assert name in get_compressor(part).supports(get_backbone(name, 60, heads=2, dim=16, max_length=64))
    for name in ("sasrec", "hstu", "lsrm"):
        assert get_compressor(part).supports(build(name)) is None


# --- longformer


@pytest.mark.parametrize("name, has_time", KINDS)
@torch.no_grad()
def test_a_window_over_all_is_the_plain_backbone(name, has_time):
    plain, history = build(name, has_time), histories(build(name, has_time), LENGTHS)[0]
    wide = get_compressor("longformer", window=64).adapted(plain)
    assert torch.allclose(wide(history), plain(history), atol=1e-6)


@torch.no_grad()
def test_longformer_is_masked_attention():
    """One layer of SASRec in float64: softmax over the band and the first slots, token by token."""
    made = adapted("longformer", {"window": 5, "globals": 2}, "sasrec", layers=1).double()
    history, _ = histories(made, (40,))
    block, x = made.blocks[0], made._embed(history, torch.arange(40)[None])
    q, own, _ = block.project(x)
    want = torch.zeros_like(q)
    for t in range(40):
        seen = [i for i in range(t + 1) if t - i <= 5 or i < 2]
        w = (q[:, :, t : t + 1] @ own["keys"][:, :, seen].mT).softmax(-1)
        want[:, :, t] = (w @ own["values"][:, :, seen]).squeeze(2)
    places, asked = made._places(history, torch.arange(40)[None])
    assert torch.allclose(block.causal(q, own, places, asked), want, atol=1e-12)


@torch.no_grad()
def test_only_window_and_globals_are_stored():
    made = adapted("longformer", {"window": 5, "globals": 2}, "hstu", True)
    state = made.prefill(histories(made, LENGTHS)[0]).state
    kept = [min(n, 7) for n in LENGTHS]
    vectors = torch.tensor(kept) * 2 * 2 * 16 * 4
    beside = [8 + 8 * k + 4 * k * (n > k) for k, n in zip(kept, LENGTHS)]  # length, count, times, positions
    assert state.nbytes().tolist() == (vectors + torch.tensor(beside)).tolist()
    assert state.layers[0][0].slots is state.layers[1][0].slots
    assert state.layers[0][0].slots.positions[5, 0].tolist() == [0, 1, 35, 36, 37, 38, 39]


# --- linformer


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
@torch.no_grad()
def test_linformer_is_attention_over_running_sums(name):
    made = adapted("linformer", {"slots": 3}, name, layers=1).double()
    history, _ = histories(made, (40,))
    at = torch.arange(40)[None]
    block, x = made.blocks[0], made._embed(history, at)
    q, own, _ = block.project(x)
    places, asked = made._places(history, at)
    mine = alone(block, q, own, asked, places)[0].squeeze(-1)
    got, want = block.causal(q, own, places, asked), torch.zeros_like(q)
    for head in range(2):
        k, v = own["keys"][0, head], own["values"][0, head]
        for t in range(40):
            keys = sum((torch.outer(block.map_keys[:, i], k[i]) for i in range(t)), torch.zeros(3, 8).double())
            values = sum((torch.outer(block.map_values[:, i], v[i]) for i in range(t)), torch.zeros(3, 8).double())
            logits = torch.cat([keys @ q[0, head, t] + block.slot_bias, mine[0, head, t : t + 1]])
            silu = torch.nn.functional.silu(logits) / 64
            w = silu if isinstance(block, HSTUBlock) else logits.softmax(0)
            want[0, head, t] = w @ torch.cat([values, v[t : t + 1]])
    assert torch.allclose(got, want, atol=1e-10)


@torch.no_grad()
def test_a_state_is_as_large_for_any_history():
    made = adapted("linformer", {"slots": 3}, "hstu", True)
    state = made.prefill(histories(made, (0, 1, 40))[0]).state
    assert state.nbytes().tolist() == [4 + 2 * 2 * 3 * 16 * 4] * 3


# --- seeds


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
@torch.no_grad()
def test_seeds_are_means_of_the_history_by_their_attention(name):
    """One layer in float64, token by token: each seed's mean of keys and of values, then attention over seeds."""
    made = adapted("seeds", {"seeds": 3}, name, layers=1).double()
    history, at = histories(made, (40,))[0], torch.arange(40)[None]
    (block,), x = made.blocks, made._embed(history, at)
    block.recency.copy_(torch.tensor([0.0, 0.1, 1.0]))
    q, own, _ = block.project(x)
    places, asked = made._places(history, at)
    mine = alone(block, q, own, asked, places)[0].squeeze(-1)
    got, want = block.causal(q, own, places, asked), torch.zeros_like(q)
    for head in range(2):
        k, v = own["keys"][0, head], own["values"][0, head]
        for t in range(40):
            means = []
            for seed in range(3):
                liked = 15 * torch.tanh(k[:t] @ block.seed_asks[head, seed] / 15)
                w = torch.cat([torch.zeros(1), liked + block.recency[seed] * 40 / 64 * torch.arange(t)]).softmax(0)
                rows = ((block.seed_keys, k), (block.seed_values, v))
                means.append([w @ torch.cat([first[head, seed][None], x[:t]]) for first, x in rows])
            keys, values = (torch.stack(x) for x in zip(*means))
            logits = torch.cat([keys @ q[0, head, t] + block.slot_bias, mine[0, head, t : t + 1]])
            silu = torch.nn.functional.silu(logits) / 64
            w = silu if isinstance(block, HSTUBlock) else logits.softmax(0)
            want[0, head, t] = w @ torch.cat([values, v[t : t + 1]])
    assert torch.allclose(got, want, atol=1e-10)


@torch.no_grad()
def test_a_state_of_seeds_is_as_large_for_any_history():
    made = adapted("seeds", {"seeds": 3}, "hstu", True)
    state = made.prefill(histories(made, (0, 1, 40))[0]).state
    assert state.nbytes().tolist() == [4 + 2 * 3 * (2 * 16 + 2) * 4] * 3


# --- reformer


@torch.no_grad()
def test_reformer_is_attention_within_buckets():
    """One layer of SASRec in float64: softmax over slots that share a bucket in any round."""
    made = adapted("reformer", {"buckets": 4, "rounds": 2}, "sasrec", layers=1).double()
    history, at = histories(made, (40,))[0], torch.arange(40)[None]
    block, x = made.blocks[0], made._embed(history, at)
    q, own, _ = block.project(x)
    assert torch.allclose(own["keys"], q / q.norm(dim=-1, keepdim=True))
    q = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)  # all directions
    own["keys"] = q / q.norm(dim=-1, keepdim=True)
    want, shares = torch.zeros_like(q), []
    for head in range(2):
        codes = [[max(range(4), key=([*(k @ r), *(-(k @ r))]).__getitem__) for r in block.rotations]
                 for k in own["keys"][0, head]]  # fmt: skip
        for t in range(40):
            seen = [i for i in range(t + 1) if any(a == b for a, b in zip(codes[i], codes[t]))]
            w = (own["keys"][0, head, seen] @ q[0, head, t]).softmax(0)
            want[0, head, t] = w @ own["values"][0, head, seen]
            shares.append(len(seen) / (t + 1))
    assert 0.2 < sum(shares) / len(shares) < 0.8
    assert torch.allclose(block.causal(q, own, *made._places(history, at)), want, atol=1e-12)


# --- beacon


@torch.no_grad()
def test_beacons_stand_for_their_chunks():
    """Two layers of SASRec in float64: events and beacons one by one, over what they may see."""
    made = adapted("beacon", {"chunk": 3}, "sasrec").double()
    history, _ = histories(made, (20,))
    line, seen = [], []  # of each token: its input; whether it is a beacon, and its chunk
    for i in range(20):
        at = torch.tensor([[i]])
        line.append(made._embed(history.take(at, torch.tensor([1])), at))
        seen.append((False, i // 3))
        if i % 3 == 2:
            line.append(made.items.weight[0] * 4 + made.positions.weight[i] + made.beacon + 0 * line[-1])
            seen.append((True, i // 3))
    x = torch.cat(line, 1)
    for block in made.blocks:
        q, own, _ = block.project(x)
        mixed = torch.zeros_like(q)
        for t, (_, chunk) in enumerate(seen):
            index = [j for j in range(t + 1) if seen[j][0] or seen[j][1] == chunk]
            w = (q[:, :, t : t + 1] @ own["keys"][:, :, index].mT).softmax(-1)
            mixed[:, :, t] = (w @ own["values"][:, :, index]).squeeze(2)
        x = block.combine(x, mixed, None)
    events = [t for t, (beacon, _) in enumerate(seen) if not beacon]
    assert torch.allclose(made(history), made._output(x[:, events]), atol=1e-10)
    stays = [t for t, (beacon, chunk) in enumerate(seen) if beacon or chunk == 6]
    kept = made.prefill(history).state.layers[1][0]
    assert torch.allclose(kept.fields["keys"].dense(), own["keys"][:, :, stays], atol=1e-10)
    assert kept.slots.positions[0, 0].tolist() == [2, 5, 8, 11, 14, 17, 18, 19]


@torch.no_grad()
def test_a_state_of_beacons_has_as_many_slots_as_chunks():
    made = adapted("beacon", {"chunk": 7}, "hstu", True)
    state = made.prefill(histories(made, LENGTHS)[0]).state
    kept = [n // 7 + n % 7 for n in LENGTHS]
    want = [8 + k * (2 * 2 * 16 * 4 + 8) + 4 * k * (n > k) for k, n in zip(kept, LENGTHS)]
    assert state.nbytes().tolist() == want and state.layers[0][0].slots is state.layers[1][0].slots


@pytest.mark.parametrize("chunk", [3, 8])
@torch.inference_mode()
def test_appending_over_several_chunks_is_counted(chunk):
    work, made = Workload(2, 40, 1, 20), adapted("beacon", {"chunk": chunk}, "hstu", True)
    (_, tokens, new), full = work.events(60), work.prefill(made)
    found = closed_form(made, get_compressor("full"), full.state, work)
    assert 2 * found["append_flops"] == count_flops(lambda: made.append(full.state, new))
    raw = get_compressor("recompute").compress(full)
    found = closed_form(made, get_compressor("recompute"), raw, work)
    assert 2 * found["read_flops"] == count_flops(lambda: made.read(tokens, raw))


# --- rec2pm, longer, kuaiformer: users one by one


class Walk:
    """One user of a two-layer SASRec in float64: slots (place, kind, each layer's fields), a token at a time."""

    def __init__(self, made):
        self.made, self.slots = made, []

    def see(self, x, slots, among=1):
        """Inputs x [among, d] over slots and one another: what comes out, and what each layer stores."""
        x, stored = x[None], []
        for layer, block in enumerate(self.made.blocks):
            q, own, _ = block.project(x)
            keys, values = (torch.cat([*(slot[2][layer][f] for slot in slots), own[f]], 2) for f in ("keys", "values"))
            x = block.combine(x, (q @ keys.mT).softmax(-1) @ values, None)
            stored.append(own)
        return x[0], [[{f: own[f][:, :, i : i + 1] for f in own} for own in stored] for i in range(among)]

    def event(self, history, i):
        at = torch.tensor([[i]])
        out, (stored,) = self.see(self.made._embed(history.take(at, torch.tensor([1])), at)[0], self.slots)
        self.slots.append((i, 0, stored))
        return out

    def same(self, state):
        for layer, (segment,) in enumerate(state.layers):
            assert segment.slots.positions[0, 0].tolist() == [place for place, _, _ in self.slots]
            for f, v in segment.fields.items():
                want = torch.cat([stored[layer][f] for _, _, stored in self.slots], 2)
                assert torch.allclose(v.dense(), want, atol=1e-10)


@torch.no_grad()
def test_a_memory_is_overwritten_after_each_segment():
    made = adapted("rec2pm", {"memories": 2, "segment": 5}, "sasrec").double()
    history, walk, outs, old = histories(made, (18,))[0], Walk(made), [], None
    for i in range(18):
        outs.append(walk.event(history, i))
        if i % 5 == 4:
            x = made.memory + made.positions.weight[i]
            if old is not None:
                x = x + torch.stack([slot[1]["values"].flatten() for slot in old]) @ made.again.weight.T
            _, old = walk.see(x, walk.slots, 2)
            walk.slots = [(i, 1, slot) for slot in old]
    assert torch.allclose(made(history)[0], made._output(torch.cat(outs)), atol=1e-10)
    walk.same(made.prefill(history).state)


@torch.no_grad()
def test_states_of_memories_stay_as_small():
    made = adapted("rec2pm", {"memories": 2, "segment": 5}, "hstu", True)
    state = made.prefill(histories(made, LENGTHS)[0]).state
    kept = [n % 5 + 2 * (n >= 5) for n in LENGTHS]
    want = [8 + k * (2 * 2 * 16 * 4 + 8) + 4 * k * (n > k) for k, n in zip(kept, LENGTHS)]
    assert state.nbytes().tolist() == want and state.layers[0][0].slots is state.layers[1][0].slots


def test_a_memory_is_smaller_than_its_segment():
    """As many slots as events are taken to be these, whose places are not stored."""
    with pytest.raises(ValueError, match="fewer than a segment's events"):
        get_compressor("rec2pm", memories=5, segment=5)


@torch.no_grad()
def test_a_memory_that_a_later_method_has_dropped_is_not_read_for_the_next():
    made = adapted("rec2pm", {"memories": 3, "segment": 5}, "sasrec")
    (history, _), at = histories(made, (10,)), torch.tensor([9])
    prefill = made.prefill(history.each(lambda x: x[:, :9], torch.tensor([9], dtype=torch.int32)))
    newest = history.each(lambda x: x[:, 9:], torch.tensor([1], dtype=torch.int32))
    kept = made.append(get_compressor("recent").compress(prefill, {"slots": 1}), newest)
    assert kept.layers[0][0].slots.positions.flatten().tolist() == [9] * 3
    alone = made.blocks[0].project((made.memory + made.positions(at))[None])[1]["keys"]
    assert torch.allclose(kept.layers[0][0].fields["keys"].dense(), alone, atol=1e-6)
    whole = made.append(prefill.state, newest).layers[0][0].fields["keys"].dense()
    assert not torch.allclose(whole, alone, atol=1e-2)


LADDERS = [
    ("longer", {"merge": 3, "recent": 4}),
    ("kuaiformer", {"large": 6, "small": 3, "middle": 1, "recent": 4}),
    ("kuaiformer", {"large": 6, "small": 2, "middle": 2, "recent": 1}),
]


@pytest.mark.parametrize("part, params", LADDERS, ids=str)
@torch.no_grad()
def test_old_tokens_are_merged_before_the_stack(part, params):
    made = adapted(part, params, "sasrec").double()
    recent, middle = params["recent"], params.get("middle")
    short = params.get("merge") or params["small"]
    history, walk, outs = histories(made, (40,))[0], Walk(made), []

    def of(kind):
        return [slot for slot in walk.slots if slot[1] == kind]

    def merge(kind, number):
        run, rest = of(kind)[:number], of(kind)[number:]
        rows = torch.stack([torch.cat([s[0]["keys"].flatten(), s[0]["values"].flatten()]) for _, _, s in run])
        place, before = run[-1][0], [slot for slot in walk.slots if slot[0] < run[0][0]]
        _, (stored,) = walk.see(made.mergers[kind](rows[None, None])[0] + made.positions.weight[place], before)
        after = [slot for slot in walk.slots if slot[0] > place]
        assert all(slot in after for slot in rest)
        walk.slots = [*before, (place, kind + 1, stored), *after]

    for i in range(40):
        outs.append(walk.event(history, i))
        if len(of(0)) == recent + short:
            if middle and len(of(1)) == middle + params["large"] // short - 1:
                merge(1, params["large"] // short)
            merge(0, short)
    assert torch.allclose(made(history)[0], made._output(torch.cat(outs)), atol=1e-10)
    walk.same(made.prefill(history).state)
    assert max(kind for _, kind, _ in walk.slots) == len(made.mergers)


GOING = [METHODS[0], METHODS[5], ("rec2pm", {"memories": 3, "segment": 5}), *LADDERS[:2]]


@pytest.mark.parametrize("method, params", [("recent", {}), ("random", {}), ("moments", {"inner": "recent"})], ids=str)
@pytest.mark.parametrize("part, sizes", GOING, ids=str)
@torch.no_grad()
def test_what_token_methods_leave_goes_on_over_merges(part, sizes, method, params):
    made, token = adapted(part, sizes, "hstu"), get_compressor(method, **params)
    (history, tokens, new), few = Workload(2, 33, 1, 9).events(60), {"slots": 2}
    prefill = made.prepare(history, stats=token.needs, items=some_facts(60))
    state = updated = token.compress(prefill, few)
    for i in range(9):
        event = new.each(lambda x, i=i: x[:, i : i + 1], torch.ones(2, dtype=torch.int32))
        state, updated = made.append(state, event), token.update(made.go_on(prefill, updated, event, token.needs), few)
    for each in (state, updated):
        assert made.read(tokens, each).isfinite().all() and each.length.tolist() == [42, 42]
        assert list(map(len, each.packed([0, 1]))) == each.nbytes().tolist()
        assert any(segment.slots is None for segment in each.segments()) == (method == "moments")


def test_a_backbone_that_was_read_can_be_trained():
    made = adapted("longer", {"merge": 3, "recent": 4}, "hstu")
    history, _ = histories(made, (37,))
    with torch.inference_mode():
        made.prefill(history)
    made.loss(Batch(history, history.items)).backward()


@torch.no_grad()
def test_a_run_of_longer_is_a_linear_map_of_what_lies_side_by_side():
    (merger,) = adapted("longer", {"merge": 3, "recent": 4}, "sasrec").double().mergers
    x = torch.randn(2, 5, 3, 32, dtype=torch.float64)
    weight = merger.linear.weight.unflatten(1, (3, 32))
    assert torch.allclose(merger(x), torch.einsum("bnkw,dkw->bnd", x, weight) + merger.linear.bias, atol=1e-12)


@torch.no_grad()
def test_a_window_of_kuaiformer_is_the_mean_of_an_encoder_that_sees_it_alone():
    merger = adapted("kuaiformer", {"large": 6, "small": 3}, "sasrec").double().mergers[0]
    x = torch.randn(1, 2, 3, 32, dtype=torch.float64)
    got = merger(x)
    assert torch.allclose(got[0, :1], merger(x[:, :1])[0]) and torch.allclose(merger(x.flip(2)), got)
    (run,) = merger.inward(x[0, :1])
    q, k, v = merger.qkv(merger.norm_attention(run)).unflatten(1, (3, 2, 8)).permute(1, 2, 0, 3)
    run = run + merger.out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1))
    run = run + merger.down(torch.relu(merger.up(merger.norm_ffn(run))))
    assert torch.allclose(got[0, 0], run.mean(0), atol=1e-12)


@pytest.mark.parametrize("part, params", [("rec2pm", {"memories": 2, "segment": 5}), *LADDERS], ids=str)
@torch.inference_mode()
def test_appending_over_several_merges_is_counted(part, params):
    work, made = Workload(2, 40, 1, 20), adapted(part, params, "hstu", True)
    (_, tokens, new), full = work.events(60), work.prefill(made)
    found = closed_form(made, get_compressor("full"), full.state, work)
    assert 2 * found["append_flops"] == count_flops(lambda: made.append(full.state, new))
    raw = get_compressor("recompute").compress(full)
    found = closed_form(made, get_compressor("recompute"), raw, work)
    assert 2 * found["read_flops"] == count_flops(lambda: made.read(tokens, raw))


@pytest.mark.parametrize("name", ["sasrec", "hstu"])
@pytest.mark.parametrize("part, params", LADDERS[:2], ids=str)
@torch.no_grad()
def test_a_merged_token_begins_near_the_mean_of_its_events(part, params, name):
    """Fresh, and from trained weights, which another inverse fits."""
    torch.manual_seed(0)
    plain, method = (
        get_backbone(name, 60, layers=2, heads=2, dim=16, max_length=64, dropout=0.0),
        get_compressor(part, **params),
    )
    fresh, trained = method.adapted(plain.eval()), copy.deepcopy(plain)
    for block in trained.blocks:
        getattr(block, block.fused).weight.mul_(-0.5)
    begun = method.adapted(plain)
    method.begin(begun, trained.state_dict())
    assert torch.equal(begun.blocks[0].out.weight, trained.blocks[0].out.weight)
    for made in (fresh, begun):
        events, _ = histories(made, (12,))
        x = made._embed(events, torch.arange(12)[None])
        own = made.blocks[0].project(x)[1]
        rows = torch.cat([own[f].transpose(1, 2).flatten(2) for f in ("keys", "values")], -1)
        got = made.mergers[0](rows.unflatten(1, (4, 3)))[0]
        mean = x[0].unflatten(0, (4, 3)).mean(1)
        assert torch.cosine_similarity(got, mean).min() > 0.8


# --- collectivekv


@torch.no_grad()
def test_a_key_is_a_row_of_the_pool_and_a_few_numbers():
    made = adapted("collectivekv", {"own": 3, "pool": 12}, "sasrec", layers=1)
    history = histories(made, (30,))[0]
    (block,), x = made.blocks, made._embed(history, torch.arange(30)[None])
    mapped = block.qkv(block.norm_attention(x))[0]  # queries 16, keys 2 x 3, values 2 x 3, scores 12 and 12
    assert mapped.shape[1] == 16 + 6 + 6 + 24
    segment = made.prefill(history).state.layers[0][0]
    for name, own, first in (("keys", 16, 28), ("values", 22, 40)):
        vectors = segment.fields[name]
        assert isinstance(vectors, Pooled) and vectors.codes.dtype == torch.int16
        for i in range(30):
            row = getattr(block, f"pool_{name}")[int(mapped[i, first : first + 12].argmax())]
            for head in range(2):
                want = torch.cat([row[head], mapped[i, own + 3 * head :][:3]])
                assert torch.allclose(vectors.dense()[0, head, i], want, atol=1e-6)
        assert len(set(vectors.codes.flatten().tolist())) > 3
    state = made.prefill(histories(made, LENGTHS)[0]).state
    assert state.nbytes().tolist() == [8 + n * 2 * (2 + 2 * 3 * 4) for n in LENGTHS]


def test_routers_learn_and_are_held_to_use_the_pool():
    made = adapted("collectivekv", {"own": 3, "pool": 12}, "hstu").train()
    history, tokens = histories(made, LENGTHS)
    batch = Batch(history, history.items.roll(-1, 1) * history.mask())
    for loss in (made.loss, lambda _: made.for_ranking().ranking_loss(history, tokens, tokens.items % 2 == 0)):
        made.zero_grad()
        loss(batch).backward()
        assert all(block.uvqk.weight.grad[-24:].abs().sum() > 0 for block in made.blocks)
        assert all(block.uneven > 1 for block in made.blocks)
        copy.deepcopy(made)  # holds no graph of the batch, which cannot be copied


def test_from_trained_weights_own_numbers_are_the_last_channels():
    plain, part = build("sasrec"), get_compressor("collectivekv", own=3, pool=12)
    made = part.adapted(plain)
    part.begin(made, plain.state_dict())
    got, had = made.blocks[1].qkv.weight, plain.blocks[1].qkv.weight
    assert torch.equal(got[:16], had[:16])
    assert torch.equal(got[16:22], had[16:32].unflatten(0, (2, 8))[:, -3:].flatten(0, 1))
    assert torch.equal(got[22:28], had[32:].unflatten(0, (2, 8))[:, -3:].flatten(0, 1)) and got.shape == (52, 16)
