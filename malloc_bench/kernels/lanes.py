"""Steps in vectors, in the compiler's own terms: its way from loops to vectors fails on rows of a few words.

All arrays lie in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from malloc_bench.kernels.words import WORDS

I8, I32, F32, AT = ir.IntType(8), ir.IntType(32), ir.FloatType(), ir.IntType(64)
_FLAGS = ("reassoc", "contract", "nsz", "arcp")
_LANES = 16


def pieces(size: int, widest: int = _LANES) -> Iterator[tuple[int, int]]:
    """First and number of as many neighbours as go in one vector, until all have gone."""
    first = 0
    while first < size:
        lanes = min(widest, 1 << (size - first).bit_length() - 1)
        yield first, lanes
        first += lanes


class Lanes:
    """Steps over vectors of the arrays and numbers that a loop gives; constants come last."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        self.builder, self.context, self.types, self.args = builder, context, signature.args, args

    def constant(self, i: int) -> int:
        return self.types[i].literal_value

    def array(self, i: int) -> Any:
        return self.context.make_array(self.types[i])(self.context, self.builder, self.args[i]).data

    def columns(self, i: int, axis: int = -1) -> Any:
        """How many an array has along its last axis."""
        shape = self.context.make_array(self.types[i])(self.context, self.builder, self.args[i]).shape
        return self.builder.extract_value(shape, self.types[i].ndim - 1 if axis < 0 else axis)

    def number(self, i: int) -> Any:
        return self.context.cast(self.builder, self.args[i], self.types[i], types.intp)

    def load(self, array: Any, at: Any, lanes: int, kind: ir.Type = F32) -> Any:
        place = self.builder.gep(array, [at])
        return self.builder.load(self.builder.bitcast(place, ir.VectorType(kind, lanes).as_pointer()), align=1)

    def store(self, vector: Any, array: Any, at: Any) -> None:
        place = self.builder.gep(array, [at])
        self.builder.store(vector, self.builder.bitcast(place, vector.type.as_pointer()), align=1)

    def load_some(self, array: Any, at: Any, which: Any, kind: ir.Type = F32) -> Any:
        """Zeros where it is not one `which` is true of."""
        b, vector = self.builder, ir.VectorType(kind, which.type.count)
        place = b.bitcast(b.gep(array, [at]), vector.as_pointer())
        name = f"llvm.masked.load.v{vector.count}{kind.intrinsic_name}.p0"
        call = ir.FunctionType(vector, [place.type, I32, which.type, vector])
        call = cgutils.get_or_insert_function(b.module, call, name)
        return b.call(call, [place, I32(4), which, vector([0] * vector.count)])

    def store_some(self, vector: Any, array: Any, at: Any, which: Any) -> None:
        b, kind = self.builder, vector.type
        place = b.bitcast(b.gep(array, [at]), kind.as_pointer())
        name = f"llvm.masked.store.v{kind.count}{kind.element.intrinsic_name}.p0"
        call = ir.FunctionType(ir.VoidType(), [kind, place.type, I32, which.type])
        b.call(cgutils.get_or_insert_function(b.module, call, name), [vector, place, I32(4), which])

    def gathered(self, array: Any, places: Iterable[int]) -> Any:
        found = None
        for k, place in enumerate(every := list(places)):
            found = ir.VectorType(I32, len(every))(ir.Undefined) if found is None else found
            number = self.builder.load(self.builder.gep(array, [ir.Constant(AT, place)]), align=1)
            found = self.builder.insert_element(found, number, I32(k))
        return found

    def plus(self, x: Any, to: Any) -> Any:
        return self.builder.add(x, ir.Constant(AT, to) if isinstance(to, int) else to)

    def times(self, x: Any, by: int) -> Any:
        return self.builder.mul(x, ir.Constant(AT, by))

    def smaller(self, x: Any, y: Any) -> Any:
        return self.builder.select(self.builder.icmp_signed("<", x, y), x, y)

    def product(self, x: Any, y: Any) -> Any:
        return self.builder.fmul(x, y, flags=_FLAGS)

    def sum(self, x: Any, y: Any) -> Any:
        return y if x is None else self.builder.fadd(x, y, flags=_FLAGS)

    def nearest(self, x: Any) -> Any:
        """Whole numbers."""
        lanes = x.type.count
        call = ir.FunctionType(ir.VectorType(I32, lanes), [x.type])
        call = cgutils.get_or_insert_function(self.builder.module, call, f"llvm.lrint.v{lanes}i32.v{lanes}f32")
        return self.builder.call(call, [x])

    def picked(self, x: Any, y: Any, index: list[int]) -> Any:
        return self.builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(index)), index))

    def everywhere(self, array: Any, at: Any, lanes: int, kind: ir.Type = F32) -> Any:
        return self.picked(x := self.load(array, at, 1, kind), x, [0] * lanes)

    def all_of(self, number: Any, lanes: int) -> Any:
        one = self.builder.insert_element(ir.VectorType(number.type, 1)(ir.Undefined), number, I32(0))
        return self.picked(one, one, [0] * lanes)

    def real(self, left: Any, lanes: int = _LANES) -> Any:
        """Which of `lanes` neighbours are among those that are left."""
        left = self.all_of(self.builder.trunc(self.smaller(left, ir.Constant(AT, lanes)), I32), lanes)
        return self.builder.icmp_signed(">", left, ir.VectorType(I32, lanes)(list(range(lanes))))

    def unzipped(self, some: list[Any]) -> list[Any]:
        """Every n-th of n vectors' numbers, from the first, the second ... on."""
        if len(some) == 1:
            return some
        ends = 2 * some[0].type.count
        even, odd = (
            self.unzipped([self.picked(a, c, list(range(k, ends, 2))) for a, c in zip(some[::2], some[1::2])])
            for k in (0, 1)
        )
        return [each for pair in zip(even, odd) for each in pair]

    def folded(self, four: list[Any]) -> Any:
        """The sums of four vectors alike, as one vector."""
        if (lanes := four[0].type.count) < 4:
            none = four[0].type([0.0] * lanes)
            four = [self.picked(x, none, [*range(lanes), *[lanes] * (4 - lanes)]) for x in four]
        while len(four) > 1:
            four = [self.halved(x, y) for x, y in zip(four[::2], four[1::2])]
        (x,) = four
        while x.type.count > 4:
            x = self.halved(x)
        return x

    def halved(self, x: Any, y: Any = None) -> Any:
        """Sums of neighbours, those of y behind those of x."""
        ends = x.type.count * (1 if y is None else 2)
        even, odd = (self.picked(x, x if y is None else y, list(range(k, ends, 2))) for k in (0, 1))
        return self.sum(even, odd)

    def loop(self, begin: Any, end: Any, several: int, body: Callable[[list[Any]], None]) -> None:
        """body of `several` neighbouring slots at a time, and of each that is left by itself."""
        b = self.builder
        left = b.srem(b.sub(end, begin), ir.Constant(AT, several))
        for start, stop, step in ((begin, b.sub(end, left), several), (b.sub(end, left), end, 1)):
            with cgutils.for_range_slice(b, start, stop, ir.Constant(AT, step)) as (s, _):
                body([self.plus(s, k) for k in range(step)])

    def dotted(self, of: Callable[[Any], dict[int, Any]], out: Any) -> None:
        """out[s] = what comes to slot s, which `of` has by the width of vectors."""
        self.together(lambda some: [of(slot) for slot in some], out)

    def together(self, of: Callable[[list[Any]], list[dict[int, Any]]], out: Any) -> None:
        """`dotted`, where `of` has what comes to each of several slots."""

        def body(some: list[Any]) -> None:
            four = of(some) * (4 // len(some))
            found = None
            for lanes in four[0]:
                found = self.sum(found, self.folded([each[lanes] for each in four]))
            self.store(found if len(some) == 4 else self.picked(found, found, [0]), out, some[0])

        self.loop(self.number(1), self.number(2), 4, body)


class Row(Lanes):
    """Codes of one row."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.bits, self.words, self.groups = (self.constant(i) for i in (-3, -2, -1))
        self.planes, self.step = WORDS[self.bits]
        self.parts = list(pieces(self.groups * self.words))  # one vector may have words of several groups

    def of_groups(
        self, array: Any, columns: Any, slot: Any, first: int, lanes: int, each: int, kind: ir.Type = F32
    ) -> Any:
        """array [g, slot] for each of `lanes` neighbours from `first` on, of whom `each` are in a group."""
        found = None
        for g in range(first // each, (first + lanes - 1) // each + 1):
            own = self.everywhere(array, self.plus(slot, self.builder.mul(columns, ir.Constant(AT, g))), lanes, kind)
            index = [k + lanes * ((first + k) // each >= g) for k in range(lanes)]
            found = own if found is None else self.picked(found, own, index)
        return found

    def raw(self, codes: Any, slot: Any, j: int, lanes: int) -> Any:
        """The bytes of `lanes` words."""
        first = self.plus(self.times(slot, self.groups * self.words * self.step), j * self.step)
        return self.load(codes, first, lanes * self.step, I8)

    def code_planes(self, codes: Any, slot: Any, j: int, lanes: int) -> list[Any]:
        """Code p of each of `lanes` words, for every p."""
        b, wide = self.builder, ir.VectorType(I32, lanes)
        raw, words = self.raw(codes, slot, j, lanes), None
        for k in range(self.step):
            byte = b.zext(self.picked(raw, raw, list(range(k, lanes * self.step, self.step))), wide)
            byte = b.shl(byte, wide([8 * k] * lanes)) if k else byte
            words = byte if words is None else b.or_(words, byte)
        found = []
        for p in range(self.planes):
            code = b.lshr(words, wide([p * self.bits] * lanes))
            code = b.and_(code, wide([(1 << self.bits) - 1] * lanes))
            found.append(b.sitofp(code, ir.VectorType(F32, lanes)))
        return found

    def codes_in_order(self, codes: Any, slot: Any, j: int, lanes: int) -> Any:
        """The codes of `lanes` words as numbers, one behind the other."""
        if 8 % self.bits:
            return self.put_together(self.code_planes(codes, slot, j, lanes))
        planes = self.byte_planes(self.raw(codes, slot, j, lanes))
        found = self.put_together(planes)  # as bytes: four times as many as numbers go in a vector
        b, count = self.builder, found.type.count
        return b.sitofp(b.zext(found, ir.VectorType(I32, count)), ir.VectorType(F32, count))

    def byte_planes(self, raw: Any) -> list[Any]:
        """Code p of each byte, for every p: of bits that bytes are whole numbers of."""
        b, kind = self.builder, raw.type
        low = kind([(1 << self.bits) - 1] * kind.count)
        return [b.and_(b.lshr(raw, kind([k] * kind.count)), low) for k in range(0, 8, self.bits)]

    def taken_apart(self, row: Any, j: int, lanes: int) -> list[Any]:
        """The numbers of a plain row that meet those planes."""
        x = self.load(row, ir.Constant(AT, j * self.planes), lanes * self.planes)
        return [self.picked(x, x, list(range(p, lanes * self.planes, self.planes))) for p in range(self.planes)]

    def put_together(self, planes: list[Any]) -> Any:
        """The reverse of `taken_apart`."""
        if len(planes) == 1:
            return planes[0]
        lanes = planes[0].type.count * len(planes) // 2
        even, odd = self.put_together(planes[::2]), self.put_together(planes[1::2])
        return self.picked(even, odd, [i // 2 + lanes * (i % 2) for i in range(2 * lanes)])


def inlined(build: Callable[[Any], None], kind: type[Lanes] = Row) -> Callable[[Callable[..., Any]], Any]:
    """For a compiled loop to call."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        build(kind(context, builder, signature, args))
        return context.get_dummy_value()

    def typed(function: Callable[..., Any]) -> Any:
        @wraps(function)
        def types_of(typing: Any, *given: Any) -> Any:
            return types.void(*given), code

        return intrinsic(prefer_literal=True)(types_of)

    return typed


def _turned(x: Lanes) -> None:
    given, out = x.array(0), x.array(2)
    slots, groups = x.columns(2), x.constant(-1)

    def body(some: list[Any]) -> None:
        row = x.load(given, x.times(some[0], groups), groups * len(some))
        for g in range(groups):
            column = x.picked(row, row, list(range(g, groups * len(some), groups)))
            x.store(column, out, x.plus(some[0], x.builder.mul(slots, ir.Constant(AT, g))))

    x.loop(ir.Constant(AT, 0), x.number(1), _LANES, body)


def _largest(x: Lanes) -> None:
    b, given, out = x.builder, x.array(0), x.array(2)
    kept = cgutils.alloca_once_value(b, x.everywhere(out, ir.Constant(AT, 0), _LANES))

    def larger(one: Any, other: Any) -> Any:
        return b.select(b.fcmp_ordered(">", other, one), other, one)

    def body(some: list[Any]) -> None:
        several = x.load(given, some[0], _LANES) if len(some) > 1 else x.everywhere(given, some[0], _LANES)
        b.store(larger(b.load(kept), several), kept)

    x.loop(ir.Constant(AT, 0), x.number(1), _LANES, body)
    found = b.load(kept)
    while found.type.count > 1:
        half = found.type.count // 2
        first, last = (x.picked(found, found, list(range(k, k + half))) for k in (0, half))
        found = larger(first, last)
    x.store(found, out, ir.Constant(AT, 0))


@inlined(_largest, Lanes)
def largest(typing, x, size, out):  # type: ignore[no-untyped-def]
    """out[0] = the largest of itself and x[0] to x[size - 1]; what is no number is no larger than any."""


@inlined(_turned, Lanes)
def turned(typing, x, end, out, groups):  # type: ignore[no-untyped-def]
    """out[g, s] = x[s, g], slots 0 to end."""
