"""Values of fitted slots rounded a few at a time: those that are left make up for what the rounding took.

As GPTQ rounds weights (Frantar et al., ICLR 2023, arXiv 2210.17323), with probes' weights on slots for activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from malloc_bench.compressors.fitted.solving import Rows, damping, solved
from malloc_bench.state import Dense, Segment, Slots, UserState

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
        """Values [B, H, K, D] with those of this turn as they are written, and what that takes added to later ones."""
        now, later = self.turn == turn, (self.turn > turn).float()
        lost = torch.where(now, wanted - written, 0.0)
        gained = solved(self.gram * later * later.mT, self.damped, later * (self.gram @ lost))
        return torch.where(now, written, wanted + gained)

    def wrong(self, written: Tensor) -> Tensor:
        return self.rows.wrong(self.mass, written)


def rounded(state: UserState, layers: Sequence[Rounding | None], write: Write) -> UserState:
    """The state (of one segment a layer) with values that lose least when it is written; a head's stay as they are
    where probes held out are answered worse."""
    begun = _values(state)
    if not any(layers):
        return state
    plain = _values(write(_given(state, begun, bare=True)))
    wanted, written = begun, plain
    for turn in range(TURNS - 1):
        wanted = [
            x if job is None else job.after(turn, x.float(), y.float()).to(x.dtype)
            for job, x, y in zip(layers, wanted, written)
        ]
        written = _values(write(_given(state, wanted, bare=True)))
    best = [
        x if job is None else torch.where((job.wrong(y.float()) <= job.wrong(old.float()))[..., None, None], x, before)
        for job, x, y, before, old in zip(layers, wanted, written, begun, plain)
    ]
    return _given(state, best)


def rounded_flops(rows: int, segment: Segment) -> int:
    """Of one layer; rows: probes of all query heads."""
    _, heads, k, wide = segment.fields["values"].shape
    if not 0 < k <= rows // heads:
        return 0
    weighed = 3 * 2 * rows * k if segment.slots is not None and segment.slots.mass is not None else 0
    return weighed + 4 * rows * k * wide + 2 * rows * k * k + (TURNS - 1) * 4 * heads * k * k * wide


def _values(state: UserState) -> list[Tensor]:
    return [layer[0].fields["values"].dense() for layer in state.layers]


def _given(state: UserState, values: Sequence[Tensor], bare: bool = False) -> UserState:
    """With these values; bare: without keys, which are written as they were."""
    layers = (
        (Segment({**({} if bare else segment.fields), "values": Dense(x)}, segment.slots),)
        for (segment,), x in zip(state.layers, values)
    )
    return UserState(tuple(layers), state.length)
