"""Reads of vectors as they are written down, and a whole read of tokens over a layer's slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from malloc_bench.kernels.gpu import on_gpu
from malloc_bench.kernels.switch import After, Loop, array, fits, spread
from malloc_bench.kernels.words import FEW, WIDE

_CACHED = 1 << 19  # numbers at a time: two megabytes: few calls, and they are multiplied while a cache has them
_AT_HAND = 1 << 22  # logits that are kept of all rows
_SEEN = 1 << 16  # numbers that are worth being seen as memory
_NONE, _NO_ROWS = np.zeros((1, 1, 0, 0), np.float32), np.zeros((1, 1, 0), np.float32)


class Reader(Protocol):
    """The loops over vectors of R = B x H rows, users and their query heads."""

    @property
    def most(self) -> int:
        """Queries that they read for, FEW or more. What more of them meet is unpacked by `rows`."""
        ...

    def dot(self, q: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> Loop:
        """Products of q [R, M, D] with a row's first count [B or 1, H or 1] slots, to out [R, M, S]."""
        ...

    def mix(self, w: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> tuple[Loop, After]:
        """Sums of them by w [R, M, S], added to out [R, M, D]."""
        ...

    def rows(self, start: int, stop: int, room: Tensor) -> Tensor:
        """The vectors of stored heads start to stop of all users, [n, S, D]; room: where they may be put."""
        ...


class Written(Protocol):
    """Vectors as kernels know them."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def tensors(self) -> list[Tensor]: ...

    def reader(self, queries: int) -> Reader | None:
        """None where no loop may read them."""
        ...


def dot(x: Written, q: Tensor) -> Tensor | None:
    """q . x for every vector x: [B, H, M, D] -> [B, H, M, S]."""
    b, h, m, d = q.shape
    if not _alike(x, q, x.shape[3]):
        return None
    if (gpu := on_gpu(q, *x.tensors())) is not None:
        return gpu.dot(x, q)
    if not fits(q) or (reader := x.reader(m)) is None:
        return None
    rows = q.detach().reshape(b * h, m, d)
    out = q.new_empty(b * h, m, x.shape[2])
    if m > reader.most:
        asked, found = (each.reshape(b * x.shape[1], -1, each.shape[2]) for each in (rows, out))
        for part, vectors in _blocks(x, reader):
            _products(asked[part], vectors, found[part])
    else:
        spread(reader.dot(array(rows), h, _all(x), out.numpy()), b * h, b * h * x.shape[2] * d)
    return out.view(b, h, m, x.shape[2])


def mix(x: Written, w: Tensor) -> Tensor | None:
    """Weighted sums of the vectors: [B, H, M, S] -> [B, H, M, D]."""
    b, h, m, s = w.shape
    if not _alike(x, w, x.shape[2]):
        return None
    if (gpu := on_gpu(w, *x.tensors())) is not None:
        return gpu.mix(x, w)
    if not fits(w) or (reader := x.reader(m)) is None:
        return None
    rows, out = w.detach().reshape(b * h, m, s), w.new_zeros(b * h, m, x.shape[3])
    if m > reader.most:
        asked, found = (each.reshape(b * x.shape[1], -1, each.shape[2]) for each in (rows, out))
        for part, vectors in _blocks(x, reader):
            _sums(asked[part], vectors, found[part])
    else:
        loop, after = reader.mix(array(rows), h, _all(x), out.numpy())
        spread(loop, b * h, b * h * s * x.shape[3])
        if after is not None:
            after()
    return out.view(b, h, m, x.shape[3])


def dense(x: Written) -> Tensor | None:
    """The vectors, [B, H, S, D]."""
    if not fits() or (reader := x.reader(0)) is None:
        return None
    b, h, s, d = x.shape
    room = torch.empty(b * h * s * d)
    return reader.rows(0, b * h, room).view(b, h, s, d)


def _alike(x: Written, asked: Tensor, width: int) -> bool:
    """Heads that share vectors are neighbours. What does not fit is for plain torch to refuse: loops look at no end."""
    b, _, _, last = asked.shape
    fits = asked.numel() > 0 and asked.dtype == torch.float32 and last == width and x.shape[0] == b
    return fits and _of_heads(x.shape[1], asked.shape[1])


def _of_heads(some: int, every: int) -> bool:
    return some > 0 and not every % some


def _fit(given: list[tuple[Tensor, tuple[int, ...]]]) -> bool:
    """Whether each is of float32 and of that size, or of one user or fewer heads, as `loops.part` takes it."""
    for x, size in given:
        if x.dtype != torch.float32:
            return False
        if x.shape != size:
            users, heads, *rest = x.shape
            if (users != size[0] and users != 1) or not _of_heads(heads, size[1]) or rest != [*size[2:]]:
                return False
    return True


def _all(x: Written) -> np.ndarray:
    return np.full((1, 1), x.shape[2], np.int32)


def _blocks(x: Written, reader: Reader) -> Iterator[tuple[slice, Tensor]]:
    b, h, s, d = x.shape
    step = max(1, min(b * h, _CACHED // max(1, s * d)))
    room = torch.empty(step * s * d)
    for start in range(0, b * h, step):
        stop = min(b * h, start + step)
        yield slice(start, stop), reader.rows(start, stop, room)


def attend(
    q: Tensor,
    own: Mapping[str, Tensor],
    keys: Written,
    values: Written,
    count: Tensor,
    mass: Tensor | None,
    bias: tuple[Tensor, Tensor] | None,
    normaliser: float | None,
) -> Tensor | None:
    """What tokens q [B, H, M, D] mix of slots and of themselves, [B, H, M, D']: a softmax of q.k, or with a normaliser
    SiLU(q.k) over it.

    own: `keys` and `values`, [B, H, M, .] of each token. keys, values: of slots. count: [B or 1, H or 1], slots that
    are real. mass: [B or 1, H or 1, S], what each counts. bias: of slots [B or 1, H or 1, M, S], and of each token over
    itself [B or 1, H or 1, M].
    """
    b, h, m, d = q.shape
    users, heads, s, wide = values.shape
    if keys.shape != (users, heads, s, d) or users != b or not _of_heads(heads, h) or not m:
        return None
    known: list[tuple[Tensor, tuple[int, ...]]]
    known = [(q, (b, h, m, d)), (own["keys"], (b, h, m, d)), (own["values"], (b, h, m, wide))]
    if mass is not None:
        known.append((mass, (b, h, s)))
    if bias is not None:
        known += (bias[0], (b, h, m, s)), (bias[1], (b, h, m))
    if not _fit(known) or count.shape[0] not in (1, b) or not _of_heads(count.shape[1], h):
        return None
    given = [*[x for x, _ in known], count]
    if (gpu := on_gpu(*given)) is not None and on_gpu(*keys.tensors(), *values.tensors()) is not None:
        return gpu.attend(q, own, keys, values, count, mass, bias, normaliser)
    if not fits(*given) or (of_keys := keys.reader(m)) is None or (of_values := values.reader(m)) is None:
        return None
    rows, made = b * h, _room(b, h, m, wide)
    asked, out, mixed = array(q).reshape(rows, m, d), torch.from_numpy(made), made.reshape(rows, m, wide)
    counts = array(count if count.dtype == torch.int32 else count.int())
    biases, own_bias = (_NONE, _NO_ROWS) if bias is None else map(array, bias)
    masses = _NO_ROWS if mass is None else array(mass)
    scale = 1.0 if normaliser is None else 1.0 / normaliser
    about = asked, array(own["keys"]), array(own["values"]), own_bias, counts, masses, biases, scale, h, mixed
    weigh = partial(_weighing(normaliser is None), *about)
    most = min(of_keys.most, of_values.most) if rows * m * s <= _AT_HAND else FEW
    if m > most:
        _many(q.detach().reshape(rows, m, d), (keys, of_keys), (values, of_values), weigh, out.view(rows, m, wide))
        return out
    logits = _room(b, h, m, s).reshape(rows, m, s)
    ask, (take, after) = of_keys.dot(asked, h, counts, logits), of_values.mix(logits, h, counts, mixed)
    step = rows if m <= FEW else max(1, _CACHED // (8 * m * s))

    def some(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            last = min(stop, first + step)
            ask(first, last)
            weigh(logits, 0, first, last)
            take(first, last)

    spread(some, rows, rows * s * d * m)
    if after is not None:
        after()
    return out


def _room(b: int, h: int, m: int, d: int) -> np.ndarray:
    """Numbers yet to be written; where they are many by torch: what is measured as memory is seen there."""
    return np.empty((b, h, m, d), np.float32) if b * h * m * d <= _SEEN else torch.empty(b, h, m, d).numpy()


@cache
def _weighing(softmax: bool) -> Callable[..., None]:
    from malloc_bench.kernels.passes import weighing  # here: its compiler takes half a second to load

    return weighing(softmax)


Known = tuple[Written, Reader]


def _many(q: Tensor, keys: Known, values: Known, weigh: Callable[..., None], out: Tensor) -> None:
    """Rows of which many queries are asked: vectors are unpacked once, a few rows at a time."""
    b, heads, s, d = keys[0].shape
    stored, wide = b * heads, values[0].shape[3]
    each, m = len(q) // stored, q.shape[1]  # rows that share vectors
    step = max(1, min(stored, _CACHED // max(1, s * (max(d, wide) + each * m))))
    room, logits = torch.empty(step * s * max(d, wide)), torch.empty(step, each * m, s)
    numbers = logits.numpy().reshape(step * each, m, s)
    for start in range(0, stored, step):
        stop = min(stored, start + step)
        part, weights = slice(start * each, stop * each), logits[: stop - start]
        _products(_folded(q[part], weights), keys[1].rows(start, stop, room), weights)
        spread(_moved(weigh, numbers, part.start), part.stop - part.start, weights.numel())
        _sums(weights, values[1].rows(start, stop, room), _folded(out[part], weights))


def _products(q: Tensor, vectors: Tensor, out: Tensor) -> None:
    """out [R, M, S] = q . vectors, [R, M, D] and [R, S, D]."""
    if (loops := _several()) is None:
        torch.bmm(q, vectors.mT, out=out)
        return
    given = array(q), array(vectors), out.numpy()
    spread(lambda start, stop: loops.products(*given, start, stop), len(q), out.numel() * q.shape[2])


def _sums(weights: Tensor, vectors: Tensor, out: Tensor) -> None:
    """To out [R, M, D] is added weights [R, M, S] . vectors [R, S, D]."""
    if (loops := _several()) is None or vectors.shape[2] > WIDE:
        out.baddbmm_(weights, vectors)
        return
    call, given = loops.sums(vectors.shape[2]), (array(weights), array(vectors), out.numpy())
    spread(lambda start, stop: call(*given, start, stop), len(out), weights.numel() * vectors.shape[2])


@cache
def _several() -> ModuleType | None:
    """Loops for several queries, where they are faster than torch's matrix products."""
    from malloc_bench.kernels import several, whole

    return several if whole.WIDEST == 64 else None


def _folded(rows: Tensor, like: Tensor) -> Tensor:
    """[R, M, D] with the queries of heads that share vectors in a row, as like [R', M', ...] has them."""
    return rows.reshape(*like.shape[:2], rows.shape[2])


def _moved(weigh: Callable[..., None], numbers: np.ndarray, first: int) -> Loop:
    return lambda start, stop: weigh(numbers, first, first + start, first + stop)
