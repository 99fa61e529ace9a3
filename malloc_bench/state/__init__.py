"""The state of users: slots, vectors, segments, exact bytes. Imports nothing of ours but kernels."""

from malloc_bench.state.codebook import Codebook, FromCodebook, Pool, Pooled, closest
from malloc_bench.state.coded import Coded, Table, coded
from malloc_bench.state.entropy import CodedEvents, ItemFrequencies
from malloc_bench.state.extend import extend, grow, joined
from malloc_bench.state.grouped import grouped
from malloc_bench.state.lookup import ByHash, ByLabel, ByLogit, Lookup, hash_flops, signs
from malloc_bench.state.lowrank import Factor, LowRank, factor, low_rank, low_ranks, principal, side_by_side
from malloc_bench.state.microscaled import MicroScaled, microscaled
from malloc_bench.state.named import Fitted, Named
from malloc_bench.state.observed import absolute_sums, by_heads, newest_rows
from malloc_bench.state.partial import Channels, Sized
from malloc_bench.state.patched import Intact, Outliers, Over, Sum, intact, outliers, under
from malloc_bench.state.prefill import Prefill
from malloc_bench.state.probes import Ask, Probes
from malloc_bench.state.quantized import Quantized, checked, pack_bits, quantize, unpack_bits
from malloc_bench.state.rebuilt import Derived, Embedded, Map, Normed, Projection, Rebuilt, Summed
from malloc_bench.state.rounded import Rounded, rounded
from malloc_bench.state.sample import Sample
from malloc_bench.state.scaled import Scaled, sized
from malloc_bench.state.slots import Slots, take
from malloc_bench.state.stats import MissingStatistic, Stats
from malloc_bench.state.streamed import Frequencies, Streamed, coding, frequencies, integers, streamed
from malloc_bench.state.turned import Basis, Turned
from malloc_bench.state.user_state import Batch, Events, Layer, Segment, UserState, map_tensors
from malloc_bench.state.vectors import Dense, Ragged, Vectors, narrowed, unhalved
from malloc_bench.state.zipped import Zipped, zipped

__all__ = [
    "Ask", "Basis", "Batch", "ByHash", "ByLabel", "ByLogit", "Channels", "Codebook", "Coded", "CodedEvents", "Dense",
    "Derived", "Embedded", "Events", "Factor", "Fitted", "Frequencies", "FromCodebook", "Intact", "ItemFrequencies",
    "Layer", "Lookup", "LowRank", "Map", "MicroScaled", "MissingStatistic", "Named", "Normed", "Outliers", "Over",
    "Pool", "Pooled", "Prefill", "Probes", "Projection", "Quantized", "Ragged", "Rebuilt", "Rounded", "Sample",
    "Scaled", "Segment", "Sized", "Slots", "Stats", "Streamed", "Sum", "Summed", "Table", "Turned", "UserState",
    "Vectors", "Zipped", "absolute_sums", "by_heads", "checked", "closest", "coded", "coding", "extend", "factor",
    "frequencies", "grouped", "grow", "hash_flops", "intact", "integers", "joined", "low_rank", "low_ranks",
    "map_tensors", "microscaled", "narrowed", "newest_rows", "outliers", "pack_bits", "principal", "quantize",
    "rounded", "side_by_side", "signs", "sized", "streamed", "take", "under", "unhalved", "unpack_bits", "zipped",
]  # fmt: skip
