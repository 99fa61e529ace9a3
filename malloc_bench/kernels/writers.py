"""The loops that write codes of few bits, for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numba
import numpy as np

from malloc_bench.kernels.loops import EXACT, i32, jit, zero


class Writers(NamedTuple):
    """How vectors become codes: the least and the greatest number of each group, then codes between them. Not a bit is
    other than torch's: no product or quotient is reordered."""

    span_by_slot: Callable[..., None]
    span_by_channel: Callable[..., None]
    write_by_slot: Callable[..., None]
    write_by_channel: Callable[..., None]


ordered = {**EXACT, "fastmath": {"nnan", "nsz"}}  # the least and the greatest are the same in any order


@numba.njit(inline="always", **EXACT)
def placed(x, step, low, middle, least, most):  # type: ignore[no-untyped-def]
    """The code of a number, a half to the even one; middle: codes lie around it, and nothing is taken off before."""
    at = np.rint((x - low) / step + middle) if middle == zero else np.rint(x / step + middle)
    return np.uint8(i32(min(max(at, least), most)))


@numba.njit(inline="always", **EXACT)
def packed(row, codes, bits, planes):  # type: ignore[no-untyped-def]
    """Codes of a row, one a byte, side by side in bytes, the lowest bits first."""
    for j in range(codes.shape[0]):
        byte = i32(0)
        for p in range(planes):
            byte = i32(byte | i32(row[j * planes + p]) << (p * bits))
        codes[j] = np.uint8(byte)


@cache
def writers(bits: int) -> Writers:
    PLANES = 8 // bits

    @partial(jit, how=ordered)
    def span_by_slot(x, real, group, low, high, start, stop):  # type: ignore[no-untyped-def]
        for n in range(start, stop):
            for s in range(x.shape[1]):
                for g in range(low.shape[2]):
                    a, b = zero, zero
                    if real[n, s]:
                        a = b = x[n, s, g * group]
                        for d in range(g * group, min(x.shape[2], g * group + group)):
                            a, b = min(a, x[n, s, d]), max(b, x[n, s, d])
                    low[n, s, g], high[n, s, g] = a, b

    @partial(jit, how=ordered)
    def span_by_channel(x, real, group, low, high, start, stop):  # type: ignore[no-untyped-def]
        for n in range(start, stop):
            for g in range(low.shape[1]):
                some = False
                for s in range(g * group, min(x.shape[1], g * group + group)):
                    if real[n, s]:
                        for d in range(x.shape[2]):
                            if some:
                                low[n, g, d] = min(low[n, g, d], x[n, s, d])
                                high[n, g, d] = max(high[n, g, d], x[n, s, d])
                            else:
                                low[n, g, d] = high[n, g, d] = x[n, s, d]
                        some = True
                if not some:
                    low[n, g, :], high[n, g, :] = zero, zero

    @partial(jit, how=EXACT)
    def write_by_slot(x, real, group, step, low, middle, least, most, codes, start, stop):  # type: ignore[no-untyped-def]
        row = np.zeros(codes.shape[2] * PLANES, np.uint8)
        for n in range(start, stop):
            for s in range(x.shape[1]):
                if real[n, s]:
                    for g in range(step.shape[2]):
                        size, first = step[n, s, g], low[n, s, g]
                        own, at = x[n, s, g * group : g * group + group], row[g * group : g * group + group]
                        for d in range(len(own)):  # slices: an index that might wrap around stops the compiler
                            at[d] = placed(own[d], size, first, middle, least, most)
                else:
                    row[: x.shape[2]] = np.uint8(least)
                packed(row, codes[n, s], bits, PLANES)

    @partial(jit, how=EXACT)
    def write_by_channel(x, real, group, step, low, middle, least, most, codes, start, stop):  # type: ignore[no-untyped-def]
        row = np.zeros(codes.shape[2] * PLANES, np.uint8)
        for n in range(start, stop):
            for s in range(x.shape[1]):
                g = s // group
                if real[n, s]:
                    for d in range(x.shape[2]):
                        row[d] = placed(x[n, s, d], step[n, g, d], low[n, g, d], middle, least, most)
                else:
                    row[: x.shape[2]] = np.uint8(least)
                packed(row, codes[n, s], bits, PLANES)

    return Writers(span_by_slot, span_by_channel, write_by_slot, write_by_channel)
