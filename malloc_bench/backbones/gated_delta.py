"""Gated DeltaNet (Yang, Kautz and Hatamizadeh, ICLR 2025, arXiv 2412.06464): a memory of constant size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.items import ItemBackbone, Sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.registry import register
from malloc_bench.state import Dense, Events, Layer, Prefill, Segment, Stats, UserState, Vectors

CHUNK = 32  # events at a time in the parallel form
_SLOW = -4.0  # a fresh layer forgets half of what it holds in about 38 events


class Rule(NamedTuple):
    """What M tokens ask of a memory and write into it.

    q, k, v: [B, H, M, D], queries and keys of length 1. keep: [B, H, M], log alpha <= 0, how much of the memory stays.
    write: [B, H, M], beta in [0, 1], how much of what the memory holds under k is replaced by v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    write: Tensor


def chunked(rule: Rule, memory: Tensor) -> tuple[Tensor, Tensor]:
    """M_t = alpha_t (I - beta_t k_t k_t') M_(t-1) + beta_t k_t v_t', o_t = M_t' q_t, by chunks (paper, section 3.3).

    memory: M_0 [B, H, D, D], rows by key (the paper's S transposed). Returns o [B, H, M, D] and the last memory. Within
    a chunk M_t = e^(G_t) M_0 + sum_(j <= t) e^(G_t - G_j) k_j u_j', with G the running sum of log alpha; the u_j, what
    is really written, solve a unit triangular system (WY form).
    """
    tokens = rule.q.shape[2]
    parts, size = chunk_sizes(tokens)
    short = parts * size - tokens  # padding keeps all and writes nothing
    q, k, v = (F.pad(x, (0, 0, 0, short)).unflatten(2, (parts, size)) for x in rule[:3])
    keep, write = (F.pad(x, (0, short)).unflatten(2, (parts, size)) for x in rule[3:])

    total = keep.cumsum(-1)  # G
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()  # [B, H, parts, C, C]
    start, write = total.exp().unsqueeze(-1), write.unsqueeze(-1)
    solved = UnitInverse.apply((write * decay * (k @ k.mT)).tril(-1))
    fresh, stale = solved @ (write * v), solved @ (write * start * k)  # u = fresh - stale M_0
    left = (k * (total[..., -1:] - total).exp().unsqueeze(-1)).mT  # what is left of each key at the chunk's end
    after = start[..., -1:, :]

    before, written = [], []
    for fresh_, stale_, left_, after_ in zip(*(x.unbind(2) for x in (fresh, stale, left, after))):
        before.append(memory)
        written.append(fresh_ - stale_ @ memory)
        memory = after_ * memory + left_ @ written[-1]
    out = (q * start) @ torch.stack(before, 2) + (q @ k.mT * decay) @ torch.stack(written, 2)
    return out.flatten(2, 3)[:, :, :tokens], memory


class UnitInverse(torch.autograd.Function):
    """(I + A)^-1 of strictly lower triangular matrices; its gradient is two products, where torch's solves again."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:  # type: ignore[override]
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        inverse = torch.linalg.solve_triangular(a, eye, upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT)


def alone(rule: Rule, memory: Vectors | None) -> Tensor:
    """o [B, H, M, D] of M tokens, each of which is the only one to follow the memory (None: nothing is known).

    M_1' q = alpha M_0' (q - beta (q.k) k) + beta (q.k) v: the memory is read once a token and never written out anew.
    """
    hit = (rule.q * rule.k).sum(-1) * rule.write
    own = hit.unsqueeze(-1) * rule.v
    if memory is None:
        return own
    return own + memory.mix(rule.keep.exp().unsqueeze(-1) * (rule.q - hit.unsqueeze(-1) * rule.k))


class GatedDeltaBlock(nn.Module):
    """x + W_o (SiLU(gate) * RMSNorm(o)) with o from the memory, then x + FFN(LN x), SASRec's with a ReLU."""

    def __init__(self, dim: int, heads: int, rate: float) -> None:
        super().__init__()
        self.heads, self.rate, self.dim = heads, rate, dim
        self.norm_memory, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkvg = nn.Linear(dim, 4 * dim, bias=False)
        self.rates = nn.Linear(dim, 2 * heads)
        self.norm_read = nn.RMSNorm(dim // heads, eps=1e-5)
        self.out = nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        with torch.no_grad():
            self.rates.bias[:heads] = _SLOW

    def project(self, x: Tensor) -> tuple[Rule, Tensor]:
        """x [B, M, d] -> what it asks and writes, and a gate [B, M, d] for `combine`."""
        normed = self.norm_memory(x)
        mixed, gate = self.qkvg(normed).to(x.dtype).split([3 * self.dim, self.dim], -1)
        q, k, v = F.silu(mixed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        forget, write = self.rates(normed).to(x.dtype).mT.chunk(2, 1)
        return Rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -F.softplus(forget), write.sigmoid()), gate

    def combine(self, x: Tensor, read: Tensor, gate: Tensor) -> Tensor:
        """The layer's output [B, M, d] from its input and what was read, [B, H, M, D]."""
        read = self.norm_read(read).transpose(1, 2).flatten(2)
        x = x + dropout(self.out(read * F.silu(gate)), self.rate, self.training)
        hidden = dropout(torch.relu(self.up(self.norm_ffn(x))), self.rate, self.training)
        return x + dropout(self.down(hidden), self.rate, self.training)

    def follow(self, rule: Rule, padding: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """`chunked`, but for events that are padding [B, 1, M]."""
        keep, write = (y.masked_fill(padding, 0.0) for y in (rule.keep, rule.write))
        return chunked(rule._replace(keep=keep, write=write), memory)

    def alone(self, rule: Rule, memory: Vectors | None) -> Tensor:
        return alone(rule, memory)

    def chunk_flops(self, size: int) -> int:
        """Of a head and chunk: products within, products with the memory, and the triangular system."""
        width = self.dim // self.heads
        return 2 * (5 * size**2 * width + 3 * size * width**2) + size**3


@register("gated_delta")
class GatedDelta(ItemBackbone):
    """A recurrent network whose state is one D x D matrix a head: linear attention that forgets and corrects.

    A state has one field `memory` [B, H, D, D] a layer and no slots: layers x dim^2 / heads numbers whatever the length
    of the history, stored for every user, also for one without events, whose memory is zero. `append` reads a
    compressed memory, changes it and leaves it in float32.

    From the paper: the gated delta rule and its chunkwise training, SiLU and L2-normalised queries and keys,
    alpha and beta from the input, an output that is normalised per head and gated. Ours: alpha = sigmoid of a linear
    map, slow to forget when fresh; no short convolution, whose last inputs would be more state; no positions, as
    the recurrence has an order; keys and values of equal width; SASRec's feed-forward, embeddings x sqrt(d) and head.
    There is no attention to observe: a prefill has no statistics.
    """

    paper = "Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, ICLR 2025, arXiv 2412.06464"
    Block: ClassVar[type[GatedDeltaBlock]] = GatedDeltaBlock
    fields = ("memory",)
    has_slots = False
    blocks: Any  # an nn.ModuleList of `GatedDeltaBlock`s

    def __init__(self, config: Sizes, n_items: int, has_time: bool = False) -> None:
        super().__init__(config, n_items)
        nn.init.trunc_normal_(self.items.weight, std=0.02)
        sizes = config.dim, config.heads, config.dropout
        self.blocks = nn.ModuleList(self.Block(*sizes) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)

    def _embed(self, events: Events) -> Tensor:
        return dropout(self.items(events.items) * self.config.dim**0.5, self.config.dropout, self.training)

    def _output(self, x: Tensor) -> Tensor:
        return self._head(self.norm(x))

    def _follow(self, events: Events, memories: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Events one after the other behind the memories: outputs [B, M, d] and what the memories become."""
        x, padding, grown = self._embed(events), ~events.mask()[:, None], []
        for block, memory in zip(self.blocks, memories):
            rule, gate = block.project(x)
            with torch.autocast(x.device.type, enabled=False):  # the triangular system wants its digits
                read, memory = block.follow(rule, padding, memory)
            x = block.combine(x, read, gate)
            grown.append(memory)
        return self._output(x), grown

    def _empty(self, events: Events) -> list[Tensor]:
        """Memories of users of whom nothing is known."""
        heads, width = self.config.heads, self.config.dim // self.config.heads
        zeros = self.items.weight.new_zeros(len(events.count), heads, width, width)
        return [zeros] * self.config.layers

    def forward(self, events: Events) -> Tensor:
        return self._follow(events, self._empty(events))[0]

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        self.admit(events)
        state = _state(self._follow(events, self._empty(events))[1], events.count)
        ids = torch.arange(len(state)) if users is None else users
        return Prefill(state, ids, events, seed=seed)

    def read(self, tokens: Events, state: UserState) -> Tensor:
        if state.events is not None:  # raw events only: rebuild, then read
            state = self.prefill(state.events).state
        x = self._embed(tokens)
        for block, layer in zip(self.blocks, state.layers):
            rule, gate = block.project(x)
            x = block.combine(x, block.alone(rule, _memory(layer)), gate)
        return self._output(x)

    def append(self, state: UserState, events: Events) -> UserState:
        length = self.grown(state, events)
        held = [_memory(layer) for layer in state.layers]
        memories = [new if old is None else old.dense() for old, new in zip(held, self._empty(events))]
        return _state(self._follow(events, memories)[1], length)

    def flops(
        self,
        step: Literal["prefill", "statistics", "append", "read"],
        tokens: int,
        state: UserState | None = None,
        stats: Stats = Stats(),
    ) -> int:
        if step == "statistics":
            return 0
        heads, width = self.config.heads, self.config.dim // self.config.heads
        layers = () if state is None else state.layers
        linear = sum(m.in_features * m.out_features for m in self.blocks.modules() if isinstance(m, nn.Linear))
        total = 2 * tokens * linear
        if step != "read":
            parts, size = chunk_sizes(tokens)
            total += heads * parts * sum(block.chunk_flops(size) for block in self.blocks)
            return total + sum(memory.dense_flops() for layer in layers if (memory := _memory(layer)))
        if state is not None and state.events is not None:
            raw = state.events.items.shape[1]
            return total + self.flops("prefill", raw) + 2 * tokens * self.config.layers * heads * width**2
        return total + sum(memory.flops(tokens) for layer in layers if (memory := _memory(layer)))


def chunk_sizes(tokens: int) -> tuple[int, int]:
    """How many chunks, and how long: of like size, so that little is padding."""
    parts = max(-(-tokens // CHUNK), 1)
    return parts, max(-(-tokens // parts), 1)


def _memory(layer: Layer) -> Vectors | None:
    """The memory in a layer of a state; None where it has been dropped."""
    return layer[0].fields["memory"] if layer else None


def _state(memories: Sequence[Tensor], length: Tensor) -> UserState:
    return UserState(tuple((Segment({"memory": Dense(x)}, None),) for x in memories), length)
