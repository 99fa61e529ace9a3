"""The newest events, fitted to stand for all."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.fitted.fitting import FittedTokens
from malloc_bench.registry import register
from malloc_bench.state import Prefill


@register("fit_recent")
@dataclass(frozen=True)
class FitRecent(FittedTokens):
    """Keeps the keys of the newest k events; their masses and values are solved for, so that probes get what the whole
    history gives them: the cheapest of its family.

    probes: items whose queries it is fitted to. which: "drawn" by their training events, or "even", all alike, which
    serves rare and later items better; the most "popular", the user's "own" newest, the model's own "top" for the user;
    the "candidates" that will read are a ceiling, not deployable.
    ridge: of the regression, towards the values as they were. horizon: positions of which later requests the probes
    stand at, 0 the next one.
    """

    probes: int = 64
    ridge: float = 1e-3
    horizon: int | tuple[int, ...] = (0,)
    which: str = field(default="drawn", metadata={"unsaid": "drawn"})

    family = "fitted"
    paper = "ours; for language models Attention Matching, arXiv 2602.16284, and Cartridges, arXiv 2506.06266"
    formula = (
        "keys of slots n-k ... n-1; softmax: masses m >= 0 with A m ~ the history's weight, values by ridge regression "
        "of A V on the weights A m; SiLU: values by ridge regression on A; A: weights of probe tokens"
    )
    growth = grows(compress="p n L d + p k L d + h p k^2 L")
    stores = "k keys, fitted values and, with softmax, fitted masses a layer and head; positions follow from the length"
    per_head = False
    consecutive = True

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        count = prefill.slots(layer).count[:, 0].long()
        newest = (count - k)[:, None] + torch.arange(int(k.max()) if len(k) else 0, device=k.device)
        return newest.minimum((count - 1).clamp(min=0)[:, None])[:, None]
