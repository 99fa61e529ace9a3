"""Values of fitted slots rounded a few at a time: those that are left make up for what the rounding took.

As GPTQ rounds weights (Frantar et al., ICLR 2023, arXiv 2210.17323), with probes' weights on slots for activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from malloc_bench.compressors.fitted.solving import Rows, damping, solved
from malloc_bench.state import Dense, Layer, Segment, Slots, UserState, take

TURNS = 6
Write = Callable[[UserState], UserState]


class Rounding(NamedTuple):
    """One layer's: rows as they ask, masses as they are stored, gram [B, H, K, K] of weights under them as each row
    counts, and the turn [B, H, K, 1] in which a slot is rounded, those first that weigh most. Where slots are more than
    rows, which then say nothing of what is lost elsewhere, no slot has one."""

    rows: Rows
    mass: Tensor | None
    gram: Tensor
    turn: Tensor
    damped: Tensor

    @staticmethod
    def of(rows: Rows, slots: Slots, ridge: float) -> Rounding | None:
        *_, probes, size = rows.weights.shape
        few = slots.count <= probes
        if not size or not bool(few.any()):
            return None
        weights = rows.read(slots.mass)[0] * rows.even * few[..., None, None]
        real = slots.mask(size).expand(weights.shape[0], weights.shape[1], -1)
        order = torch.where(real, weights.square().sum(-2), -1.0).argsort(dim=-1, descending=True, stable=True)
        place = order.argsort(-1)
        turn = torch.where(few[..., None], place * TURNS // real.sum(-1, keepdim=True).clamp(min=1), TURNS)
        return Rounding(rows, slots.mass, weights.mT @ weights, turn.unsqueeze(-1), damping(weights, ridge))

    def after(self, turn: int, wanted: Tensor, written: Tensor) -> Tensor:
        """Values [B, H, K, D] with what it takes to write those of this turn added to later ones."""
        now, later = self.turn == turn, (self.turn > turn).float()
        lost = torch.where(now, wanted - written, 0.0)
        return wanted + solved(self.gram * later * later.mT, self.damped, later * (self.gram @ lost))

    def those(self, turn: int) -> tuple[Tensor, Tensor]:
        """Slots of a turn, index [B, H, N], of which the first count [B, H] are real."""
        now = (self.turn == turn).squeeze(-1)
        count = now.sum(-1, dtype=torch.int32)
        return now.int().argsort(dim=-1, descending=True, stable=True)[..., : int(count.max())], count

    def wrong(self, written: Tensor) -> Tensor:
        return self.rows.wrong(self.mass, written)


def rounded(
    state: UserState, layers: Sequence[Rounding | None], write: Write, by_vector: bool = False, by_field: bool = True
) -> UserState:
    """The state (of one segment a layer) with values that lose least when it is written; a head's stay as they are
    where probes held out are answered worse. by_vector, by_field: see `Encoder`."""
    begun = _values(state)
    if not any(layers):
        return state
    plain = _values(write(_given(state, begun, bare=by_field)))
    wanted, written = begun, plain
    for turn in range(TURNS - 1):
        after = [
            x if job is None else job.after(turn, x.float(), y.float()).to(x.dtype)
            for job, x, y in zip(layers, wanted, written)
        ]
        if by_vector:
            wanted, written = after, _next(state, layers, turn + 1, after, written, write)
            continue
        # what was written may be written otherwise beside other values: it is asked for again
        wanted = [
            x if job is None else torch.where(job.turn == turn, y.to(x.dtype), x)
            for job, x, y in zip(layers, after, written)
        ]
        written = _values(write(_given(state, wanted, bare=by_field)))
    best = [
        x if job is None else torch.where((job.wrong(y.float()) <= job.wrong(old.float()))[..., None, None], x, before)
        for job, x, y, before, old in zip(layers, wanted, written, begun, plain)
    ]
    return _given(state, best)


def in_turns(layers: Sequence[Layer]) -> Iterator[tuple[Layer, ...]]:
    """Layers of what is written by itself in each turn after the first, where heads are full; without numbers."""
    for turn in range(1, TURNS):
        some = []
        for (segment,) in layers:
            b, h, k, d = segment.fields["values"].shape
            slots = -(-k * (turn + 1) // TURNS) + (-k * turn // TURNS)
            some.append((Segment({"values": Dense(torch.empty(b, h, slots, d, device="meta"))}, segment.slots),))
        yield tuple(some)


def rounded_flops(rows: int, segment: Segment) -> int:
    """Of one layer, without what the encoder takes; rows: probes of all query heads."""
    _, heads, k, wide = segment.fields["values"].shape
    if not 0 < k <= rows // heads:
        return 0
    weighed = 3 * 2 * rows * k if segment.slots is not None and segment.slots.mass is not None else 0
    return weighed + 4 * rows * k * wide + 2 * rows * k * k + (TURNS - 1) * 4 * heads * k * k * wide


def _values(state: UserState) -> list[Tensor]:
    return [layer[0].fields["values"].dense() for layer in state.layers]


def _next(
    state: UserState,
    layers: Sequence[Rounding | None],
    turn: int,
    wanted: Sequence[Tensor],
    before: Sequence[Tensor],
    write: Write,
) -> list[Tensor]:
    """What was written `before`, and the values of a turn as they are written by themselves."""
    which = [
        (x.new_zeros(len(x), 1, 0, dtype=torch.long), x.new_zeros(len(x), 1, dtype=torch.int32))
        if job is None
        else job.those(turn)
        for job, x in zip(layers, wanted)
    ]
    some = ((Segment({"values": Dense(take(x, at))}, Slots(n)),) for x, (at, n) in zip(wanted, which))
    made = _values(write(UserState(tuple(some), state.length)))
    return [
        y if job is None else torch.where(job.turn == turn, y.scatter(2, at.unsqueeze(-1).expand_as(new), new), y)
        for job, y, (at, _), new in zip(layers, before, which, made)
    ]


def _given(state: UserState, values: Sequence[Tensor], bare: bool = False) -> UserState:
    """With these values; bare: without keys, which are written as they were."""
    layers = (
        (Segment({**({} if bare else segment.fields), "values": Dense(x)}, segment.slots),)
        for (segment,), x in zip(state.layers, values)
    )
    return UserState(tuple(layers), state.length)
