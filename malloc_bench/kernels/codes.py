"""What loops do with the codes of one row, in vectors.

Codes [S, G x J x STEP] uint8, a user's and head's: G groups of channels a slot, each of J words of STEP bytes with
PLANES codes. All arrays lie in one piece; bits, words and groups are constants.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from malloc_bench.kernels import whole
from malloc_bench.kernels.lanes import AT, F32, Row, inlined


def _products(x: Row) -> None:
    if whole.fits(x):
        return whole.products(x)
    codes, row, sizes, out = (x.array(i) for i in (0, 3, 4, 5))
    slots = x.columns(4)
    known = {part: x.taken_apart(row, *part) for part in x.parts}

    def of(slot: Any) -> dict[int, Any]:
        """By the width of vectors, what comes to the product."""
        total: dict[int, Any] = {}
        for j, lanes in x.parts:
            found = None
            for one, other in zip(known[j, lanes], x.code_planes(codes, slot, j, lanes)):
                found = x.sum(found, x.product(one, other))
            if x.groups > 1:
                found = x.product(found, x.of_groups(sizes, slots, slot, j, lanes, x.words))
            total[lanes] = x.sum(total.get(lanes), found)
        return total

    x.dotted(of, out)


def _sums(x: Row) -> None:
    if whole.fits(x):
        return whole.sums(x)
    codes, weights, out = (x.array(i) for i in (0, 3, 4))
    columns = x.columns(3)
    kept = {}
    for part in x.parts:
        kind = ir.VectorType(F32, part[1])
        kept[part] = [cgutils.alloca_once(x.builder, kind, zfill=True) for _ in range(x.planes)]

    def body(some: list[Any]) -> None:
        for part in x.parts:
            found: list[Any] = [None] * x.planes
            for slot in some:
                weight = x.of_groups(weights, columns, slot, *part, x.words)
                planes = x.code_planes(codes, slot, *part)
                found = [x.sum(to, x.product(weight, code)) for to, code in zip(found, planes)]
            for place, vector in zip(kept[part], found):
                x.builder.store(x.sum(x.builder.load(place), vector), place)

    x.loop(x.number(1), x.number(2), 2, body)
    for part in x.parts:
        planes = [x.builder.load(place) for place in kept[part]]
        x.store(x.put_together(planes), out, ir.Constant(AT, part[0] * x.planes))


def _unpacked(x: Row) -> None:
    codes, sizes, lows, out = (x.array(i) for i in (0, 3, 4, 5))
    columns = x.columns(3)
    by_channel, width = x.types[6].literal_value, x.types[7].literal_value

    def body(some: list[Any]) -> None:
        (slot,) = some
        for j, lanes in x.parts:
            numbers, first = x.codes_in_order(codes, slot, j, lanes), j * x.planes
            real = min(numbers.type.count, width - first)  # several groups have no words that are filled up
            if real < numbers.type.count:
                numbers = x.picked(numbers, numbers, list(range(max(real, 0))))
            if real <= 0:
                continue
            if by_channel:
                size, low = (x.load(each, ir.Constant(AT, first), real) for each in (sizes, lows))
            else:
                each = x.words * x.planes
                size, low = (x.of_groups(array, columns, slot, first, real, each) for array in (sizes, lows))
            x.store(x.sum(low, x.product(numbers, size)), out, x.plus(x.times(slot, width), first))

    x.loop(x.number(1), x.number(2), 1, body)


@inlined(_products)
def products(typing, codes, begin, end, row, sizes, out, bits, words, groups):  # type: ignore[no-untyped-def]
    """out[s] = row . codes of s, slots begin to end, each group of them times sizes [g, s] where there are several."""


@inlined(_sums)
def sums(typing, codes, begin, end, weights, out, bits, words, groups):  # type: ignore[no-untyped-def]
    """out [G x J x PLANES] = sum over slots begin to end of weights [g, s] times codes."""


@inlined(_unpacked)
def unpacked(typing, codes, begin, end, sizes, lows, out, by_channel, width, bits, words, groups):  # type: ignore[no-untyped-def]
    """out [s, width] = sizes times codes plus lows, [g, s] or, by_channel, [width]."""
