"""Slots as pursuit takes them, whose keys are moved too."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.fitted.descent import refined, refining_flops
from malloc_bench.compressors.fitted.fit_omp import FitOMP
from malloc_bench.compressors.fitted.solving import Rows, solve
from malloc_bench.registry import register
from malloc_bench.state import Probes, Segment, UserState


@register("fit_keys")
@dataclass(frozen=True)
class FitKeys(FitOMP):
    """Begins with `fit_omp`, then moves the keys by a few steps of Adam on what probes are answered wrongly, and solves
    for masses and values again; a head stays as it was where probes held out are answered worse. Where they stand, and
    with it any bias, stays. rounds: steps of the descent; rate: of the first, in root mean squares of a head's keys.
    """

    rounds: int = field(default=10, kw_only=True)
    rate: float = field(default=0.1, kw_only=True)

    family = "fitted"
    paper = "ours; for language models Cartridges, arXiv 2506.06266, and Attention Matching, arXiv 2602.16284"
    formula = "keys: down dL/dk by Adam, L = |A V of the slots - A V|^2 over probes; masses and values as in fit_recent"
    growth = grows(compress="p n L d + h p k n L + h p k^2 L")
    stores = "k fitted keys, values and, with softmax, masses a layer and head; positions where the backbone reads them"
    version = 4
    whole: ClassVar[bool] = False  # masses and values move too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1 or not self.rate > 0:
            raise ValueError(f"{self.name}: at least one step, at a rate above 0, not {self.rounds} at {self.rate}")

    def fit_slots(self, probes: Probes, chosen: Segment, mass: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        keys, rows = chosen.fields["keys"].dense(), Rows.of(probes, chosen)
        begin = keys, *solve(rows, self.ridge, mass)
        if not keys.shape[2]:
            return begin
        return refined(probes, chosen, rows, begin, self.ridge, self.rounds, self.rate, self.whole)

    def flops(self, state: UserState, of: Sources) -> int:
        """Of `fit_omp`, and the steps of every key."""
        refining = (
            refining_flops(self.probes, x, segment, self.rounds, self.whole)
            for x, (segment, *_) in zip(of, state.layers)
        )
        return super().flops(state, of) + sum(refining)
