"""A token reads the slots whose hashes are nearest to its own."""

from dataclasses import dataclass

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.search.hashed import Hashed
from malloc_bench.registry import register
from malloc_bench.state import ByHash, Lookup, Prefill


@register("eta")
@dataclass(frozen=True)
class ETA(Hashed):
    """Search by Hamming distance between SimHash codes (efficient long-term attention), head by head.

    The paper hashes item embeddings of a model that is trained with the search; here a trained backbone's queries and
    keys are hashed, with planes that are the same for all. 32 bits add 1.6 % to float32
    keys and values of 32 channels. `top` = 32 suits histories of 50 to 1,000. FLOPs fall, but torch compares hashes by
    element-wise work: on a CPU the read of 100 candidates over 4,000 slots takes two to four times the full state's.
    """

    top: int = 32
    bits: int = 32

    family = "search"
    paper = "ETA, Chen et al., End-to-End User Behavior Retrieval, 2021, arXiv 2108.04468"
    formula = "attention over the `top` slots with fewest sign(R q) != sign(R (k - mean k)), R random; reads fall alone"
    growth = grows(memory="n L d", compress="n L d", read="m L d")
    stores = "keys and values of every event, and `bits` bits of each key"

    def lookup(self, prefill: Prefill, layer: int) -> Lookup:
        return ByHash(self.top, self.codes(prefill, layer))
