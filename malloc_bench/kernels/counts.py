"""The loop that counts scores beside others, for a compiler: without a branch, so no guess of the processor fails."""

import numpy as np

from malloc_bench.kernels.loops import f32, jit, zero

_PIECE = 4096  # scores at a time: they stay in the first cache for all marks


@jit
def counted(scores, marked, count, start, stop):  # type: ignore[no-untyped-def]
    for n in range(start, stop):
        row, mark, own = scores[n], marked[n], count[n]
        own[:] = 0
        for first in range(0, len(row), _PIECE):
            piece = row[first : first + _PIECE]
            for m in range(len(mark)):
                least, more = row[mark[m]], zero
                for j in range(len(piece)):
                    more += f32(1) if piece[j] >= least else zero
                own[m] += np.int32(more)
