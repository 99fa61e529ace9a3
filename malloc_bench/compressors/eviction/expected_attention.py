"""What queries like the newest would attend to."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench import kernels
from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState, by_heads, unhalved


@register("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(Eviction):
    """Keeps slots by the attention that a Gaussian of the newest queries would pay, times the size of their values.

    From the paper: mean and covariance of queries, the Gaussian's closed form of E exp(q.k). Ours: no rotation to
    future positions, as positions are in the vectors or a bias, which is the next request's; the newest `window`
    queries, not all; no sinks. Behind SiLU attention, which no closed form is known for, it is softmax's score.
    """

    window: int = 64

    grid = {"window": (8, 16, 32, 64, 128, 256)}
    family = "eviction"
    version_placed = 2
    paper = "Expected Attention, Devoto et al., arXiv 2510.00636"
    formula = "score = softmax over slots of (mu.k + k'Ck / 2 + bias) x |v|, mu and C of the newest `window` queries"
    growth = grows(compress="n L d^2")
    stores = "keys and values of k events per layer and head, and their positions where the backbone reads them"
    reads = ("keys", "values")

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"expected_attention: window must be at least 1, not {self.window}")

    @property
    def needs(self) -> Stats:
        return Stats(queries=self.window)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        keys, real = prefill.keys(layer).float(), prefill.mask(layer)
        queries, there = prefill.newest_queries(layer, self.window)
        queries = queries.float()
        count = there.sum(-1).clamp(min=1)[..., None, None]  # [B, 1, 1, 1]
        mean = queries.sum(2, keepdim=True) / count  # [B, Hq, 1, D]
        spread = (queries - mean) * (there.unsqueeze(-1) * (2 * count).rsqrt())
        group = queries.shape[1] // keys.shape[1]
        half, mean = (x.unflatten(1, (-1, group)) for x in (spread.mT @ spread, mean))
        logits = by_heads(gaussian, keys, half, mean)  # [B, H, group, S]
        if prefill.standing is not None:
            logits = logits + prefill.standing[layer].unflatten(1, (-1, group))
        weights = logits.masked_fill(~real.unsqueeze(2), -1e30).softmax(-1).mean(2)
        return weights * unhalved(prefill.values(layer)).norm(dim=-1)

    def flops(self, state: UserState, of: Sources) -> int:
        """The covariance of each query head's newest, and each key with it."""
        widths = [layer[0].fields["keys"].shape[3] for layer in state.layers]
        return sum(2 * (x.events + self.window) * x.queries * d * d for x, d in zip(of, widths))


def gaussian(keys: Tensor, half: Tensor, mean: Tensor) -> Tensor:
    """mu.k + k'Ck / 2; keys [n, S, D], half a C [n, group, D, D] and mu [n, group, 1, D] -> [n, group, S]."""
    if (found := kernels.quadratic(keys, half, mean.squeeze(2))) is not None:
        return found
    k = keys.unsqueeze(1)
    return (k @ half).add_(mean).mul_(k).sum(-1)
