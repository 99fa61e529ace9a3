"""Products and sums of codes in whole numbers, on CPUs that multiply four bytes at a time (VNNI).

What meets the codes, queries or weights, is written in three bytes, see `digits`. Each byte meets the codes by itself,
with exact sums. The lanes of a vector are slots in products and channels in sums: none is added up across.
"""

from __future__ import annotations

import os
from functools import partial, reduce
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from malloc_bench.kernels import digits
from malloc_bench.kernels.digits import WRITTEN
from malloc_bench.kernels.lanes import AT, F32, I8, I32, Row, pieces
from malloc_bench.kernels.words import WORDS

BLOCK = 256  # slots whose weights are written beside their own largest
QUERIES = 16  # at most, in one call
_TOGETHER = {"products": 4, "sums": 2}  # queries that meet a vector of codes while it is at hand


def _widest() -> int:
    """Bytes of a vector; 0 where the CPU has no such products, or nobody wants them."""
    known = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    if os.environ.get("MALLOC_BENCH_KERNELS") == "float":
        return 0
    return 64 if {"+avx512vnni", "+avx512vl", "+avx512bw"} <= known else 32 * ("+avxvnni" in known)


WIDEST = _widest()
MOST = 1 << 30  # queries that are read for in whole numbers
SOME = 32 if WIDEST == 64 else MOST  # where each is written anew for every few slots; see `several`


def fits(bits: int, words: int) -> bool:
    """Whether the codes of a group lie in whole bytes, in fours."""
    return WIDEST > 0 and WORDS[bits][1] == 1 and words % 4 == 0


def _met(x: Row, to: Any, codes: Any, digits: Any) -> Any:
    """to [lanes] plus the products of four neighbours."""
    kind = to.type
    size, few = kind.count, kind.count < 4
    if few:  # there is no vector of less than 16 bytes
        kind = ir.VectorType(I32, 4)
        to, codes, digits = (
            x.picked(each, each.type([0] * size), [*range(size), *[size] * (4 - size)])
            for each in (x.builder.bitcast(given, ir.VectorType(I32, size)) for given in (to, codes, digits))
        )
    name = f"llvm.x86.avx512.vpdpbusd.{32 * kind.count}"
    call = cgutils.get_or_insert_function(x.builder.module, ir.FunctionType(kind, [kind] * 3), name)
    found = x.builder.call(call, [to, x.builder.bitcast(codes, kind), x.builder.bitcast(digits, kind)])
    return x.picked(found, found, list(range(size))) if few else found


def _told(x: Row, levels: list[Any], unit: Any, most: int) -> Any:
    """The numbers whose levels these are, each `most` at most, the last of them in units."""
    b, found = x.builder, None
    while len(levels) > 1 and (most := most * 257) < 1 << 31:  # the highest two become one
        high, low, *rest = levels
        levels = [b.add(b.shl(high, high.type([8] * high.type.count)), low), *rest]
    for level, size in zip(levels[::-1], (1, 256, 65536)):
        number = b.sitofp(level, ir.VectorType(F32, level.type.count))
        each = b.fmul(unit, unit.type([size] * level.type.count)) if size > 1 else unit
        found = x.sum(found, x.product(number, each))
    return found


def _most(x: Row, numbers: int) -> int:
    return numbers * ((1 << x.bits) - 1) * 128


def _planes(x: Row, raw: Any) -> list[Any]:
    """Code p of each byte, for every p, still as a vector of words."""
    b, kind, low = x.builder, raw.type, ((1 << x.bits) - 1) * 0x01010101
    moved = [b.lshr(raw, kind([k] * kind.count)) if k else raw for k in range(0, 8, x.bits)]
    return [b.and_(each, kind([low] * kind.count)) if x.bits < 8 else each for each in moved]


def _chunks(x: Row) -> tuple[int, int, int]:
    """How many numbers of a row are written at a time, the bytes that these take, and how often."""
    several = max(WRITTEN, 4 * x.planes)
    return several, 4 * several, -(-x.groups * x.words * x.planes // several)


def _asked(x: Row, asked: Any, by: Any, width: Any, count: Any, room: Any, units: Any) -> None:
    """Each row of numbers times `by` as bytes, zeros behind them, and the unit of each group."""
    b, (several, stride, chunks) = x.builder, _chunks(x)
    with cgutils.for_range(b, count) as loop:
        row, at = b.gep(asked, [b.mul(loop.index, width)]), x.times(loop.index, chunks * stride)
        numbers = []
        for first in range(0, chunks * several, WRITTEN):
            place, real = ir.Constant(AT, first), x.real(x.plus(width, -first), WRITTEN)
            numbers.append(x.product(x.load_some(row, place, real), x.load_some(by, place, real)))
        factors = []
        for g in range(x.groups):
            of_group = [digits.bits(x, each, [k == g for k in _groups(x, v)]) for v, each in enumerate(numbers)]
            factor, unit = digits.units(x, digits.top(x, reduce(partial(digits.larger, x), of_group)))
            b.store(unit, b.gep(units, [x.plus(x.times(loop.index, x.groups), g)]))
            factors.append(x.all_of(factor, WRITTEN))
        written, each = [], several // WRITTEN
        for v, number in enumerate(numbers):
            found = factors[(groups := _groups(x, v))[0]]
            for g in range(groups[0] + 1, groups[-1] + 1):
                found = x.picked(found, factors[g], [i + WRITTEN * (k >= g) for i, k in enumerate(groups)])
            written.append(digits.written(x, number, found))
        for chunk in range(chunks):
            some = written[chunk * each : (chunk + 1) * each]
            digits.put(x, some, x.planes, room, x.plus(at, chunk * stride))


def _groups(x: Row, vector: int) -> list[int]:
    """Of each number that is written in a vector; what is behind the last is nothing."""
    first, each = vector * WRITTEN, x.words * x.planes
    return [min((first + i) // each, x.groups - 1) for i in range(WRITTEN)]


def _across(x: Row, codes: Any, slot: Any, left: Any) -> list[Any]:
    """Four bytes each of as many neighbouring slots as go in a vector, by place; of fewer where fewer are left."""
    b, lanes, words = x.builder, WIDEST // 4, x.groups * x.words // 4
    raw = b.bitcast(b.gep(codes, [x.times(slot, 4 * words)]), I32.as_pointer())
    room = _room(x, I32, lanes * words)
    place = cgutils.alloca_once_value(b, raw)
    with b.if_then(b.icmp_signed("<", left, ir.Constant(AT, lanes)), likely=False):
        for first in range(0, lanes * words, lanes):
            here = x.load_some(raw, ir.Constant(AT, first), x.real(x.plus(x.times(left, words), -first), lanes), I32)
            x.store(here, room, ir.Constant(AT, first))
        b.store(room, place)
    base = b.load(place)
    if words & (words - 1):
        return [x.gathered(base, range(w, lanes * words, words)) for w in range(words)]
    return x.unzipped([x.load(base, ir.Constant(AT, first), lanes, I32) for first in range(0, lanes * words, lanes)])


def _room(x: Row, kind: ir.Type, size: int) -> Any:
    room = cgutils.alloca_once(x.builder, kind, ir.Constant(AT, size))
    room.align = 64  # vectors that lie across two lines of a cache take twice as long
    return room


def products(x: Row) -> None:
    """`codes.products`"""
    b, codes, asked, by, sizes, out = x.builder, *(x.array(i) for i in (0, 3, 4, 5, 6))
    count, slots, columns = x.columns(3, 0), x.columns(5), x.columns(6)
    lanes, end, (several, stride, chunks) = WIDEST // 4, x.number(2), _chunks(x)
    each = chunks * stride
    written, units = _room(x, I8, QUERIES * each), _room(x, F32, QUERIES * x.groups)
    _asked(x, asked, by, x.columns(3), count, written, units)
    with cgutils.for_range_slice(b, x.number(1), end, ir.Constant(AT, lanes)) as (slot, _):
        left = b.sub(end, slot)
        real = x.real(left, lanes)

        def of(some: list[Any], words: list[Any]) -> None:
            total: list[Any] = [None] * len(some)
            for g in range(x.groups):
                turns = 2 if len(some) == 1 else 1  # no product waits for the one before
                levels = [[[ir.VectorType(I32, lanes)([0] * lanes)] * 3 for _ in range(turns)] for _ in some]
                for w in range(g * x.words // 4, (g + 1) * x.words // 4):
                    chunk, within = divmod(w * 4 * x.planes, several)
                    for p, code in enumerate(_planes(x, words[w])):
                        for k, query in enumerate(some):
                            to = levels[k][w % turns]
                            for level in range(3):
                                place = chunk * stride + level * several + within + 4 * p
                                digit = x.everywhere(written, x.plus(x.times(query, each), place), lanes, I32)
                                to[level] = _met(x, to[level], code, digit)
                for k, query in enumerate(some):
                    every = [reduce(b.add, of_level) for of_level in zip(*levels[k])]
                    unit = x.everywhere(units, x.plus(x.times(query, x.groups), g), lanes)
                    found = _told(x, every, unit, _most(x, x.words * x.planes))
                    if x.groups > 1:
                        here = x.plus(slot, b.mul(slots, ir.Constant(AT, g)))
                        found = x.product(found, x.load_some(sizes, here, real))
                    total[k] = x.sum(total[k], found)
            for query, found in zip(some, total):
                x.store_some(found, out, b.add(slot, b.mul(query, columns)), real)

        together = _TOGETHER["products"]
        alone = b.sub(count, b.srem(count, ir.Constant(AT, together)))
        for begin, stop, step in ((ir.Constant(AT, 0), alone, together), (alone, count, 1)):
            with b.if_then(b.icmp_signed("<", begin, stop)):
                words = _across(x, codes, slot, left)  # in both: no vector has to be put aside for the other
                with cgutils.for_range_slice(b, begin, stop, ir.Constant(AT, step)) as (query, _):
                    of([x.plus(query, k) for k in range(step)], words)


def sums(x: Row) -> None:
    """`codes.sums`"""
    b, codes, weights, sizes, out = x.builder, *(x.array(i) for i in (0, 3, 4, 5))
    count, columns, slots = x.columns(3, 0), x.columns(3), x.columns(4)
    size, together = x.groups * x.words, _TOGETHER["sums"]
    parts = list(pieces(size, WIDEST // 4))
    query_size = x.groups * 4 * BLOCK
    written, units = _room(x, I8, together * query_size), _room(x, F32, together * x.groups)
    kept, few = _room(x, I8, BLOCK * size), _room(x, I8, 4 * size)
    levels = {
        (k, part): [[cgutils.alloca_once(b, ir.VectorType(I32, part[1])) for _ in range(3)] for _ in range(x.planes)]
        for k in range(together)
        for part in parts
    }
    end = x.number(2)
    with cgutils.for_range_slice(b, x.number(1), end, ir.Constant(AT, BLOCK)) as (first, _):
        last = x.smaller(x.plus(first, BLOCK), end)
        several = b.icmp_signed(">", count, ir.Constant(AT, together - 1))
        with b.if_then(several), cgutils.for_range_slice(b, first, last, ir.Constant(AT, 4)) as (slot, _):
            at = x.times(b.sub(slot, first), size)
            for (j, _lanes), vector in zip(parts, _side_by_side(x, codes, slot, last, few, parts)):
                x.store(vector, kept, x.plus(at, 4 * j))

        def of(some: list[Any]) -> None:
            for k, query in enumerate(some):
                row, room = b.gep(weights, [b.mul(query, columns)]), b.gep(written, [ir.Constant(AT, k * query_size)])
                of_groups = [b.gep(sizes, [b.mul(slots, ir.Constant(AT, g))]) for g in range(x.groups)]
                for g, unit in enumerate(_weights(x, row, of_groups, first, last, room)):
                    b.store(unit, b.gep(units, [ir.Constant(AT, k * x.groups + g)]))
                for part in parts:
                    for place in (place for plane in levels[k, part] for place in plane):
                        b.store(place.type.pointee([0] * part[1]), place)
            with cgutils.for_range_slice(b, first, last, ir.Constant(AT, 4)) as (slot, _):
                past = b.sub(slot, first)
                here = b.add(
                    x.times(b.and_(past, ir.Constant(AT, -WRITTEN)), 4), b.and_(past, ir.Constant(AT, WRITTEN - 1))
                )
                if len(some) > 1:
                    at = x.times(b.sub(slot, first), size)
                    raw = [x.load(kept, x.plus(at, 4 * j), 4 * lanes, I8) for j, lanes in parts]
                else:
                    raw = _side_by_side(x, codes, slot, last, few, parts)
                for part, vector in zip(parts, raw):
                    j, lanes = part
                    planes = _planes(x, b.bitcast(vector, ir.VectorType(I32, lanes)))
                    for k in range(len(some)):
                        for level in range(3):
                            at = x.plus(here, k * query_size + level * WRITTEN)
                            digit = x.of_groups(written, ir.Constant(AT, 4 * BLOCK), at, j, lanes, x.words, I32)
                            for place, code in zip((plane[level] for plane in levels[k, part]), planes):
                                b.store(_met(x, b.load(place), code, digit), place)
            for k, query in enumerate(some):
                for part in parts:
                    j, lanes = part
                    unit = x.of_groups(units, ir.Constant(AT, 1), ir.Constant(AT, k * x.groups), j, lanes, x.words)
                    told = [
                        _told(x, [b.load(place) for place in plane], unit, _most(x, BLOCK)) for plane in levels[k, part]
                    ]
                    found, at = x.put_together(told), x.plus(x.times(query, size * x.planes), j * x.planes)
                    x.store(x.sum(x.load(out, at, found.type.count), found), out, at)

        x.loop(ir.Constant(AT, 0), count, together, of)


def _weights(x: Row, row: Any, sizes: list[Any], first: Any, last: Any, room: Any) -> list[Any]:
    """Weights first to last times the sizes of each group as bytes, zeros behind them, and their units."""
    b, kind = x.builder, ir.VectorType(I32, WRITTEN)
    kept = [cgutils.alloca_once(b, kind) for _ in sizes]

    def numbers(slot: Any) -> list[Any]:
        real = x.real(b.sub(last, slot), WRITTEN)
        weight = x.load_some(row, slot, real)
        return [x.product(weight, x.load_some(size, slot, real)) for size in sizes]

    for place in kept:
        b.store(kind([0] * WRITTEN), place)
    with cgutils.for_range_slice(b, first, last, ir.Constant(AT, WRITTEN)) as (slot, _):
        for place, number in zip(kept, numbers(slot)):
            b.store(digits.larger(x, b.load(place), digits.bits(x, number)), place)
    found = [digits.units(x, digits.top(x, b.load(place))) for place in kept]
    with cgutils.for_range_slice(b, first, last, ir.Constant(AT, WRITTEN)) as (slot, _):
        for g, (number, (by, _unit)) in enumerate(zip(numbers(slot), found)):
            at = x.plus(x.times(b.sub(slot, first), 4), g * 4 * BLOCK)
            digits.put(x, [digits.written(x, number, x.all_of(by, WRITTEN))], 1, room, at)
    return [unit for _, unit in found]


def _side_by_side(x: Row, codes: Any, slot: Any, last: Any, few: Any, parts: list[tuple[int, int]]) -> list[Any]:
    """Bytes of four slots, those of a place beside each other; what is behind the last is anything."""
    b, size = x.builder, x.groups * x.words
    raw = b.gep(codes, [x.times(slot, size)])
    place = cgutils.alloca_once_value(b, raw)
    with b.if_then(b.icmp_signed(">", x.plus(slot, 4), last), likely=False):
        for k in range(4):
            own = x.times(b.sub(x.smaller(x.plus(slot, k), x.plus(last, -1)), slot), size)
            for j, lanes in pieces(size, WIDEST):
                x.store(x.load(raw, x.plus(own, j), lanes, I8), few, ir.Constant(AT, k * size + j))
        b.store(few, place)
    base, found = b.load(place), []
    whole = 4 * size if 4 * size <= WIDEST else 0
    for j, lanes in parts:
        if whole:
            one = other = x.load(base, ir.Constant(AT, 0), whole, I8)
            index = [k * size + j + i for i in range(lanes) for k in range(4)]
        elif 4 * size == 2 * WIDEST:
            one, other = (x.load(base, ir.Constant(AT, k), WIDEST, I8) for k in (0, WIDEST))
            index = [k * size + j + i for i in range(lanes) for k in range(4)]
        else:
            four = [x.load(base, ir.Constant(AT, k * size + j), lanes, I8) for k in range(4)]
            one, other = (x.picked(a, c, list(range(2 * lanes))) for a, c in (four[:2], four[2:]))
            index = [k * lanes + i for i in range(lanes) for k in range(4)]
        found.append(x.picked(one, other, index))
    return found
