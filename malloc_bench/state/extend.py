"""Streaming: new events at the end of a state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from malloc_bench.state.slots import Slots
from malloc_bench.state.user_state import Events, Layer, Segment, UserState
from malloc_bench.state.vectors import Dense


def extend(state: UserState, new: Sequence[dict[str, Tensor]], events: Events, timestamps: bool) -> UserState:
    """The state with the vectors of new events, a dict field -> [B, H, M, D] a layer; nothing stored is changed.

    Rows go to the end of a layer's last segment where that holds plain consecutive events, else to a new segment.
    timestamps: the backbone reads the slots' times.
    """
    times = events.times[:, None] if timestamps and events.times is not None else None  # [B, 1, M]
    tail = Slots(events.count[:, None], None, times)
    grown: dict[int, Slots] = {}  # slots that layers share stay shared
    layers: list[Layer] = []
    for layer, fields in zip(state.layers, new):
        last = layer[-1] if layer else None
        if last is None or not _plain(last):
            layers.append((*layer, Segment({k: Dense(v) for k, v in fields.items()}, tail)))
            continue
        slots = last.slots
        assert slots is not None
        if id(slots) not in grown:
            joined = None
            if slots.timestamps is not None and times is not None:
                joined = _place(slots.timestamps.unsqueeze(-1), times.unsqueeze(-1), slots.count).squeeze(-1)
            grown[id(slots)] = replace(slots, count=slots.count + events.count[:, None], timestamps=joined)
        vectors = {k: Dense(_place(last.fields[k].dense(), v, slots.count)) for k, v in fields.items()}
        layers.append((*layer[:-1], Segment(vectors, grown[id(slots)])))
    return UserState(tuple(layers), state.length + events.count)


def _plain(segment: Segment) -> bool:
    """Consecutive events, the same for all heads, written as they came."""
    slots = segment.slots
    consecutive = slots is not None and slots.positions is None and slots.mass is None and slots.count.shape[1] == 1
    return consecutive and all(isinstance(v, Dense) for v in segment.fields.values())


def _place(old: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """[B, H, S, D] and [B, H, M, D] -> [B, H, S + M, D], new rows right behind each user's `count` [B, 1] old ones."""
    out = torch.cat([old, torch.zeros_like(new)], dim=2)
    rows = count.long().unsqueeze(-1) + torch.arange(new.shape[2], device=new.device)  # [B, 1, M]
    return out.scatter_(2, rows.unsqueeze(-1).expand_as(new), new)
