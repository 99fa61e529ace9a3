"""The state of users: slots, vectors, segments, exact bytes. Imports nothing of ours."""

from malloc_bench.state.codebook import Codebook, FromCodebook, closest
from malloc_bench.state.coded import Coded, Table, coded
from malloc_bench.state.extend import extend, grow, joined
from malloc_bench.state.lowrank import Factor, LowRank, low_rank, low_ranks, principal, side_by_side
from malloc_bench.state.named import Fitted, Named
from malloc_bench.state.observed import newest_rows
from malloc_bench.state.prefill import Prefill
from malloc_bench.state.probes import Ask, Probes
from malloc_bench.state.quantized import Quantized, pack_bits, quantize, unpack_bits
from malloc_bench.state.rounded import Rounded, rounded
from malloc_bench.state.sample import Sample
from malloc_bench.state.slots import Slots, take
from malloc_bench.state.stats import MissingStatistic, Stats
from malloc_bench.state.user_state import Batch, Events, Layer, Segment, UserState, map_tensors
from malloc_bench.state.vectors import Dense, Ragged, Vectors

__all__ = [
    "Ask", "Batch", "Codebook", "Coded", "Dense", "Events", "Factor", "Fitted", "FromCodebook", "Layer", "LowRank",
    "MissingStatistic", "Named", "Prefill", "Probes", "Quantized", "Ragged", "Rounded", "Sample", "Segment", "Slots",
    "Stats", "Table", "UserState", "Vectors", "closest", "coded", "extend", "grow", "joined", "low_rank", "low_ranks",
    "map_tensors", "newest_rows", "pack_bits", "principal", "quantize", "rounded", "side_by_side", "take",
    "unpack_bits",
]  # fmt: skip
