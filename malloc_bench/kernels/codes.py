"""What loops do with the codes of one row, in vectors.

Codes [S, G x J x STEP] uint8, a user's and head's: G groups of channels a slot, each of J words of STEP bytes with
PLANES codes. All arrays lie in one piece; bits, words and groups are constants.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from malloc_bench.kernels import whole
from malloc_bench.kernels.lanes import AT, F32, I8, I32, Row, inlined
from malloc_bench.kernels.words import WORDS


def _products(x: Row) -> None:
    if whole.fits(x.bits, x.words):
        return whole.products(x)
    codes, asked, by, sizes, out = (x.array(i) for i in (0, 3, 4, 5, 6))
    width, slots, columns = x.columns(3), x.columns(5), x.columns(6)
    row = cgutils.alloca_once(x.builder, ir.ArrayType(F32, x.groups * x.words * x.planes))  # zeros behind the width
    row = x.builder.bitcast(row, F32.as_pointer())
    with cgutils.for_range(x.builder, x.columns(3, 0)) as query:
        first = x.builder.mul(query.index, width)

        def each(some: list[Any], first: Any = first) -> None:
            numbers = x.product(x.load(asked, x.plus(some[0], first), len(some)), x.load(by, some[0], len(some)))
            x.store(numbers, row, some[0])

        x.loop(ir.Constant(AT, 0), width, 4, each)
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

        x.dotted(of, x.builder.gep(out, [x.builder.mul(query.index, columns)]))


def _sums(x: Row) -> None:
    if whole.fits(x.bits, x.words):
        return whole.sums(x)
    codes, weights, sizes, out = (x.array(i) for i in (0, 3, 4, 5))
    columns, slots = x.columns(3), x.columns(4)
    kept = {
        part: [cgutils.alloca_once(x.builder, ir.VectorType(F32, part[1])) for _ in range(x.planes)] for part in x.parts
    }
    with (
        cgutils.for_range(x.builder, x.columns(3, 0)) as query,
        cgutils.for_range_slice(x.builder, x.number(1), x.number(2), ir.Constant(AT, whole.BLOCK)) as (first, _),
    ):  # by blocks: what is small beside the sum of all is not lost
        row = x.builder.gep(weights, [x.builder.mul(query.index, columns)])
        for place in (place for planes in kept.values() for place in planes):
            x.builder.store(place.type.pointee([0] * place.type.pointee.count), place)

        def body(some: list[Any], row: Any = row) -> None:
            for part in x.parts:
                found: list[Any] = [None] * x.planes
                for slot in some:
                    weight = x.everywhere(row, slot, part[1])
                    weight = x.product(weight, x.of_groups(sizes, slots, slot, *part, x.words))
                    planes = x.code_planes(codes, slot, *part)
                    found = [x.sum(to, x.product(weight, code)) for to, code in zip(found, planes)]
                for place, vector in zip(kept[part], found):
                    x.builder.store(x.sum(x.builder.load(place), vector), place)

        x.loop(first, x.smaller(x.plus(first, whole.BLOCK), x.number(2)), 2, body)
        for part, places in kept.items():
            found = x.put_together([x.builder.load(place) for place in places])
            at = x.plus(x.times(query.index, x.groups * x.words * x.planes), part[0] * x.planes)
            x.store(x.sum(x.load(out, at, found.type.count), found), out, at)


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


def _widened(x: Row) -> None:
    codes, out, total = x.array(0), x.array(2), x.times(x.number(1), x.groups * x.words)
    b, (_, step) = x.builder, WORDS[3]

    def body(some: list[Any]) -> None:
        lanes = len(some)
        raw = x.load(codes, x.times(some[0], step), lanes * step, I8)
        index = [i * step + k if k < step else lanes * step for i in range(lanes) for k in range(4)]
        word = b.bitcast(x.picked(raw, raw.type([0] * raw.type.count), index), ir.VectorType(I32, lanes))
        for low, moved in ((0x00000FFF, 4), (0x003F003F, 2), (0x07070707, 1)):  # halves of all, of those, and of those
            high = low << 12 // (4 // moved)
            first, second = (b.and_(word, word.type([mask] * lanes)) for mask in (low, high))
            word = b.or_(first, b.shl(second, word.type([moved] * lanes)))
        x.store(b.bitcast(word, ir.VectorType(I8, 4 * lanes)), out, x.times(some[0], 4))

    x.loop(ir.Constant(AT, 0), total, 16, body)


@inlined(_widened)
def widened(typing, codes, end, out, bits, words, groups):  # type: ignore[no-untyped-def]
    """out [s, G x J x 4] = codes of three bits as codes of four, slots 0 to end."""


@inlined(_products)
def products(typing, codes, begin, end, asked, by, sizes, out, bits, words, groups):  # type: ignore[no-untyped-def]
    """out[m, s] = (asked[m] times by) . codes of s, slots begin to end, each group of them times sizes [g, s] where
    there are several. asked [m, d]: no more than `whole.QUERIES`. by [d]."""


@inlined(_sums)
def sums(typing, codes, begin, end, weights, sizes, out, bits, words, groups):  # type: ignore[no-untyped-def]
    """To out [m, G x J x PLANES] is added the sum over slots begin to end of weights [m, s] times sizes [g, s] times
    codes."""


@inlined(_unpacked)
def unpacked(typing, codes, begin, end, sizes, lows, out, by_channel, width, bits, words, groups):  # type: ignore[no-untyped-def]
    """out [s, width] = sizes times codes plus lows, [g, s] or, by_channel, [width]."""
