"""Keys of kept slots, and what they weigh and hold, moved down the gradient of what they answer wrongly."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from malloc_bench.compressors.fitted.solving import ROUNDS, Rows, ridge_flops, rows_of
from malloc_bench.state import Dense, Probes, Segment

_LEAST = 1e-3
Slot = tuple[Tensor, Tensor | None, Tensor]  # keys [B, H, K, D], masses [B, H, K] or None, values [B, H, K, D']


def refined(probes: Probes, chosen: Segment, begin: Slot, ridge: float, steps: int, rate: float, whole: bool) -> Slot:
    """Slots after so many steps of Adam on the squared error of probes that are not held out, all users and heads at
    once; then masses and values are solved for again. Of each head the better of both on probes held out.

    chosen: the slots as they stand, whose keys `begin` has. rate: of a step, in deviations of what moves. whole: masses
    and values move too.
    """
    unmoved = Rows.of(probes, chosen)
    keys, mass, values = descended(probes, chosen, begin, unmoved.even * (1 - unmoved.held), steps, rate, whole)
    rows = Rows.of(probes, replace(chosen, fields={"keys": Dense(keys), "values": Dense(values)}))
    mass, values = rows.fitted(rows.even, ridge)
    won = rows.wrong(mass, values) <= unmoved.wrong(begin[1], begin[2].float())
    if mass is not None and begin[1] is not None:
        mass = torch.where(won[..., None], mass, begin[1])
    keys, values = (
        torch.where(won[..., None, None], new.to(old.dtype), old) for new, old in ((keys, begin[0]), (values, begin[2]))
    )
    return keys, mass, values


def descended(
    probes: Probes, chosen: Segment, begin: Slot, counted: Tensor, steps: int, rate: float, whole: bool
) -> Slot:
    """The steps alone. With z = m exp(logit - total), out = (z V + s v_own) / (z 1 + s), e = out - wanted:
    dL/dlogit = 2 z / (z 1 + s) e.(v - out); SiLU: 2 silu'(logit) / N e.v; and dL/dk is its sum over q."""
    heads = begin[2].shape[1]
    asking, logits = (rows_of(x.float(), heads) for x in (probes.asking(), probes.logits(chosen)))
    share, target = (rows_of(x.float(), heads) for x in (probes.share, probes.target))
    own = rows_of(probes.own_values().float().expand(-1, probes.target.shape[1], -1, -1), heads)
    total = None if probes.total is None else rows_of(probes.total.float(), heads)
    square = counted.square()
    begun, values = begin[0].float(), begin[2].float()
    moving = [begun] if not whole else [begun, values] + ([] if begin[1] is None else [begin[1].float().log()])
    assert chosen.slots is not None
    real = chosen.slots.mask(chosen.width).expand(-1, heads, -1)
    logits = logits.masked_fill(~real.unsqueeze(2), -1e4)  # weighs exactly nothing, and has no slope
    mean = real.float() / real.sum(-1, keepdim=True).clamp(min=1)
    size = [(x.square().mean(-1) * mean).sum(-1).sqrt()[..., None, None] for x in moving[:2]]
    size += [torch.ones_like(x) for x in moving[2:]]
    # what is to be explained, per unit of what moves: slopes far below are rounding, and Adam would make much of them
    least = _LEAST * (target * counted).square().sum((2, 3))[..., None, None]
    floors = [least / x.clamp(min=1e-20) for x in size[:2]] + [least[..., 0] for _ in size[2:]]
    first, second = ([torch.zeros_like(x) for x in moving] for _ in range(2))
    mass = None if begin[1] is None else begin[1].float().log()
    for step in range(1, steps + 1):
        keys = moving[0]
        values = moving[1] if whole else values
        mass = moving[2] if len(moving) > 2 else mass
        logit = logits + asking @ (keys - begun).mT
        if total is None or mass is None:
            gate = torch.sigmoid(logit)
            weights, bend = logit * gate / probes.normaliser, gate * (1 + logit * (1 - gate)) / probes.normaliser
            off = (weights @ values - target) * square
            wrong = bend * (off @ values.mT)
        else:
            z = (logit - total + mass.unsqueeze(-2)).clamp(max=20).exp()
            all_of_it = z.sum(-1, keepdim=True) + share
            weights = z / all_of_it
            out = weights @ values + share / all_of_it * own
            off = (out - target - share * own) * square
            wrong = weights * (off @ values.mT - (off * out).sum(-1, keepdim=True))
        slopes = [wrong.mT @ asking]
        if whole:
            slopes += [weights.mT @ off] + ([] if len(moving) < 3 else [wrong.sum(-2)])
        turn = rate * (1 - (step - 1) / steps)  # to nothing, in a line
        for i, slope in enumerate(slopes):
            first[i] = 0.9 * first[i] + 0.1 * slope
            second[i] = 0.99 * second[i] + 0.01 * slope.square()
            along = first[i] / (1 - 0.9**step) / ((second[i] / (1 - 0.99**step)).sqrt() + floors[i] + 1e-20)
            moving[i] = moving[i] - turn * size[i] * along
    values = moving[1] if whole else values
    mass = moving[2] if len(moving) > 2 else mass
    return moving[0], None if mass is None else mass.exp(), values


def refining_flops(rows: int, segment: Segment, steps: int, whole: bool) -> int:
    """Of `refined` in one layer; rows: probes of all query heads."""
    (_, heads, k, d), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
    weighed = segment.slots is not None and segment.slots.mass is not None
    step = 4 * rows * k * d + 2 * rows * k * wide * (3 if whole else 2)
    again = 2 * rows * k * wide + ridge_flops(rows, heads, k, wide, 1)
    if weighed:
        again += 2 * rows * k * k + 4 * rows * k + 2 * ROUNDS * heads * k * k + 4 * rows * k
    return steps * step + 2 * rows * k * d + again + 4 * rows * k * d + 4 * rows * k * wide
