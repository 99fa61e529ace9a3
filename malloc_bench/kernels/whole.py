"""Products and sums of codes in whole numbers, on CPUs that multiply four bytes at a time (VNNI).

What meets the codes, a query or weights, is written in three bytes, the largest of its numbers as LARGEST: as exact as
float32 is beside that. Each byte meets the codes by itself, with exact sums.
"""

from __future__ import annotations

import os
from functools import partial, reduce
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from malloc_bench.kernels.lanes import AT, F32, I8, I32, Row, pieces

LARGEST, LEAST = 127 << 16, 1e-30  # what is smaller than the latter is nothing
BLOCK = 256  # slots whose weights are written beside their own largest
_LEVEL = BLOCK // 4 + 4  # float32s that hold a byte of each, and are read in fours


def _widest() -> int:
    """Bytes of a vector; 0 where the CPU has no such products, or nobody wants them."""
    known = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
    if os.environ.get("MALLOC_BENCH_KERNELS") == "float":
        return 0
    return 64 if {"+avx512vnni", "+avx512vl", "+avx512bw"} <= known else 32 * ("+avxvnni" in known)


WIDEST = _widest()


def fits(x: Row) -> bool:
    """Whether the codes of a group lie in whole bytes, in fours."""
    return WIDEST > 0 and x.step == 1 and x.words % 4 == 0


def _bits(x: Row, numbers: Any) -> Any:
    """Without signs: they are ordered as the numbers are, and what is no number is above all."""
    kind = ir.VectorType(I32, numbers.type.count)
    return x.builder.and_(x.builder.bitcast(numbers, kind), kind([0x7FFFFFFF] * kind.count))


def _larger(x: Row, one: Any, other: Any) -> Any:
    return x.builder.select(x.builder.icmp_unsigned(">", one, other), one, other)


def _units(x: Row, bits: Any) -> tuple[Any, Any]:
    """What numbers are multiplied by to be written, and the unit that they are then written in."""
    b, kind = x.builder, bits.type
    name = f"llvm.vector.reduce.umax.v{kind.count}i32"
    top = b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(I32, [kind]), name), [bits])
    top = b.bitcast(top, F32)
    little = b.fcmp_ordered("<", top, F32(LEAST))
    return b.select(little, F32(0), b.fdiv(F32(LARGEST), top)), b.fmul(top, F32(1 / LARGEST))


def _all(x: Row, number: Any, lanes: int) -> Any:
    one = x.builder.insert_element(ir.VectorType(F32, 1)(ir.Undefined), number, I32(0))
    return x.picked(one, one, [0] * lanes)


def _written(x: Row, numbers: Any, by: Any) -> list[Any]:
    """The three bytes of each number, the highest first."""
    b, lanes = x.builder, numbers.type.count
    wide, byte = ir.VectorType(I32, lanes), ir.VectorType(I8, lanes)
    near = ir.FunctionType(numbers.type, [numbers.type])
    near = cgutils.get_or_insert_function(b.module, near, f"llvm.rint.v{lanes}f32")
    moved = b.add(b.fptosi(b.call(near, [b.fmul(numbers, _all(x, by, lanes))]), wide), wide([0x808080] * lanes))
    high = [b.trunc(b.lshr(moved, wide([k] * lanes)), byte) for k in (16, 8, 0)]
    return [b.xor(each, byte([0x80] * lanes)) for each in high]


def _met(x: Row, to: Any, codes: Any, digits: Any) -> Any:
    """to [lanes / 4] plus the products of four neighbours."""
    kind = to.type
    name = f"llvm.x86.avx512.vpdpbusd.{32 * kind.count}"
    call = cgutils.get_or_insert_function(x.builder.module, ir.FunctionType(kind, [kind] * 3), name)
    return x.builder.call(call, [to, x.builder.bitcast(codes, kind), x.builder.bitcast(digits, kind)])


def _filled(x: Row, few: Any) -> Any:
    """At least as many bytes as go in a vector."""
    if (lanes := few.type.count) >= 16:
        return few
    return x.picked(few, few.type([0] * lanes), [*range(lanes), *[lanes] * (16 - lanes)])


def _told(x: Row, levels: list[Any], unit: Any) -> Any:
    """The numbers whose levels these are, the last of them in units."""
    found = None
    for level, size in zip(levels[::-1], (1, 256, 65536)):
        number = x.builder.sitofp(level, ir.VectorType(F32, level.type.count))
        each = x.builder.fmul(unit, unit.type([size] * level.type.count)) if size > 1 else unit
        found = x.sum(found, x.product(number, each))
    return found


def products(x: Row) -> None:
    """`codes.products`"""
    b, codes, row, sizes, out = x.builder, *(x.array(i) for i in (0, 3, 4, 5))
    slots, parts = x.columns(4), list(pieces(x.groups * x.words, WIDEST))
    plain = {part: x.taken_apart(row, *part) for part in parts}
    every = [_bits(x, each) for planes in plain.values() for each in planes]
    every = [x.picked(each, each.type([0] * each.type.count), [min(k, each.type.count) for k in range(WIDEST)])
             for each in every]  # fmt: skip
    by, unit = _units(x, reduce(partial(_larger, x), every))
    known = {part: [_written(x, each, by) for each in plain[part]] for part in parts}
    together = WIDEST // (x.groups * x.words) if x.groups == 1 and len(parts) == 1 else 1  # slots in a vector
    at_once = 4 * x.planes * ((1 << x.bits) - 1) * 128 << 16 < 1 << 31  # whether three levels go in one sum

    def of(some: list[Any]) -> list[dict[int, Any]]:
        step = min(together, len(some))
        return [of_neighbours(some[k], step) for k in range(0, len(some), step)]

    def of_neighbours(slot: Any, several: int) -> dict[int, Any]:
        total: dict[int, Any] = {}
        for j, lanes in parts:
            planes, size = x.byte_planes(x.raw(codes, slot, j, lanes * several)), max(lanes * several, 16) // 4
            levels = [ir.VectorType(I32, size)([0] * size)] * 3
            for code, digits in zip(planes, known[j, lanes]):
                every = [_filled(x, x.picked(each, each, list(range(lanes)) * several)) for each in digits]
                levels = [_met(x, to, _filled(x, code), each) for to, each in zip(levels, every)]
            while len(levels) > (1 if at_once else 2):  # the highest two become one
                high, low, *rest = levels
                levels = [b.add(b.shl(high, high.type([8] * size)), low), *rest]
            fours = lanes * several // 4
            found = _told(x, [x.picked(each, each, list(range(fours))) for each in levels], _all(x, unit, fours))
            if x.groups > 1:
                found = x.product(found, x.of_groups(sizes, slots, slot, j // 4, fours, x.words // 4))
            total[fours] = x.sum(total.get(fours), found)
        return total

    x.together(of, out)


def sums(x: Row) -> None:
    """`codes.sums`"""
    b, codes, weights, out = x.builder, x.array(0), x.array(3), x.array(4)
    columns, parts = x.columns(3), list(pieces(x.groups * x.words, WIDEST // 4))
    room, units = (
        b.bitcast(cgutils.alloca_once(b, ir.ArrayType(F32, size)), F32.as_pointer())
        for size in (x.groups * 3 * _LEVEL, x.groups)
    )
    kept = {
        part: [[cgutils.alloca_once(b, ir.VectorType(I32, part[1])) for _ in range(3)] for _ in range(x.planes)]
        for part in parts
    }
    places = [place for planes in kept.values() for levels in planes for place in levels]
    for j, lanes in parts:
        x.store(ir.VectorType(F32, lanes * x.planes)([0] * lanes * x.planes), out, ir.Constant(AT, j * x.planes))
    begin, end = x.number(1), x.number(2)
    with cgutils.for_range_slice(b, begin, end, ir.Constant(AT, BLOCK)) as (first, _):
        last = x.smaller(x.plus(first, BLOCK), end)
        for g in range(x.groups):
            row = b.gep(weights, [b.mul(columns, ir.Constant(AT, g))])
            unit = _weights(x, row, first, last, b.gep(room, [ir.Constant(AT, g * 3 * _LEVEL)]))
            b.store(unit, b.gep(units, [ir.Constant(AT, g)]))
        for place in places:
            b.store(place.type.pointee([0] * place.type.pointee.count), place)
        with cgutils.for_range_slice(b, first, last, ir.Constant(AT, 4)) as (slot, _):
            some = [x.smaller(x.plus(slot, k), b.sub(last, ir.Constant(AT, 1))) for k in range(4)]
            four = b.lshr(b.sub(slot, first), ir.Constant(AT, 2))
            for j, lanes in parts:
                digits = [
                    x.of_groups(room, ir.Constant(AT, 3 * _LEVEL), x.plus(four, level * _LEVEL), j, lanes, x.words)
                    for level in range(3)
                ]
                for levels, code in zip(kept[j, lanes], x.byte_planes(_side_by_side(x, codes, some, j, lanes))):
                    for place, digit in zip(levels, digits):
                        b.store(_met(x, b.load(place), code, digit), place)
        for (j, lanes), planes in kept.items():
            unit = x.of_groups(units, ir.Constant(AT, 1), ir.Constant(AT, 0), j, lanes, x.words)
            found = x.put_together([_told(x, [b.load(place) for place in levels], unit) for levels in planes])
            at = ir.Constant(AT, j * x.planes)
            x.store(x.sum(x.load(out, at, found.type.count), found), out, at)


def _weights(x: Row, row: Any, first: Any, last: Any, room: Any) -> Any:
    """Weights first to last as three rows of bytes, to `room`, and zeros until all are fours; their unit."""
    b = x.builder
    kept = cgutils.alloca_once(b, ir.VectorType(I32, 16))
    b.store(kept.type.pointee([0] * 16), kept)

    def numbers(some: list[Any]) -> Any:
        return x.load(row, some[0], len(some))

    def top(some: list[Any]) -> None:
        own = _bits(x, numbers(some))
        if len(some) == 1:
            own = x.picked(own, own.type([0]), [0, *[1] * 15])
        b.store(_larger(x, b.load(kept), own), kept)

    x.loop(first, last, 16, top)
    by, unit = _units(x, b.load(kept))
    rows = [b.bitcast(b.gep(room, [ir.Constant(AT, level * _LEVEL)]), I8.as_pointer()) for level in range(3)]
    whole = b.and_(b.sub(last, first), ir.Constant(AT, -16))
    for each in rows:
        x.store(ir.VectorType(I8, 16)([0] * 16), each, whole)

    def write(some: list[Any]) -> None:
        for each, digits in zip(rows, _written(x, numbers(some), by)):
            x.store(digits, each, b.sub(some[0], first))

    x.loop(first, last, 16, write)
    return unit


def _side_by_side(x: Row, codes: Any, some: list[Any], j: int, lanes: int) -> Any:
    """Bytes of four slots, those of a place beside each other."""
    b, (one, two, three, four) = x.builder, [x.raw(codes, slot, j, lanes) for slot in some]
    first, second = (x.picked(each[0], each[1], list(range(2 * lanes))) for each in ((one, two), (three, four)))
    found = b.bitcast(x.picked(first, second, list(range(4 * lanes))), ir.VectorType(I32, lanes))
    fours = lanes // 4
    found = x.picked(found, found, [k * fours + place for place in range(fours) for k in range(4)])
    found = b.bitcast(found, ir.VectorType(I8, 4 * lanes))
    return x.picked(found, found, [16 * i + 4 * k + at for i in range(fours) for at in range(4) for k in range(4)])
