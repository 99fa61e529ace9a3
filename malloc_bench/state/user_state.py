"""What is kept of a batch of users between requests: exact bytes, packing and unpacking, written once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Self, TypeVar, final

import torch
from torch import Tensor

from malloc_bench.state.lookup import Lookup
from malloc_bench.state.packing import Reader, stored_bytes
from malloc_bench.state.slots import Slots
from malloc_bench.state.vectors import Ragged, Vectors

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Events:
    """Raw events of B users, left-aligned and padded to S.

    items: [B, S] int32, 1..n_items, 0 is padding.
    count: [B] int32.
    times: [B, S] int64 seconds, None where the data has none.
    next_times: [B, S] int64, when the prediction after each event is asked for: the time of the event that follows.
    kinds: [B, S] uint8, what the user did, as `Dataset.kinds` has it; None where nobody knows.
    """

    items: Tensor
    count: Tensor
    times: Tensor | None = None
    next_times: Tensor | None = None
    kinds: Tensor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.columns())} of {list(self.items.shape)})"

    def columns(self) -> dict[str, Tensor]:
        """What is known of every event, by name, [B, S] each."""
        known = {f.name: getattr(self, f.name) for f in fields(Events) if f.name != "count"}
        return {name: x for name, x in known.items() if x is not None}

    def stored(self) -> dict[str, Tensor]:
        """The columns that a state of raw events writes down: all but the moments of requests."""
        return {name: x for name, x in self.columns().items() if name != "next_times"}

    def parts(self, length: Tensor) -> Iterator[Ragged]:
        """The stored arrays; length [B] events."""
        for name, column in self.stored().items():
            yield Ragged(column[:, None, :, None], length.unsqueeze(1), None, "ids" if name == "items" else name)

    def load(self, read: Reader, length: Tensor) -> Self:
        """The inverse of `parts`; self is of other users."""
        found = {name: read(x[:, None, :, None], length.unsqueeze(1)) for name, x in self.stored().items()}
        return replace(self, count=length, next_times=None, **{name: x[:, 0, :, 0] for name, x in found.items()})

    def each(self, fn: Callable[[Tensor], Tensor], count: Tensor) -> Events:
        """fn of every column, of which the first count [B] events are real."""
        return replace(self, count=count, **{name: fn(x) for name, x in self.columns().items()})

    def take(self, index: Tensor, count: Tensor) -> Events:
        """The events at index [B, K] int64, of which the first count [B] are real."""
        return self.each(lambda x: x.gather(1, index), count)

    def mask(self) -> Tensor:
        """True where an event is real: [B, S] bool."""
        return torch.arange(self.items.shape[1], device=self.items.device) < self.count.unsqueeze(1)

    def last(self, k: Tensor) -> Events:
        """The newest k events of each user, k [B] >= 0."""
        count = torch.minimum(self.count, k.to(self.count.dtype))
        width = int(count.max()) if len(count) else 0
        index = (self.count - count).long().unsqueeze(1) + torch.arange(width, device=count.device)
        return self.take(index.clamp(max=max(self.items.shape[1] - 1, 0)), count)

    def then(self, new: Events) -> Self:
        """With new events [B, M] right behind each user's own; columns that these do not have are left out."""
        place = self.count.long().unsqueeze(1) + torch.arange(new.items.shape[1], device=self.items.device)
        columns, theirs = self.columns(), new.columns()
        grown = {
            name: torch.cat([x, x.new_zeros(place.shape)], 1).scatter(1, place, theirs[name].to(x.dtype))
            for name, x in columns.items()
        }
        return replace(self, count=self.count + new.count, **grown)


@dataclass(frozen=True, eq=False)
class Batch:
    """Training sequences: events [B, S] and the item that follows each of them, targets [B, S] int32 (0: none).

    negatives: [B, K] int32 items that a user's targets are held against, each of which stands for `each` items; None:
    the whole catalogue. users: whose they are, [B] int64 from 0; None: it is not told.
    """

    events: Events
    targets: Tensor
    negatives: Tensor | None = None
    users: Tensor | None = None
    each: float = 1.0


@final
@dataclass(frozen=True, eq=False, slots=True)
class Segment:
    """Slots that are written down alike. fields: name -> Vectors (B, H, S, D); slots None: a memory without slots.

    lookup: which few slots a token touches; None: all.
    """

    fields: Mapping[str, Vectors]
    slots: Slots | None
    lookup: Lookup | None = None

    def __repr__(self) -> str:
        return f"Segment({', '.join(f'{name}: {x!r}' for name, x in self.held())}, {self.slots!r})"

    def held(self) -> Iterator[tuple[str, Vectors]]:
        """All that is stored over the slots, by name: the fields, then the codes of the look-up."""
        yield from self.fields.items()
        if self.lookup is not None and self.lookup.codes is not None:
            yield "look-up", self.lookup.codes

    def __init_subclass__(cls) -> None:
        raise TypeError(f"{cls.__name__}: Segment is final; another way to write vectors down is a Vectors class")

    @property
    def width(self) -> int:
        """S, the padded number of slots."""
        return next(iter(self.fields.values())).shape[2]

    def real(self, x: Tensor) -> Tensor:
        """Which rows of x [B, H, S, D], its vectors, are real: [B, H or 1, S] bool; of a memory all are."""
        if self.slots is None:
            return torch.ones(x.shape[0], 1, x.shape[2], dtype=torch.bool, device=x.device)
        return self.slots.mask(x.shape[2])


Layer = tuple[Segment, ...]


@final
@dataclass(frozen=True, eq=False, slots=True)
class UserState:
    """The state of B users: one tuple of segments a layer, attended together. Final: bytes are counted in one place.

    length: [B] int32, events that the state stands for: the position of the next token.
    events: raw ids, times and kinds, for methods that rebuild the state on request; `layers` is empty then.

    Vectors and Slots that several segments share are one object and are stored once.
    """

    layers: tuple[Layer, ...]
    length: Tensor
    events: Events | None = None

    def __init_subclass__(cls) -> None:
        raise TypeError(
            f"{cls.__name__}: UserState is final, its bytes are counted in one place; another way to write vectors "
            "down is a Vectors class"
        )

    def __len__(self) -> int:
        return len(self.length)

    def __repr__(self) -> str:
        size = self.nbytes().double().mean() if len(self) else 0.0
        held = {repr(each): None for each in self.segments()}
        said = [f"{len(self)} users", f"{len(self.layers)} layers", f"{size:,.0f} bytes a user", *held]
        return f"UserState({', '.join(said)})"

    def segments(self) -> Iterator[Segment]:
        for layer in self.layers:
            yield from layer

    def nbytes(self) -> Tensor:
        """Bytes that each user's state takes when packed, [B] int64."""
        return torch.stack([*self.nbytes_by_part().values()]).sum(0)

    def nbytes_by_part(self) -> dict[str, Tensor]:
        """`nbytes` by what they hold, each [B] int64: numbers or codes of a field ("keys"; "shared": of several), and
        apart from them its "keys scales", "keys sizes" (of streams) and "keys index" (which numbers are meant);
        "positions", "times", "masses", "scores" and "counts" of slots; "ids", "times" and "kinds" of events; "length".
        """
        found: dict[str, Tensor] = {}
        for part in self._parts():  # of a Ragged of somebody's own, the arrays count and nothing else
            found[part.what] = found.get(part.what, 0) + Ragged(*part).nbytes()
        return found

    def pack(self, user: int) -> bytes:
        """One user's state as it would lie in a store; row `user` of the batch."""
        return self.packed([user])[0]

    def packed(self, users: Sequence[int]) -> list[bytes]:
        """What `pack` gives for each of the users; of many at once it is faster."""
        parts = [stored_bytes(part, users) for part in self._parts()]
        return [b"".join(own) for own in zip(*parts)]

    def unpack(self, blobs: Sequence[bytes]) -> UserState:
        """States of len(blobs) users from what `pack` wrote; self, the template, is a state of the same make of any
        users, of whom nothing is read: only shapes, dtypes, and what all users share.

        Raises ValueError, before anything large is allocated, where a blob is not what `pack` could have written.
        """
        read = Reader(blobs)
        length = read.numbers(self.length.unsqueeze(1), torch.iinfo(torch.int32).max, "has a negative length")[:, 0]
        events = self.events
        if events is not None:
            events = events.load(read, length)
            read.refuse((events.items < 1) & events.mask(), "has events without an item")
        new: dict[int, Any] = {}
        for slots, vectors, _ in self._stored():
            if vectors is None:
                assert slots is not None
                new[id(slots)] = Slots.load(slots, read, length)
            else:
                found = vectors.over(tuple(new[id(part)] for part in vectors.shared()))
                new[id(vectors)] = found.load(read, None if slots is None else new[id(slots)].count)
        read.finish()

        def again(s: Segment) -> Segment:
            slots = None if s.slots is None else new[id(s.slots)]
            codes = None if s.lookup is None or s.lookup.codes is None else new[id(s.lookup.codes)]
            return Segment({k: new[id(v)] for k, v in s.fields.items()}, slots, s.lookup and s.lookup.over(codes))

        return UserState(tuple(tuple(map(again, layer)) for layer in self.layers), length, events)

    def map(self, fn: Callable[[Tensor], Tensor]) -> UserState:
        """The same state with every tensor replaced by fn(tensor); what was shared stays shared."""
        return map_tensors(fn, self)

    def take(self, users: Tensor) -> UserState:
        """The states of the given rows of the batch, users [B'] int64."""
        return self.map(lambda x: x.index_select(0, users.to(x.device)))

    def to(self, device: str | torch.device) -> UserState:
        return self.map(lambda x: x.to(device))

    def _stored(self) -> Iterator[tuple[Slots | None, Vectors | None, str]]:
        """Every distinct object once, slots (as (slots, None, "")) before the vectors over them, shared ones first; the
        name is that of the field that holds them, "shared" where fields of several names do."""
        holders: dict[int, set[str]] = {}
        for segment in self.segments():
            for name, field in segment.held():
                for vectors in (*field.shared(), field):
                    holders.setdefault(id(vectors), set()).add(name)
        seen: set[int] = set()
        for segment in self.segments():
            if segment.slots is not None and id(segment.slots) not in seen:
                seen.add(id(segment.slots))
                yield segment.slots, None, ""
            for name, field in segment.held():
                for vectors in (*field.shared(), field):
                    if id(vectors) not in seen:
                        seen.add(id(vectors))
                        yield segment.slots, vectors, name if len(holders[id(vectors)]) == 1 else "shared"

    def _parts(self) -> Iterator[Ragged]:
        one = torch.ones(len(self), 1, dtype=torch.long, device=self.length.device)
        yield Ragged(self.length.view(-1, 1, 1, 1), one, None, "length")
        if self.events is not None:
            yield from self.events.parts(self.length)
        for slots, vectors, name in self._stored():
            if vectors is not None:
                for part in vectors.parts(None if slots is None else slots.count):
                    yield part._replace(what=f"{name} {part.what}".rstrip())
            elif slots is not None:
                yield from Slots.parts(slots, self.length)


def map_tensors(fn: Callable[[Tensor], Tensor], x: T) -> T:
    """x (dataclasses, tuples, lists and dicts) with fn of every tensor in its place; what was shared stays shared."""
    return _map(fn, x, {})


def _map(fn: Callable[[Tensor], Tensor], x: T, done: dict[int, Any]) -> T:
    if id(x) in done:
        return done[id(x)]
    new: Any = x
    if isinstance(x, Tensor):
        new = fn(x)
    elif is_dataclass(x):
        new = replace(x, **{f.name: _map(fn, getattr(x, f.name), done) for f in fields(x)})  # type: ignore[type-var]
    elif isinstance(x, tuple | list):
        new = type(x)(_map(fn, y, done) for y in x)
    elif isinstance(x, dict):
        new = {k: _map(fn, v, done) for k, v in x.items()}
    done[id(x)] = new
    return new
