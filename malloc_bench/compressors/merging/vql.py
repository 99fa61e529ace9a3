"""Keys are entries of a codebook, and a slot is an entry: its size does not grow with the history."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, Sources, grows
from malloc_bench.compressors.quantization.codebooks import entries
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import (
    Codebook,
    Dense,
    Fitted,
    FromCodebook,
    Prefill,
    Sample,
    Segment,
    Slots,
    UserState,
    grouped,
)

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("vql")
@dataclass(frozen=True)
class VQL(Compressor):
    """Of each entry of a key codebook: how many events are nearest to it, and the mean of their values.

    codes: entries a layer and head, k-means over keys of training users; so many slots at most. The paper trains its
    codebook with the model; here it is fitted afterwards. A slot's position and time are the rounded means of its
    events'.
    """

    codes: int = 32

    family = "merging"
    paper = "VQL, arXiv 2508.17125 (abstract)"
    formula = "key = nearest entry, value = mean of the entry's events, mass = their number"
    growth = grows(memory="m L d", compress="m n L d", read="m L d")
    stores = "of each entry in use: a one-byte code, a mean value, a count, positions and times where they are read"

    def __post_init__(self) -> None:
        if not 1 <= self.codes <= 256:
            raise ValueError(f"vql: codes 1 to 256 are needed, not {self.codes}")

    @property
    def takes_budget(self) -> bool:
        return False

    def supports(self, backbone: "Backbone") -> str | None:
        two = set(backbone.fields) == {"keys", "values"} and backbone.has_slots
        return None if two else f"vql sums values by key, {backbone.name} has no slots of keys and values"

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        keys = {str(layer): x for (layer, field), x in sample.vectors.items() if field == "keys"}
        return Fitted({layer: entries(x, self.codes).unsqueeze(1) for layer, x in keys.items()})

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        layers = tuple((self._folded(prefill, layer),) for layer in prefill.layers)
        return UserState(layers, prefill.state.length)

    def _folded(self, prefill: Prefill, layer: int) -> Segment:
        assert prefill.fitted is not None
        keys, values, old = prefill.keys(layer).float(), prefill.values(layer), prefill.slots(layer)
        book = Codebook(prefill.fitted[str(layer)], 8, keys.shape[3], added=False)
        real = prefill.mask(layer).expand(keys.shape[:3])
        code = book.nearest(torch.where(real.unsqueeze(-1), keys, 0.0))[..., 0].long()
        code = torch.where(real, code, self.codes)  # padding: one more, which is cut off
        had = None if old.mass is None else torch.where(real, old.mass, 0.0)  # of an earlier compression: events each
        counts = real.float() if had is None else had
        mass = grouped(counts.unsqueeze(-1), code, self.codes)[..., 0]  # [B, H, codes]
        index = torch.arange(keys.shape[2], device=keys.device).double().expand(real.shape).unsqueeze(-1)
        when = grouped(index, code, self.codes, had)[..., 0] / mass.clamp(min=1)
        order = when.masked_fill(mass == 0, torch.inf).argsort(dim=-1, stable=True)  # in time order, unused ones last
        count = (mass > 0).sum(-1).int()
        width = int(count.max()) if count.numel() else 0
        order = order[..., :width]
        each = mass.gather(2, order).clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            """[B, H, S, D] -> [B, H, width, D]"""
            found = grouped(x, code, self.codes, had)
            return found.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[3])) / each.unsqueeze(-1)

        def whole(x: Tensor | None) -> Tensor | None:
            wide = None if x is None else x.double().unsqueeze(-1).expand(*real.shape, 1)
            return None if wide is None or x is None else mean(wide)[..., 0].round().to(x.dtype)

        places = old.places(keys.shape[2], prefill.state.length[:, None]).int() if prefill.uses_positions else None
        slots = Slots(count, whole(places), whole(old.timestamps), each)
        fields = {
            "keys": FromCodebook(order.byte().unsqueeze(-1), book),
            "values": Dense(mean(values).to(values.dtype)),
        }
        return Segment(fields, slots)

    def flops(self, state: UserState, of: Sources) -> int:
        """Every key against every entry."""
        shapes = [layer[0].fields["keys"].shape for layer in state.layers]
        return sum(2 * h * x.events * width * self.codes for x, (_, h, _, width) in zip(of, shapes))
