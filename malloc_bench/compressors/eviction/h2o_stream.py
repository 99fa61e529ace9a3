"""Heavy hitters as the paper runs them: sums that go on with the stream, one eviction for each new event."""

from dataclasses import dataclass, replace

from torch import Tensor

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.selection import Eviction
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Segment, Stats, UserState, take


@register("h2o_stream")
@dataclass(frozen=True)
class H2OStream(Eviction):
    """Keeps the newest half of k and, of the rest, the slots that drew most attention; carries their sums along.

    An update adds to the sums what new events paid and evicts by the total, as the paper does at every token; what an
    evicted slot drew is gone with it. The first compression starts from the sums over the whole history, which a
    prefill has anyway. Sums favour old slots, which more queries see: from scratch `h2o`, with means, does better.
    """

    family = "eviction"
    paper = "H2O: Heavy-Hitter Oracle, Zhang et al., NeurIPS 2023, arXiv 2306.14048, algorithm 1"
    formula = "score = sum so far of |attention weight| over the queries since the slot came; the newest k/2 stay"
    growth = grows(compress="h n^2 L")
    stores = (
        "keys, values and a float32 sum of k events per layer and head, and positions where the backbone reads them"
    )

    @property
    def needs(self) -> Stats:
        return Stats(column_sum=True)

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        received, carried = prefill.attention_received(layer), prefill.slots(layer).score
        return received if carried is None else received + carried

    def forced(self, k: Tensor) -> tuple[int, Tensor]:
        return 0, k // 2

    def layout(self, prefill: Prefill) -> Layout:
        layout = super().layout(prefill)
        return replace(layout, score=layout.lists)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        state, layers = super().keep(prefill, k), []
        for layer, (segment,) in enumerate(state.layers):
            assert segment.slots is not None
            index = self.index(prefill, layer, segment.slots.count[:, 0].long())
            score = take(self.scores(prefill, layer).float(), index)
            layers.append((Segment(segment.fields, replace(segment.slots, score=score)),))
        return UserState(tuple(layers), state.length)
