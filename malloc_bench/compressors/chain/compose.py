"""Several methods in a row, sized together."""

from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

from torch import Tensor

from malloc_bench.compressors.base import Budget, Compressor, Encoder, get_compressor, slots_within
from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("compose")
@dataclass(frozen=True)
class Compose(Compressor):
    """Token methods in a row, then at most one encoder; the chain as a whole lands on the budget.

    steps: as in a suite: names, {name: {parameter: value}}, or compressors. Where several token methods share a
    budget, each does an equal share of the reduction (slots fall by the same factor).
    """

    steps: tuple[Any, ...] = ()

    family = "chain"
    paper = "none: combinations across families, which MALLOC (arXiv 2601.20234) leaves open"
    formula = "encode(keep(... keep(state)))"
    stores = "what the last token method keeps, written as the encoder writes it"

    def __post_init__(self) -> None:
        steps = tuple(_step(step) for step in self.steps)
        object.__setattr__(self, "steps", steps)
        tokens = self._tokens()
        if len(steps) < 2 or len(tokens) < len(steps) - 1 or not all(isinstance(t, TokenMethod) for t in tokens):
            raise ValueError("compose: token methods, then at most one encoder, two steps or more are needed")
        for later in tokens[1:]:
            if later.needs != Stats():
                raise ValueError(f"compose: {later.name} needs attention statistics, so it must come first")

    def _tokens(self) -> tuple[TokenMethod, ...]:
        return self.steps[:-1] if self._encoder() else self.steps

    def _encoder(self) -> Encoder | None:
        last = self.steps[-1] if self.steps else None
        return last if isinstance(last, Encoder) and not last.takes_budget else None

    @property
    def needs(self) -> Stats:
        return reduce(Stats.__or__, (step.needs for step in self.steps), Stats())

    def supports(self, backbone: "Backbone") -> str | None:
        return next((why for step in self.steps if (why := step.supports(backbone))), None)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if budget is None:
            raise ValueError("compose needs a budget")
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        length = prefill.state.length.long()
        target = budget.target(prefill.remember("full bytes", prefill.state.nbytes))
        k = length.clamp(max=budget.slots) if target is None else slots_within(target, length, self._cost(prefill))
        view, tokens = prefill, self._tokens()
        for link, method in enumerate(tokens, start=1):
            share = length.double() * (k / length.clamp(min=1)).double() ** (link / len(tokens))
            view = view.over(method.keep(view, share.round().long().maximum(k) if link < len(tokens) else k))
        encoder = self._encoder()
        return view.state if encoder is None else encoder.encode(view.state)

    def _cost(self, prefill: Prefill) -> Any:
        layout, length, encoder = self._tokens()[-1].layout(prefill), prefill.state.length.long(), self._encoder()
        if len(self._tokens()) > 1:  # indices or mass that an earlier link made stay
            layouts = [method.layout(prefill) for method in self._tokens()]
            layout = replace(
                layout, **{name: max(getattr(each, name) for each in layouts) for name in ("counts", "index", "times")}
            )

        def cost(n: Tensor) -> Tensor:
            return layout.dense(n, length) if encoder is None else encoder.cost(layout, n, length)

        return cost

    def floor(self, prefill: Prefill) -> Tensor:
        return self._cost(prefill)(prefill.state.length.long().clamp(max=1))

    def flops(self, layers: int, heads: int, slots: int, width: int) -> int:
        return sum(step.flops(layers, heads, slots, width) for step in self.steps)


def _step(step: Any) -> Compressor:
    if isinstance(step, Compressor):
        return step
    if isinstance(step, str):
        return get_compressor(step)
    if isinstance(step, dict) and len(step) == 1:
        ((name, params),) = step.items()
        return get_compressor(name, **(params or {}))
    raise ValueError(f"compose: a step is a name or {{name: {{parameter: value}}}}, not {step!r}")
