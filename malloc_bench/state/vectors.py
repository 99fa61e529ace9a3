"""How the vectors of a state are written down. `Vectors` is the seam between *which* slots are kept and *how*."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from malloc_bench import kernels
from malloc_bench.kernels import Plain, Written

_KNOWN = "known by kernels"


class Ragged(NamedTuple):
    """An array as it must be stored: of `data` only the leading rows x cols of each user and head. what: its name where
    bytes are told apart; none for a field's own numbers."""

    data: Tensor  # [B, H, R, C]
    rows: Tensor  # [B or 1, H or 1], integers
    cols: Tensor | None = None  # [B or 1, H or 1]; None = all of C
    what: str = ""

    def nbytes(self) -> Tensor:
        """Stored bytes of each user, [B] int64."""
        users, heads, _, width = self.data.shape
        cells = self.rows.long() * (width if self.cols is None else self.cols.long())
        cells = cells.sum(1) if cells.shape[1] == heads else cells[:, 0] * heads
        return (cells * self.data.element_size()).expand(users)


class Read(Protocol):
    """Takes the next stored array from packed bytes: heads, dtype, device and width follow `like`, not its users.

    Raises ValueError where the bytes are not there, before anything is allocated.
    """

    def __call__(self, like: Tensor, rows: Tensor, cols: Tensor | None = None) -> Tensor: ...

    def numbers(self, like: Tensor, most: Tensor | int, what: str) -> Tensor:
        """One number a user and head, [B, H]; outside 0 .. most a ValueError that says `what` of the user's bytes."""
        ...


class Vectors(ABC):
    """S vectors of width D for each of B users and H heads, in some encoding: a dataclass of tensors [B, ...].

    What is a user's own goes through `parts` and `load`, nothing else survives: a state is judged by what is read from
    its bytes, unpacked beside other users. What all users share (a codebook) lies in an object that is no tensor,
    tuple, list, dict or dataclass, so that `take` leaves it whole, and `load` passes it on from the template.
    by_slot: each of its tensors is [B, H or 1, S, ...], a row a slot, so that those of new events may be put behind.
    """

    by_slot: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.__repr__ = Vectors.__repr__  # type: ignore[method-assign]  # a dataclass would print its tensors

    def __repr__(self) -> str:
        return f"{type(self).__name__}{list(self.shape)}"

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, S, D)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The vectors as read, [B, H, S, D] float; rows at and beyond a user's count are finite garbage."""

    @abstractmethod
    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        """The arrays to be stored, in the order in which `load` reads them; count [B, H or 1], None = all S rows."""

    @abstractmethod
    def load(self, read: Read, count: Tensor | None) -> Vectors:
        """The inverse of `parts`: vectors of this encoding and width from stored arrays; self is of other users, any
        number of them. count [B or 1, H or 1], of the users that are read."""

    def shared(self) -> tuple[Vectors, ...]:
        """What is stored once for several `Vectors` (the left factor of all fields, say): objects that these hold too.

        They are packed and loaded before the first of those that hold them, over that one's slots; `parts` leaves them
        out, and in `load` those in self are already of the users that are read.
        """
        return ()

    def over(self, shared: tuple[Vectors, ...]) -> Vectors:
        """The same vectors with others in the place of `shared()`."""
        return self

    def written(self) -> Written | None:
        """The vectors as kernels know them, where they are written in one of those ways."""
        return None

    def known(self) -> Written | None:
        """`written`, made once: a read of few slots costs little more than to see how they are written."""
        if (found := vars(self).get(_KNOWN, self)) is self:
            found = vars(self)[_KNOWN] = self.written()
        return found

    def __getstate__(self) -> dict[str, object]:
        return {name: x for name, x in vars(self).items() if name != _KNOWN}

    def dot(self, q: Tensor) -> Tensor:
        """q . x for every vector x: [B, H, M, D] -> [B, H, M, S]."""
        found = None if (written := self.known()) is None else kernels.dot(written, q)
        return self._dot(q) if found is None else found

    def _dot(self, q: Tensor) -> Tensor:
        """The same in plain torch."""
        return q @ self.dense().to(q.dtype).transpose(-1, -2)

    def mix(self, w: Tensor) -> Tensor:
        """Weighted sums of the vectors: [B, H, M, S] -> [B, H, M, D]. Weights beyond a user's count are 0."""
        found = None if (written := self.known()) is None else kernels.mix(written, w)
        return self._mix(w) if found is None else found

    def _mix(self, w: Tensor) -> Tensor:
        """The same in plain torch."""
        return w @ self.dense().to(w.dtype)

    def each(self, fn: Callable[..., Tensor], *others: Vectors) -> Self:
        """The same, of `by_slot` vectors, with fn of every tensor, and of the one that `others` have in its place."""
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}  # type: ignore[arg-type]
        made = {name: fn(x, *(getattr(other, name) for other in others)) for name, x in tensors.items()}
        return replace(self, **made)  # type: ignore[type-var]

    def flops(self, queries: int) -> int:
        """FLOPs of one `dot` or one `mix` for `queries` queries over all S rows, per user (2 per multiply-add)."""
        _, heads, slots, width = self.shape
        return 2 * queries * heads * slots * width

    def dense_flops(self) -> int:
        """FLOPs of `dense`, per user."""
        return 0


def unhalved(x: Tensor) -> Tensor:
    """In float32 at least: half precision has no room for sums of squares, nor for another kind's largest number."""
    return x.float() if x.is_floating_point() and x.element_size() < 4 else x


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In another float, what is beyond its range as its largest."""
    x, largest = unhalved(x), torch.finfo(dtype).max
    return (x.clamp(-largest, largest) if largest < torch.finfo(x.dtype).max else x).to(dtype)


def all_rows(data: Tensor) -> Tensor:
    """[1, 1] count of every row of data [B, H, R, C], the same for any users."""
    return torch.full((1, 1), data.shape[2], dtype=torch.long, device=data.device)


@dataclass(frozen=True, eq=False)
class Dense(Vectors):
    """Plain vectors: data [B, H, S, D] in any float dtype."""

    by_slot = True
    data: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, d = self.data.shape
        return b, h, s, d

    def written(self) -> Plain:
        return Plain(self.data)

    def dense(self) -> Tensor:
        return self.data

    def dot(self, q: Tensor) -> Tensor:
        return q @ self.data.to(q.dtype).mT

    def mix(self, w: Tensor) -> Tensor:
        return w @ self.data.to(w.dtype)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.data, all_rows(self.data) if count is None else count)

    def load(self, read: Read, count: Tensor | None) -> Dense:
        return Dense(read(self.data, all_rows(self.data) if count is None else count))
