"""Slots whose masses and values are solved for, so that a layer gives to probes what the whole history gives them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor
from malloc_bench.compressors.selection import TokenMethod, kept_slots
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.state import Ask, Dense, Prefill, Probes, Segment, Stats, UserState, take

ROUNDS = 40  # of the non-negative least squares
_GOLDEN = 0.6180339887498949


class Asking(Compressor):
    """Looks at what probes ask and get; fields of a subclass: probes, which, horizon, see `Ask`."""

    probes: int
    which: str
    horizon: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "horizon", tuple(self.horizon))  # a suite's list
        _ = self.ask

    @property
    def ask(self) -> Ask:
        return Ask(self.probes, self.which, self.horizon)

    @property
    def needs(self) -> Stats:
        return Stats(probes=self.ask)


class FittedTokens(Asking, TokenMethod):
    """Keeps k slots of a history where they stand and solves for what they weigh and hold; a subclass chooses them.

    Fields of a subclass: probes, ridge, horizon, which. Where keys and values are one stored field, slots store two.
    A user who has no more than k slots keeps them as they are.
    """

    per_head: ClassVar[bool] = True
    consecutive: ClassVar[bool] = False
    version: ClassVar[int] = 2
    ridge: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise ValueError(f"{self.name}: ridge must be above 0, not {self.ridge}")

    @abstractmethod
    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        """Kept slots in time order, [B, H or 1, max k]; k [B] <= count."""

    def fit_slots(self, probes: Probes, chosen: Segment, mass: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Keys, masses and values of the chosen slots, which had `mass` (None: 1); see `solve`."""
        return chosen.fields["keys"].dense(), *solve(probes, chosen, self.ridge, mass)

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
            keys, masses, values = self.fit_slots(probes, chosen, before.mass)
            whole = (kept == old.count[:, 0])[:, None, None]
            keys, values = (
                torch.where(whole[..., None], chosen.fields[name].dense(), x)
                for name, x in (("keys", keys), ("values", values))
            )
            if masses is not None:
                slots = replace(slots, mass=torch.where(whole, 1.0 if before.mass is None else before.mass, masses))
            elif not self.per_head:
                slots = shared.setdefault(id(old), slots)  # the same in every layer
            layers.append((Segment({"keys": Dense(keys), "values": Dense(values)}, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def settled(self, prefill: Prefill, state: UserState, written: UserState) -> UserState:
        """Masses and values for keys as an encoder writes them, which takes back most of what their rounding does."""
        layers = []
        for layer, ((segment,), (coded, *others)) in enumerate(zip(state.layers, written.layers)):
            slots, keys, values = segment.slots, coded.fields.get("keys"), segment.fields["values"]
            assert slots is not None
            if not others and keys is not None:
                chosen = Segment({"keys": Dense(keys.dense()), "values": values}, replace(slots, mass=None))
                mass, found = solve(prefill.probes(layer, self.ask), chosen, self.ridge, slots.mass)
                whole = (slots.count == prefill.slots(layer).count)[..., None]
                values = Dense(torch.where(whole[..., None], values.dense(), found))
                if mass is not None and slots.mass is not None:
                    slots = replace(slots, mass=torch.where(whole, slots.mass, mass))
            layers.append((Segment({"keys": segment.fields["keys"], "values": values}, slots),))
        return UserState(tuple(layers), state.length)

    def flops(self, state: UserState, history: int) -> int:
        """Weights of the kept slots; twice: Gram matrices, rounds, right sides, triangular systems; and the tests."""
        return self.work(state, history, [layer[0].fields["keys"].shape[1] for layer in state.layers])

    def settling(self, state: UserState, heads: Sequence[int]) -> int:
        return sum(self._solving(layer[0], heads[i]) for i, layer in enumerate(state.layers) if len(layer) == 1)

    def work(self, state: UserState, history: int, heads: Sequence[int]) -> int:
        """As `flops`, of query heads that a state does not tell of."""
        total = 0
        for layer, (segment, *_) in enumerate(state.layers):
            (_, h, k, d), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
            weighed = segment.slots is not None and segment.slots.mass is not None
            total += self._solving(segment, heads[layer])
            total += self.choosing(h, self.probes * heads[layer], k, d, wide + weighed, history)
        return total

    def _solving(self, segment: Segment, heads: int) -> int:
        """FLOPs of `solve` in one layer of so many query heads."""
        (_, h, k, d), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
        rows = self.probes * heads
        total = 2 * rows * k * d + ridge_flops(rows, h, k, wide, 2)
        if segment.slots is None or segment.slots.mass is None:
            return total + 8 * rows * k * wide  # SiLU: what was read is the same twice
        return total + 10 * rows * k * wide + 4 * rows * k * k + 14 * rows * k + 4 * ROUNDS * h * k * k

    def choosing(self, heads: int, rows: int, k: int, width: int, wide: int, history: int) -> int:
        """FLOPs of `index` in one layer; rows: probes of all query heads; wide: columns of the target."""
        return 0


def without_slots(backbone: Any) -> str | None:
    """Why a backbone cannot read a memory beside its slots; None: it can."""
    return None if backbone.has_slots else f"{backbone.name} keeps a memory of constant size: it attends to no slots"


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


class Rows(NamedTuple):
    """Probes of the query heads that share a stored head, stacked, and the slots that are to answer them.

    weights: [B, H, R, K], what the slots weigh as they are. share [B, H, R, 1], own and target [B, H, R, D]: see
    `Probes`. values: [B, H, K, D], as they are.
    """

    weights: Tensor
    share: Tensor
    own: Tensor
    target: Tensor
    values: Tensor

    @staticmethod
    def of(probes: Probes, chosen: Segment) -> Rows:
        values = chosen.fields["values"].dense().float()
        own = probes.own_values().expand(-1, probes.target.shape[1], -1, -1)
        asked = (probes.columns(chosen), probes.share, own, probes.target)
        weights, share, own, target = (rows_of(x.float(), values.shape[1]) for x in asked)
        return Rows(weights, share, own, target, values)

    def read(self, mass: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights under masses [..., B, H, K] (None: not normalised), and what they are to make of the values."""
        if mass is None:
            return self.weights, self.target
        total = (self.weights @ mass.unsqueeze(-1) + self.share).clamp(min=1e-30)
        return self.weights * mass.unsqueeze(-2) / total, self.target + (self.share - self.share / total) * self.own

    def fitted(self, normalised: bool, counted: Tensor, ridge: float) -> tuple[Tensor | None, Tensor]:
        """Masses and values by `solve`'s rules; counted: how much each row counts, [..., B, H, R, 1]."""
        mass = masses(self.weights * counted, (1 - self.share) * counted) if normalised else None
        weights, target = self.read(mass)
        gap, weights = (target - weights @ self.values) * counted, weights * counted
        return mass, self.values + _ridge(weights, gap, ridge)

    def error(self, mass: Tensor | None, values: Tensor, counted: Tensor) -> Tensor:
        """What is wrong with all rows' answers in squares, [..., B, H]; as in `fitted`."""
        weights, target = self.read(mass)
        return ((target - weights @ values) * counted).square().sum((-2, -1))


def solve(probes: Probes, chosen: Segment, ridge: float, before: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
    """Masses [B, H, K] (None where weights are not normalised) and values [B, H, K, D] for which the chosen slots give

    the probes what the history gave them; before: masses that they had, None: 1. Masses: non-negative least squares on
    the total weight of the history. Values: ridge regression on the weights as they then are, of what was got and what
    the token's own value gained or lost. ridge: of the mean diagonal of the Gram matrix, towards the values as they
    were. The slots of a head that so give probes held out less wrongly are solved for with all; the others stay.
    Without a probe held out, of less than 4, all are fitted.
    """
    kept, normalised, rows = chosen.fields["values"].dense(), probes.normalised, Rows.of(probes, chosen)
    if not kept.shape[2]:
        return rows.values[..., 0] if normalised else None, kept
    plain = None
    if normalised:
        plain = torch.ones_like(rows.values[..., 0]) if before is None else before.float().expand(kept.shape[:3])
    even, number = rows_of(evened(probes).float(), kept.shape[1]), probes.target.shape[2]
    held = held_out(number, kept.device).repeat(even.shape[2] // number)[:, None].float()  # [R, 1]
    both = torch.stack([even * (1 - held), even])  # two fits in one go
    mass, values = rows.fitted(normalised, both, ridge)
    tried = rows.error(mass, values, even * held)  # the second too: what is not finite never wins
    won = (tried <= rows.error(plain, rows.values, even * held)).all(0)
    chosen_values = torch.where(won[..., None, None], values[1], rows.values).to(kept.dtype)
    if mass is None or plain is None:
        return None, chosen_values
    return torch.where(won.unsqueeze(-1), mass[1], plain), chosen_values


def held_out(number: int, device: torch.device) -> Tensor:
    """Which of so many probes a fit is tested on, [M] bool: one of five, at steps that are those of no horizon."""
    return (torch.arange(number, device=device, dtype=torch.float64) * _GOLDEN) % 1 >= 0.8


def _ridge(weights: Tensor, gap: Tensor, ridge: float) -> Tensor:
    """(W'W + r 1)^-1 W' gap = W'(W W' + r 1)^-1 gap, the smaller of both systems; r: ridge x the mean of diag W'W."""
    diagonal = weights.square().sum(-2)
    some = (diagonal > 0).sum(-1, keepdim=True).clamp(min=1)
    damped = ridge * diagonal.sum(-1, keepdim=True) / some + 1e-30
    if weights.shape[-1] > weights.shape[-2]:
        return weights.mT @ _solved(weights @ weights.mT, damped, gap)
    return _solved(weights.mT @ weights, damped, weights.mT @ gap)


def ridge_flops(rows: int, heads: int, k: int, wide: int, fits: int) -> int:
    """Of `_ridge`; rows: of all heads."""
    side = min(k, rows // heads)
    return fits * (2 * rows * k * side + 2 * heads * side * side * wide + 2 * rows * k * wide)


def _solved(gram: Tensor, damped: Tensor, wanted: Tensor) -> Tensor:
    """(gram + damped 1)^-1 wanted."""
    scale = (gram.diagonal(dim1=-2, dim2=-1) + damped).rsqrt()  # a unit diagonal: rows that weigh little are no trouble
    unit = scale.unsqueeze(-1) * gram * scale.unsqueeze(-2)
    unit.diagonal(dim1=-2, dim2=-1).fill_(1 + 1e-6)
    lower = torch.linalg.cholesky_ex(unit)[0]
    half = torch.linalg.solve_triangular(lower, wanted * scale.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True) * scale.unsqueeze(-1)


def masses(weights: Tensor, total: Tensor) -> Tensor:
    """m [..., K] > 0 with weights m ~ total in least squares, weights [..., R, K] >= 0, total [..., R, 1].

    Accelerated projected gradient on columns of length 1; begins with the same mass for all.
    """
    size = weights.square().sum(-2).sqrt().clamp(min=1e-20)  # [..., K]
    gram = weights.mT @ weights / size.unsqueeze(-1) / size.unsqueeze(-2)
    wanted = (weights.mT @ total).squeeze(-1) / size
    step = 1 / gram.sum(-1).amax(-1, keepdim=True).clamp(min=1e-20)
    sums = weights.sum(-1, keepdim=True)
    same = (sums * total).sum((-2, -1)) / sums.square().sum((-2, -1)).clamp(min=1e-20)
    now = before = (same.unsqueeze(-1) * size).view(-1, size.shape[-1], 1)
    shift = (step * wanted).view(now.shape)  # a step in one product: many rounds of little work
    move = torch.eye(size.shape[-1], device=size.device) - (step.unsqueeze(-1) * gram).flatten(0, -3)
    for turn in range(ROUNDS):
        ahead = torch.lerp(before, now, 1 + turn / (turn + 3))
        before, now = now, torch.baddbmm(shift, move, ahead).clamp_(min=0)
    return (now.view(size.shape) / size).clamp(1e-6, 1e6)
