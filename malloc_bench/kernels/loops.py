"""The loops over codes of few bits, for a compiler: arrays in, arrays out, nothing else.

Rows start to stop of R, users and their heads, are read, M queries each; what is known of users and heads is
[B, H, ...] and has fewer of them where neighbours are alike, see `part`.
"""

from __future__ import annotations

import inspect
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core.registry import cpu_target

from malloc_bench.kernels import codes, digits, lanes, powers, whole, words
from malloc_bench.kernels.codes import products, sums, unpacked, widened
from malloc_bench.kernels.lanes import turned
from malloc_bench.kernels.whole import QUERIES
from malloc_bench.kernels.words import BYTES, FEW, GIVEN, MIDDLE, WORDS

PLANES = {bits: planes for bits, (planes, _) in WORDS.items()}
f32, i32, zero = np.float32, np.int32, np.float32(0)
EIGHTHS = np.exp2(-np.arange(256) / 8).astype(np.float32)
# sums may be taken in another order; what is no number stays none
EXACT: dict[str, Any] = {"error_model": "numpy", "nogil": True}
HOW = {**EXACT, "fastmath": {"reassoc", "contract", "nsz", "arcp"}}


_FILES = lanes, codes, digits, powers, whole, words, sys.modules[__name__]
_CPU = cpu_target.target_context.codegen().magic_tuple()
_CALLED = zlib.crc32("".join([*map(inspect.getsource, _FILES), str(whole.WIDEST), *_CPU]).encode())


def jit(function: Callable[..., None], how: dict[str, Any] = HOW) -> Callable[..., None]:
    """Compiled at its first call; kept on disk where that can be written to, by a name that what it calls is part of,
    and its constants: the compiler looks at a function's own file alone, and processes that put several loops under one
    name at once leave the code of one as that of another."""
    constants = [str(int(cell.cell_contents)) for cell in function.__closure__ or ()]
    function.__qualname__ += "-".join(["", f"{_CALLED:08x}", *constants])
    try:
        made = numba.njit(cache=True, **how)(function)
    except RuntimeError:  # no folder for its cache
        return numba.njit(**how)(function)
    for name in ("load_overload", "save_overload"):
        setattr(made._cache, name, _if_it_can(getattr(made._cache, name)))
    return made


def _if_it_can(call: Callable[..., Any]) -> Callable[..., Any]:
    """None where a file is broken, or a disk full: the loop is compiled, and not kept."""

    def tried(*given: Any) -> Any:
        with suppress(OSError, EOFError, UnpicklingError):
            return call(*given)

    return tried


inlined, called = numba.njit(inline="always", **HOW), numba.njit(**HOW)


@inlined
def part(x, i, rows, heads):  # type: ignore[no-untyped-def]
    """Of x [B or 1, H or fewer, ...] what row i of all of them has; one of fewer heads is of several neighbours."""
    b, n = i // heads, x.shape[1]  # a division takes as long as ten numbers
    h = 0 if n == 1 else i - b * heads if n == heads else (i - b * heads) * n // heads
    return x[b if x.shape[0] > 1 else 0, h]


@inlined
def sized(scale, offset, whole, s, g, bits, how):  # type: ignore[no-untyped-def]
    """Scale and offset of a slot and a group of channels, as numbers."""
    if how == BYTES:
        size = EIGHTHS[i32(scale[s, g]) & 255] * whole
        return size, (f32(offset[s, g]) - f32((1 << bits) - 1)) * f32(0.5) * size
    size = f32(scale[s, g])
    return size, size * f32(-(1 << bits >> 1)) if how == MIDDLE else f32(offset[s, g])


@inlined
def all_sized(scale, offset, whole, end, sizes, lows, bits, groups, how):  # type: ignore[no-untyped-def]
    if how == GIVEN:
        turned(scale, end, sizes, groups)
        turned(offset, end, lows, groups)
        return
    for g in range(groups):
        for s in range(end):
            sizes[g, s], lows[g, s] = sized(scale, offset, whole, s, g, bits, how)


@inlined
def read(codes, i, rows, heads, end, room, bits, words, groups, wider):  # type: ignore[no-untyped-def]
    """Codes of row i; wider: those of three bits as codes of four, in `room`."""
    own = part(codes, i, rows, heads)
    if wider:
        widened(own, end, room, bits, words, groups)
    return room if wider else own


@called
def exponent(top, i, rows, heads, how):  # type: ignore[no-untyped-def]
    return np.exp2(f32(part(top, i, rows, heads)[0, 0])) if how == BYTES else f32(1)


class Ways(NamedTuple):
    """Products are written, sums added, to [R, M, ...]."""

    dot: Callable[..., None]
    mix: Callable[..., None]
    most: int  # queries that they read for


@cache
def loops(BITS: int, WORDS: int, GROUPS: int, HOW_SIZED: int) -> tuple[Ways, Ways]:
    """Of vectors of GROUPS groups of WORDS words of codes of so many bits: constants to the compiler.

    Scales [B, H, S, G] are of a slot and a group of channels, or, the second, [B, H, S / group, D] of slots and one
    channel.
    """
    ROOM = WORDS * GROUPS * PLANES[BITS]
    EACH = ROOM // GROUPS
    WIDER = BITS == 3 and whole.fits(4, 4 * WORDS)  # three bits are read as four: these lie in whole bytes
    AS, BYTES_READ = (4, 4 * WORDS) if WIDER else (BITS, WORDS)

    @jit
    def dot_by_slot(codes, scale, offset, top, group, count, q, out, heads, start, stop):  # type: ignore[no-untyped-def]
        slots, ones = codes.shape[2], np.ones(q.shape[2], f32)
        sizes, lows = np.empty((GROUPS, slots), f32), np.empty((GROUPS, slots), f32)
        room = np.empty((slots if WIDER else 0, codes.shape[3] * 4 // 3), np.uint8)
        for i in range(start, stop):
            end = min(slots, part(count, i, len(out), heads))
            own = read(codes, i, len(out), heads, end, room, BITS, WORDS, GROUPS, WIDER)
            all_sized(
                part(scale, i, len(out), heads),
                part(offset, i, len(out), heads),
                exponent(top, i, len(out), heads, HOW_SIZED),
                end,
                sizes,
                lows,
                BITS,
                GROUPS,
                HOW_SIZED,
            )
            for m in range(0, q.shape[1], QUERIES):
                asked, given = q[i, m : m + QUERIES], out[i, m : m + QUERIES]
                products(own, 0, end, asked, ones, sizes, given, AS, BYTES_READ, GROUPS)
                for k in range(len(asked)):
                    found = given[k]
                    for g in range(GROUPS):
                        total = zero
                        for d in range(g * EACH, min(g * EACH + EACH, q.shape[2])):
                            total += asked[k, d]
                        for s in range(end):
                            found[s] = (found[s] * sizes[g, s] if GROUPS == 1 else found[s]) + lows[g, s] * total

    @jit
    def dot_by_channel(codes, scale, offset, top, group, count, q, out, heads, start, stop):  # type: ignore[no-untyped-def]
        slots, none = codes.shape[2], np.empty((1, 0), f32)
        room = np.empty((slots if WIDER else 0, codes.shape[3] * 4 // 3), np.uint8)
        for i in range(start, stop):
            end = min(slots, part(count, i, len(out), heads))
            own = read(codes, i, len(out), heads, end, room, BITS, WORDS, GROUPS, WIDER)
            sizes, lows = part(scale, i, len(out), heads), part(offset, i, len(out), heads)
            for m in range(0, q.shape[1], QUERIES):
                asked, given = q[i, m : m + QUERIES], out[i, m : m + QUERIES]
                for g in range((end + group - 1) // group):
                    begin, last = g * group, min(end, g * group + group)
                    products(own, begin, last, asked, sizes[g], none, given, AS, BYTES_READ, 1)
                    for k in range(len(asked)):
                        total, found = zero, given[k, begin:last]
                        for d in range(q.shape[2]):
                            low = lows[g, d] if HOW_SIZED == GIVEN else f32(-(1 << BITS >> 1)) * sizes[g, d]
                            total += asked[k, d] * low
                        for s in range(len(found)):
                            found[s] += total

    @jit
    def mix_by_slot(codes, scale, offset, top, group, count, w, out, heads, start, stop):  # type: ignore[no-untyped-def]
        slots, rows = codes.shape[2], np.empty((min(QUERIES, w.shape[1]), ROOM), f32)
        sizes, lows = np.empty((GROUPS, slots), f32), np.empty((GROUPS, slots), f32)
        room = np.empty((slots if WIDER else 0, codes.shape[3] * 4 // 3), np.uint8)
        for i in range(start, stop):
            end = min(slots, part(count, i, len(out), heads))
            own = read(codes, i, len(out), heads, end, room, BITS, WORDS, GROUPS, WIDER)
            all_sized(
                part(scale, i, len(out), heads),
                part(offset, i, len(out), heads),
                exponent(top, i, len(out), heads, HOW_SIZED),
                end,
                sizes,
                lows,
                BITS,
                GROUPS,
                HOW_SIZED,
            )
            for m in range(0, w.shape[1], QUERIES):
                asked, given = w[i, m : m + QUERIES], out[i, m : m + QUERIES]
                rows[:] = zero
                sums(own, 0, end, asked, sizes, rows[: len(asked)], AS, BYTES_READ, GROUPS)
                for k in range(len(asked)):
                    for g in range(GROUPS):
                        total = zero
                        for s in range(end):
                            total += asked[k, s] * lows[g, s]
                        for d in range(g * EACH, min(out.shape[2], g * EACH + EACH)):
                            given[k, d] += rows[k, d] + total

    @jit
    def mix_by_channel(codes, scale, offset, top, group, count, w, out, heads, start, stop):  # type: ignore[no-untyped-def]
        slots, rows = codes.shape[2], np.empty((min(QUERIES, w.shape[1]), ROOM), f32)
        width = out.shape[2]
        ones, sizes, lows = np.ones((1, slots), f32), np.empty(width, f32), np.empty(width, f32)
        room = np.empty((slots if WIDER else 0, codes.shape[3] * 4 // 3), np.uint8)
        for i in range(start, stop):
            end = min(slots, part(count, i, len(out), heads))
            own = read(codes, i, len(out), heads, end, room, BITS, WORDS, GROUPS, WIDER)
            scales, offsets = part(scale, i, len(out), heads), part(offset, i, len(out), heads)
            for g in range((end + group - 1) // group):
                begin, last = g * group, min(end, g * group + group)
                for d in range(width):
                    sizes[d], lows[d] = sized(scales, offsets, f32(1), g, d, BITS, HOW_SIZED)
                for m in range(0, w.shape[1], QUERIES):
                    asked, given = w[i, m : m + QUERIES], out[i, m : m + QUERIES]
                    rows[:] = zero
                    sums(own, begin, last, asked, ones, rows[: len(asked)], AS, BYTES_READ, 1)
                    for k in range(len(asked)):
                        total = zero
                        for s in range(begin, last):
                            total += asked[k, s]
                        for d in range(width):
                            given[k, d] += rows[k, d] * sizes[d] + total * lows[d]

    most, some = (whole.MOST, whole.SOME) if whole.fits(AS, BYTES_READ) else (FEW, FEW)
    return Ways(dot_by_slot, mix_by_slot, most), Ways(dot_by_channel, mix_by_channel, some)


@cache
def dense(BITS: int, WORDS: int, GROUPS: int, WIDTH: int, HOW_SIZED: int) -> tuple[Callable[..., None], ...]:
    """Likewise, what writes the vectors out, of WIDTH numbers each."""

    @jit
    def dense_by_slot(codes, scale, offset, top, group, out, first, start, stop):  # type: ignore[no-untyped-def]
        slots, heads, rows = codes.shape[2], codes.shape[1], codes.shape[0] * codes.shape[1]
        sizes, lows = np.empty((GROUPS, slots), f32), np.empty((GROUPS, slots), f32)
        for i in range(start, stop):
            all_sized(
                part(scale, i, rows, heads),
                part(offset, i, rows, heads),
                exponent(top, i, rows, heads, HOW_SIZED),
                slots,
                sizes,
                lows,
                BITS,
                GROUPS,
                HOW_SIZED,
            )
            unpacked(part(codes, i, rows, heads), 0, slots, sizes, lows, out[i - first], 0, WIDTH, BITS, WORDS, GROUPS)

    @jit
    def dense_by_channel(codes, scale, offset, top, group, out, first, start, stop):  # type: ignore[no-untyped-def]
        slots, heads, rows = codes.shape[2], codes.shape[1], codes.shape[0] * codes.shape[1]
        sizes, lows = np.empty(WIDTH, f32), np.empty(WIDTH, f32)
        for i in range(start, stop):
            scales, offsets = part(scale, i, rows, heads), part(offset, i, rows, heads)
            for g in range((slots + group - 1) // group):
                for d in range(WIDTH):
                    sizes[d], lows[d] = sized(scales, offsets, f32(1), g, d, BITS, HOW_SIZED)
                end = min(slots, g * group + group)
                unpacked(
                    part(codes, i, rows, heads), g * group, end, sizes, lows, out[i - first], 1, WIDTH, BITS, WORDS, 1
                )

    return dense_by_slot, dense_by_channel
