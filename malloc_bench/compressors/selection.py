"""Which slots to keep: methods that choose or make k slots, and the one place where scores become slots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget, Layout, dense_layout, slots_within
from malloc_bench.state import Dense, Prefill, Segment, Slots, UserState, take

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class TokenMethod(Compressor):
    """Keeps or makes k slots of each user, the most that fit the budget."""

    def supports(self, backbone: Backbone) -> str | None:
        return None if backbone.has_slots else f"{backbone.name} keeps a memory of constant size: it has no slots"

    @abstractmethod
    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        """A state of k [B] slots (0 <= k <= the length) in every layer and head; layers that have fewer keep all."""

    @abstractmethod
    def layout(self, prefill: Prefill) -> Layout:
        """What the kept slots of a Prefill of one stack take beside their vectors."""

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        """Bytes [B] of a state of n [B] slots."""
        return layout.dense(n, length)

    def sizes(self, prefill: Prefill) -> Callable[[Tensor], Tensor]:
        """n [B] -> bytes [B] of a state of at most n slots in every layer: the sum over stacks, one length for all."""
        length = prefill.state.length.long()
        stacks = [(self.layout(view), view.rows(0)) for view in prefill.apart()]

        def bytes_of(n: Tensor) -> Tensor:
            total = sum((self.cost(layout, n.minimum(own), length) for layout, own in stacks), torch.zeros_like(n))
            return total - COUNT_BYTES * (len(stacks) - 1)

        return bytes_of

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if budget is None:
            raise ValueError(f"{self.name} needs a budget")
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        return self.keep(prefill, self.slots(prefill, budget))

    def slots(self, prefill: Prefill, budget: Budget) -> Tensor:
        """k [B] for a budget; worked out once per Prefill, budget and layouts."""
        layouts = tuple(self.layout(view) for view in prefill.apart())
        return prefill.remember(("k", budget, layouts, self._costs), lambda: self._slots(prefill, budget))

    @property
    def _costs(self) -> Any:
        """Methods of the same layout and equal `_costs` cost the same."""
        return type(self).cost

    def _slots(self, prefill: Prefill, budget: Budget) -> Tensor:
        length = torch.stack([view.rows(0) for view in prefill.apart()]).sum(0)
        target = budget.target(prefill.full_bytes())
        if target is None:
            return length.clamp(max=budget.slots)
        return slots_within(target, length, self.sizes(prefill))

    def floor(self, prefill: Prefill) -> Tensor:
        return self.sizes(prefill)(prefill.state.length.long().clamp(max=1))


class Eviction(TokenMethod):
    """Keeps the k slots that come first by (forced, score, newer); an implementation writes `scores`.

    `forced` slots stay whatever their score, at most half of k. per_head False: `scores` are the same for all heads.
    reads: the fields of a state that `scores` looks at; backbones that store others are skipped.
    """

    per_head: ClassVar[bool] = True
    reads: ClassVar[tuple[str, ...]] = ()

    def supports(self, backbone: Backbone) -> str | None:
        missing = [field for field in self.reads if field not in backbone.fields]
        why = f"{self.name} scores {missing[0]}, {backbone.name} stores {backbone.fields[0]}" if missing else None
        return super().supports(backbone) or why

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        """[B, H or 1, S], higher stays; what stands beyond a user's count is not read.

        Real slots need finite scores: infinities tie, and a tie keeps the newer slot, which would pass as a method. A
        slot that must stay is `forced`.
        """
        raise TypeError(f"{type(self).__name__} must define scores(prefill, layer) -> (B, H, S)")

    def forced(self, k: Tensor) -> tuple[Tensor | int, Tensor | int]:
        """How many oldest and newest slots stay whatever their score; k [B]."""
        return 0, 0

    def layout(self, prefill: Prefill) -> Layout:
        return dense_layout(prefill, "head" if self.per_head else "layer")

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        layers = []
        for layer in prefill.layers:
            own = prefill.slots(layer)
            kept = k.minimum(own.count.amin(1))  # stacks of fewer events keep all of theirs
            index = self.index(prefill, layer, kept)
            slots = kept_slots(own, index, kept, prefill.state.length if prefill.uses_positions else None)
            layers.append((gather(prefill.segment(layer), index, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        """Kept slots in time order, [B, H or 1, max k]."""
        count = prefill.slots(layer).count.long()
        order = prefill.remember(("order", self, layer), lambda: ranked(self.scores(prefill, layer), count))
        heads = next(iter(prefill.segment(layer).fields.values())).shape[1] if self.per_head else 1
        oldest, newest = self.forced(k)
        return chosen(order, count, k, oldest, newest).expand(-1, heads, -1)


def ranked(scores: Tensor, count: Tensor) -> Tensor:
    """Slots by falling score, the newer first where scores tie, padding last: [B, H, S] -> indices [B, H, S].

    Nothing is added to a score: in float32 a large constant would erase it. Raises ValueError where the score of a
    real slot is not finite.
    """
    width = scores.shape[-1]
    real = torch.arange(width, device=scores.device) < count.unsqueeze(-1)
    scores = scores.masked_fill(~real, -torch.inf)
    if wrong := int((real & ~scores.isfinite()).sum()):
        raise ValueError(f"scores of real slots are NaN or infinite: {wrong} of {int(real.expand_as(scores).sum())}")
    return width - 1 - scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices


def chosen(order: Tensor, count: Tensor, k: Tensor, oldest: Tensor | int, newest: Tensor | int) -> Tensor:
    """The k [B] kept slots in time order, [B, H, max k]: forced ones first, then by `order`; order [B, H, S]."""
    if isinstance(oldest, int) and isinstance(newest, int) and oldest == 0 and newest == 0:
        return filled(order, None, k)
    first, last = (x.view(-1, 1, 1) if isinstance(x, Tensor) else x for x in (oldest, newest))
    return filled(order, (order < first) | ((order >= count.unsqueeze(-1) - last) & (order < count.unsqueeze(-1))), k)


def filled(order: Tensor, forced: Tensor | None, k: Tensor) -> Tensor:
    """The k [B] kept slots in time order, [B, H, max k]: of `order` [B, H, S] the `forced` ones, and the first of the
    rest; forced [B, H, S] bool, in that order."""
    b, h, s = order.shape
    size = int(k.max()) if b else 0
    k = k.view(b, 1, 1)
    wanted = torch.arange(s, device=order.device) < k
    if forced is not None:
        free = ~forced
        wanted = forced | (free & (free.cumsum(-1) <= k - forced.sum(-1, keepdim=True)))
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, wanted.expand(b, h, s))
    place = torch.where(kept, kept.cumsum(-1) - 1, size)
    index = torch.zeros(b, h, size + 1, dtype=torch.long, device=order.device)
    return index.scatter_(2, place, torch.arange(s, device=order.device).expand(b, h, s))[..., :size]


def gather(segment: Segment, index: Tensor, slots: Slots) -> Segment:
    """The segment's vectors at index [B, H or 1, K], and what is known of them."""
    return Segment({name: Dense(take(v.dense(), index)) for name, v in segment.fields.items()}, slots)


def kept_slots(old: Slots, index: Tensor, k: Tensor, length: Tensor | None) -> Slots:
    """What is stored of the slots at index [B, H', K], of which the first k [B] count, beside their vectors.

    length: [B] events in all; None where positions need not be stored.
    """
    place = None
    if length is not None and old.positions is None:
        place = (index + (length[:, None] - old.count).unsqueeze(-1)).to(torch.int32)
    elif length is not None and old.positions is not None:
        place = take(old.positions, index)
    times = None if old.timestamps is None else take(old.timestamps, index)
    mass = None if old.mass is None else take(old.mass, index)
    return Slots(k.to(torch.int32)[:, None], place, times, mass)
