"""Loops over plain vectors and numbers of entries, and weights from logits, for a compiler."""

from __future__ import annotations

from functools import cache

import numpy as np

from malloc_bench.kernels.lanes import largest
from malloc_bench.kernels.loops import f32, jit, part, zero
from malloc_bench.kernels.powers import exponentials, gates

one = f32(1)
BLOCK = 256  # weights at a time


@jit
def dot(data, count, q, out, heads, start, stop):  # type: ignore[no-untyped-def]
    """out[s] = q . data[s]; two at once."""
    for i in range(start, stop):
        keys, size = part(data, i, len(q), heads), min(data.shape[2], part(count, i, len(q), heads))
        even = size - size % 2
        for m in range(q.shape[1]):
            row, given = q[i, m], out[i, m]
            for s in range(0, even, 2):
                a, b = zero, zero
                for d in range(keys.shape[1]):
                    a += row[d] * keys[s, d]
                    b += row[d] * keys[s + 1, d]
                given[s], given[s + 1] = a, b
            if even < size:
                a = zero
                for d in range(keys.shape[1]):
                    a += row[d] * keys[even, d]
                given[even] = a


@jit
def mix(data, count, w, out, heads, start, stop):  # type: ignore[no-untyped-def]
    """out += w[s] data[s]; four at once."""
    for i in range(start, stop):
        values, size = part(data, i, len(w), heads), min(data.shape[2], part(count, i, len(w), heads))
        fours = size - size % 4
        for m in range(w.shape[1]):
            weights, given = w[i, m], out[i, m]
            for s in range(0, fours, 4):
                a, b, c, d = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
                for j in range(values.shape[1]):
                    near = a * values[s, j] + b * values[s + 1, j]
                    given[j] += near + c * values[s + 2, j] + d * values[s + 3, j]
            for s in range(fours, size):
                for j in range(values.shape[1]):
                    given[j] += weights[s] * values[s, j]


@cache
def weighing(softmax: bool):  # type: ignore[no-untyped-def]
    """Logits of slots become weights, and what a token is to itself begins its mixture. What there is none of has no
    columns; logits and weights [R, M, S] begin with row `first`. See `kernels.attend`."""

    @jit
    def weigh(q, own_key, own_value, own_bias, count, mass, bias, scale, heads, out, logits, first, start, stop):  # type: ignore[no-untyped-def]
        slots, rows = logits.shape[2], len(q)
        own, most = np.empty(1, f32), np.empty(1, f32)
        for i in range(start, stop):
            size = min(slots, part(count, i, rows, heads))
            masses, biases = part(mass, i, rows, heads), part(bias, i, rows, heads)
            keys, values = part(own_key, i, rows, heads), part(own_value, i, rows, heads)
            for m in range(q.shape[1]):
                weights, itself, mixed = logits[i - first, m], zero, out[i, m]
                for d in range(q.shape[2]):
                    itself += q[i, m, d] * keys[m, d]
                if biases.shape[0]:
                    for s in range(size):
                        weights[s] += biases[m, s]
                    itself += part(own_bias, i, rows, heads)[m]
                own[0] = itself
                if softmax:
                    most[0] = itself
                    largest(weights, size, most)
                    exponentials(weights, size, most)
                    exponentials(own, 1, most)
                else:
                    most[0] = scale
                    gates(weights, size, most)
                    gates(own, 1, most)
                if masses.shape[0]:
                    for s in range(size):
                        weights[s] *= max(masses[s], f32(1e-6)) if softmax else masses[s]
                itself = own[0]
                if softmax:
                    whole = itself
                    for s in range(size):
                        whole += weights[s]
                    whole = one / whole
                    for s in range(size):
                        weights[s] *= whole
                    itself *= whole
                for s in range(size, slots):
                    weights[s] = zero
                for d in range(out.shape[2]):
                    mixed[d] = itself * values[m, d]

    return weigh


@jit
def standing(first, edge, by_distance, by_gap, asked, placed, asked_at, placed_at, out, timed, heads, start, stop):  # type: ignore[no-untyped-def]
    """Numbers of distances in events, and of gaps in time; see `kernels.relative`."""
    far = np.empty(BLOCK, f32)
    bits = far.view(np.int32)
    for i in range(start, stop):
        here, there = part(asked, i, len(out), heads), part(placed, i, len(out), heads)
        now, then = part(asked_at, i, len(out), heads), part(placed_at, i, len(out), heads)
        for m in range(out.shape[1]):
            given = out[i, m]
            for s in range(out.shape[2]):
                distance = np.int64(here[m]) - np.int64(there[s])
                given[s] = by_distance[min(max(distance, 0), len(by_distance) - 1)]
            if timed:
                for begin in range(0, out.shape[2], BLOCK):
                    end = min(BLOCK, out.shape[2] - begin)
                    for s in range(end):
                        far[s] = f32(max(abs(now[m] - then[begin + s]), 1))
                    for s in range(end):
                        cell = (bits[s] >> 19) - (127 << 4)
                        given[begin + s] += by_gap[first[cell] + (far[s] >= edge[cell])]


@jit
def worth(codes, table, count, out, heads, start, stop):  # type: ignore[no-untyped-def]
    """Sums over numbers of entries of what each is worth to a query, table [H, N, B x M, K]."""
    most = np.uint8(table.shape[3] - 1)
    for i in range(start, stop):
        own, size = part(codes, i, len(out), heads), min(out.shape[2], part(count, i, len(out), heads))
        for m in range(out.shape[1]):
            known = table[i % heads, :, i // heads * out.shape[1] + m]
            for s in range(size):
                total = zero
                for n in range(codes.shape[3]):
                    total += known[n, min(own[s, n], most)]
                out[i, m, s] = total


@jit
def fallen(codes, w, count, out, heads, start, stop):  # type: ignore[no-untyped-def]
    """The weight that falls on each entry, out [H, N, B x M, K]."""
    most = np.uint8(out.shape[3] - 1)
    for i in range(start, stop):
        own, size = part(codes, i, len(w), heads), min(w.shape[2], part(count, i, len(w), heads))
        for m in range(w.shape[1]):
            known = out[i % heads, :, i // heads * w.shape[1] + m]
            known[:] = zero
            for s in range(size):
                for n in range(codes.shape[3]):
                    known[n, min(own[s, n], most)] += w[i, m, s]
