"""A token reads the slots that fall into its hash buckets."""

from dataclasses import dataclass

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.search.hashed import Hashed
from malloc_bench.registry import register
from malloc_bench.state import ByHash, Lookup, Prefill


@register("sdim")
@dataclass(frozen=True)
class SDIM(Hashed):
    """Search by hash buckets: a slot is found where a whole run of its hash is the query's, in any of bits / run runs.

    Of the slots found, those in most of the token's buckets come first, at most `top`. Ours: the slots found are
    attended to. The paper sums each bucket's values in place of attention, with m hashes in runs of tau bits, which a
    model must be trained for; as it keeps sums alone it could do without slots, but it is no read of a softmax or SiLU
    attention that exists. FuxiCTR's version has one run of 4 bits.
    """

    top: int = 32
    bits: int = 32
    run: int = 4

    grid = {"run": (2, 4, 8)}
    family = "search"
    paper = (
        "SDIM, Cao et al., Sampling Is All You Need on Modeling Long-Term User Behaviors, CIKM 2022, arXiv 2205.10249"
    )
    formula = (
        "attention over at most `top` slots that share a bucket, `run` bits of sign(R x), with q; reads fall alone"
    )
    growth = grows(memory="n L d", compress="n L d", read="m L d")
    stores = "keys and values of every event, and `bits` bits of each key"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.run not in (1, 2, 4, 8):
            raise ValueError(f"sdim: a run is 1, 2, 4 or 8 bits, not {self.run}")

    def lookup(self, prefill: Prefill, layer: int) -> Lookup:
        return ByHash(self.top, self.codes(prefill, layer), self.run, 1)
