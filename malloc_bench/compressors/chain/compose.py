"""Several methods in a row, sized together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, Encoder, Sources, Structural, as_compressor
from malloc_bench.compressors.encoding import beside_memories, slotted
from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.compressors.sizing import Budget, Layout, slots_within
from malloc_bench.registry import register
from malloc_bench.state import Fitted, Prefill, Stats, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("compose")
@dataclass(frozen=True)
class Compose(TokenMethod):
    """At most one structural method, token methods, at most one encoder; the chain as a whole lands on the budget.

    steps: as in a suite: names, {name: {parameter: value}}, or compressors. Where several token methods share a
    budget, each does an equal share of the reduction (slots fall by the same factor). Without any it takes no budget.
    """

    steps: tuple[Any, ...] = ()

    family = "chain"
    paper = "none: combinations across families, which MALLOC (arXiv 2601.20234) leaves open"
    growth = {}  # its steps'
    formula = "encode(keep(... keep(state))), the state from an adapted backbone if the first step is structural"
    stores = "what the last token method keeps, written as the encoder writes it"

    def __post_init__(self) -> None:
        steps = tuple(map(as_compressor, self.steps))
        object.__setattr__(self, "steps", steps)
        tokens = self._tokens()
        if len(steps) < 2 or not all(map(_chains, tokens)):
            raise ValueError(
                "compose: at most one structural method, then token methods that keep slots, then at most one encoder, "
                "two steps or more are needed"
            )
        if len(tokens) > 1 and (uneven := next((method for method in tokens if not method.even), None)):
            raise ValueError(f"compose: {uneven.name} divides the whole budget: no other token method stands beside it")
        if early := next((method for method in tokens[:-1] if method.remembers), None):
            raise ValueError(f"compose: {early.name} leaves a memory beside its slots: no token method comes after it")
        for later in tokens[1:]:
            if later.needs != Stats() and not later.needs_at_best:
                raise ValueError(f"compose: {later.name} needs statistics or events, so it must come first")
        encoder = self._encoder()
        if tokens and encoder is not None and encoder.needs != Stats():
            raise ValueError(f"compose: {encoder.name} needs statistics that nobody knows behind a token method")

    @property
    def structural(self) -> Structural | None:
        return self.steps[0] if self.steps and isinstance(self.steps[0], Structural) else None

    @property
    def takes_budget(self) -> bool:
        return bool(self._tokens())

    def _tokens(self) -> tuple[TokenMethod, ...]:
        return self.steps[1 if self.structural else 0 : -1 if self._encoder() else None]

    def _encoder(self) -> Encoder | None:
        last = self.steps[-1] if self.steps else None
        return last if isinstance(last, Encoder) and not last.takes_budget else None

    @property
    def settles(self) -> bool:
        """Whether the last token method fits what it keeps to the encoder's rounding."""
        tokens = self._tokens()
        return bool(tokens) and self._encoder() is not None and type(tokens[-1]).settled is not TokenMethod.settled

    @property
    def version_settled(self) -> int:
        encoder = self._encoder()
        return 2 if self.settles and encoder is not None and (encoder.by_vector or not encoder.by_field) else 1

    @property
    def needs(self) -> Stats:
        return reduce(Stats.__or__, (step.needs for step in self.steps), Stats())

    @property
    def fit_needs(self) -> Stats:
        return reduce(Stats.__or__, (part.fit_needs for part in self.fit_parts().values()), Stats())

    def supports(self, backbone: "Backbone") -> str | None:
        for step in self.steps:
            if why := step.supports(backbone):
                return why
            backbone = step.structural.adapted(backbone) if step.structural else backbone  # later steps meet that one
        return None

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if not self.takes_budget:
            return self.keep(prefill, prefill.state.length.long())
        if budget is None:
            raise ValueError("compose needs a budget")
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        k = self.slots(prefill, budget)
        state, target = self.kept(prefill, k), budget.target(prefill.full_bytes())
        if target is None or self._encoder() is None:
            return state
        sizes, most = self.sizes(prefill), self.most(prefill)
        while bool(((state.nbytes() > target) & (k > 1)).any()):  # scales that needed float32
            # fewer slots may need fewer such scales, so some users keep a slot less than would fit
            said = sizes(k)
            extra = (state.nbytes() - said).clamp(min=0)
            by_share = (target * said.double() / state.nbytes()).long()  # of a `cost` that says far too little
            left = slots_within(torch.where(2 * extra > target, by_share, target - extra), most, sizes)
            k = torch.where(state.nbytes() > target, left, k)
            state = self.keep(prefill, k)
        return state

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        length, view, own, tokens = prefill.state.length.long(), prefill, prefill, self._tokens()
        for link, method in enumerate(tokens, start=1):
            share = length.double() * (k.double() / length.clamp(min=1)) ** (link / len(tokens))
            own = view.given(self._own(prefill, method))
            view = view.over(method.keep(own, share.round().long().maximum(k) if link < len(tokens) else k))
        encoder = self._encoder()
        if encoder is None:
            return view.state
        view = view.given(self._own(prefill, encoder))
        if not tokens:
            return encoder.write(view)

        def write(state: UserState) -> UserState:
            return beside_memories(lambda slotted: encoder.write(view.over(slotted)), state)

        return write(tokens[-1].settled(own, view.state, write, encoder))

    def _own(self, prefill: Prefill, step: Compressor) -> Fitted | None:
        """The step's share of the chain's fit."""
        if prefill.fitted is None or not step.fit_parts():
            return None
        return prefill.fitted.part(str(next(i for i, each in enumerate(self.steps) if each is step)))

    def fit_parts(self) -> Mapping[str, Compressor]:
        parts = [(str(i), step.fit_parts()) for i, step in enumerate(self.steps)]
        return {f"{i}/{name}".rstrip("/"): part for i, inner in parts for name, part in inner.items()}

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        """Each step by itself, to whole states."""
        return Fitted.joined({name: part.fit(sample, budget) for name, part in self.fit_parts().items()})

    def layout(self, prefill: Prefill) -> Layout:
        return reduce(Layout.then, (method.layout(prefill) for method in self._tokens()))

    @property
    def even(self) -> bool:  # type: ignore[override]
        return all(method.even for method in self._tokens())

    def most(self, prefill: Prefill, slots: int | None = None) -> Tensor:
        if not self.even:
            return self._tokens()[0].most(self._first(prefill), slots)
        return reduce(Tensor.minimum, (m.most(prefill, slots) for m in self._tokens()), super().most(prefill, slots))

    def pieces(self, prefill: Prefill) -> tuple[Layout, ...]:
        return super().pieces(prefill) if self.even else self._tokens()[0].pieces(self._first(prefill))

    def spread(self, prefill: Prefill, k: Tensor) -> Sequence[Tensor]:
        return super().spread(prefill, k) if self.even else self._tokens()[0].spread(self._first(prefill), k)

    def _first(self, prefill: Prefill) -> Prefill:
        """What the method that divides, the only one then, gets."""
        return prefill.given(self._own(prefill, self._tokens()[0]))

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        """Bytes [B] of n [B] slots, where all scales fit float16 and the encoder is not `measured`."""
        encoder = self._encoder()
        return layout.dense(n, length) if encoder is None else encoder.cost(layout, n, length)

    @property
    def _costs(self) -> Any:
        encoder = self._encoder()
        if encoder is not None and encoder.measured:
            return self
        return (encoder, *(method._costs for method in self._tokens()))

    def _slots(self, prefill: Prefill, budget: Budget) -> Tensor:
        encoder, target = self._encoder(), budget.target(prefill.full_bytes())
        if encoder is None or not encoder.measured or target is None:
            return super()._slots(prefill, budget)
        return slots_within(target, self.most(prefill), lambda k: self.keep(prefill, k).nbytes())

    def floor(self, prefill: Prefill) -> Tensor:
        one = self.most(prefill).clamp(max=1)
        return prefill.remember(("floor", self), lambda: self.keep(prefill, one).nbytes())

    def flops(self, state: UserState, of: Sources) -> int:
        """The sum over its steps, and what settles the last token method, for which the encoder writes again."""
        encoder, tokens = self._encoder(), self._tokens()
        total = sum(step.flops(state, of) for step in self.steps if step is not encoder)
        if encoder is None:
            return total

        def writing(made: UserState) -> int:
            return encoder.flops(slotted(made), of)

        return total + writing(state) + (tokens[-1].settling(state, of, writing, encoder) if tokens else 0)


def _chains(step: Compressor) -> bool:
    return isinstance(step, TokenMethod) and step.family not in ("chain", "recompute")  # raw ids have no slots
