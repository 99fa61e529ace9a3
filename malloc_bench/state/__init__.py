"""The state of users: slots, vectors, segments, exact bytes. Imports nothing of ours."""

from malloc_bench.state.coded import Coded, Table, coded
from malloc_bench.state.extend import extend, grow
from malloc_bench.state.lowrank import Factor, LowRank, low_rank, low_ranks, principal, side_by_side
from malloc_bench.state.prefill import MissingStatistic, Prefill, Stats
from malloc_bench.state.quantized import Quantized, pack_bits, quantize, unpack_bits
from malloc_bench.state.rounded import Rounded, rounded
from malloc_bench.state.slots import Slots, take
from malloc_bench.state.user_state import Batch, Events, Layer, Segment, UserState, map_tensors
from malloc_bench.state.vectors import Dense, Ragged, Vectors

__all__ = [
    "Batch", "Coded", "Dense", "Events", "Factor", "Layer", "LowRank", "MissingStatistic", "Prefill", "Quantized",
    "Ragged", "Rounded", "Segment", "Slots", "Stats", "Table", "UserState", "Vectors", "coded", "extend", "grow",
    "low_rank", "low_ranks",
    "map_tensors", "pack_bits", "principal", "quantize", "rounded", "side_by_side", "take", "unpack_bits",
]  # fmt: skip
