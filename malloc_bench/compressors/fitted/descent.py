"""Keys of kept slots, and what they weigh and hold, moved down the gradient of what they answer wrongly."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from malloc_bench.compressors.base import Source
from malloc_bench.compressors.fitted.solving import ROUNDS, Rows, held_out, ridge_flops, rows_of
from malloc_bench.state import Probes, Segment

_LEAST = 1e-3
_RIGHT = 3e-5  # of the squares of what is wanted: heads that are wrong by no more stay
_CACHE = 2 << 20  # bytes of rows that stay near the core over all steps
_NONE = -1e4  # the logit of no slot: it weighs exactly nothing, and has no slope
Slot = tuple[Tensor, Tensor | None, Tensor]  # keys [..., K, D], masses [..., K] or None, values [..., K, D']


class Asked(NamedTuple):
    """What rows ask of slots: asking [..., R, D], logits [..., R, K] of these as they are; total [..., R, 1] as
    `Probes` have it."""

    asking: Tensor
    logits: Tensor
    total: Tensor | None
    normaliser: float

    @staticmethod
    def of(probes: Probes, chosen: Segment, heads: int) -> Asked:
        assert chosen.slots is not None
        asking, logits = (rows_of(x.float(), heads) for x in (probes.asking(), probes.logits(chosen)))
        real = chosen.slots.mask(chosen.width).expand(-1, heads, -1).unsqueeze(2)
        total = None if probes.total is None else rows_of(probes.total.float(), heads)
        # contiguous: `some` would copy all of it for every few heads
        return Asked(asking.contiguous(), logits.masked_fill(~real, _NONE), total, probes.normaliser)

    def some(self, heads: Tensor, width: int, rows: Tensor | slice = slice(None)) -> Asked:
        """Of some heads [N] of all, B x H, the first slots and some rows."""
        total = None if self.total is None else self.total.flatten(0, 1)[heads][:, rows]
        logits = self.logits.flatten(0, 1)[heads][:, rows, :width]
        return Asked(self.asking.flatten(0, 1)[heads][:, rows], logits, total, self.normaliser)

    def moved(self, by: Tensor) -> Tensor:
        """Logits [N, R, K] when keys have moved by so much, [N, K, D]."""
        return torch.baddbmm(self.logits, self.asking, by.mT)

    def weights(self, by: Tensor) -> Tensor:
        logit = self.moved(by)
        if self.total is None:
            return logit * torch.sigmoid(logit) / self.normaliser
        return (logit - self.total).clamp(max=20).exp()


def refined(
    probes: Probes, chosen: Segment, rows: Rows, begin: Slot, ridge: float, steps: int, rate: float, whole: bool
) -> Slot:
    """Slots after so many steps of Adam on the squared error of probes that are not held out, head by head; then masses
    and values are solved for again. Of each head the better of both on probes held out. Heads that are hardly wrong as
    they begin stay so.

    chosen: the slots as they stand, whose keys `begin` has, and rows: of them. rate: of a step, in deviations of what
    moves. whole: masses and values move too.
    """
    assert chosen.slots is not None
    heads, known = rows.values.shape[1], 1 - rows.held
    wrong = rows.squares(begin[1], begin[2].float())
    wanted = (rows.target * rows.even).square().sum(-1, keepdim=True)
    worse = (wrong * known).sum((2, 3)) > _RIGHT * (wanted * known).sum((2, 3))
    moving, fit = worse.flatten().nonzero()[:, 0], known[:, 0].nonzero()[:, 0]
    if not len(moving):
        return begin
    keys, mass, values = (x if x is None else x.flatten(0, 1).clone() for x in begin)
    assert keys is not None and values is not None
    asked, before = Asked.of(probes, chosen, heads), (wrong * rows.held).sum((2, 3)).flatten()
    count = chosen.slots.count.expand(-1, heads).flatten()
    row = keys.shape[1] + 2 * keys.shape[2] + 2 * values.shape[2]  # numbers
    for some in moving.split(max(1, _CACHE // (4 * wrong.shape[2] * row))):
        width = int(count[some].max())
        start = keys[some, :width].float(), None if mass is None else mass[some, :width], values[some, :width].float()
        new = descended(asked.some(some, width, fit), rows.some(some, width, fit), start, steps, rate, whole)
        weights = asked.some(some, width).weights(new[0] - start[0])
        own = rows.some(some, width)._replace(weights=weights, values=new[2])
        again, fitted = own.fitted(own.even, ridge)
        won = own.wrong(again, fitted) <= before[some]
        better = some[won]
        keys[better, :width], values[better, :width] = new[0][won].to(keys.dtype), fitted[won].to(values.dtype)
        if mass is not None and again is not None:
            mass[better, :width] = again[won]
    keys, values = (x.unflatten(0, (-1, heads)) for x in (keys, values))
    return keys, None if mass is None else mass.unflatten(0, (-1, heads)), values


def descended(asked: Asked, rows: Rows, begin: Slot, steps: int, rate: float, whole: bool) -> Slot:
    """The steps alone, of N heads. With z = m exp(logit - total), out = (z V + s v_own) / (z 1 + s), e = out - wanted:
    dL/dlogit = 2 z / (z 1 + s) e.(v - out); SiLU: 2 silu'(logit) / N e.v; and dL/dk is its sum over q."""
    square, (begun, _, values) = rows.even.square(), begin
    mass = None if begin[1] is None else begin[1].log()
    moving = [begun.clone()] + ([] if not whole else [values.clone()] + ([] if mass is None else [mass]))
    real = (asked.logits.amax(1) > _NONE).float()  # [N, K]
    mean = real / real.sum(-1, keepdim=True).clamp(min=1)
    size = [(x.square().mean(-1) * mean).sum(-1).sqrt()[..., None, None] for x in moving[:2]]
    size += [torch.ones_like(x) for x in moving[2:]]
    # what is to be explained, per unit of what moves: slopes far below are rounding, and Adam would make much of them
    least = _LEAST * (rows.target * rows.even).square().sum((1, 2))[..., None, None]
    floors = [least / x.clamp(min=1e-20) for x in size[:2]] + [least[..., 0] for _ in size[2:]]
    first, second = ([torch.zeros_like(x) for x in moving] for _ in range(2))
    wanted = rows.target + rows.share * rows.own
    for step in range(1, steps + 1):
        values = moving[1] if whole else values
        mass = moving[2] if len(moving) > 2 else mass
        logit = asked.moved(moving[0] - begun)
        if asked.total is None or mass is None:
            gate = torch.sigmoid(logit)
            weights, bend = logit * gate / asked.normaliser, gate * (1 + logit * (1 - gate)) / asked.normaliser
            off = (weights @ values - rows.target) * square
            wrong = bend * (off @ values.mT)
        else:
            z = logit.sub_(asked.total).add_(mass.unsqueeze(1)).clamp_(max=20).exp_()
            each = 1 / (z.sum(-1, keepdim=True) + rows.share)
            out = (z @ values + rows.share * rows.own) * each
            off = (out - wanted) * (square * each)
            wrong = torch.baddbmm((off * out).sum(-1, keepdim=True), off, values.mT, beta=-1).mul_(z)
            weights = z
        slopes = [wrong.mT @ asked.asking]
        if whole:
            slopes += [weights.mT @ off] + ([] if len(moving) < 3 else [wrong.sum(1)])
        turn = rate * (1 - (step - 1) / steps)  # to nothing, in a line
        for x, slope, far, floor, mean_of, mean_square in zip(moving, slopes, size, floors, first, second):
            mean_of.lerp_(slope, 0.1)
            mean_square.mul_(0.99).addcmul_(slope, slope, value=0.01)
            along = mean_of / (mean_square.sqrt().div_((1 - 0.99**step) ** 0.5).add_(floor + 1e-20))
            x.sub_(along.mul_(far * (turn / (1 - 0.9**step))))
    return moving[0], None if mass is None else mass.exp(), values


def refining_flops(probes: int, own: Source, segment: Segment, steps: int, whole: bool) -> int:
    """Of `refined` in one layer, all heads moving."""
    (_, heads, k, d), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
    rows, known = (own.queries * each for each in (probes, probes - int(held_out(probes, torch.device("cpu")).sum())))
    weighed = segment.slots is not None and segment.slots.mass is not None
    step = 4 * known * k * d + 2 * known * k * wide * (3 if whole else 2)
    again = 2 * rows * k * wide + ridge_flops(rows, heads, k, wide, 1)
    if weighed:
        again += 2 * rows * k * k + 4 * rows * k + 2 * ROUNDS * heads * k * k + 4 * rows * k
    return steps * step + again + 2 * (probes * own.asking + rows) * k * d + 4 * rows * k * wide
