"""The loop of a beam search through codebooks whose entries are added, for a compiler."""

from functools import partial

import numba
import numpy as np

from malloc_bench.kernels.loops import EXACT, jit

quick = {**EXACT, "fastmath": {"nnan", "nsz", "reassoc", "contract"}}  # what is no number has been refused
LANES = 16  # the least of entries so far apart, most of which are then left out


@numba.njit(inline="always", **EXACT)
def _placed(value, number, values, numbers):  # type: ignore[no-untyped-def]
    """Among the least so far, which rise; the last one goes."""
    i = len(values) - 1
    while i > 0 and value < values[i - 1]:
        values[i], numbers[i] = values[i - 1], numbers[i - 1]
        i -= 1
    values[i], numbers[i] = value, number


@partial(jit, how=quick)
def held(near, left, codes, entries, kids, stage, left_out, codes_out, start, stop):  # type: ignore[no-untyped-def]
    """near [R, W, K]: of each row's sums held, half the squared distance of what they leave, left [R, W, D], to the
    entries [H, K, D] of a stage, half its own square aside; the nearest W' go on as left_out, codes_out."""
    parents, many, width = near.shape[1], near.shape[2], left.shape[2]
    own, least = np.empty(kids, np.float32), np.empty(left_out.shape[1], np.float32)
    lows = np.empty(LANES, np.float32)
    kid, best = np.empty(kids, np.int64), np.empty(left_out.shape[1], np.int64)
    rows = near.shape[0] // entries.shape[0]  # of a head
    for n in range(start, stop):
        head = n // rows
        least[:], best[:] = np.inf, 0
        for w in range(parents):
            lows[:], own[:], kid[:] = np.inf, np.inf, 0
            for first in range(0, many - LANES + 1, LANES):
                for j in range(LANES):
                    lows[j] = min(lows[j], near[n, w, first + j])
            for j in range(LANES):
                if lows[j] < own[kids - 1]:
                    _placed(lows[j], j, own, kid)
            most, own[:], kid[:] = own[kids - 1], np.inf, 0  # what is among the least lies in a lane with such a low
            for j in range(LANES):
                if lows[j] <= most:
                    for k in range(j, many - many % LANES, LANES):
                        if near[n, w, k] <= most and near[n, w, k] < own[kids - 1]:
                            _placed(near[n, w, k], k, own, kid)
            for k in range(many - many % LANES, many):
                if near[n, w, k] < own[kids - 1]:
                    _placed(near[n, w, k], k, own, kid)
            base = np.float32(0)
            for d in range(width):
                base += left[n, w, d] * left[n, w, d]
            for i in range(kids):
                value = own[i] + base / 2
                if value < least[-1]:
                    _placed(value, w * many + kid[i], least, best)
        for w in range(len(best)):
            parent, k = best[w] // many, best[w] % many
            for d in range(width):
                left_out[n, w, d] = left[n, parent, d] - entries[head, k, d]
            for i in range(stage):
                codes_out[n, w, i] = codes[n, parent, i]
            codes_out[n, w, stage] = k
