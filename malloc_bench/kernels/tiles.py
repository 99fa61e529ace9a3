"""Reads by Triton, for GPUs: a tile of slots is unpacked, scaled, multiplied and mixed where it is held, and weights of
the next go on from it; no vector is written in full.

The same numbers as `loops`, `chosen` and `passes` give, to tolerance. Proven in Triton's interpreter
(TRITON_INTERPRET=1) and compiled for GPUs, never run on one. Compiled at the first call of each kind, kept on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from malloc_bench.kernels.affine import Affine
from malloc_bench.kernels.entries import Entries
from malloc_bench.kernels.plain import Plain

_ALL = 1 << 30  # slots or channels: one scale for all of them
_FEW = 4  # queries that are multiplied as they are; more go in matrices, whose sides are 16 at least
_WIDE = 128  # numbers of a vector beyond which such matrices do not fit
_HELD = 1 << 12  # numbers at a time that compilers find registers for: with more ptxas put kilobytes aside


@triton.jit
def mine(x, b, h):
    """Where a user's and query head's own begins in x: its first number, numbers a user, heads that share, numbers a
    head."""
    return x[0] + b * x[1] + h // x[2] * x[3]


@triton.jit
def rows(x, b, h, m, d, real, WIDTH: tl.constexpr):
    """[M, D] of x [.., .., M, WIDTH]."""
    return tl.load(
        mine(x, b, h) + m[:, None] * WIDTH + d[None, :], mask=real[:, None] & (d < WIDTH)[None, :], other=0.0
    )


@triton.jit
def entries(tables, start, d, real, FORM: tl.constexpr):
    """Of numbers of entries from `start` on: those entries, side by side or added."""
    PARTS: tl.constexpr = FORM[2]
    LAST: tl.constexpr = FORM[3] - 1
    EACH: tl.constexpr = FORM[4]
    if FORM[0] == "beside":
        n = d // EACH
        code = tl.minimum(tl.load(start + n, mask=real, other=0).to(tl.int32), LAST)
        found = tl.load(tables + (n * (LAST + 1) + code) * EACH + d % EACH, mask=real, other=0.0)
    else:
        found = tl.where(real, 0.0, 0.0)
        for n in range(PARTS):
            code = tl.minimum(tl.load(start + n + d * 0, mask=real, other=0).to(tl.int32), LAST)
            found += tl.load(tables + (n * (LAST + 1) + code) * EACH + d, mask=real, other=0.0)
    return found


@triton.jit
def scaled(x, start, row, s, d, real, FORM: tl.constexpr):
    """Of codes from `start` on: scale * code + offset."""
    KIND: tl.constexpr = FORM[0]
    BITS: tl.constexpr = FORM[3]
    byte = d * BITS // 8
    word = tl.load(start + byte, mask=real, other=0).to(tl.int32)
    if 8 % BITS != 0:  # codes that cross bytes
        word |= tl.load(start + byte + 1, mask=real & (byte + 1 < FORM[2]), other=0).to(tl.int32) << 8
    code = ((word >> d * BITS % 8) & ((1 << BITS) - 1)).to(tl.float32)
    at = (row * x[4] + s // FORM[4]) * FORM[6] + d // FORM[5]
    size = tl.load(x[0][1] + at, mask=real, other=0).to(tl.float32)
    if KIND == "middle":
        low = size * -(1 << (BITS - 1))
    else:
        low = tl.load(x[0][2] + at, mask=real, other=0).to(tl.float32)
        if KIND == "bytes":
            size = tl.where(real, tl.exp2(tl.load(x[0][3] + row).to(tl.float32) - size / 8), 0.0)
            low = (low - ((1 << BITS) - 1)) * 0.5 * size
    return size * code + low


@triton.jit
def numbers(x, b, h, s, d, real, FORM: tl.constexpr):
    """Vectors [S, D] of slots s, 0 where they are not real; what x and FORM hold, see `_known`."""
    s, d, real = s[:, None], d[None, :], real[:, None] & (d < FORM[1])[None, :]
    h = h // x[2]
    row = b * x[3] + h
    start = x[0][0] + (row * x[1] + s) * FORM[2]
    if FORM[0] == "plain":
        found = tl.load(start + d, mask=real, other=0.0).to(tl.float32)
    elif FORM[0] == "added" or FORM[0] == "beside":
        found = entries(x[0][1] + h * (FORM[2] * FORM[3] * FORM[4]), start, d, real, FORM)
    else:
        found = scaled(x, start, row, s, d, real, FORM)
    return found


@triton.jit
def products(q, x):
    """[M, D], [S, D] -> [M, S]"""
    if q.shape[0] < 16:
        found = tl.sum(q[:, None, :] * x[None, :, :], 2)
    else:
        found = tl.dot(q, tl.trans(x), input_precision="ieee")
    return found


@triton.jit
def sums(w, x):
    """[M, S], [S, D] -> [M, D]"""
    if w.shape[0] < 16:
        found = tl.sum(w[:, :, None] * x[None, :, :], 1)
    else:
        found = tl.dot(w, x, input_precision="ieee")
    return found


@triton.jit
def asks(heads, queries, M: tl.constexpr):
    """User, head and queries of this program, and which of these there are."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.program_id(1) * M + tl.arange(0, M)
    return row // heads, row % heads, m, m < queries


@triton.jit
def dot_tile(q, x, out, heads, queries, slots, FORM: tl.constexpr, M: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    b, h, m, asked = asks(heads, queries, M)
    d, s = tl.arange(0, D), tl.program_id(2) * S + tl.arange(0, S)
    found = products(rows(q, b, h, m, d, asked, FORM[1]), numbers(x, b, h, s, d, s < slots, FORM))
    here = asked[:, None] & (s < slots)[None, :]
    tl.store(mine(out, b, h) + m[:, None] * slots + s[None, :], found, mask=here)


@triton.jit
def mix_tile(w, x, out, heads, queries, slots, FORM: tl.constexpr, M: tl.constexpr, S: tl.constexpr, D: tl.constexpr):
    b, h, m, asked = asks(heads, queries, M)
    d, mixed = tl.arange(0, D), tl.zeros([M, D], tl.float32)
    for first in range(0, slots, S):
        s = first + tl.arange(0, S)
        here = asked[:, None] & (s < slots)[None, :]
        weights = tl.load(mine(w, b, h) + m[:, None] * slots + s[None, :], mask=here, other=0.0)
        mixed += sums(weights, numbers(x, b, h, s, d, s < slots, FORM))
    WIDTH: tl.constexpr = FORM[1]
    here = asked[:, None] & (d < WIDTH)[None, :]
    tl.store(mine(out, b, h) + m[:, None] * WIDTH + d[None, :], mixed, mask=here)


@triton.jit
def attend_tile(
    q, own_keys, own_values, own_bias, count, mass, bias, out, keys, values, heads, queries, slots, scale,
    KEYS: tl.constexpr, VALUES: tl.constexpr, SOFTMAX: tl.constexpr,
    M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A softmax goes on from tile to tile: `most` is the largest logit yet, `whole` the sum of weights below it."""
    b, h, m, asked = asks(heads, queries, M)
    d, wide = tl.arange(0, D), tl.arange(0, WIDE)
    ask = rows(q, b, h, m, d, asked, KEYS[1])
    itself = tl.sum(ask * rows(own_keys, b, h, m, d, asked, KEYS[1]), 1)
    if bias is not None:
        itself += tl.load(mine(own_bias, b, h) + m, mask=asked, other=0.0)
    mixed = rows(own_values, b, h, m, wide, asked, VALUES[1])
    most, whole = itself, itself * 0 + 1
    if not SOFTMAX:
        mixed *= (itself / (1 + tl.exp(-itself)) * scale)[:, None]
    end = tl.minimum(slots, tl.load(mine(count, b, h)))
    for first in range(0, end, S):
        s = first + tl.arange(0, S)
        real = s < end
        weights = products(ask, numbers(keys, b, h, s, d, real, KEYS))
        if bias is not None:
            here = asked[:, None] & real[None, :]
            weights += tl.load(mine(bias, b, h) + m[:, None] * slots + s[None, :], mask=here, other=0.0)
        if SOFTMAX:
            weights = tl.where(real[None, :], weights, float("-inf"))
            peak = tl.maximum(most, tl.max(weights, 1))
            weights = tl.exp(weights - peak[:, None])
            fallen = tl.exp(most - peak)
            most = peak
        else:
            weights = tl.where(real[None, :], weights / (1 + tl.exp(-weights)) * scale, 0.0)
        if mass is not None:
            times = tl.load(mine(mass, b, h) + s, mask=real, other=0.0)[None, :]
            weights *= tl.maximum(times, 1e-6) if SOFTMAX else times
        if SOFTMAX:
            whole = whole * fallen + tl.sum(weights, 1)
            mixed *= fallen[:, None]
        mixed += sums(weights, numbers(values, b, h, s, wide, real, VALUES))
    if SOFTMAX:
        mixed /= whole[:, None]
    here = asked[:, None] & (wide < VALUES[1])[None, :]
    tl.store(mine(out, b, h) + m[:, None] * VALUES[1] + wide[None, :], mixed, mask=here)


class Known(NamedTuple):
    """As `numbers` takes them: arrays, slots, query heads that share a head, heads, rows of scales; the form."""

    given: tuple[Any, ...]
    form: tuple[Any, ...]


def _known(x: Plain | Affine | Entries, heads: int) -> Known:
    """Its form, constants to the compiler: kind, width, numbers that a slot takes; then entries and their width, or
    bits, slots and channels that share a scale, and columns of scales."""
    b, h, s, width = x.shape
    if isinstance(x, Plain):
        return Known(((x.data.contiguous(),), s, heads // h, h, 1), ("plain", width, width))
    if isinstance(x, Entries):
        _, n, entries, each = x.tables.shape
        entries_of = x.codes.contiguous(), x.tables.contiguous()
        return Known((entries_of, s, heads // h, h, 1), ("added" if x.added else "beside", width, n, entries, each))
    kind = "bytes" if x.top is not None else "middle" if x.offset is None else "given"
    groups, columns = x.scale.shape[2:]
    sizes = [t.expand(b, h, groups, columns).contiguous() for t in (x.scale, x.offset) if t is not None]
    arrays = x.codes.contiguous(), *sizes, *([] if x.top is None else [x.top.expand(b, h, 1, 1).contiguous()])
    share = x.slots if groups > 1 else _ALL, x.channels if columns > 1 else _ALL
    return Known((arrays, s, heads // h, h, groups), (kind, width, x.codes.shape[3], x.bits, *share, columns))


def _reads(*some: Any) -> bool:
    return all(isinstance(x, Plain | Affine | Entries) for x in some)


def _shared(x: Tensor, heads: int) -> tuple[Tensor, int, int, int]:
    """[B or 1, H or fewer, ...] as `mine` takes it: one of fewer heads is of several neighbours."""
    x = x.detach().contiguous()
    return x, x.stride(0) if x.shape[0] > 1 else 0, heads // x.shape[1], x.stride(1)


def _tile(queries: int, *widths: int) -> tuple[int, ...] | None:
    """Queries, slots and numbers of a tile; None where plain torch unpacks them once for all queries."""
    wide = [max(16, triton.next_power_of_2(width)) for width in widths]
    several = triton.next_power_of_2(queries)
    if queries <= _FEW:
        return several, max(1, min(64, _HELD // (several * max(wide)))), *wide
    if max(wide) > _WIDE:
        return None
    return max(16, min(several, 32, _HELD // (2 * max(wide)))), 32, *wide


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def dot(x: Any, q: Tensor) -> Tensor | None:
    """As `reading.dot`, of what it has looked at."""
    b, h, m, d = q.shape
    if (tile := _tile(m, d)) is None or not _reads(x):
        return None
    s, known, (M, S, D) = x.shape[2], _known(x, h), tile
    out = q.new_empty(b, h, m, s)
    with _on(q):
        grid = b * h, triton.cdiv(m, M), triton.cdiv(s, S)
        dot_tile[grid](_shared(q, h), known.given, _shared(out, h), h, m, s, known.form, M, S, D, num_stages=1)
    return out


def mix(x: Any, w: Tensor) -> Tensor | None:
    """As `reading.mix`, of what it has looked at."""
    b, h, m, s = w.shape
    if (tile := _tile(m, x.shape[3])) is None or not _reads(x):
        return None
    known, out, (M, S, D) = _known(x, h), w.new_empty(b, h, m, x.shape[3]), tile
    with _on(w):
        grid = b * h, triton.cdiv(m, M)
        mix_tile[grid](_shared(w, h), known.given, _shared(out, h), h, m, s, known.form, M, S, D, num_stages=1)
    return out


def attend(
    q: Tensor,
    own: Mapping[str, Tensor],
    keys: Any,
    values: Any,
    count: Tensor,
    mass: Tensor | None,
    bias: tuple[Tensor, Tensor] | None,
    normaliser: float | None,
) -> Tensor | None:
    """As `reading.attend`, of what it has looked at."""
    b, h, m, d = q.shape
    s, wide = values.shape[2:]
    if (tile := _tile(m, d, wide)) is None or not _reads(keys, values):
        return None
    out, (M, S, D, W) = q.new_empty(b, h, m, wide), tile
    of_keys, of_values = _known(keys, h), _known(values, h)
    over, itself = (None, None) if bias is None else (_shared(x, h) for x in bias)
    masses = None if mass is None else _shared(mass, h)
    given = *(_shared(x, h) for x in (q, own["keys"], own["values"])), itself, _shared(count.int(), h), masses, over
    scale = 1.0 if normaliser is None else 1.0 / normaliser
    with _on(q):
        attend_tile[b * h, triton.cdiv(m, M)](
            *given, _shared(out, h), of_keys.given, of_values.given, h, m, s, scale,
            of_keys.form, of_values.form, normaliser is None, M, S, D, W, num_stages=1,
        )  # fmt: skip
    return out


def tried(device: torch.device) -> None:
    """Raises what stands in the way: a compiler of C, Python's headers and a GPU that Triton knows are asked for."""
    one = torch.ones(1, 1, 1, 1, device=device)
    if (found := dot(Plain(one), one)) is None or found != 1:
        raise ArithmeticError("1 x 1 is not 1 there")
