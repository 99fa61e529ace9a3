"""The loops over codes of few bits, for a compiler: arrays in, arrays out, nothing else.

Rows [N] are users and heads. Codes [N, S, G, J x STEP]: G groups of channels a slot, each of J words of STEP bytes with
PLANES codes, so that plane p of a group, code p of every word, is multiplied as one vector.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np

f32, i32, zero = np.float32, np.int32, np.float32(0)
# sums may be taken in another order; what is no number stays none
HOW: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy", "nogil": True}


def jit(function: Callable[..., None], how: dict[str, Any] = HOW) -> Callable[..., None]:
    """Compiled at its first call; kept on disk where that can be written to."""
    try:
        return numba.njit(cache=True, **how)(function)
    except RuntimeError:  # no folder for its cache
        return numba.njit(**how)(function)


inlined = numba.njit(inline="always", **HOW)


@inlined
def word(codes, n, s, g, j, step):  # type: ignore[no-untyped-def]
    if step == 1:
        return i32(codes[n, s, g, j])
    low, high = i32(codes[n, s, g, 3 * j]), i32(codes[n, s, g, 3 * j + 2])
    return i32(low | i32(codes[n, s, g, 3 * j + 1]) << 8 | high << 16)


@inlined
def code(word, p, bits):  # type: ignore[no-untyped-def]
    return f32(i32((word >> (p * bits)) & ((1 << bits) - 1)))


@inlined
def in_planes(row, first, planes):  # type: ignore[no-untyped-def]
    """planes[p, j] = row[first + j P + p], 0 behind its end."""
    for j in range(planes.shape[1]):
        for p in range(planes.shape[0]):
            at = first + j * planes.shape[0] + p
            planes[p, j] = row[at] if at < row.shape[0] else zero


@inlined
def products(codes, n, begin, end, g, y, scale, offset, total, out, bits, planes, step):  # type: ignore[no-untyped-def]
    """out[s] += scale[s] (y . codes of s) + offset[s] total; two slots at once."""
    words, even = y.shape[1], end - (end - begin) % 2
    for s in range(begin, even, 2):
        a, b = zero, zero
        for j in range(words):
            u, v = word(codes, n, s, g, j, step), word(codes, n, s + 1, g, j, step)
            for p in range(planes):
                a += y[p, j] * code(u, p, bits)
                b += y[p, j] * code(v, p, bits)
        out[s] += a * scale[s] + offset[s] * total
        out[s + 1] += b * scale[s + 1] + offset[s + 1] * total
    for s in range(even, end):
        a = zero
        for j in range(words):
            u = word(codes, n, s, g, j, step)
            for p in range(planes):
                a += y[p, j] * code(u, p, bits)
        out[s] += a * scale[s] + offset[s] * total


@inlined
def sums(codes, n, begin, end, g, weights, y, bits, planes, step):  # type: ignore[no-untyped-def]
    """y[p, j] = sum over slots of weights[s] times codes; four slots at once."""
    words, fours = y.shape[1], end - (end - begin) % 4
    y[:] = zero
    for s in range(begin, fours, 4):
        a, b, c, d = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        for j in range(words):
            t, u = word(codes, n, s, g, j, step), word(codes, n, s + 1, g, j, step)
            v, w = word(codes, n, s + 2, g, j, step), word(codes, n, s + 3, g, j, step)
            for p in range(planes):
                near = a * code(t, p, bits) + b * code(u, p, bits)
                y[p, j] += near + c * code(v, p, bits) + d * code(w, p, bits)
    for s in range(fours, end):
        a = weights[s]
        for j in range(words):
            t = word(codes, n, s, g, j, step)
            for p in range(planes):
                y[p, j] += a * code(t, p, bits)


class Loops(NamedTuple):
    """Over rows start to stop. Scales [N, S, G] are of a slot and a group of channels (`by_slot`), or [N, S / group, D]
    of `group` slots and one channel (`by_channel`, then G = 1)."""

    dot_by_slot: Callable[..., None]
    dot_by_channel: Callable[..., None]
    mix_by_slot: Callable[..., None]
    mix_by_channel: Callable[..., None]
    dense_by_slot: Callable[..., None]
    dense_by_channel: Callable[..., None]


@cache
def loops(bits: int, PLANES: int, STEP: int) -> Loops:
    """Of codes of so many bits, PLANES in a word of STEP bytes: constants to the compiler."""

    @jit
    def dot_by_slot(codes, q, scale, offset, out, start, stop):  # type: ignore[no-untyped-def]
        slots, groups, words = codes.shape[1], codes.shape[2], codes.shape[3] // STEP
        y, sizes, lows = np.empty((PLANES, words), f32), np.empty(slots, f32), np.empty(slots, f32)
        for n in range(start, stop):
            for g in range(groups):
                for s in range(slots):
                    sizes[s], lows[s] = scale[n, s, g], offset[n, s, g]
                for m in range(q.shape[1]):
                    in_planes(q[n, m], g * words * PLANES, y)
                    if g == 0:
                        out[n, m, :] = zero
                    products(codes, n, 0, slots, g, y, sizes, lows, y.sum(), out[n, m], bits, PLANES, STEP)

    @jit
    def dot_by_channel(codes, q, scale, offset, group, out, start, stop):  # type: ignore[no-untyped-def]
        slots, words, width = codes.shape[1], codes.shape[3] // STEP, q.shape[2]
        y, row, ones = np.empty((PLANES, words), f32), np.empty(width, f32), np.ones(slots, f32)
        for n in range(start, stop):
            for m in range(q.shape[1]):
                out[n, m, :] = zero
                for g in range((slots + group - 1) // group):
                    total = zero
                    for d in range(width):
                        row[d] = q[n, m, d] * scale[n, g, d]
                        total += q[n, m, d] * offset[n, g, d]
                    in_planes(row, 0, y)
                    end = min(slots, g * group + group)
                    products(codes, n, g * group, end, 0, y, ones, ones, total, out[n, m], bits, PLANES, STEP)

    @jit
    def mix_by_slot(codes, w, scale, offset, out, start, stop):  # type: ignore[no-untyped-def]
        slots, groups, words, width = codes.shape[1], codes.shape[2], codes.shape[3] // STEP, out.shape[2]
        y, weights = np.empty((PLANES, words), f32), np.empty(slots, f32)
        for n in range(start, stop):
            for m in range(w.shape[1]):
                for g in range(groups):
                    total = zero
                    for s in range(slots):
                        weights[s] = w[n, m, s] * scale[n, s, g]
                        total += w[n, m, s] * offset[n, s, g]
                    sums(codes, n, 0, slots, g, weights, y, bits, PLANES, STEP)
                    first = g * words * PLANES
                    for d in range(first, min(width, first + words * PLANES)):
                        out[n, m, d] = y[(d - first) % PLANES, (d - first) // PLANES] + total

    @jit
    def mix_by_channel(codes, w, scale, offset, group, out, start, stop):  # type: ignore[no-untyped-def]
        slots, words, width = codes.shape[1], codes.shape[3] // STEP, out.shape[2]
        y = np.empty((PLANES, words), f32)
        for n in range(start, stop):
            for m in range(w.shape[1]):
                out[n, m, :] = zero
                for g in range((slots + group - 1) // group):
                    begin, end = g * group, min(slots, g * group + group)
                    sums(codes, n, begin, end, 0, w[n, m], y, bits, PLANES, STEP)
                    total = zero
                    for s in range(begin, end):
                        total += w[n, m, s]
                    for d in range(width):
                        out[n, m, d] += y[d % PLANES, d // PLANES] * scale[n, g, d] + total * offset[n, g, d]

    @jit
    def dense_by_slot(codes, scale, offset, out, start, stop):  # type: ignore[no-untyped-def]
        slots, groups, words, width = codes.shape[1], codes.shape[2], codes.shape[3] // STEP, out.shape[2]
        row, wide = np.empty(words * PLANES, f32), words * PLANES
        for n in range(start, stop):
            for s in range(slots):
                for g in range(groups):
                    for j in range(words):
                        u = word(codes, n, s, g, j, STEP)
                        for p in range(PLANES):
                            row[j * PLANES + p] = code(u, p, bits)
                    size, low, here = scale[n, s, g], offset[n, s, g], out[n, s, g * wide :]
                    for d in range(min(wide, width - g * wide)):
                        here[d] = row[d] * size + low

    @jit
    def dense_by_channel(codes, scale, offset, group, out, start, stop):  # type: ignore[no-untyped-def]
        slots, words, width = codes.shape[1], codes.shape[3] // STEP, out.shape[2]
        row = np.empty(words * PLANES, f32)
        for n in range(start, stop):
            for s in range(slots):
                g = s // group
                for j in range(words):
                    u = word(codes, n, s, 0, j, STEP)
                    for p in range(PLANES):
                        row[j * PLANES + p] = code(u, p, bits)
                for d in range(width):
                    out[n, s, d] = row[d] * scale[n, g, d] + offset[n, g, d]

    return Loops(dot_by_slot, dot_by_channel, mix_by_slot, mix_by_channel, dense_by_slot, dense_by_channel)


@cache
def tables() -> tuple[Callable[..., None], Callable[..., None]]:
    """Sums over numbers of entries: of what each entry is worth to a query, and of the weight that falls on each."""

    @jit
    def worth(codes, table, out, start, stop):  # type: ignore[no-untyped-def]
        for n in range(start, stop):
            for m in range(out.shape[1]):
                for s in range(out.shape[2]):
                    total = zero
                    for i in range(codes.shape[2]):
                        total += table[n, m, i, codes[n, s, i]]
                    out[n, m, s] = total

    @jit
    def weight(codes, w, out, start, stop):  # type: ignore[no-untyped-def]
        for n in range(start, stop):
            for m in range(w.shape[1]):
                out[n, m, :, :] = zero
                for s in range(w.shape[2]):
                    for i in range(codes.shape[2]):
                        out[n, m, i, codes[n, s, i]] += w[n, m, s]

    return worth, weight
