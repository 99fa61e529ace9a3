"""HSTU (Zhai et al., ICML 2024, arXiv 2402.17152)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench import kernels
from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import BLOCK, Block, Places
from malloc_bench.backbones.items import Sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.backbones.sums import Weigher
from malloc_bench.kernels import Gaps
from malloc_bench.registry import register
from malloc_bench.state import Projection

TIME_BUCKETS = 128
_OCTAVE = 0.301
_EPS = 1e-6  # of the layer norms, as the authors' code has it
_NEVER = -1e4  # SiLU and its gradient are exactly 0 here


class _TimeBias(torch.autograd.Function):
    """table[buckets] whose gradient is one histogram; the stock backward of indexing takes 30 times as long on CPUs."""

    @staticmethod
    def forward(ctx, table: Tensor, buckets: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(buckets)
        ctx.size = len(table)
        return table.index_select(0, buckets.flatten()).view(buckets.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (buckets,) = ctx.saved_tensors
        return grad.new_zeros(ctx.size).scatter_add_(0, buckets.flatten(), grad.flatten()), None


def relative_bias(position_bias: Tensor, time_bias: Tensor | None, distance: Tensor, gap: Tensor | None) -> Tensor:
    """Learned numbers of distances in events and gaps in seconds, integers of one shape (gap None: no times)."""
    bias = position_bias[distance.long().clamp(0, len(position_bias) - 1)]  # below 0: masked later
    return bias if time_bias is None or gap is None else bias + of_gaps(time_bias, gap)


def of_gaps(time_bias: Tensor, gap: Tensor) -> Tensor:
    """Learned numbers of gaps in seconds."""
    return _TimeBias.apply(time_bias, _buckets(gap.abs().clamp(min=1).float()))


def _buckets(gap: Tensor) -> Tensor:
    """Of gaps from 1 second on."""
    return (gap.log() / _OCTAVE).long().clamp(max=TIME_BUCKETS)


@cache
def _gaps() -> Gaps:
    """`_buckets` as kernels look them up: 16 cells an octave are narrower than a bucket."""
    begin = (torch.arange(64 * 16 + 1, device="cpu") << 19) + (127 << 23)
    first, step = _buckets(begin.int().view(torch.float32)), torch.zeros_like(begin)
    for bit in range(18, -1, -1):  # the last float of the cell's own bucket
        further = step + (1 << bit)
        step = torch.where(_buckets((begin + further).int().view(torch.float32)) == first, further, step)
    return Gaps(first.int().numpy(), (begin + step + 1).int().view(torch.float32).numpy())


class HSTUBlock(Block):
    """U, V, Q, K = SiLU(LN(x) W); A = SiLU(QK' + bias) / N; output x + W_o dropout(U * LN(AV)) (paper, eq. 1-3)."""

    fused = "uvqk"
    normalised = False
    weighing = "silu"

    def __init__(self, dim: int, heads: int, rate: float, max_length: int, times: bool) -> None:
        super().__init__()
        self.heads, self.stored_heads, self.rate, self.dim = heads, heads, rate, dim
        self.parts = dict.fromkeys(("gate", "values", "queries", "keys"), dim)
        self.normaliser = max_length  # a constant, whatever the number of slots
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.position_bias = nn.Parameter(torch.empty(max_length + 1).normal_(std=0.02))  # by distance
        self.time_bias = nn.Parameter(torch.empty(TIME_BUCKETS + 1).normal_(std=0.02)) if times else None
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.out.weight)

    biased = True

    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        return self.split(F.silu(self.uvqk(F.layer_norm(x, x.shape[-1:], eps=_EPS))))

    def projection(self) -> Projection | None:
        return self._projected(self.uvqk, {}, True, _EPS)

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        normed = F.layer_norm(mixed.transpose(1, 2).flatten(2), (self.dim,), eps=_EPS)
        return x + self.out(dropout(gate * normed, self.rate, self.training))

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        """As `weigh` and `mix` do it, but masked by the bias and divided on the thin side: fewer passes."""
        keys, values = own["keys"], own["values"] / self.normaliser
        mixed = []
        for start in range(0, max(q.shape[2], 1), BLOCK):
            rows, seen = slice(start, start + BLOCK), slice(0, start + BLOCK)
            bias = self.bias(asked.rows(rows), places.rows(seen))
            future = torch.ones_like(bias[:1, :1], dtype=torch.bool).triu(start + 1)
            logits = q[:, :, rows] @ keys[:, :, seen].transpose(-1, -2) + bias.masked_fill(future, _NEVER)
            mixed.append(F.silu(logits) @ values[:, :, seen])
        return torch.cat(mixed, dim=2)

    def in_tiles(self, own: dict[str, Tensor], places: Places, asked: Places) -> tuple[Tensor, Tensor, Weigher] | None:
        def weigher(rows: slice) -> Callable[[Tensor, slice], Tensor]:
            bias = self.bias(asked.rows(rows), places.rows(slice(0, rows.stop)))[:, 0]  # [B or 1, rows, keys]
            future = torch.ones_like(bias[0], dtype=torch.bool).triu(rows.start + 1)
            bias = bias.masked_fill(future, _NEVER)

            def weigh(weights: Tensor, some: slice) -> Tensor:
                mine = bias if len(bias) == 1 else bias[torch.arange(some.start, some.stop) // self.heads]
                return F.silu(weights.add_(mine), inplace=True).div_(self.normaliser)

            return weigh

        return own["keys"], own["values"], weigher

    def bias(self, queries: Places, slots: Places) -> Tensor:
        tables, places = (self.position_bias, self.time_bias), ((x.positions, x.times) for x in (queries, slots))
        if (found := kernels.relative(*tables, _gaps, *places)) is not None:
            return found
        distance = queries.positions.unsqueeze(-1) - slots.positions.unsqueeze(-2)
        gap = None
        if queries.times is not None and slots.times is not None:
            gap = queries.times.unsqueeze(-1) - slots.times.unsqueeze(-2)
        return relative_bias(*tables, distance, gap)

    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        """SiLU(logit) / N for every slot by itself; a slot that stands for m events counts m times: x m."""
        weights = []
        for x, mask, mass in zip(logits, masks, masses):
            w = (F.silu(x) / self.normaliser).masked_fill(~mask, 0.0)
            weights.append(w if mass is None else w * mass.unsqueeze(2))
        return weights


@register("hstu")
class HSTU(AttentionBackbone):
    """A stack of gated attention layers that weigh events by SiLU, not softmax, with position and time bias.

    The time bias needs data with times and uses the gap between a slot's event and the moment at which the prediction
    is asked for, as the authors' code does; without times the position bias stands alone.
    Ours where code and paper leave room: N = max_length. Presets: the published settings for MovieLens-1M and -20M
    and for Amazon Books, small and large.
    """

    paper = "Zhai et al., Actions Speak Louder than Words (HSTU), ICML 2024, arXiv 2402.17152"
    presets = {
        "ml-1m": {"layers": 2, "heads": 1, "dim": 50},
        "ml-1m-large": {"layers": 8, "heads": 2, "dim": 50},
        "ml-20m": {"layers": 4, "heads": 4, "dim": 256},
        "ml-20m-large": {"layers": 16, "heads": 8, "dim": 256},
        "books": {"layers": 4, "heads": 4, "dim": 64, "max_length": 50, "dropout": 0.5},
        "books-large": {"layers": 16, "heads": 8, "dim": 64, "max_length": 50, "dropout": 0.5},
    }
    version = 2
    uses_positions = True

    def __init__(self, config: Sizes, n_items: int, has_time: bool = False) -> None:
        sizes = config.dim, config.heads, config.dropout, config.max_length
        super().__init__(config, n_items, lambda: HSTUBlock(*sizes, has_time))
        self.uses_times = has_time

    def _output(self, x: Tensor) -> Tensor:
        return self._head(x)
