"""Masses and values of slots in least squares, for which they give probes what the whole history gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from malloc_bench.state import Probes, Segment

ROUNDS = 40  # of the non-negative least squares
_GOLDEN = 0.6180339887498949
_NEAR = 4 << 20  # bytes of weights of users who are solved for at once
_MANY, _CACHE = 20, 1 << 20  # slots; bytes of matrices that stay near the core over all rounds
_LARGE = 1e15  # of weights


def rows_of(x: Tensor, heads: int) -> Tensor:
    """Queries' numbers [B, Hq, M, ...] as rows of the stored head that they share, [B, H, group x M, ...]."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).flatten(2, 3)


def evened(probes: Probes) -> Tensor:
    """How much each probe's row counts, [B, Hq, M, 1]: where weights are not normalised a layer norm follows, so 1 over

    the deviation of the mixture over all heads."""
    if probes.normalised:
        return torch.ones_like(probes.share)
    mixed = probes.target + probes.share * probes.own_values()
    spread = mixed.transpose(1, 2).flatten(2).std(-1)[:, None, :, None]  # [B, 1, M, 1]
    typical = spread.mean(2, keepdim=True).clamp(min=1e-30)
    return (typical / spread.clamp(min=1e-3 * typical)).expand_as(probes.share)


class Rows(NamedTuple):
    """Probes of the query heads that share a stored head, stacked, and the slots that are to answer them.

    weights: [B, H, R, K], what the slots weigh as they are. share [B, H, R, 1], own and target [B, H, R, D]: see
    `Probes`. even [B, H, R, 1]: how much a row counts, see `evened`; held [R, 1]: 1 where it is held out. values:
    [B, H, K, D], as they are.
    """

    weights: Tensor
    share: Tensor
    own: Tensor
    target: Tensor
    even: Tensor
    held: Tensor
    values: Tensor
    normalised: bool

    @staticmethod
    def of(probes: Probes, chosen: Segment) -> Rows:
        values, number = chosen.fields["values"].dense().float(), probes.target.shape[2]
        own = probes.own_values().expand(-1, probes.target.shape[1], -1, -1)
        asked = (probes.columns(chosen), probes.share, own, probes.target, evened(probes))
        weights, share, own, target, even = (rows_of(x.float(), values.shape[1]) for x in asked)
        held = held_out(number, values.device).repeat(even.shape[2] // number)[:, None].float()
        return Rows(weights, share, own, target, even, held, values, probes.normalised)

    def some(self, heads: Tensor, width: int, rows: Tensor | slice = slice(None)) -> Rows:
        """Of some heads [N] of all, B x H, the first slots and some rows; fields then have N for B, H."""
        weights, share, own, target, even = (x.flatten(0, 1)[heads][:, rows] for x in self._by_row)
        values = self.values.flatten(0, 1)[heads, :width]
        return Rows(weights[..., :width], share, own, target, even, self.held[rows], values, self.normalised)

    def split(self, users: int) -> Iterator[Rows]:
        """Of so many users each."""
        for *each, values in zip(*(x.split(users) for x in (*self._by_row, self.values))):
            weights, share, own, target, even = each
            yield Rows(weights, share, own, target, even, self.held, values, self.normalised)

    @property
    def _by_row(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.weights, self.share, self.own, self.target, self.even

    def read(self, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights under masses [..., B, H, K] (None: not normalised), and what they are to make of the values."""
        if mass is None:
            return self.weights, self.target
        total = (self.weights @ mass.unsqueeze(-1) + self.share).clamp(min=1e-30)
        return self.weights * mass.unsqueeze(-2) / total, self.target + (self.share - self.share / total) * self.own

    def fitted(self, counted: Tensor, ridge: float) -> tuple[Tensor | None, Tensor]:
        """Masses and values by `solve`'s rules; counted: how much each row counts, [..., B, H, R, 1]."""
        mass = masses(self.weights * counted, (1 - self.share) * counted) if self.normalised else None
        weights, target = self.read(mass)
        gap, weights = (target - weights @ self.values) * counted, weights * counted
        return mass, self.values + ridge_values(weights, gap, damping(weights, ridge))

    def wrong(self, mass: Tensor | None, values: Tensor) -> Tensor:
        """What is wrong with the answers to rows held out, in squares, [..., B, H]; values [..., B, H, K, D]."""
        return (self.squares(mass, values) * self.held).sum((-2, -1))

    def squares(self, mass: Tensor | None, values: Tensor) -> Tensor:
        """What is wrong with the answer to each row, as it counts, in squares, [..., B, H, R, 1]."""
        weights, target = self.read(mass)
        return ((target - weights @ values) * self.even).square().sum(-1, keepdim=True)


def solve(rows: Rows, ridge: float, before: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """Masses [B, H, K] (None where weights are not normalised) and values [B, H, K, D] for which the chosen slots give

    the probes what the history gave them; before: masses that they had, None: 1. Masses: non-negative least squares on
    the total weight of the history. Values: ridge regression on the weights as they then are, of what was got and what
    the token's own value gained or lost. ridge: of the mean diagonal of the Gram matrix, towards the values as they
    were. The slots of a head that so give probes held out less wrongly are solved for with all; the others stay.
    Without a probe held out, of less than 4, all are fitted.
    """
    plain = None
    if rows.normalised:
        ones = torch.ones_like(rows.values[..., 0])
        plain = ones if before is None else before.float().expand_as(ones)
    if not rows.values.numel():
        return plain, rows.values
    at_once = max(1, _NEAR // (4 * rows.weights[0].numel()))
    masses_of = [None] * len(rows.weights) if plain is None else plain.split(at_once)
    found = [_better(some, ridge, mass) for some, mass in zip(rows.split(at_once), masses_of)]
    mass, values = zip(*found)
    return None if plain is None else torch.cat(mass), torch.cat(values)


def _better(rows: Rows, ridge: float, plain: Tensor | None) -> tuple[Tensor | None, Tensor]:
    mass, values = rows.fitted(torch.stack([rows.even * (1 - rows.held), rows.even]), ridge)  # two fits in one go
    # the second is tested too: what is not finite never wins
    won = (rows.wrong(mass, values) <= rows.wrong(plain, rows.values)).all(0)
    chosen_values = torch.where(won[..., None, None], values[1], rows.values)
    if mass is None or plain is None:
        return None, chosen_values
    return torch.where(won.unsqueeze(-1), mass[1], plain), chosen_values


def held_out(number: int, device: torch.device) -> Tensor:
    """Which of so many probes a fit is tested on, [M] bool: one of five, at steps that are those of no horizon."""
    return (torch.arange(number, device=device, dtype=torch.float64) * _GOLDEN) % 1 >= 0.8


def damping(weights: Tensor, ridge: float) -> Tensor:
    """ridge x the mean of diag W'W over slots that weigh anything, [..., 1]; never less than float32 can do with."""
    diagonal = weights.square().sum(-2)
    some = (diagonal > 0).sum(-1, keepdim=True).clamp(min=1)
    return (ridge + 1e-6) * diagonal.sum(-1, keepdim=True) / some + 1e-30


def ridge_values(weights: Tensor, gap: Tensor, damped: Tensor) -> Tensor:
    """(W'W + r 1)^-1 W' gap = W'(W W' + r 1)^-1 gap, the smaller of both systems; r: see `damping`."""
    if weights.shape[-1] > weights.shape[-2]:
        return weights.mT @ solved(weights @ weights.mT, damped, gap)
    return solved(weights.mT @ weights, damped, weights.mT @ gap)


def ridge_flops(rows: int, heads: int, k: int, wide: int, fits: int) -> int:
    """Of `_ridge`; rows: of all heads."""
    side = min(k, rows // heads)
    return fits * (2 * rows * k * side + 2 * heads * side * side * wide + 2 * rows * k * wide)


def solved(gram: Tensor, damped: Tensor, wanted: Tensor) -> Tensor:
    """(gram + damped 1)^-1 wanted."""
    scale = (gram.diagonal(dim1=-2, dim2=-1) + damped).rsqrt()  # a unit diagonal: rows that weigh little are no trouble
    unit = scale.unsqueeze(-1) * gram * scale.unsqueeze(-2)
    unit.diagonal(dim1=-2, dim2=-1).fill_(1)
    lower = torch.linalg.cholesky_ex(unit)[0]
    half = torch.linalg.solve_triangular(lower, wanted * scale.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True) * scale.unsqueeze(-1)


def masses(weights: Tensor, total: Tensor) -> Tensor:
    """m [..., K] > 0 with weights m ~ total in least squares, weights [..., R, K] >= 0, total [..., R, 1].

    Accelerated projected gradient on columns of length 1; begins with the same mass for all.
    """
    unit = torch.maximum(weights.amax((-2, -1), keepdim=True), total.amax((-2, -1), keepdim=True))
    if weights.numel() and bool((unit > _LARGE).any()):  # whose squares have no place in float32
        unit = unit.clamp(min=1.0)
        weights, total = weights / unit, total / unit
    size = weights.square().sum(-2).sqrt().clamp(min=1e-20)  # [..., K]
    gram = weights.mT @ weights / size.unsqueeze(-1) / size.unsqueeze(-2)
    wanted = (weights.mT @ total).squeeze(-1) / size
    step = 1 / gram.sum(-1).amax(-1, keepdim=True).clamp(min=1e-20)
    sums = weights.sum(-1, keepdim=True)
    same = (sums * total).sum((-2, -1)) / sums.square().sum((-2, -1)).clamp(min=1e-20)
    first = (same.unsqueeze(-1) * size).view(-1, size.shape[-1])
    shift = (step * wanted).view(first.shape)  # a step in one product: many rounds of little work
    move = (-step.unsqueeze(-1) * gram).flatten(0, -3)
    move.diagonal(dim1=-2, dim2=-1).add_(1)
    at_once = max(1, _CACHE // (move.element_size() * size.shape[-1] ** 2))
    found = [_descended(*each) for each in zip(move.split(at_once), shift.split(at_once), first.split(at_once))]
    return (torch.cat(found).view(size.shape) / size).clamp(1e-6, 1e6)


def _descended(move: Tensor, shift: Tensor, first: Tensor) -> Tensor:
    """Rounds of x = max(0, shift + move x) with momentum; move [N, K, K] symmetric, shift and first [N, K]."""
    rows = first.shape[-1] >= _MANY  # then a row times a matrix is several times as fast as a matrix times a column
    axis = 1 if rows else 2
    shift, now = shift.unsqueeze(axis), first.unsqueeze(axis)
    before = now
    for turn in range(ROUNDS):
        ahead = torch.lerp(before, now, 1 + turn / (turn + 3))
        product = (ahead, move) if rows else (move, ahead)
        before, now = now, torch.baddbmm(shift, *product).clamp_(min=0)
    return now.squeeze(axis)
