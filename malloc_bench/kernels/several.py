"""Products of several queries with vectors, and sums by their weights, in vectors of 16 numbers: the loops."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from malloc_bench.kernels.lanes import AT, F32, Lanes, inlined, pieces
from malloc_bench.kernels.loops import f32, jit

LANES = 16
_TOGETHER = 4  # queries, and vectors of each, that are summed up at a time


def _meet(x: Lanes) -> None:
    b, asked, vectors, out = x.builder, *(x.array(i) for i in (0, 1, 2))
    slots, width, count = x.columns(1, 0), x.columns(1), x.columns(2, 0)
    last = x.plus(slots, -1)
    kept = [cgutils.alloca_once(b, ir.VectorType(F32, LANES)) for _ in range(LANES)]
    with cgutils.for_range_slice(b, ir.Constant(AT, 0), slots, ir.Constant(AT, LANES)) as (slot, _):
        rows = [b.gep(vectors, [b.mul(x.smaller(x.plus(slot, k), last), width)]) for k in range(LANES)]
        for place in kept:
            b.store(place.type.pointee([0] * LANES), place)
        with cgutils.for_range(b, width) as loop:
            numbers = x.load(asked, x.times(loop.index, LANES), LANES)
            for row, place in zip(rows, kept):
                found = x.product(x.everywhere(row, loop.index, LANES), numbers)
                b.store(x.sum(b.load(place), found), place)
        real = x.real(b.sub(slots, slot))
        for k, found in enumerate(x.unzipped([b.load(place) for place in kept])):
            with b.if_then(b.icmp_signed("<", ir.Constant(AT, k), count)):
                x.store_some(found, out, b.add(slot, b.mul(slots, ir.Constant(AT, k))), real)


def _add(x: Lanes) -> None:
    b, weights, vectors, out = x.builder, *(x.array(i) for i in (0, 1, 2))
    slots, width = x.columns(1, 0), x.constant(-1)
    parts = list(pieces(width))
    for few in (parts[i : i + _TOGETHER] for i in range(0, len(parts), _TOGETHER)):

        def body(some: list[Any], few: list[tuple[int, int]] = few) -> None:
            kept = [[cgutils.alloca_once(b, ir.VectorType(F32, lanes)) for _, lanes in few] for _ in some]
            for query, places in zip(some, kept):
                for (first, lanes), place in zip(few, places):
                    b.store(x.load(out, x.plus(x.times(query, width), first), lanes), place)
            rows = [b.gep(weights, [b.mul(query, slots)]) for query in some]
            with cgutils.for_range(b, slots) as loop:
                numbers = [x.load(vectors, x.plus(x.times(loop.index, width), first), lanes) for first, lanes in few]
                for row, places in zip(rows, kept):
                    for number, place in zip(numbers, places):
                        found = x.product(x.everywhere(row, loop.index, number.type.count), number)
                        b.store(x.sum(b.load(place), found), place)
            for query, places in zip(some, kept):
                for (first, _), place in zip(few, places):
                    x.store(b.load(place), out, x.plus(x.times(query, width), first))

        x.loop(ir.Constant(AT, 0), x.columns(0, 0), _TOGETHER, body)


@inlined(_meet, Lanes)
def meet(typing, asked, vectors, out):  # type: ignore[no-untyped-def]
    """out[m, s] = asked[., m] . vectors[s]; asked [D, LANES], of which out has as many as it has rows."""


@inlined(_add, Lanes)
def add(typing, weights, vectors, out, width):  # type: ignore[no-untyped-def]
    """To out [m, width] is added the sum over s of weights[m, s] times vectors[s]."""


@jit
def products(q, vectors, out, start, stop):  # type: ignore[no-untyped-def]
    """out [R, M, S] = q [R, M, D] . vectors [R, S, D]"""
    turned = np.zeros((q.shape[2], LANES), f32)
    for i in range(start, stop):
        for m in range(0, q.shape[1], LANES):
            given = out[i, m : m + LANES]
            for k in range(len(given)):
                for d in range(q.shape[2]):
                    turned[d, k] = q[i, m + k, d]
            meet(turned, vectors[i], given)


@cache
def sums(width: int) -> Callable[..., None]:
    WIDTH = width

    @jit
    def each(w, vectors, out, start, stop):  # type: ignore[no-untyped-def]
        """To out [R, M, D] is added w [R, M, S] . vectors [R, S, D]."""
        for i in range(start, stop):
            add(w[i], vectors[i], out[i], WIDTH)

    return each
