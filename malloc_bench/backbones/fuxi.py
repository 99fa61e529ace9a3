"""FuXi-alpha (Ye et al., 2025, arXiv 2502.03036)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import BLOCK, Block, Places
from malloc_bench.backbones.hstu import TIME_BUCKETS, of_gaps, relative_bias
from malloc_bench.backbones.items import Sizes
from malloc_bench.backbones.losses import dropout
from malloc_bench.registry import register
from malloc_bench.state import Segment

_EPS = 1e-6
_NEVER = -1e4  # SiLU and its gradient are exactly 0 here


class FuXiBlock(Block):
    """Multi-channel attention, then a feed-forward of two stages (paper, sections 3.2 and 3.3).

    U, V, Q, K = SiLU(RMS(x) W); A = [SiLU(QK') / N, time bias, position bias], each over the same V;
    y = x + W_o dropout(U * RMS(A V)); output y + W_3 (SiLU(n W_1) * (n W_2)) with n = dropout(RMS(y)).
    Each stored head has a query head for every channel; those of the biases ask its keys nothing.
    """

    normalised = False
    biased = True

    def __init__(self, config: Sizes, times: bool) -> None:
        super().__init__()
        d, self.channels = config.dim, 3 if times else 2
        self.stored_heads, self.heads, self.rate = config.heads, self.channels * config.heads, config.dropout
        self.parts = {"gate": self.channels * d, "values": d, "queries": d, "keys": d}
        self.normaliser = config.max_length  # a constant, whatever the number of slots
        self.uvqk = nn.Linear(d, sum(self.parts.values()), bias=False)
        self.out = nn.Linear(self.channels * d, d)
        self.up, self.gate, self.down = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.position_bias = nn.Parameter(torch.empty(config.max_length + 1).normal_(std=0.02))  # by distance
        self.time_bias = nn.Parameter(torch.empty(TIME_BUCKETS + 1).normal_(std=0.02)) if times else None
        nn.init.normal_(self.uvqk.weight, std=0.02)
        for linear in (self.out, self.up, self.gate, self.down):
            nn.init.xavier_uniform_(linear.weight)

    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        mapped = F.silu(self.uvqk(_rms(x))).split(list(self.parts.values()), -1)
        gate, *rest = mapped
        values, q, keys = (y.unflatten(-1, (self.stored_heads, -1)).transpose(1, 2) for y in rest)
        q = torch.stack([q, *[torch.zeros_like(q)] * (self.channels - 1)], 2).flatten(1, 2)
        return q, {"keys": keys.contiguous(), "values": values.contiguous()}, gate

    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        x = x + self.out(dropout(gate * _rms(mixed.transpose(1, 2).flatten(2)), self.rate, self.training))
        hidden = dropout(_rms(x), self.rate, self.training)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        found = segment.fields["keys"].dot(q[:, :: self.channels].contiguous())
        biases = self._biases(queries, slots)
        return torch.stack([found, *(x.to(found.dtype).expand_as(found) for x in biases)], 2).flatten(1, 2)

    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        """SiLU(logit) / N, and biases as they are; a slot that stands for m events counts m times: x m."""
        weights = []
        for x, mask, mass in zip(logits, masks, masses):
            x = x.unflatten(1, (-1, self.channels))
            w = torch.cat([F.silu(x[:, :, :1]) / self.normaliser, x[:, :, 1:]], 2).flatten(1, 2)
            w = w.masked_fill(~self.each(mask), 0.0)
            weights.append(w if mass is None else w * self.each(mass).unsqueeze(2))
        return weights

    def mix(self, weights: Tensor, segment: Segment) -> Tensor:
        """[B, H, M, S] -> [B, H, M, D]; the channels of a stored head are queries in a row."""
        weights = weights.unflatten(1, (-1, self.channels)).flatten(2, 3)
        return segment.fields["values"].mix(weights).unflatten(2, (self.channels, -1)).flatten(1, 2)

    def each(self, x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x.repeat_interleave(self.heads // x.shape[1], 1)

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        """As `weigh` and `mix` do it; a bias that all heads share is made once."""
        q, keys, values = q[:, :: self.channels], own["keys"], own["values"]
        mixed = []
        for start in range(0, max(q.shape[2], 1), BLOCK):
            rows, seen = slice(start, start + BLOCK), slice(0, start + BLOCK)
            biases = self._biases(asked.rows(rows), places.rows(seen))
            future = torch.ones_like(biases[0][:1, :1], dtype=torch.bool).triu(start + 1)
            logits = (q[:, :, rows] @ keys[:, :, seen].mT).masked_fill(future, _NEVER)
            weights = [F.silu(logits) / self.normaliser, *(x.masked_fill(future, 0.0).to(q.dtype) for x in biases)]
            mixed.append(torch.stack([w @ values[:, :, seen] for w in weights], 2).flatten(1, 2))
        return torch.cat(mixed, dim=2)

    def logit_flops(self, queries: int, segment: Segment) -> int:
        return segment.fields["keys"].flops(queries)

    def attend_flops(self, queries: int, segment: Segment) -> int:
        return self.logit_flops(queries, segment) + segment.fields["values"].flops(self.channels * queries)

    def _biases(self, queries: Places, slots: Places) -> list[Tensor]:
        """Of time, where there are times, and of position, [B or 1, H or 1, M, S]."""
        found = [relative_bias(self.position_bias, None, _apart(queries.positions, slots.positions), None)]
        if self.time_bias is None:
            return found
        assert queries.times is not None and slots.times is not None
        return [of_gaps(self.time_bias, _apart(queries.times, slots.times)), *found]


def _rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=_EPS)


def _apart(queries: Tensor, slots: Tensor) -> Tensor:
    return queries.unsqueeze(-1) - slots.unsqueeze(-2)


@register("fuxi")
class FuXi(AttentionBackbone):
    """HSTU's successor: meaning, time and place each weigh the values by themselves, and a feed-forward stage follows.

    From the paper and its authors' code: the channels' weights, one set of values for all, RMS norms without weights, a
    gate over all channels, SwiGLU; times as HSTU has them (the gap to the moment at which the prediction is asked for,
    in its buckets). A state is what HSTU's is, keys and values, with positions and times of slots where they are chosen
    or merged. Without times there are two channels.
    Ours where code and paper leave room: N = max_length; SiLU of U, V, Q and K. Presets: the published settings for
    MovieLens-1M and -20M.
    """

    paper = "Ye et al., FuXi-alpha: Feature Interaction Enhanced Transformer, 2025, arXiv 2502.03036"
    presets = {
        "ml-1m": {"layers": 2, "heads": 1, "dim": 50},
        "ml-1m-large": {"layers": 8, "heads": 2, "dim": 50},
        "ml-20m": {"layers": 2, "heads": 4, "dim": 256},
    }
    uses_positions = True

    def __init__(self, config: Sizes, n_items: int, has_time: bool = False) -> None:
        super().__init__(config, n_items, lambda: FuXiBlock(config, has_time))
        self.uses_times = has_time

    def _output(self, x: Tensor) -> Tensor:
        return self._head(x)
