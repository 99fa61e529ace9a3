"""Numbers written in three bytes, for products with codes of few bits: as exact as float32 is beside their largest."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from malloc_bench.kernels.lanes import F32, I8, I32, Lanes

LARGEST, LEAST = 127 << 16, 1e-30  # what is smaller than the latter is nothing
WRITTEN = 16  # numbers at a time


def bits(x: Lanes, numbers: Any, which: list[bool] | None = None) -> Any:
    """Without signs: they are ordered as the numbers are, and what is no number is above all. which: the rest is 0."""
    kind = ir.VectorType(I32, numbers.type.count)
    kept = [0x7FFFFFFF * (which is None or which[i]) for i in range(kind.count)]
    return x.builder.and_(x.builder.bitcast(numbers, kind), kind(kept))


def larger(x: Lanes, one: Any, other: Any) -> Any:
    return x.builder.select(x.builder.icmp_unsigned(">", one, other), one, other)


def top(x: Lanes, several: Any) -> Any:
    """The largest number of `bits`."""
    b, kind = x.builder, several.type
    call = ir.FunctionType(I32, [kind])
    call = cgutils.get_or_insert_function(b.module, call, f"llvm.vector.reduce.umax.v{kind.count}i32")
    return b.bitcast(b.call(call, [several]), F32)


def units(x: Lanes, top: Any) -> tuple[Any, Any]:
    """What numbers are multiplied by to be written, and the unit that they are then written in."""
    b = x.builder
    little = b.fcmp_ordered("<", top, F32(LEAST))
    return b.select(little, F32(0), b.fdiv(F32(LARGEST), top)), b.fmul(top, F32(1 / LARGEST))


def written(x: Lanes, numbers: Any, by: Any) -> Any:
    """Four bytes of each number times by, vectors both, the lowest first and the last of them nothing."""
    b, lanes = x.builder, numbers.type.count
    wide = ir.VectorType(I32, lanes)
    moved = b.add(x.nearest(b.fmul(numbers, by)), wide([0x808080] * lanes))
    return b.bitcast(b.xor(moved, wide([0x808080] * lanes)), ir.VectorType(I8, 4 * lanes))


def put(x: Lanes, numbers: list[Any], planes: int, room: Any, at: Any) -> None:
    """Of neighbours in vectors the bytes that meet the same codes: by level, the highest first, and plane, in words."""
    several = WRITTEN * len(numbers)
    each = [
        4 * (w * 4 * planes + i * planes + p) + 2 - level
        for level in range(3) for w in range(several // (4 * planes)) for p in range(planes) for i in range(4)
    ]  # fmt: skip
    for first in range(0, len(each), 64):
        index = each[first : first + 64]
        x.store(x.picked(numbers[0], numbers[-1], index + [0] * (64 - len(index))), room, x.plus(at, first))
