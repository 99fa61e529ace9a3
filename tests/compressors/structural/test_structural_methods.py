"""Trained variants: an adapted backbone keeps what backbones promise, its state holds what it says, and no more."""

from dataclasses import replace

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.folded import alone
from malloc_bench.backbones.hstu import HSTUBlock
from malloc_bench.compressors import get_compressor
from malloc_bench.measure import Workload, closed_form, count_flops
from malloc_bench.state import Batch, Dense, Pooled, Segment, Stats
from malloc_bench.testing import Check, histories
from malloc_bench.testing.backbones import BACKBONE_PROMISES, read_needs_every_field
from malloc_bench.testing.worlds import LENGTHS, _lively

METHODS = [
    ("longformer", {"window": 5, "globals": 2}),
    ("longformer", {"window": 3, "globals": 0}),
    ("linformer", {"slots": 3}),
    ("reformer", {"buckets": 4}),
    ("beacon", {"chunk": 4}),
    ("beacon", {"chunk": 7}),
    ("collectivekv", {"own": 3, "pool": 12}),
]
KINDS = [("sasrec", False), ("hstu", False), ("hstu", True)]


def build(name, has_time=False, **sizes):
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": 2, "dim": 16, "max_length": 64, "dropout": 0.0, **sizes}
    return _lively(get_backbone(name, 60, has_time, **sizes)).eval()


def adapted(part, params, name, has_time=False, **sizes):
    """Adapted, with large weights: fresh ones hide mistakes."""
    return _lively(get_compressor(part, **params).adapted(build(name, has_time, **sizes))).eval()


PROMISES = [promise for promise in BACKBONE_PROMISES if promise is not read_needs_every_field]  # for trained weights


@pytest.mark.parametrize("promise", PROMISES, ids=lambda p: p.__name__)
@pytest.mark.parametrize("name, has_time", KINDS)
@pytest.mark.parametrize("part, params", METHODS, ids=str)
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


def test_from_trained_weights_own_numbers_are_the_last_channels():
    plain, part = build("sasrec"), get_compressor("collectivekv", own=3, pool=12)
    made = part.adapted(plain)
    part.begin(made, plain.state_dict())
    got, had = made.blocks[1].qkv.weight, plain.blocks[1].qkv.weight
    assert torch.equal(got[:16], had[:16])
    assert torch.equal(got[16:22], had[16:32].unflatten(0, (2, 8))[:, -3:].flatten(0, 1))
    assert torch.equal(got[22:28], had[32:].unflatten(0, (2, 8))[:, -3:].flatten(0, 1)) and got.shape == (52, 16)
