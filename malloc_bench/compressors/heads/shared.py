"""What the head variants have in common: query heads that share what is stored, and layers made narrower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from malloc_bench.backbones.block import Block, Places
from malloc_bench.backbones.sums import Weigher
from malloc_bench.state import Dense, Ragged, Segment, Vectors
from malloc_bench.state.vectors import Read

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@dataclass(frozen=True, eq=False)
class Shared(Vectors):
    """Stored heads as query heads see them, each `group` times; nothing is copied, the group's queries lie in a row."""

    vectors: Vectors
    group: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, d = self.vectors.shape
        return b, h * self.group, s, d

    def dense(self) -> Tensor:
        return self.vectors.dense().unsqueeze(2).expand(-1, -1, self.group, -1, -1).flatten(1, 2)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        return self.vectors.parts(count)

    def load(self, read: Read, count: Tensor | None) -> Shared:
        return Shared(self.vectors.load(read, count), self.group)

    def dot(self, q: Tensor) -> Tensor:
        return self._unfold(self.vectors.dot(self._fold(q)), q)

    def mix(self, w: Tensor) -> Tensor:
        return self._unfold(self.vectors.mix(self._fold(w)), w)

    def flops(self, queries: int) -> int:
        return self.vectors.flops(queries * self.group)

    def _fold(self, x: Tensor) -> Tensor:
        b, h, m, d = x.shape
        return x.reshape(b, h // self.group, self.group * m, d)

    def _unfold(self, x: Tensor, like: Tensor) -> Tensor:
        return x.reshape(*like.shape[:3], x.shape[-1])


class SharedHeads(Block):
    """Comes before a block's own class (`swap`): its query heads share the stored ones, in groups of neighbours."""

    def seen(self, segment: Segment) -> Segment:
        """`keys` and `values` as the query heads see them."""
        return Segment({k: Shared(v, self.heads // v.shape[1]) for k, v in segment.fields.items()}, segment.slots)

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        places = Places(self._each(slots.positions), None if slots.times is None else self._each(slots.times))
        return super().logits(q, self.seen(segment), queries, places)

    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        known = [None if mass is None else self._each(mass) for mass in masses]
        return super().weigh(logits, [self._each(mask) for mask in masks], known)  # type: ignore[safe-super]

    def mix(self, weights: Tensor, segment: Segment) -> Tensor:
        return super().mix(weights, self.seen(segment))

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        """The block's own plain pass, over copies: there every slot is a query, and fused kernels want equal heads."""
        return super().causal(q, self._copies(own), places, asked)

    def in_tiles(self, own: dict[str, Tensor], places: Places, asked: Places) -> tuple[Tensor, Tensor, Weigher] | None:
        return super().in_tiles(self._copies(own), places, asked)

    def _copies(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        seen = self.seen(Segment({k: Dense(v) for k, v in own.items()}, None))
        return {k: v.dense() for k, v in seen.fields.items()}

    def logit_flops(self, queries: int, segment: Segment) -> int:
        return super().logit_flops(queries, self.seen(segment))

    def attend_flops(self, queries: int, segment: Segment) -> int:
        return super().attend_flops(queries, self.seen(segment))

    def _each(self, x: Tensor) -> Tensor:
        """What is known of the slots of each stored head, [B, H', ...], for each query head; one for all stays one."""
        return x if x.shape[1] == 1 else x.repeat_interleave(self.heads // x.shape[1], 1)


def layers(backbone: Backbone) -> list[Block]:
    return list(getattr(backbone, "blocks", ()))


def refusal(name: str, backbone: Backbone) -> str | None:
    """Why the layers of a backbone cannot be made narrower, or None."""
    if layers(backbone) and all(getattr(block, "fused", None) for block in layers(backbone)):
        return None
    return f"{name} narrows a layer's map to keys and values, and {backbone.name} has no such map that may be narrowed"


def outputs(block: Block) -> dict[str, Tensor]:
    """Which outputs of the fused map make each part."""
    widths = list(block.parts.values())
    return dict(zip(block.parts, torch.arange(sum(widths)).split(widths)))


def narrow(block: Block, kept: dict[str, Tensor]) -> None:
    """Cut the fused map down to the outputs that each part keeps: what stays begins with the weights that it had."""
    linear, index = getattr(block, str(block.fused)), torch.cat(list(kept.values()))
    linear.weight = nn.Parameter(linear.weight.detach()[index])
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach()[index])
    linear.out_features = len(index)
    block.parts = {name: len(rows) for name, rows in kept.items()}


def swap(block: Block, variant: type) -> None:
    """Put a variant before the block's own class, as torch's parametrizations do."""
    own = type(block)
    block.__class__ = type(f"{variant.__name__}{own.__name__}", (variant, own), {})
