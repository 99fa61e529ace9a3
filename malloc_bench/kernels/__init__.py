"""Reads of vectors as they are written down, in one pass and with no copy of them in full; what `state` calls.

Each function answers None where it has no kernel for what is asked: the caller then does it in plain torch. There is
none without numba (`pip install 'malloc-bench[fast]'`), on another device than a CPU, where gradients are asked for,
and within `eager()` or with MALLOC_BENCH_KERNELS=eager.
"""

from malloc_bench.kernels.affine import FEW, Affine, dense, dot, mix
from malloc_bench.kernels.attention import attend
from malloc_bench.kernels.grouping import group
from malloc_bench.kernels.switch import compiled, eager, fits

__all__ = ["FEW", "Affine", "attend", "compiled", "dense", "dot", "eager", "fits", "group", "mix"]
