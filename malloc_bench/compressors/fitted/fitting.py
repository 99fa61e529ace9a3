"""Slots whose masses and values are solved for, so that a layer gives to probes what the whole history gives them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, Encoder, Source, Sources
from malloc_bench.compressors.fitted.rounding import TURNS, Rounding, in_turns, rounded, rounded_flops
from malloc_bench.compressors.fitted.solving import ROUNDS, Rows, ridge_flops, solve
from malloc_bench.compressors.selection import TokenMethod, kept_slots
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.state import Ask, Dense, Prefill, Probes, Segment, Stats, UserState, Vectors, narrowed, take


class Asking(Compressor):
    """Looks at what probes ask and get; fields of a subclass: probes, which, horizon, see `Ask`; a horizon of h is that
    of the next h requests."""

    probes: int
    which: str
    horizon: int | tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.horizon, int):
            object.__setattr__(self, "horizon", tuple(self.horizon))  # a suite's list
        _ = self.ask

    @property
    def ask(self) -> Ask:
        next_ones = self.horizon
        return Ask(self.probes, self.which, tuple(range(next_ones)) if isinstance(next_ones, int) else next_ones)

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
    version: ClassVar[int] = 3
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
        return chosen.fields["keys"].dense(), *solve(Rows.of(probes, chosen), self.ridge, mass)

    def layout(self, prefill: Prefill) -> Layout:
        mass = prefill.probes(0, self.ask).normalised
        own = "head" if self.per_head else "state" if self.consecutive and not mass else "layer"
        plain = dense_layout(prefill, own, consecutive=self.consecutive)  # type: ignore[arg-type]
        stored = split(plain.vectors)
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
            fields = dict(zip(("keys", "values"), pair(segment)))
            chosen = Segment({name: Dense(take(v.dense(), index)) for name, v in fields.items()}, slots)
            keys, masses, values = self.fit_slots(probes, chosen, before.mass)
            whole = (kept == old.count[:, 0])[:, None, None]
            keys, values = (
                torch.where(whole[..., None], old, narrowed(x, old.dtype))
                for old, x in ((chosen.fields["keys"].dense(), keys), (chosen.fields["values"].dense(), values))
            )
            if masses is not None:
                slots = replace(slots, mass=torch.where(whole, 1.0 if before.mass is None else before.mass, masses))
            elif self.consecutive:
                slots = shared.setdefault(id(old), slots)  # the same in every layer
            layers.append((Segment({"keys": Dense(keys), "values": Dense(values)}, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def settled(
        self, prefill: Prefill, state: UserState, write: Callable[[UserState], UserState], encoder: Encoder
    ) -> UserState:
        """Masses and values for keys as an encoder writes them, which takes back most of what their rounding does; then
        values are `rounded`. Where it writes fields together, for each user what answers probes held out better."""
        layers: list[tuple[Segment, ...]] = []
        roundings: list[Rounding | None] = []
        written = write(_of_each(state, "keys") if encoder.by_vector else state)
        for layer, ((segment,), (coded, *others)) in enumerate(zip(state.layers, written.layers)):
            slots, keys, kept = segment.slots, coded.fields.get("keys"), segment.fields["values"].dense()
            assert slots is not None
            roundings.append(None)
            if not others and keys is not None:
                fields = {"keys": Dense(keys.dense()), "values": Dense(kept)}
                rows = Rows.of(prefill.probes(layer, self.ask), Segment(fields, replace(slots, mass=None)))
                mass, values = solve(rows, self.ridge, slots.mass)
                whole = (slots.count == prefill.slots(layer).count)[..., None]
                kept = torch.where(whole[..., None], kept, narrowed(values, kept.dtype))
                if mass is not None and slots.mass is not None:
                    slots = replace(slots, mass=torch.where(whole, slots.mass, mass))
                roundings[-1] = Rounding.of(rows, slots, self.ridge)
            once = coded.fields["keys"] if encoder.by_vector else segment.fields["keys"]
            layers.append((Segment({"keys": once, "values": Dense(kept)}, slots),))
        made = UserState(tuple(layers), state.length)
        made = rounded(made, roundings, write, encoder.by_vector, encoder.by_field)
        if encoder.by_field:
            return made
        # other values may have made other keys: users for whom it all came out worse keep what they had
        better = (self._wrong(prefill, made, write) <= self._wrong(prefill, state, write))[:, None, None, None]
        for layer, ((one,), (other,)) in enumerate(zip(made.layers, state.layers)):
            assert one.slots is not None and other.slots is not None
            values = torch.where(better, one.fields["values"].dense(), other.fields["values"].dense())
            mass, before = one.slots.mass, other.slots.mass
            mass = None if mass is None or before is None else torch.where(better[..., 0], mass, before)
            layers[layer] = (Segment({**one.fields, "values": Dense(values)}, replace(one.slots, mass=mass)),)
        return UserState(tuple(layers), state.length)

    def _wrong(self, prefill: Prefill, state: UserState, write: Callable[[UserState], UserState]) -> Tensor:
        """How wrong the written state answers probes held out, summed over layers and heads, [B]; zero where it has
        come to several segments a layer."""
        total = torch.zeros(len(state), device=state.length.device)
        for layer, ((segment,), (coded, *others)) in enumerate(zip(state.layers, write(state).layers)):
            if not others and segment.slots is not None:
                fields = {name: Dense(coded.fields[name].dense()) for name in ("keys", "values")}
                chosen = Segment(fields, replace(segment.slots, mass=None))
                rows = Rows.of(prefill.probes(layer, self.ask), chosen)
                most = (rows.target * rows.even * rows.held).square().sum((-2, -1)).clamp(min=1e-30)
                total = total + (rows.wrong(segment.slots.mass, rows.values) / most).sum(1)
        return total

    def settling(self, state: UserState, of: Sources, writing: Callable[[UserState], int], encoder: Encoder) -> int:
        layers = [(segment, own) for (segment, *others), own in zip(state.layers, of) if not others]
        total = 0 if encoder.by_vector else writing(state)  # keys are written once
        total += sum(self._solving(s, own) + s.fields["keys"].dense_flops() for s, own in layers)
        if not encoder.by_field:
            total += 2 * (writing(state) + sum(self._testing(s, own) for s, own in layers))
        if not any(rounding := [rounded_flops(self.probes * own.queries, s) for s, own in layers]):
            return total
        values = _of_each(state, "values")
        turn = writing(values if encoder.by_field else state) + sum(
            segment.fields["values"].dense_flops() for segment, *_ in values.layers
        )
        if not encoder.by_vector:
            return total + sum(rounding) + TURNS * turn
        several = [own for own, some in zip(values.layers, rounding) if some]
        return total + sum(rounding) + turn + sum(writing(UserState(x, state.length)) for x in in_turns(several))

    def flops(self, state: UserState, of: Sources) -> int:
        """Weights of the kept slots; twice: Gram matrices, rounds, right sides, triangular systems; and the tests."""
        total = 0
        for own, (segment, *_) in zip(of, state.layers):
            (_, h, k, _), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
            weighed = segment.slots is not None and segment.slots.mass is not None
            rows = self.probes * own.queries
            total += self._solving(segment, own) + self.choosing(h, rows, k, wide + weighed, own.events)
        return total

    def _testing(self, segment: Segment, own: Source) -> int:
        """FLOPs of `_wrong` in one layer, without those of writing."""
        (_, _, k, d), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
        rows = self.probes * own.queries
        weighed = 2 * rows * k if segment.slots is not None and segment.slots.mass is not None else 0
        decoded = sum(segment.fields[name].dense_flops() for name in ("keys", "values"))
        return 2 * self.probes * own.asking * k * d + 2 * rows * k * wide + weighed + decoded

    def _solving(self, segment: Segment, own: Source) -> int:
        """FLOPs of `solve` in one layer."""
        (_, h, k, d), (_, _, _, wide) = (segment.fields[name].shape for name in ("keys", "values"))
        rows = self.probes * own.queries
        total = 2 * self.probes * own.asking * k * d + ridge_flops(rows, h, k, wide, 2)
        if segment.slots is None or segment.slots.mass is None:
            return total + 8 * rows * k * wide  # SiLU: what was read is the same twice
        return total + 10 * rows * k * wide + 4 * rows * k * k + 14 * rows * k + 4 * ROUNDS * h * k * k

    def choosing(self, heads: int, rows: int, k: int, wide: int, history: int) -> int:
        """FLOPs of `index` in one layer; rows: probes of all query heads; wide: columns of the target."""
        return 0


def _of_each(state: UserState, name: str) -> UserState:
    """One field of each segment."""
    layers = (tuple(Segment({name: s.fields[name]}, s.slots) for s in layer) for layer in state.layers)
    return UserState(tuple(layers), state.length)


def without_slots(backbone: Any) -> str | None:
    """Why a backbone cannot read a memory beside its slots; None: it can."""
    return None if backbone.has_slots else f"{backbone.name} keeps a memory of constant size: it attends to no slots"


def pair(segment: Segment) -> tuple[Vectors, Vectors]:
    """Keys and values; one field is both."""
    only = next(iter(segment.fields.values()))
    return segment.fields.get("keys", only), segment.fields.get("values", only)


def split(vectors: Sequence[tuple[str, int, int]]) -> list[tuple[tuple[str, int, int], ...]]:
    """A layout's vectors layer by layer, one field as the two that are stored of kept slots."""
    if vectors and vectors[0][0] in ("keys", "values"):
        return [tuple(vectors[i : i + 2]) for i in range(0, len(vectors), 2)]
    return [(("keys", h, d), ("values", h, d)) for _, h, d in vectors]
