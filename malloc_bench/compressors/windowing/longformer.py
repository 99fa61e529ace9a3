"""Longformer: every layer sees a sliding window and a few global slots, and was trained so."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from malloc_bench.backbones.block import Places
from malloc_bench.compressors.base import Structural, grows
from malloc_bench.compressors.heads.shared import layers, swap
from malloc_bench.compressors.trimmed import NEVER, Banded, Trimmed, refusal
from malloc_bench.registry import register
from malloc_bench.state import Segment

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class WindowBlock(Banded):
    """Comes before a block's own class: slots beyond the window weigh nothing, and the plain pass skips them."""

    window: int
    first: int  # global slots

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        places = slots.positions.unsqueeze(-2)
        far = (queries.positions.unsqueeze(-1) - places > self.window) & (places >= self.first)
        return super().logits(q, segment, queries, slots).masked_fill(far, NEVER)

    def bands(self, slots: int) -> list[tuple[slice, Tensor]]:
        step, found = max(self.window, 32), []
        for start in range(0, max(slots, 1), step):
            stop, oldest = min(start + step, slots), max(start - self.window, 0)
            index = torch.cat([torch.arange(min(self.first, oldest)), torch.arange(oldest, stop)])
            found.append((slice(start, stop), index))
        return found


class WindowBackbone(Trimmed):
    def stays(self, layer: int, positions: Tensor, length: Tensor) -> Tensor:
        block = self.blocks[layer]
        return (positions >= length - block.window) | (positions < block.first)


@register("longformer")
@dataclass(frozen=True)
class Longformer(Structural):
    """A token sees the newest `window` events and the `globals` first ones in each layer (Beltagy et al., 2020).

    Events further back reach it through the layers between only, so that layers x window events count. From the paper:
    window and global slots, the same window in each layer. Ours: causal, so that global slots, the oldest events, see
    only what came before them; one map for both kinds, where the paper has a second one for global attention; no
    dilation. The paper's window is 512 of 4,096 tokens; 24 of 100 to 200 events here.
    """

    window: int = 24
    globals: int = 2

    family = "windowing"
    paper = "Longformer, Beltagy et al. 2020, arXiv 2004.05150"
    formula = "attention over slots i with t - i <= window, or i < globals"
    growth = grows(memory="w L d", read="w L d")
    stores = "keys, values and positions of the newest `window` and the first `globals` events, of no others"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1 or self.globals < 0:
            raise ValueError(f"longformer: window must be at least 1 and globals 0, not {self.window}, {self.globals}")

    def supports(self, backbone: "Backbone") -> str | None:
        return refusal(self.name, backbone)

    def adapt(self, backbone: "Backbone") -> None:
        for block in layers(backbone):
            vars(block).update(window=self.window, first=self.globals)
            swap(block, WindowBlock)
        swap(backbone, WindowBackbone)
        backbone.uses_positions, backbone.only_adds = True, False
