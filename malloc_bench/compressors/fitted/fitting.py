"""Slots whose masses and values are solved for, so that a layer gives to probes what the whole history gives them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.selection import TokenMethod, kept_slots
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.state import Ask, Dense, Prefill, Probes, Segment, Stats, UserState, take

ROUNDS = 40  # of the non-negative least squares


class FittedTokens(TokenMethod):
    """Keeps k slots of a history where they stand and solves for what they weigh and hold; a subclass chooses them.

    Fields of a subclass: probes, ridge, horizon. Where keys and values are one stored field, kept slots store two.
    A user who has no more than k slots keeps them as they are.
    """

    per_head: ClassVar[bool] = True
    consecutive: ClassVar[bool] = False
    probes: int
    ridge: float
    horizon: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "horizon", tuple(self.horizon))  # a suite's list
        if not self.ridge > 0:
            raise ValueError(f"{self.name}: ridge must be above 0, not {self.ridge}")
        Ask(self.probes, "drawn", self.horizon)

    @property
    def ask(self) -> Ask:
        return Ask(self.probes, "drawn", self.horizon)

    @property
    def needs(self) -> Stats:
        return Stats(probes=self.ask)

    @abstractmethod
    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        """Kept slots in time order, [B, H or 1, max k]; k [B] <= count."""

    def layout(self, prefill: Prefill) -> Layout:
        mass = prefill.probes(0, self.ask).normalised
        own = "head" if self.per_head else "layer" if mass else "state"
        plain = dense_layout(prefill, own, consecutive=self.consecutive)  # type: ignore[arg-type]
        stored = _split(plain.vectors)
        heads = sum(pair[0][1] for pair in stored)
        return replace(plain, mass=heads * mass, vectors=tuple(vectors for pair in stored for vectors in pair))

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        layers = []
        shared: dict[int, Any] = {}
        for layer in prefill.layers:
            segment, old, probes = prefill.segment(layer), prefill.slots(layer), prefill.probes(layer, self.ask)
            kept = k.minimum(old.count.amin(1))
            index = self.index(prefill, layer, kept)
            implied = self.consecutive and old.positions is None
            length = prefill.state.length if prefill.uses_positions and not implied else None
            before = kept_slots(old, index, kept, length)
            slots = replace(before, mass=None)
            fields = (
                segment.fields
                if len(segment.fields) > 1
                else dict.fromkeys(("keys", "values"), *segment.fields.values())
            )
            chosen = Segment({name: Dense(take(v.dense(), index)) for name, v in fields.items()}, slots)
            masses, values = solve(probes, chosen, self.ridge)
            whole = (kept == old.count[:, 0])[:, None, None]
            values = torch.where(whole[..., None], chosen.fields["values"].dense(), values)
            if masses is not None:
                slots = replace(slots, mass=torch.where(whole, 1.0 if before.mass is None else before.mass, masses))
            elif not self.per_head:
                slots = shared.setdefault(id(old), slots)  # the same in every layer
            layers.append((Segment({"keys": chosen.fields["keys"], "values": Dense(values)}, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def flops(self, state: UserState, history: int) -> int:
        """Weights of the kept slots, two Gram matrices, the rounds, right sides and two triangular systems."""
        return self.work(state, history, [layer[0].fields["keys"].shape[1] for layer in state.layers])

    def work(self, state: UserState, history: int, heads: Sequence[int]) -> int:
        """As `flops`, of query heads that a state does not tell of."""
        total = 0
        for layer, (segment, *_) in enumerate(state.layers):
            (_, h, k, d), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
            rows = self.probes * heads[layer]
            total += 2 * rows * k * d + 2 * rows * k * k + 4 * rows * k * wide + 2 * h * k * k * wide
            weighed = segment.slots is not None and segment.slots.mass is not None
            if weighed:
                total += 2 * rows * k * k + 4 * rows * k + 2 * ROUNDS * h * k * k
            total += self.choosing(h, rows, k, d, wide + weighed, history)
        return total

    def choosing(self, heads: int, rows: int, k: int, width: int, wide: int, history: int) -> int:
        """FLOPs of `index` in one layer; rows: probes of all query heads; wide: columns of the target."""
        return 0


def _split(vectors: Sequence[tuple[str, int, int]]) -> list[tuple[tuple[str, int, int], ...]]:
    """A layout's vectors layer by layer, one field as the two that are stored of kept slots."""
    if vectors and vectors[0][0] in ("keys", "values"):
        return [tuple(vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    return [(("keys", h, d), ("values", h, d)) for _, h, d in vectors]


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


def solve(probes: Probes, chosen: Segment, ridge: float) -> tuple[Tensor | None, Tensor]:
    """Masses [B, H, K] (None where weights are not normalised) and values [B, H, K, D] for which the chosen slots give

    the probes what the history gave them. Masses: non-negative least squares on the total weight of the history.
    Values: ridge regression on the weights as they then are, of what was got and what the token's own value gained or
    lost. ridge: of the mean diagonal of the Gram matrix, towards the values as they were.
    """
    values = chosen.fields["values"].dense().float()
    heads, counted = values.shape[1], evened(probes)
    if not values.shape[2]:
        return values[..., 0] if probes.normalised else None, chosen.fields["values"].dense()
    weights = rows_of(probes.columns(chosen).float(), heads)
    share, target, even = (rows_of(x.float(), heads) for x in (probes.share, probes.target, counted))
    mass: Tensor | None = None
    if probes.normalised:
        own = probes.own_values().expand(-1, probes.target.shape[1], -1, -1)
        mass = masses(weights, 1 - share)
        total = (weights @ mass.unsqueeze(-1) + share).clamp(min=1e-20)
        weights = weights * mass.unsqueeze(2) / total
        target = target + (share - share / total) * rows_of(own.float(), heads)
    weights, target = weights * even, target * even
    gram, wanted = weights.mT @ weights, weights.mT @ (target - weights @ values)
    values = values + _ridge(gram, wanted, ridge)
    return mass, values.to(chosen.fields["values"].dense().dtype)


def _ridge(gram: Tensor, wanted: Tensor, ridge: float) -> Tensor:
    """(gram + ridge x its mean diagonal)^-1 wanted."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    some = (diagonal > 0).sum(-1, keepdim=True).clamp(min=1)
    damped = ridge * diagonal.sum(-1, keepdim=True) / some + 1e-30
    scale = (diagonal + damped).rsqrt()  # a unit diagonal: slots that weigh little are no trouble to float32
    unit = scale.unsqueeze(-1) * gram * scale.unsqueeze(-2)
    unit = unit + torch.diag_embed(1 - unit.diagonal(dim1=-2, dim2=-1))
    lower = torch.linalg.cholesky_ex(unit + 1e-6 * torch.eye(unit.shape[-1], device=unit.device))[0]
    half = torch.linalg.solve_triangular(lower, wanted * scale.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True) * scale.unsqueeze(-1)


def masses(weights: Tensor, total: Tensor) -> Tensor:
    """m [B, H, K] > 0 with weights m ~ total in least squares, weights [B, H, R, K] >= 0, total [B, H, R, 1].

    Accelerated projected gradient on columns of length 1; begins with the same mass for all.
    """
    size = weights.square().sum(2).sqrt().clamp(min=1e-20)  # [B, H, K]
    gram = weights.mT @ weights / size.unsqueeze(-1) / size.unsqueeze(-2)
    wanted = (weights.mT @ total).squeeze(-1) / size
    step = 1 / gram.sum(-1).amax(-1, keepdim=True).clamp(min=1e-20)
    sums = weights.sum(-1, keepdim=True)
    same = (sums * total).sum((2, 3)) / sums.square().sum((2, 3)).clamp(min=1e-20)
    now = before = same.unsqueeze(-1) * size
    for turn in range(ROUNDS):
        ahead = now + turn / (turn + 3) * (now - before)
        before, now = now, (ahead - step * ((gram @ ahead.unsqueeze(-1)).squeeze(-1) - wanted)).clamp(min=0)
    return (now / size).clamp(1e-6, 1e6)
