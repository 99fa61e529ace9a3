"""The loop that puts chosen slots in order, for a compiler: without a branch, so no guess of the processor fails."""

import numpy as np

from malloc_bench.kernels.loops import jit


@jit
def placed(order, wanted, index, start, stop):  # type: ignore[no-untyped-def]
    slots, size = order.shape[1], index.shape[1]
    marks, found = np.empty(slots, np.uint8), np.empty(slots + 1, np.int64)
    for n in range(start, stop):
        for s in range(slots):
            marks[order[n, s]] = wanted[n, s]
        many = 0
        for s in range(slots):
            found[many] = s
            many += marks[s]
        many = min(many, size)
        index[n, :many] = found[:many]
        index[n, many:] = 0
