"""Backbones that keep only the slots that a later token may see; what `append` makes equals a prefill."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import Block
from malloc_bench.state import Dense, Events, Layer, Prefill, Segment, Slots, Stats, UserState, joined
from malloc_bench.state.slots import take

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

NEVER = -1e4  # a logit at which softmax's weight and SiLU with its gradient are exactly 0


class Trimmed(AttentionBackbone):
    """Comes before a backbone's own class (`swap`): it attends as before and drops the slots that `stays` does not
    name. Slots keep their positions, as `append` must know who still sees them."""

    def stays(self, layer: int, positions: Tensor, length: Tensor) -> Tensor:
        """Which slots the token at position `length` [B, 1, 1], or a later one, may see: [B, 1, S] bool."""
        raise NotImplementedError

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        full = super().prefill(events, users, stats, seed)  # type: ignore[safe-super]
        state, kept = self._trimmed(joined(full.state))
        seen: dict[str, Any] = {}
        for name, axis in (("column_sum", 2), ("window", 3), ("inputs", 1)):
            if (known := getattr(full, name)) is not None:
                seen[name] = [_columns(x, index, mask, axis) for x, (index, mask) in zip(known, kept)]
        return replace(full, state=state, uses_positions=True, **seen)

    def _grown(self, state: UserState, own: list[dict[str, Tensor]], events: Events, positions: Tensor) -> UserState:
        grown = super()._grown(state, own, events, positions)  # type: ignore[safe-super]
        return self._trimmed(joined(grown))[0]

    def _trimmed(self, state: UserState) -> tuple[UserState, list[tuple[Tensor, Tensor]]]:
        """The state with one segment a layer, and of each layer which slots [B, H', K] it kept, and which are real."""
        layers: list[Layer] = []
        kept: list[tuple[Tensor, Tensor]] = []
        length, done = state.length[:, None, None], dict[Any, Any]()
        for i, (segment,) in enumerate(state.layers):
            old = segment.slots
            assert old is not None and old.positions is not None, "as `joined` leaves them"
            stays = self.stays(i, old.positions, length) & old.mask(segment.width)
            count = stays.sum(-1)
            index = (~stays).byte().argsort(dim=-1, stable=True)[..., : int(count.max()) if count.numel() else 0]
            key = id(old), getattr(self.blocks[i], "window", None)
            if key not in done:  # layers that keep the same share their slots
                known = ((name, getattr(old, name)) for name in ("positions", "timestamps", "mass"))
                columns = {
                    name: None if x is None else x.gather(2, index.expand(-1, x.shape[1], -1)) for name, x in known
                }
                slots = Slots(count.to(old.count.dtype), **columns)
                done[key] = slots
            slots = done[key]
            fields = {name: Dense(take(v.dense(), index)) for name, v in segment.fields.items()}
            layers.append((Segment(fields, slots),))
            kept.append((index, slots.mask(index.shape[-1])))
        return replace(state, layers=tuple(layers)), kept


def _columns(x: Tensor, index: Tensor, mask: Tensor, axis: int) -> Tensor:
    """What was observed of the kept slots: x along `axis` by index [B, 1, K], 0 where there is none."""
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape[0], index.shape[2]
    size = list(x.shape)
    size[axis] = index.shape[2]
    return x.gather(axis, index.reshape(shape).expand(size)).masked_fill(~mask.reshape(shape), 0.0)


def refusal(name: str, backbone: Backbone) -> str | None:
    """Why the attention of a backbone cannot be swapped, or None."""
    blocks: list[Block] = list(getattr(backbone, "blocks", ()))
    if isinstance(backbone, AttentionBackbone) and blocks and all(getattr(b, "fused", None) for b in blocks):
        return None
    return f"{name} swaps plain causal attention over events, which {backbone.name} does not have"
