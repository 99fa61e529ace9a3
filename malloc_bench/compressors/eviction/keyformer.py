"""Heavy hitters of a softer, noisy softmax."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.eviction.random import hashed
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState


@register("keyformer")
@dataclass(frozen=True)
class Keyformer(Eviction):
    """Keeps slots by their weights in a softmax with Gumbel noise on logits and a temperature that rises.

    Noise and heat stand for the weight that moves when slots are dropped. From the paper: tau from 1 to 2, a share of
    the budget for the newest (0.2 to 0.3). Ours: the newest `window` queries, tau rising over them, as nothing is
    generated; noise is hashed from (seed, user, layer, query, slot). Behind SiLU attention it is the same softmax. A
    position bias is the next request's. normalise: divide by the queries that see the slot, as `h2o` does; the paper
    has the sum.
    """

    window: int = 64
    tau: float = 2.0
    recent: float = 0.25
    normalise: bool = True

    family = "eviction"
    version_placed = 2
    paper = "Keyformer, Adnan et al., MLSys 2024, arXiv 2403.09054"
    formula = "score = mean over newest queries t that see it of softmax((q_t.k + Gumbel) / tau_t), tau_t from 1 to tau"
    growth = grows(compress="w n L d")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys",)

    def __post_init__(self) -> None:
        if self.window < 1 or self.tau < 1 or not 0 <= self.recent <= 0.5:
            raise ValueError(f"keyformer: window >= 1, tau >= 1 and 0 <= recent <= 0.5 are needed, not {self}")

    @property
    def needs(self) -> Stats:
        return Stats(queries=self.window)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        keys, count = prefill.keys(layer).float(), prefill.slots(layer).count.long()[:, :1, None]  # [B, 1, 1]
        queries, there = prefill.newest_queries(layer, self.window)  # [B, Hq, W, D], [B, 1, W]
        queries = queries.float().unflatten(1, (keys.shape[1], -1))  # [B, H, G, W, D]
        slot, age = (
            torch.arange(keys.shape[2], device=keys.device),
            torch.arange(self.window, 0, -1, device=keys.device),
        )
        asks = count - age[:, None]  # the slot that asks, [B, W, 1]
        seen = (slot <= asks)[:, None, None]
        noise = -(-hashed(prefill, layer, slot + (1 << 20) * asks).log()).log()  # [B, W, S]
        logits = queries @ keys.unsqueeze(2).mT + noise[:, None, None]
        if prefill.standing is not None:  # of the next request, for all of them: it is what will read
            logits = logits + prefill.standing[layer].unflatten(1, (keys.shape[1], -1)).unsqueeze(3)
        tau = torch.linspace(1, self.tau, self.window, device=keys.device)[:, None]
        seen = seen & there[:, None, ..., None]
        score = ((logits / tau).masked_fill(~seen, -1e30).softmax(-1) * seen).sum(3).mean(2)
        return score / seen.sum(3).squeeze(2).clamp(min=1) if self.normalise else score

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, (k * self.recent).long()

    def flops(self, state: UserState, of: Sources) -> int:
        """Each key with each query."""
        widths = [layer[0].fields["keys"].shape[3] for layer in state.layers]
        return sum(2 * x.events * self.window * x.queries * d for x, d in zip(of, widths))
