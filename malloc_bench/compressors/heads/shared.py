"""What the head variants have in common: query heads that share what is stored, and layers made narrower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
        places = Places(self.each(slots.positions), None if slots.times is None else self.each(slots.times))
        return super().logits(q, self.seen(segment), queries, places)

    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        known = [None if mass is None else self.each(mass) for mass in masses]
        return super().weigh(logits, [self.each(mask) for mask in masks], known)  # type: ignore[safe-super]

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

    def each(self, x: Tensor) -> Tensor:
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
    block.parts_before, block.parts = block.parts, {name: len(rows) for name, rows in kept.items()}


def converted(
    weights: Mapping[str, Tensor], backbone: Backbone, change: Callable[[Block, dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Trained weights for a narrowed backbone: of each layer's fused map, the rows [out, in (+ 1, the bias)] of every
    part as `change` makes them; what `change` names beside the block's parts is a tensor of the block's own."""
    made = dict(weights)
    for i, block in enumerate(layers(backbone)):
        name = f"blocks.{i}.{block.fused}"
        whole, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        whole = whole if bias is None else torch.cat([whole, bias[:, None]], 1)
        parts = change(block, dict(zip(block.parts_before, whole.split(list(block.parts_before.values())))))
        rows = torch.cat([parts.pop(part) for part in block.parts])
        made[f"{name}.weight"] = rows if bias is None else rows[:, :-1]
        made |= {} if bias is None else {f"{name}.bias": rows[:, -1]}
        made |= {f"blocks.{i}.{part}": x for part, x in parts.items()}
    return made


def swap(module: nn.Module, variant: type) -> None:
    """Put a variant before the own class of a block or backbone, as torch's parametrizations do."""
    own = type(module)
    module.__class__ = type(f"{variant.__name__}{own.__name__}", (variant, own), {})
