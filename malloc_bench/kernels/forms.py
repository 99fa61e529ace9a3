"""The loop over quadratic forms of vectors, for a compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from malloc_bench.kernels.lanes import AT, F32, Lanes, inlined, pieces
from malloc_bench.kernels.loops import jit


def _form(x: Lanes) -> None:
    keys, lower, mean, out = (x.array(i) for i in (0, 3, 4, 5))
    width = x.constant(-1)
    parts = list(pieces(width))

    def of(some: list[Any]) -> list[dict[int, Any]]:
        kept = [[cgutils.alloca_once(x.builder, ir.VectorType(F32, lanes)) for _, lanes in parts] for _ in some]
        for own in kept:
            for (first, lanes), place in zip(parts, own):
                x.builder.store(x.load(mean, ir.Constant(AT, first), lanes), place)
        for p, (first, lanes) in enumerate(parts):  # rows that begin parts 0 to p of their columns
            with cgutils.for_range_slice(x.builder, *(ir.Constant(AT, i) for i in (first, first + lanes, 1))) as (j, _):
                rows = [x.load(lower, x.plus(x.times(j, width), at), size) for at, size in parts[: p + 1]]
                for slot, own in zip(some, kept):
                    at = x.plus(x.times(slot, width), j)
                    for row, place in zip(rows, own):
                        size = x.everywhere(keys, at, row.type.count)
                        x.builder.store(x.sum(x.builder.load(place), x.product(size, row)), place)
        total: list[dict[int, Any]] = []
        for slot, own in zip(some, kept):
            found: dict[int, Any] = {}
            for (first, lanes), place in zip(parts, own):
                key = x.load(keys, x.plus(x.times(slot, width), first), lanes)
                found[lanes] = x.sum(found.get(lanes), x.product(key, x.builder.load(place)))
            total.append(found)
        return total

    x.together(of, out)


@inlined(_form, Lanes)
def form(typing, keys, begin, end, lower, mean, out, width):  # type: ignore[no-untyped-def]
    """out[s] = k'(mean + lower' k), keys [S, width] begin to end; lower [width, width], 0 above its diagonal."""


@cache
def forms(width: int) -> Callable[..., None]:
    WIDTH = width

    @partial(jit)
    def each(keys, lower, mean, out, start, stop):  # type: ignore[no-untyped-def]
        for n in range(start, stop):
            for g in range(mean.shape[1]):
                form(keys[n], 0, keys.shape[1], lower[n, g], mean[n, g], out[n, g], WIDTH)

    return each
