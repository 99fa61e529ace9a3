"""A state with its vectors written down otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from malloc_bench.state import Segment, UserState, Vectors


def map_vectors(state: UserState, encode: Callable[[str, Segment], Vectors]) -> UserState:
    """The state with every field's vectors replaced by encode(field, segment); shared vectors stay shared."""
    return map_layers(state, lambda layer, name, segment: encode(name, segment))


def map_layers(state: UserState, encode: Callable[[int, str, Segment], Vectors]) -> UserState:
    """As `map_vectors`, of encode(layer, field, segment); what layers share counts as the first one's."""
    done: dict[int, Vectors] = {}
    layers = []
    for number, layer in enumerate(state.layers):
        segments = []
        for segment in layer:
            for name, vectors in segment.fields.items():
                if id(vectors) not in done:
                    done[id(vectors)] = made = encode(number, name, segment)
                    if not isinstance(made, Vectors):
                        raise TypeError(f"{name}: expected vectors such as state.Dense(x), not {type(made).__name__}")
            segments.append(Segment({k: done[id(v)] for k, v in segment.fields.items()}, segment.slots))
        layers.append(tuple(segments))
    return UserState(tuple(layers), state.length, state.events)


def shortened(state: UserState) -> UserState:
    """The state with positions and masses in two bytes each, times in four; slots that segments share stay shared."""
    done = {id(segment.slots): segment.slots and segment.slots.shortened() for segment in state.segments()}
    layers = (tuple(replace(segment, slots=done[id(segment.slots)]) for segment in layer) for layer in state.layers)
    return UserState(tuple(layers), state.length, state.events)


def beside_memories(write: Callable[[UserState], UserState], state: UserState) -> UserState:
    """What `write` makes of the segments with slots, and the memories that stand beside them as they are."""
    memories = [tuple(s for s in layer if s.slots is None) if len(layer) > 1 else () for layer in state.layers]
    made = write(slotted(state))
    return replace(made, layers=tuple((*layer, *own) for layer, own in zip(made.layers, memories)))


def slotted(state: UserState) -> UserState:
    """The state without memories that stand beside slots."""
    return replace(state, layers=tuple(tuple(s for s in layer if s.slots) or layer for layer in state.layers))


def together(state: UserState) -> UserState:
    """The state, of one segment a layer; raises ValueError where an encoder has split them."""
    if any(len(layer) != 1 for layer in state.layers):
        raise ValueError("an inner encoder that writes all slots alike is needed, without a tail or an age")
    return state
