"""Heads of a trained backbone, pooled without any training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from malloc_bench.compressors.base import Compressor, grows, map_vectors
from malloc_bench.compressors.heads.shared import Shared
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Dense, Prefill, Segment, UserState, Vectors

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


def refusal(what: str, backbone: "Backbone", heads: int) -> str | None:
    """Why the heads of a backbone's states cannot become fewer by a multiple of `heads`, or None."""
    if not backbone.has_slots or backbone.fields != ("keys", "values"):
        return f"{what} heads of keys and values, {backbone.name} stores {backbone.fields[0]}"
    blocks: Any = getattr(backbone, "blocks", ())
    had = min((getattr(block, "stored_heads", 1) for block in blocks), default=1)
    if had > heads and had % heads == 0:
        return None
    return f"{what.split()[0]} needs a larger multiple of {heads} heads, {backbone.name} has {had}"


@register("mean_heads")
@dataclass(frozen=True)
class MeanHeads(Compressor):
    """Neighbouring heads of keys and values become their mean; the query heads stay and share it.

    How GQA begins its training (Ainslie et al., EMNLP 2023, section 2.1), here without it. Nothing has taught the
    heads of a backbone to agree, so expect a floor for `gqa` and `mqa` rather than a rival. heads: that stay; the
    backbone's must be a larger multiple of it.
    """

    heads: int = 1

    family = "heads"
    paper = "GQA's conversion of a checkpoint, Ainslie et al., EMNLP 2023, arXiv 2305.13245, section 2.1"
    formula = "keys and values of stored head g = mean over the heads of group g; nothing is trained, so heads that "
    formula += "differ blur one another"
    growth = grows(read="n L d")
    stores = "keys and values of every event in `heads` heads"

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"mean_heads: heads must be at least 1, not {self.heads}")

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal("mean_heads pools", backbone, self.heads)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        def pooled(name: str, segment: Segment) -> Vectors:
            if (had := segment.fields[name].shape[1]) % self.heads:
                raise ValueError(f"mean_heads: heads must divide the state's {had}, not {self.heads}")
            groups = segment.fields[name].dense().unflatten(1, (self.heads, -1))  # [B, heads, group, S, D]
            return Shared(Dense(groups.mean(2)), groups.shape[2])

        return map_vectors(prefill.state, pooled)
