"""Streaming: new events at the end of a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from malloc_bench.state.slots import Slots
from malloc_bench.state.user_state import Events, Layer, Segment, UserState
from malloc_bench.state.vectors import Dense, Vectors

New = Sequence[Mapping[str, Tensor | Vectors]]  # of each layer, field -> [B, H, M, D]


def extend(state: UserState, new: New, events: Events, timestamps: bool) -> UserState:
    """The state with the vectors of new events; nothing stored is changed.

    timestamps: the backbone reads the slots' times.
    """
    times = events.times[:, None] if timestamps and events.times is not None else None  # [B, 1, M]
    tail = Slots(events.count[:, None], None, times)
    return UserState(grow(state.layers, new, tail), state.length + events.count)


def grow(old: Sequence[Layer], new: New, tail: Slots) -> tuple[Layer, ...]:
    """Layers with new vectors over the slots `tail`, H' = 1.

    Rows go to the end of a layer's last segment where that holds events as they came, else to a new segment.
    """
    grown: dict[int, Slots] = {}  # slots that layers share stay shared
    layers: list[Layer] = []
    for layer, made in zip(old, new):
        own = {name: x if isinstance(x, Vectors) else Dense(x) for name, x in made.items()}
        last = layer[-1] if layer else None
        if last is None or not _plain(last, own, tail):
            layers.append((*layer, Segment(own, tail)))
            continue
        slots = last.slots
        assert slots is not None
        if id(slots) not in grown:
            places, times = (
                None if a is None or b is None else _place(a.unsqueeze(-1), b.unsqueeze(-1), slots, tail).squeeze(-1)
                for a, b in ((slots.positions, tail.positions), (slots.timestamps, tail.timestamps))
            )
            grown[id(slots)] = replace(slots, count=slots.count + tail.count, positions=places, timestamps=times)
        vectors = {k: last.fields[k].each(lambda x, y: _place(x, y, slots, tail), v) for k, v in own.items()}  # noqa: B023
        layers.append((*layer[:-1], Segment(vectors, grown[id(slots)])))
    return tuple(layers)


def _plain(segment: Segment, own: Mapping[str, Vectors], tail: Slots) -> bool:
    """Events as they came, the same for all heads, written down as `own`, that tell of their places as `tail` does."""
    if segment.fields.keys() != own.keys():
        return False
    slots = segment.slots
    if segment.lookup is not None:  # new events are read whatever they are, as a short-term history
        return False
    if slots is None or slots.mass is not None or slots.score is not None or slots.count.shape[1] != 1:
        return False
    if (slots.positions is None) != (tail.positions is None):
        return False
    if slots.positions is not None and slots.positions.shape[1] != 1:  # each head kept events of its own
        return False
    return all(type(v) is type(own[name]) and v.by_slot for name, v in segment.fields.items())


def _place(old: Tensor, new: Tensor, slots: Slots, tail: Slots) -> Tensor:
    """[B, H, S, D] and [B, H, M, D] joined, new rows right behind each user's old ones, as wide as the longest."""
    out = torch.cat([old, torch.zeros_like(new)], dim=2)
    rows = slots.count.long().unsqueeze(-1) + torch.arange(new.shape[2], device=new.device)  # [B, 1, M]
    out.scatter_(2, rows.unsqueeze(-1).expand_as(new), new)
    return out[:, :, : int((slots.count + tail.count).max())] if len(out) else out


def joined(state: UserState) -> UserState:
    """The same with one dense segment a layer: what an earlier compression kept, then what was appended to it.

    Slots that layers share stay shared. Memories, behind the slots, and raw events are as they were.
    """
    done: dict[tuple[int, ...], Slots] = {}
    layers: list[Layer] = []
    for layer in state.layers:
        slotted = [segment for segment in layer if segment.slots is not None]
        owns = [segment.slots for segment in slotted if segment.slots is not None]
        memories = tuple(segment for segment in layer if segment.slots is None)
        if not owns:
            layers.append(layer)
            continue
        heads = max(slots.count.shape[1] for slots in owns)
        counts = [slots.count.expand(-1, heads) for slots in owns]
        key = tuple(map(id, owns))
        if key not in done:
            done[key] = _one_after_the_other(owns, counts, [segment.width for segment in slotted], state.length)
        fields = {
            name: Dense(_behind([_field(s, name).dense() for s in slotted], counts)) for name in slotted[0].fields
        }
        layers.append((Segment(fields, done[key]), *memories))
    return UserState(tuple(layers), state.length, state.events)


def _field(segment: Segment, name: str) -> Vectors:
    """By its name; where keys and values are one stored field, that."""
    return segment.fields[name] if name in segment.fields else next(iter(segment.fields.values()))


def _one_after_the_other(owns: Sequence[Slots], counts: Sequence[Tensor], widths: list[int], length: Tensor) -> Slots:
    def column(parts: Sequence[Tensor]) -> Tensor:
        heads = max(x.shape[1] for x in parts)
        return _behind([x.expand(-1, heads, -1).unsqueeze(-1) for x in parts], counts).squeeze(-1)

    places: list[Tensor] = []
    end = length[:, None]
    for slots, width in zip(reversed(owns), reversed(widths)):
        places.insert(0, slots.places(width, end).int())
        end = end - slots.count
    times = [slots.timestamps for slots in owns]
    known = None if any(x is None for x in times) else column([x for x in times if x is not None])
    masses = [torch.ones_like(p, dtype=torch.float32) if s.mass is None else s.mass for s, p in zip(owns, places)]
    mass = column(masses) if any(slots.mass is not None for slots in owns) else None
    scores = [torch.zeros_like(p, dtype=torch.float32) if s.score is None else s.score for s, p in zip(owns, places)]
    score = column(scores) if any(slots.score is not None for slots in owns) else None
    return Slots(torch.stack(list(counts)).sum(0).int(), column(places), known, mass, score)


def _behind(parts: Sequence[Tensor], counts: Sequence[Tensor]) -> Tensor:
    """Left-aligned rows of several x [B, H, S_i, D], of which counts [B, H'] are real, one after the other."""
    b, h, _, d = parts[0].shape
    total = torch.stack(list(counts)).sum(0)
    width = int(total.max()) if total.numel() else 0
    out = parts[0].new_zeros(b, h, width + 1, d)  # the last row takes all padding
    before = torch.zeros_like(counts[0])
    for x, count in zip(parts, counts):
        place = torch.arange(x.shape[2], device=x.device)
        index = torch.where(place < count.unsqueeze(-1), before.unsqueeze(-1) + place, width).expand(b, h, -1)
        out.scatter_(2, index.long().unsqueeze(-1).expand(-1, -1, -1, d), x.to(out.dtype))
        before = before + count
    return out[:, :, :width]
