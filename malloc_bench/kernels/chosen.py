"""What loops do with numbers of entries of a codebook, in vectors, and those loops.

Codes [S, N] uint8, a user's and head's; table [N, K, w], the head's. Entries stand side by side, or are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from malloc_bench.kernels.lanes import AT, F32, Lanes, inlined, pieces
from malloc_bench.kernels.loops import called, f32, jit, part


class _Chosen(Lanes):
    """Entries of one row."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.parts, self.width, self.added = (self.constant(i) for i in (-3, -2, -1))
        self.codes, self.table, self.count = self.array(0), self.array(3), self.columns(3, 1)

    def places(self) -> Iterator[tuple[int, int, int, int]]:
        """Part, first number of its entries and how many, and where these stand in a vector."""
        for n in range(self.parts):
            for j, lanes in pieces(self.width):
                yield n, j, lanes, j if self.added else n * self.width + j

    def entries(self, slot: Any) -> Iterator[tuple[int, Any]]:
        """The numbers of a slot, by where they stand."""
        b, last, first = self.builder, self.builder.sub(self.count, ir.Constant(AT, 1)), {}
        for n in range(self.parts):
            code = b.zext(b.load(b.gep(self.codes, [self.plus(self.times(slot, self.parts), n)])), AT)
            code = b.select(b.icmp_unsigned("<", code, last), code, last)
            first[n] = self.times(self.plus(code, self.times(self.count, n)), self.width)
        for n, j, lanes, at in self.places():
            yield at, self.load(self.table, self.plus(first[n], j), lanes)


def _products(x: _Chosen) -> None:
    row, out = x.array(4), x.array(5)
    known = {at: x.load(row, ir.Constant(AT, at), lanes) for _, _, lanes, at in x.places()}

    def of(slot: Any) -> dict[int, Any]:
        total: dict[int, Any] = {}
        for at, numbers in x.entries(slot):
            lanes = numbers.type.count
            total[lanes] = x.sum(total.get(lanes), x.product(known[at], numbers))
        return total

    x.dotted(of, out)


def _sums(x: _Chosen) -> None:
    weights, out = x.array(4), x.array(5)
    kinds = {at: ir.VectorType(F32, lanes) for _, _, lanes, at in x.places()}
    kept = {at: cgutils.alloca_once(x.builder, kind, zfill=True) for at, kind in kinds.items()}

    def body(some: list[Any]) -> None:
        found: dict[int, Any] = {}
        for slot in some:
            for at, numbers in x.entries(slot):
                weight = x.everywhere(weights, slot, numbers.type.count)
                found[at] = x.sum(found.get(at), x.product(weight, numbers))
        for at, numbers in found.items():
            x.builder.store(x.sum(x.builder.load(kept[at]), numbers), kept[at])

    x.loop(x.number(1), x.number(2), 2, body)
    for at, place in kept.items():
        x.store(x.builder.load(place), out, ir.Constant(AT, at))


def _unpacked(x: _Chosen) -> None:
    out, width = x.array(4), x.constant(-4)

    def body(some: list[Any]) -> None:
        found: dict[int, Any] = {}
        for at, numbers in x.entries(some[0]):
            found[at] = x.sum(found.get(at), numbers)
        for at, numbers in found.items():
            if (real := min(numbers.type.count, width - at)) > 0:
                x.store(x.picked(numbers, numbers, list(range(real))), out, x.plus(x.times(some[0], width), at))

    x.loop(x.number(1), x.number(2), 1, body)


@inlined(_products, _Chosen)
def products(typing, codes, begin, end, table, row, out, parts, each, added):  # type: ignore[no-untyped-def]
    """out[s] = row . x of s, slots begin to end."""


@inlined(_sums, _Chosen)
def sums(typing, codes, begin, end, table, weights, out, parts, each, added):  # type: ignore[no-untyped-def]
    """out = sum over slots begin to end of weights[s] times x."""


@inlined(_unpacked, _Chosen)
def unpacked(typing, codes, begin, end, table, out, width, parts, each, added):  # type: ignore[no-untyped-def]
    """out [s, width] = x of s."""


class Ways(NamedTuple):
    """Of codes [B, H, S, N] and tables [H, N, K, w]: products are written, sums added, to [R, M, ...]."""

    dot: Callable[..., None]
    mix: Callable[..., None]
    dense: Callable[..., None]


@called
def of_head(tables, i, heads):  # type: ignore[no-untyped-def]
    return tables[i % heads * len(tables) // heads]


@cache
def loops(PARTS: int, EACH: int, WIDTH: int, ADDED: int) -> Ways:
    """Of vectors of WIDTH numbers, entries of EACH: constants to the compiler."""
    ROOM = EACH if ADDED else PARTS * EACH

    @jit
    def dot(codes, tables, count, q, out, heads, start, stop):  # type: ignore[no-untyped-def]
        row = np.zeros(ROOM, f32)
        for i in range(start, stop):
            own, end = part(codes, i, len(out), heads), min(codes.shape[2], part(count, i, len(out), heads))
            for m in range(q.shape[1]):
                asked = q[i, m]
                for d in range(WIDTH):
                    row[d] = asked[d]
                products(own, 0, end, of_head(tables, i, heads), row, out[i, m], PARTS, EACH, ADDED)

    @jit
    def mix(codes, tables, count, w, out, heads, start, stop):  # type: ignore[no-untyped-def]
        row = np.zeros(ROOM, f32)
        for i in range(start, stop):
            own, end = part(codes, i, len(out), heads), min(codes.shape[2], part(count, i, len(out), heads))
            for m in range(w.shape[1]):
                sums(own, 0, end, of_head(tables, i, heads), w[i, m], row, PARTS, EACH, ADDED)
                for d in range(WIDTH):
                    out[i, m, d] += row[d]

    @jit
    def dense(codes, tables, out, first, start, stop):  # type: ignore[no-untyped-def]
        slots, heads = codes.shape[2], codes.shape[1]
        for i in range(start, stop):
            own = codes[i // heads, i % heads]
            unpacked(own, 0, slots, tables[i % heads], out[i - first], WIDTH, PARTS, EACH, ADDED)

    return Ways(dot, mix, dense)
