"""Keep each layer's input in few bits and make keys and values of it when they are read."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.recompute.inputs import normed, refusal
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Normed, Prefill, Stats, Summed, UserState, Vectors, quantize

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("xquant")
@dataclass(frozen=True)
class XQuant(Compressor):
    """A layer's input in `bits` bits instead of its keys and values: half of the codes at the same bits.

    group: channels that share a scale and a zero point, None for the whole vector (the paper's 128 is wider than most
    recommenders). across (XQuant-CL): the lowest layer's input, then only what each layer adds to what is read of the
    layer below; pays in deep stacks whose layers change little, with two layers it is much the same. Otherwise the
    input is kept behind the layer norm, where all vectors are of one size.
    """

    bits: int = 4
    group: int | None = None
    across: bool = False

    family = "recompute"
    paper = "XQuant, Tomar et al., 2025, arXiv 2508.10395"
    formula = "k = act(W_k x~), v = act(W_v x~), x~ = norm(x) rounded; across: x~_l = x~_(l-1) + rounded x_l - x~_(l-1)"
    growth = grows(read="n L d")
    stores = "bit-packed codes of one vector a slot and layer, a scale and a zero point a group"

    def __post_init__(self) -> None:
        if self.bits not in (8, 4, 3, 2, 1) or (self.group is not None and self.group < 1):
            raise ValueError(f"xquant: bits 8, 4, 3, 2 or 1 and group >= 1 are needed, not {self}")

    @property
    def needs(self) -> Stats:
        return Stats(inputs=True, projections=True)

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal(self.name, backbone, smaller=False)

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers, below = [], None
        for layer in prefill.layers:
            projection, mask = prefill.projection(layer), prefill.mask(layer)
            below = None if layer % (len(prefill.layers) // prefill.stacks) == 0 else below
            x = prefill.layer_input(layer).unsqueeze(1) if self.across else normed(prefill, layer)
            rest = x if below is None else x - below.dense()
            base: Vectors = quantize(rest, mask, self.bits, self.group or x.shape[3], "width")
            if self.across:
                below = base if below is None else Summed(below, base)
                base = Normed(below, projection)
            layers.append((projection.rebuilt(prefill.segment(layer), base),))
        return UserState(tuple(layers), prefill.state.length)
