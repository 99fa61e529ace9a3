"""The slots that probes look at most, fitted to stand for all."""

from dataclasses import dataclass, field

from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.fitted.fitting import FittedTokens
from malloc_bench.compressors.fitted.solving import evened, rows_of
from malloc_bench.compressors.selection import chosen, ranked
from malloc_bench.registry import register
from malloc_bench.state import Prefill


@register("fit_top")
@dataclass(frozen=True)
class FitTop(FittedTokens):
    """Keeps the k slots of each head with the largest root mean square weight over probes; masses and values are
    solved for as in `fit_recent`, where the parameters are told.
    """

    probes: int = 64
    ridge: float = 1e-3
    horizon: int | tuple[int, ...] = (0,)
    which: str = field(default="drawn", metadata={"unsaid": "drawn"})

    family = "fitted"
    paper = "ours; for language models Attention Matching, arXiv 2602.16284"
    formula = "the k slots of the largest mean over probes of A^2; masses and values as in fit_recent"
    growth = grows(compress="p n L d + p k L d + h p k^2 L")
    stores = "k keys, fitted values and, with softmax, masses a layer and head; positions where the backbone reads them"

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        count = prefill.slots(layer).count.long()

        def order() -> Tensor:
            probes, segment = prefill.probes(layer, self.ask), prefill.segment(layer)
            weights = rows_of(probes.columns(segment) * evened(probes), next(iter(segment.fields.values())).shape[1])
            return ranked(weights.square().mean(2), count)

        return chosen(prefill.remember(("fit_top", self.ask, layer), order), count, k, 0, 0)
