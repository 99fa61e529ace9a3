"""The gated delta rule in its three forms: step by step, chunk by chunk, and for tokens that only read."""

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.backbones import gated_delta, get_backbone
from malloc_bench.backbones.gated_delta import Rule, alone, chunked
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.registry import names
from malloc_bench.state import Dense, low_rank, quantize
from malloc_bench.testing import histories
from malloc_bench.testing.worlds import LENGTHS, close


def drawn(tokens, seed=0, alike=False, users=3, heads=2, width=6):
    """A rule and a memory in double precision; alike: the same key and value at every event."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(users, heads, *shape, generator=generator, dtype=torch.float64)

    q, k, v = (draw(1 if alike else tokens, width).expand(-1, -1, tokens, -1) for _ in range(3))
    keep, write = -draw(tokens).exp(), draw(tokens).sigmoid()
    rule = Rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, keep, torch.ones_like(write) if alike else write)
    return rule, draw(width, width)


def step(rule, memory, t):
    """S_t = S_(t-1) (alpha (I - beta k k')) + beta v k', o = S_t q, as in the paper; memory = S'."""
    q, k, v = (x[:, :, t, :, None] for x in rule[:3])
    alpha, beta = rule.keep[:, :, t, None, None].exp(), rule.write[:, :, t, None, None]
    s = memory.mT @ (alpha * (torch.eye(k.shape[2], dtype=k.dtype) - beta * k @ k.mT)) + beta * v @ k.mT
    return (s @ q).squeeze(-1), s.mT


def one_by_one(rule, memory):
    out = []
    for t in range(rule.q.shape[2]):
        o, memory = step(rule, memory, t)
        out.append(o)
    return torch.stack(out, 2), memory


@pytest.mark.parametrize("chunk", [1, 5, 32])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 33, 100])
def test_chunks_are_the_recurrence(tokens, alike, chunk, monkeypatch):
    monkeypatch.setattr(gated_delta, "CHUNK", chunk)
    rule, memory = drawn(tokens, alike=alike)
    for got, want in zip(chunked(rule, memory), one_by_one(rule, memory)):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def test_strong_forgetting_does_not_overflow():
    rule, memory = drawn(100)
    rule = rule._replace(keep=rule.keep * 1e4)
    for got, want in zip(chunked(rule, memory), one_by_one(rule, memory)):
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-9)


def test_no_events_change_nothing():
    rule, memory = drawn(0)
    out, after = chunked(rule, memory)
    assert out.shape == rule.v.shape and torch.equal(after, memory)


def test_the_gradient_is_that_of_the_recurrence():
    leaves = [x.requires_grad_() for x in (*drawn(40)[0], drawn(40)[1])]

    def gradients(form):
        out, memory = form(Rule(*leaves[:5]), leaves[5])
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype)
        return torch.autograd.grad((out * weight).sum() + memory.square().sum(), leaves)

    for got, want in zip(gradients(chunked), gradients(one_by_one)):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-8)


def test_tokens_alone_read_what_each_would_as_the_next_event():
    rule, memory = drawn(9)
    each = torch.stack([step(rule, memory, t)[0] for t in range(9)], 2)
    assert torch.allclose(alone(rule, Dense(memory)), each, atol=1e-12)
    nothing = torch.stack([step(rule, torch.zeros_like(memory), t)[0] for t in range(9)], 2)
    assert torch.allclose(alone(rule, None), nothing, atol=1e-12)


@pytest.mark.parametrize("sizes", [{"layers": 2, "heads": 2, "dim": 16}, {"layers": 1, "heads": 1, "dim": 12}])
def test_bytes_do_not_grow_with_the_history(sizes):
    backbone = get_backbone("gated_delta", 60, max_length=64, **sizes).eval()
    history, _ = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    assert set(state.nbytes().tolist()) == {4 + 4 * sizes["layers"] * sizes["dim"] ** 2 // sizes["heads"]}
    memory = state.layers[0][0].fields["memory"].dense()
    assert not bool(memory[0].any()) and bool(memory[1].any())  # who has no event has a memory of zeros


def test_padding_leaves_the_memory_alone(trained):
    backbone = trained("gated_delta-2-heads")
    history, _ = histories(backbone, (3, 40))
    short, _ = histories(backbone, (3,))
    padded = type(history)(history.items[:1], history.count[:1])
    assert padded.items.shape[1] == 40
    for got, want in zip(backbone.prefill(padded).state.segments(), backbone.prefill(short).state.segments()):
        close(got.fields["memory"].dense(), want.fields["memory"].dense(), "memory", 1e-6)


def test_a_read_costs_the_same_for_any_history():
    backbone = get_backbone("gated_delta", 60, max_length=400).eval()
    costs = set()
    for n in (0, 5, 300):
        state = backbone.prefill(histories(backbone, (n,))[0]).state
        costs.add(backbone.flops("read", 3, state))
    assert len(costs) == 1


@pytest.mark.parametrize("encode", [
    lambda x: quantize(x, torch.ones(x.shape[:3], dtype=torch.bool)[:, :1], 8, 32, "slots"),
    lambda x: low_rank(x, torch.ones(x.shape[:3], dtype=torch.bool)[:, :1], torch.full((len(x), 1), 3)),
])  # fmt: skip
def test_an_encoded_memory_is_read_and_appended_to_as_what_it_stands_for(encode, trained):
    backbone = trained("gated_delta-2-heads")
    history, tokens = histories(backbone, LENGTHS)
    state = backbone.prefill(history).state
    encoded, plain = [], []
    for (segment,) in state.layers:
        vectors = encode(segment.fields["memory"].dense())
        encoded.append((type(segment)({"memory": vectors}, None),))
        plain.append((type(segment)({"memory": Dense(vectors.dense())}, None),))
    one, other = (type(state)(tuple(layers), state.length) for layers in (encoded, plain))
    close(backbone.read(tokens, one), backbone.read(tokens, other), "read", 1e-5)
    grown = backbone.append(one, tokens)
    close(backbone.read(tokens, grown), backbone.read(tokens, backbone.append(other, tokens)), "append", 1e-5)
    assert grown.nbytes().tolist() == state.nbytes().tolist()  # float32 again


class TestCompressors:
    """Which methods apply to a memory, and what budgets come to."""

    def test_methods_of_slots_do_not(self):
        backbone = get_backbone("gated_delta", 60)
        skipped = {
            name for name in names("compressors") if name != "compose" and get_compressor(name).supports(backbone)
        }
        assert skipped.isdisjoint({"full", "none", "int8", "kivi", "svd", "recompute", "truncate"})
        assert skipped >= {"recent", "sink_recent", "random", "knorm", "h2o", "tova", "snapkv", "merge_adjacent"}
        assert "no slots" in get_compressor("recent").supports(backbone)
        assert "no slots" in get_compressor("compose", steps=["recent", "int8"]).supports(backbone)
        assert "newest 8 slots" in get_compressor("kivi", tail=8).supports(backbone)

    def test_a_budget_of_truncate_is_a_share_of_the_events(self, trained):
        backbone = trained("gated_delta-2-heads")
        prefill = backbone.prefill(histories(backbone, (0, 1, 3, 40))[0])
        full = int(prefill.state.nbytes()[0])

        def kept(budget):
            return get_compressor("truncate").compress(prefill, Budget.parse(budget)).length.tolist()

        assert kept(0.5) == kept({"bytes": full // 2}) == [0, 1, 1, 20]
        assert kept({"slots": 6}) == [0, 1, 3, 6]
        assert kept({"bytes": 28}) == [0, 1, 1, 1]
        assert get_compressor("truncate").compress(prefill, Budget(1.0)) is prefill.state

    @pytest.mark.parametrize("rank", [1, 3, 8])
    def test_svd_is_the_best_of_its_rank(self, rank, trained):
        backbone = trained("gated_delta-2-heads")
        prefill = backbone.prefill(histories(backbone, LENGTHS)[0])
        state = get_compressor("svd", rank=rank, dtype="float32").compress(prefill)
        for got, want in zip(state.segments(), prefill.state.segments()):
            memory = want.fields["memory"].dense().double()
            u, s, v = torch.linalg.svd(memory)
            s[..., rank:] = 0
            close(got.fields["memory"].dense().double(), u @ s.diag_embed() @ v, "memory", 1e-4)
        assert set(state.nbytes().tolist()) == {4 + 2 * (8 + 2 * 4 * rank * (8 + 8))}


def test_autocast_keeps_the_triangular_system_in_float32(trained):
    backbone = trained("gated_delta")
    history, _ = histories(backbone, LENGTHS)
    plain = backbone(history)
    with torch.autocast("cpu", torch.bfloat16):
        close(backbone(history), plain, "bfloat16", 0.1)
