"""Backbones that keep only the slots that a later token may see; what `append` makes equals a prefill."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from malloc_bench.backbones.attention import AttentionBackbone
from malloc_bench.backbones.block import Block, Places
from malloc_bench.state import Dense, Events, Layer, Prefill, Segment, Slots, Stats, UserState, joined
from malloc_bench.state.slots import take

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

NEVER = -1e4  # a logit at which softmax's weight and SiLU with its gradient are exactly 0


class Banded(Block):
    """Comes before a block's own class: `logits` hides most slots, and the plain pass skips those of no use to a band
    of queries. Statistics are gathered by `causal_blocks`, as the own class's tiles know nothing of what is hidden."""

    in_tiles = Block.in_tiles

    def bands(self, slots: int) -> list[tuple[slice, Tensor]]:
        """Queries, some at a time, and which slots [K] any of them may see, oldest first."""
        raise NotImplementedError

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        b, _, s, _ = q.shape
        mixed = []
        for rows, index in self.bands(s):
            index = index.to(q.device)
            keys = Segment({k: Dense(v[:, :, index]) for k, v in own.items()}, Slots(torch.full((b, 1), len(index))))
            mask = (index <= torch.arange(rows.start, rows.stop, device=q.device)[:, None])[None, None]
            logits = self.logits(q[:, :, rows], keys, asked.rows(rows), places.rows(index))
            mixed.append(self.mix(self.weigh([logits], [mask], [None])[0], keys))
        return torch.cat(mixed, dim=2)

    def causal_pairs(self, slots: int) -> int:
        return sum((rows.stop - rows.start) * len(index) for rows, index in self.bands(slots))


class Trimmed(AttentionBackbone):
    """Comes before a backbone's own class (`swap`): it attends as before and drops the slots that `stays` does not
    name. Slots keep their positions, as `append` must know who still sees them."""

    def stays(self, layer: int, positions: Tensor, length: Tensor) -> Tensor:
        """Which slots the token at position `length` [B, 1, 1], or a later one, may see: [B, 1, S] bool."""
        raise NotImplementedError

    def prefill(self, events: Events, users: Tensor | None = None, stats: Stats = Stats(), seed: int = 0) -> Prefill:
        full = super().prefill(events, users, stats, seed)  # type: ignore[safe-super]
        state, seen = self._trimmed(joined(full.state), {name: getattr(full, name) for name in COLUMNS})
        return replace(full, state=state, uses_positions=True, **seen)

    def _grown(self, state: UserState, own: list[dict[str, Tensor]], events: Events, positions: Tensor) -> UserState:
        grown = super()._grown(state, own, events, positions)  # type: ignore[safe-super]
        return self._trimmed(joined(grown))[0]

    def _trimmed(self, state: UserState, seen: dict[str, Any] | None = None) -> tuple[UserState, dict[str, Any]]:
        length = state.length[:, None, None]
        same = [getattr(block, "window", None) for block in self.blocks]
        return trimmed(state, lambda i, positions: self.stays(i, positions, length), same, seen)


COLUMNS = {
    "column_sum": 2,
    "window": 3,
    "standing": 2,
    "inputs": 1,
    "alike": 1,
}  # what is observed of slots, along which axis


def trimmed(
    state: UserState,
    stays: Callable[[int, Tensor], Tensor],
    same: Sequence[Hashable],
    seen: dict[str, Any] | None = None,
) -> tuple[UserState, dict[str, Any]]:
    """A state, `joined`, without the slots that `stays` (layer, positions [B, H', S]) does not name, the others in the
    order of their positions, and what was observed of them. Memories beside them stay.

    same: of each layer; those that shared their slots and are alike here share what is left.
    """
    layers: list[Layer] = []
    known = {name: x for name, x in (seen or {}).items() if x is not None}
    left: dict[str, Any] = {name: [] for name in known}
    done: dict[Hashable, Slots] = {}
    for i, (segment, *memories) in enumerate(state.layers):
        old = segment.slots
        assert old is not None and old.positions is not None, "as `joined` leaves them"
        stay = stays(i, old.positions) & old.mask(segment.width)
        count = stay.sum(-1)
        order = old.positions.masked_fill(~stay, torch.iinfo(old.positions.dtype).max).argsort(dim=-1, stable=True)
        index = order[..., : int(count.max()) if count.numel() else 0]
        key = id(old), same[i]
        if key not in done:
            done[key] = old.each(partial(_rows, index=index), count.to(old.count.dtype))
        fields = {k: Dense(take(v.dense(), index)) for k, v in segment.fields.items()}
        layers.append((Segment(fields, done[key]), *memories))
        for name, x in known.items():
            left[name].append(_columns(x[i], index, done[key].mask(index.shape[-1]), COLUMNS[name]))
    return replace(state, layers=tuple(layers)), left


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index.expand(-1, x.shape[1], -1))


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
