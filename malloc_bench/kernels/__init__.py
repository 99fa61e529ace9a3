"""Reads of vectors as they are written down, with no copy of them in full; what `state` and backbones call.

Each function answers None where it has no kernel for what is asked: the caller then does it in plain torch. There is
none on a CPU without numba (`pip install 'malloc-bench[fast]'`), on a GPU without Triton (`[cuda]`; it reads, nothing
more), elsewhere, where gradients are asked for, and within `eager()` or with MALLOC_BENCH_KERNELS=eager. With
MALLOC_BENCH_KERNELS=float a CPU that multiplies bytes reads as one that does not (`whole`).
"""

from malloc_bench.kernels.affine import Affine
from malloc_bench.kernels.beams import nearest_sums
from malloc_bench.kernels.counting import reach
from malloc_bench.kernels.entries import Entries
from malloc_bench.kernels.gpu import reads
from malloc_bench.kernels.grouping import group
from malloc_bench.kernels.plain import Plain
from malloc_bench.kernels.quadratic import quadratic
from malloc_bench.kernels.reading import FEW, Written, attend, dense, dot, mix
from malloc_bench.kernels.relative import Gaps, relative
from malloc_bench.kernels.sorting import sorted_places
from malloc_bench.kernels.switch import compiled, eager
from malloc_bench.kernels.thin import Thin

__all__ = [
    "FEW", "Affine", "Entries", "Gaps", "Plain", "Thin", "Written", "attend", "compiled", "dense", "dot", "eager",
    "group", "mix", "nearest_sums", "quadratic", "reach", "reads", "relative", "sorted_places",
]  # fmt: skip
