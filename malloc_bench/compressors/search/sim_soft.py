"""A token reads the slots that it would weigh most."""

from dataclasses import dataclass

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.search.searched import Search
from malloc_bench.registry import register
from malloc_bench.state import ByLogit, Lookup, Prefill


@register("sim_soft")
@dataclass(frozen=True)
class SIMSoft(Search):
    """Search by inner product, the soft search of SIM's general search unit, over each head's own keys.

    The paper learns embeddings for the search and asks an index of inner products; here the search is exact and by the
    attention's own logit (with HSTU's bias), so it shows the best that an index could find: all keys are still
    multiplied, only values and their weights are saved. Online the paper reads sub-sequences of at most some hundreds
    of events out of tens of thousands; `top` = 32 suits histories of 50 to 1,000.
    """

    top: int = 32

    family = "search"
    paper = "SIM, Pi et al., Search-based User Interest Modeling, CIKM 2020, arXiv 2006.05639"
    formula = "attention over the `top` slots of the largest logits q.k of each token and head; reads fall, not bytes"
    growth = grows(memory="n L d", read="n L d")
    stores = "keys and values of every event"

    def lookup(self, prefill: Prefill, layer: int) -> Lookup:
        return ByLogit(self.top)
