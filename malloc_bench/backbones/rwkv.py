"""RWKV-7 (Peng et al., 2025, arXiv 2503.14456): the delta rule, its decay and its writing told channel by channel."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.gated_delta import GatedDelta, GatedDeltaBlock, UnitInverse, chunk_sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.registry import register
from malloc_bench.state import Vectors

_SHARPEST = math.exp(-0.5)  # -log of the strongest decay: half of a channel may go with each event, no more
_SLOW = -3.5  # a fresh layer forgets half of what it holds in about 39 events


class Rule(NamedTuple):
    """What M tokens ask of a memory and write into it, [B, H, M, D] each.

    q, k, v: queries, keys and values. keep: log w <= 0, how much stays of each channel. hit: unit vectors, under which
    the memory is corrected. write: in [0, 1], by how much, channel by channel.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    hit: Tensor
    write: Tensor


def chunked(rule: Rule, memory: Tensor) -> tuple[Tensor, Tensor]:
    """M_t = (diag(w_t) - (a_t hit_t) hit_t') M_(t-1) + k_t v_t', o_t = M_t' q_t, by chunks; memory [B, H, D, D].

    M is the paper's S transposed: rows by key. Returns o [B, H, M, D] and the last memory. With W the running product
    of w and M_t = diag(W_t) N_t, what each event removes, r_t = hit_t' M_(t-1), solves a unit triangular system.
    """
    tokens = rule.q.shape[2]
    parts, size = chunk_sizes(tokens)
    short = parts * size - tokens  # padding keeps all and writes nothing
    q, k, v, keep, hit, write = (F.pad(x, (0, 0, 0, short)).unflatten(2, (parts, size)) for x in rule)
    total = keep.cumsum(-2)  # log W
    grown = (-total).exp()
    removes, adds = write * hit * grown, k * grown
    finds, asks = hit * (total - keep).exp(), q * total.exp()
    solved = UnitInverse.apply((finds @ removes.mT).tril(-1))
    fresh, stale = solved @ ((finds @ adds.mT).tril(-1) @ v), solved @ finds  # r = fresh + stale M_0
    after = total[..., -1:, :].exp().mT

    before, removed = [], []
    for fresh_, stale_, removes_, adds_, v_, after_ in zip(
        *(x.unbind(2) for x in (fresh, stale, removes, adds, v, after))
    ):
        before.append(memory)
        removed.append(fresh_ + stale_ @ memory)
        memory = after_ * (memory - removes_.mT @ removed[-1] + adds_.mT @ v_)
    out = asks @ torch.stack(before, 2) + (asks @ adds.mT).tril() @ v
    out = out - (asks @ removes.mT).tril() @ torch.stack(removed, 2)
    return out.flatten(2, 3)[:, :, :tokens], memory


class RWKVBlock(GatedDeltaBlock):
    """x + W_o (SiLU(gate) * (RMSNorm(o) + (q.(rho k)) v)), then x + FFN(LN x), SASRec's with a ReLU."""

    def __init__(self, dim: int, heads: int, rate: float) -> None:
        super().__init__(dim, heads, rate)
        self.rates = nn.Linear(dim, 2 * dim)
        self.toward, self.less = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))  # xi, alpha
        self.bonus = nn.Parameter(torch.zeros(dim).normal_(std=0.1))  # rho
        with torch.no_grad():
            self.rates.bias[:dim] = _SLOW

    def project(self, x: Tensor) -> tuple[Rule, tuple[Tensor, Tensor]]:  # type: ignore[override]
        normed = self.norm_memory(x)
        q, k, v, gate = self.qkvg(normed).to(x.dtype).chunk(4, -1)
        decay, write = self.rates(normed).to(x.dtype).chunk(2, -1)
        keep, write = -_SHARPEST * decay.sigmoid(), write.sigmoid()
        replaced = k * (1 + (write - 1) * self.less)
        parts = q, replaced, v, keep, k * self.toward, write
        q, kept, v, keep, hit, write = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in parts)
        rho = self.bonus.view(self.heads, 1, -1)
        extra = (q * rho * kept).sum(-1, keepdim=True) * v
        return Rule(q, kept, v, keep, F.normalize(hit, dim=-1), write), (gate, extra)

    def combine(self, x: Tensor, read: Tensor, gate: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        read = (self.norm_read(read) + gate[1]).transpose(1, 2).flatten(2)
        x = x + dropout(self.out(read * F.silu(gate[0])), self.rate, self.training)
        hidden = dropout(torch.relu(self.up(self.norm_ffn(x))), self.rate, self.training)
        return x + dropout(self.down(hidden), self.rate, self.training)

    def follow(self, rule: Rule, padding: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        k, keep, write = (x.masked_fill(padding.unsqueeze(-1), 0.0) for x in (rule.k, rule.keep, rule.write))
        return chunked(rule._replace(k=k, keep=keep, write=write), memory)

    def alone(self, rule: Rule, memory: Vectors | None) -> Tensor:  # type: ignore[override]
        """M_1' q = M_0' (w q - ((a hit).q) hit) + (q.k) v, the memory read once a token."""
        own = (rule.q * rule.k).sum(-1, keepdim=True) * rule.v
        if memory is None:
            return own
        removed = (rule.write * rule.hit * rule.q).sum(-1, keepdim=True) * rule.hit
        return own + memory.mix(rule.keep.exp() * rule.q - removed)

    def chunk_flops(self, size: int) -> int:
        width = self.dim // self.heads
        return 2 * (9 * size**2 * width + 4 * size * width**2) + size**3


@register("rwkv")
class RWKV(GatedDelta):
    """RWKV-7's time mixing as a recommender: one D x D matrix a head, as `gated_delta` has it, with a richer rule.

    From the paper: decay w, in-context learning rate a and the removal key hit told channel by channel, keys that are
    weakened by 1 + (a - 1) alpha, the bonus (r.(rho k)) v of the token itself, no normalised queries or keys beside
    hit. Ours: no token shift, whose last inputs would be more state; w and a by linear maps rather than low-rank ones;
    no residual of the first layer's values; the gate, feed-forward, embeddings and head of `gated_delta`.
    """

    paper = "Peng et al., RWKV-7 Goose with Expressive Dynamic State Evolution, 2025, arXiv 2503.14456"
    Block = RWKVBlock
