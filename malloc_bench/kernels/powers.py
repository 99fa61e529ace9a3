"""Exponentials of logits, in vectors: to float32's last digit or two; what is no number stays none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from malloc_bench.kernels.lanes import AT, I32, Lanes, inlined

_LANES = 16
_FIRST, *_REST = 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1


def _power(x: Lanes, of: Any) -> Any:
    """2^n e^r, |r| <= ln 2 / 2, no less than e^-87 and no more than e^88."""
    b, kind = x.builder, of.type
    wide = ir.VectorType(I32, kind.count)

    def all_of(number: float) -> Any:
        return kind([number] * kind.count)

    def with_product(one: Any, other: Any, to: Any) -> Any:
        return x.sum(to, x.product(one, other))

    of = b.select(b.fcmp_ordered("<", of, all_of(-87)), all_of(-87), of)
    of = b.select(b.fcmp_ordered(">", of, all_of(88)), all_of(88), of)
    whole = x.nearest(x.product(of, all_of(1.4426950408889634)))
    n = b.sitofp(whole, kind)
    r = with_product(n, all_of(2.12194440e-4), with_product(n, all_of(-0.693359375), of))
    p = all_of(_FIRST)
    for each in _REST:
        p = with_product(p, r, all_of(each))
    p = x.sum(with_product(x.product(r, r), p, r), all_of(1))
    two = b.shl(b.add(whole, wide([127] * kind.count)), wide([23] * kind.count))
    return x.product(p, b.bitcast(two, kind))


def _each(x: Lanes, of: Callable[[Any], Any]) -> None:
    """Of the array that comes first and the number of its columns, each number becomes what `of` makes of it."""
    b, given, end = x.builder, x.array(0), x.number(1)
    left = b.srem(end, ir.Constant(AT, _LANES))
    whole = b.sub(end, left)
    with cgutils.for_range_slice(b, ir.Constant(AT, 0), whole, ir.Constant(AT, _LANES)) as (s, _):
        x.store(of(x.load(given, s, _LANES)), given, s)
    with b.if_then(b.icmp_signed(">", left, ir.Constant(AT, 0))):
        real = x.real(left)
        x.store_some(of(x.load_some(given, whole, real)), given, whole, real)


def _exponentials(x: Lanes) -> None:
    most = x.everywhere(x.array(2), ir.Constant(AT, 0), _LANES)
    _each(x, lambda here: _power(x, x.builder.fsub(here, most)))


def _gates(x: Lanes) -> None:
    b, by = x.builder, x.everywhere(x.array(2), ir.Constant(AT, 0), _LANES)

    def gate(here: Any) -> Any:
        none, one, least = (here.type([number] * _LANES) for number in (0.0, 1.0, -88.0))
        ended = b.select(b.fcmp_ordered("<", here, least), least, here)
        found = b.fdiv(ended, b.fadd(one, _power(x, b.fsub(none, here))))
        return b.fmul(b.fadd(found, b.fmul(none, here)), by)

    _each(x, gate)


@inlined(_exponentials, Lanes)
def exponentials(typing, x, size, most):  # type: ignore[no-untyped-def]
    """x[s] = exp(x[s] - most[0]), s < size."""


@inlined(_gates, Lanes)
def gates(typing, x, size, by):  # type: ignore[no-untyped-def]
    """x[s] = SiLU(x[s]) times by[0], s < size: x ends at -88; what is infinite is no number."""
