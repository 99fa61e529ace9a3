"""RWKV-7's rule in its three forms: step by step as in the paper, chunk by chunk, and for tokens that only read."""

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.backbones import gated_delta, get_backbone
from malloc_bench.backbones.rwkv import Rule, RWKVBlock, chunked
from malloc_bench.state import Dense


def drawn(tokens, sharp=0.6065, users=3, heads=2, width=6):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(users, heads, *shape, generator=generator, dtype=torch.float64)

    q, k, v, hit = (draw(tokens, width) for _ in range(4))
    keep, write = -sharp * draw(tokens, width).sigmoid(), draw(tokens, width).sigmoid()
    return Rule(q, k, v, keep, F.normalize(hit, dim=-1), write), draw(width, width)


def one_by_one(rule, memory):
    """S_t = S_(t-1) (diag(w) - hit' (a hit)) + v' k, o_t = S_t q (paper, section 4); memory = S'."""
    s, out = memory.mT, []
    for t in range(rule.q.shape[2]):
        q, k, v, keep, hit, write = (x[:, :, t, None] for x in rule)
        s = s @ (torch.diag_embed(keep.exp().squeeze(2)) - hit.mT @ (write * hit)) + v.mT @ k
        out.append((s @ q.mT).squeeze(-1))
    return torch.stack(out, 2), s.mT


@pytest.mark.parametrize("chunk", [1, 5, 32])
@pytest.mark.parametrize("tokens", [1, 2, 31, 33, 100])
def test_chunks_are_the_recurrence(tokens, chunk, monkeypatch):
    monkeypatch.setattr(gated_delta, "CHUNK", chunk)
    rule, memory = drawn(tokens)
    for got, want in zip(chunked(rule, memory), one_by_one(rule, memory)):
        assert torch.allclose(got, want, rtol=1e-7, atol=1e-7)


def test_the_sharpest_decay_keeps_its_digits_in_float32():
    rule, memory = drawn(100)
    rule = rule._replace(keep=torch.full_like(rule.keep, -0.6065))
    want = one_by_one(rule, memory)
    for got, exact in zip(chunked(Rule(*(x.float() for x in rule)), memory.float()), want):
        assert (got.double() - exact).norm() < 1e-5 * exact.norm()


def test_tokens_alone_read_what_each_would_as_the_next_event():
    rule, memory = drawn(4)
    block = RWKVBlock(12, 2, 0.0)
    got = block.alone(rule, Dense(memory))
    for m in range(4):
        one = Rule(*(x[:, :, m : m + 1] for x in rule))
        assert torch.allclose(got[:, :, m : m + 1], one_by_one(one, memory)[0])


def test_a_fresh_layer_forgets_slowly():
    keep = get_backbone("rwkv", 60, dim=16).blocks[0].project(torch.zeros(1, 1, 16))[0].keep
    assert 30 < 0.6931 / -float(keep.detach().mean()) < 50
