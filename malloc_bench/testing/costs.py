"""Whether an encoder takes what it says beforehand."""

from __future__ import annotations

from malloc_bench.compressors import Compressor, Encoder, get_compressor
from malloc_bench.compressors.chain.compose import Compose
from malloc_bench.testing.worlds import World


def costs_what_it_says(compressor: Compressor, world: World) -> None:
    """An encoder's `cost`, by which chains know how many slots fit, is within a factor of what is packed; what codes
    to entropy need not know it better."""
    if not isinstance(compressor, Encoder) or compressor.takes_budget or compressor.fit_parts():
        return
    try:
        chain = Compose((get_compressor("recent"), compressor))
    except ValueError:  # nobody knows what it asks for behind other methods
        return
    if world.backbone is None or chain.supports(world.backbone) is None:
        prefill = world.full(chain.needs)
        said, size = chain.sizes(prefill)(most := chain.most(prefill)), chain.keep(prefill, most).nbytes()
        off = float(size.sum() / said.sum().clamp(min=1))
        assert 0.6 < off < 2.5, f"{off:.2g} times the bytes that `cost` says: {size.tolist()} for {said.tolist()}"
