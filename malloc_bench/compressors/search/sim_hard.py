"""A token reads the events of its own category."""

from dataclasses import dataclass

import torch

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.search.searched import Search
from malloc_bench.registry import register
from malloc_bench.state import ByLabel, Dense, Lookup, Named, Prefill, Stats


@register("sim_hard")
@dataclass(frozen=True)
class SIMHard(Search):
    """Search by category, the hard search of SIM's general search unit, which the paper deploys.

    The category is the candidate's in ranking, the newest event's in retrieval; where the user has no other event of it
    the token sees itself alone. Backbones are not trained for that: a model whose attention is diffuse loses more here
    than by any `top` slots of the history, so hold it against `sim_soft` at the same `top`.
    """

    top: int = 32

    family = "search"
    paper = "SIM, Pi et al., Search-based User Interest Modeling, CIKM 2020, arXiv 2006.05639"
    formula = "attention over the `top` newest slots of the token's own item category; reads fall, not bytes"
    growth = grows(memory="n L d", read="m L d")
    stores = (
        "keys and values of every event, and once its category (1 byte up to 256 categories, else 4); the catalogue's "
        "table of categories is a column beside its embeddings, not counted"
    )

    @property
    def needs(self) -> Stats:
        return Stats(categories=True)

    def lookup(self, prefill: Prefill, layer: int) -> Lookup:
        def codes() -> ByLabel:
            held = prefill.slot_categories(layer)  # raises MissingStatistic
            assert prefill.items is not None
            table = prefill.items["categories"]
            narrow = torch.uint8 if int(table.max()) < 256 else torch.int32
            return ByLabel(self.top, Dense(held.clamp(min=0).to(narrow).unsqueeze(-1)), Named({"categories": table}))

        return prefill.remember(("labels", self.top, id(prefill.slots(layer))), codes)  # layers of the same slots share
