"""Which slots to keep: methods that choose or make k slots, and the one place where scores become slots."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from malloc_bench import kernels
from malloc_bench.compressors.base import Compressor, Encoder, Sources, grows
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget, Layout, dense_layout, slots_within
from malloc_bench.state import Dense, Prefill, Segment, Slots, UserState, take

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


class TokenMethod(Compressor):
    """Keeps or makes k slots of each user, the most that fit the budget.

    even: every layer and head gets the same k; else k is the total, see division.py. remembers: it leaves a memory
    beside its slots.
    """

    even: ClassVar[bool] = True
    remembers: ClassVar[bool] = False
    growth = grows()

    def supports(self, backbone: Backbone) -> str | None:
        return None if backbone.has_slots else f"{backbone.name} keeps a memory of constant size: it has no slots"

    @abstractmethod
    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        """A state of k [B] slots (0 <= k <= `most`) in every layer and head; layers that have fewer keep all."""

    def settled(
        self, prefill: Prefill, state: UserState, write: Callable[[UserState], UserState], encoder: Encoder
    ) -> UserState:
        """`state`, which `keep` made, given the encoder and how it will `write`; itself where that changes nothing."""
        return state

    def settling(self, state: UserState, of: Sources, writing: Callable[[UserState], int], encoder: Encoder) -> int:
        """FLOPs of `settled`; writing: those of the encoder, of a state that it has made."""
        return 0

    @abstractmethod
    def layout(self, prefill: Prefill) -> Layout:
        """What the kept slots of a Prefill of one stack take beside their vectors."""

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        """Bytes [B] of a state of n [B] slots."""
        return layout.dense(n, length)

    def most(self, prefill: Prefill, slots: int | None = None) -> Tensor:
        """The largest k [B] there is, or the one that comes to so many slots in every layer and head."""
        length = torch.stack([view.rows(0) for view in prefill.apart()]).sum(0)
        return length if slots is None else length.clamp(max=slots)

    def pieces(self, prefill: Prefill) -> tuple[Layout, ...]:
        """What is sized by itself, here each stack: the bytes of a state are their sum."""
        return tuple(self.layout(view) for view in prefill.apart())

    def spread(self, prefill: Prefill, k: Tensor) -> Sequence[Tensor]:
        """How many slots [B] each of `pieces` has at k [B]."""
        return [k.minimum(view.rows(0)) for view in prefill.apart()]

    def sizes(self, prefill: Prefill) -> Callable[[Tensor], Tensor]:
        """k [B] -> bytes [B] of a state of k: the sum over its pieces, which share one length."""
        length, pieces = prefill.state.length.long(), self.pieces(prefill)
        alike = {layout: [i for i, other in enumerate(pieces) if other == layout] for layout in pieces}

        def bytes_of(k: Tensor) -> Tensor:
            each, total = self.spread(prefill, k), torch.full_like(k, -COUNT_BYTES * (len(pieces) - 1))
            for layout, which in alike.items():  # in one go: a search asks often
                cost = self.cost(layout, torch.cat([each[i] for i in which]), length.repeat(len(which)))
                total = total + cost.view(len(which), len(length)).sum(0)
            return total

        return bytes_of

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if budget is None:
            raise ValueError(f"{self.name} needs a budget")
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        return self.kept(prefill, self.slots(prefill, budget))

    def kept(self, prefill: Prefill, k: Tensor) -> UserState:
        """`keep`; the same state again for a budget that leaves the same slots as the one before, such as all."""
        last = prefill.memo.get("kept")
        if last is None or last[0] != self or not torch.equal(last[1], k):
            last = prefill.memo["kept"] = self, k, self.keep(prefill, k)
        state: UserState = last[2]
        return state

    def slots(self, prefill: Prefill, budget: Budget) -> Tensor:
        """k [B] for a budget; worked out once per Prefill, budget, what that is a share of, and layouts."""
        whole = None if prefill.whole is None else tuple(prefill.whole.tolist())
        key = ("k", budget, whole, self.pieces(prefill), self._costs)
        return prefill.remember(key, lambda: self._slots(prefill, budget))

    @property
    def _costs(self) -> Any:
        """Methods of the same pieces and equal `_costs` cost the same."""
        return type(self).cost

    def _slots(self, prefill: Prefill, budget: Budget) -> Tensor:
        target = budget.target(prefill.full_bytes())
        if target is None:
            return self.most(prefill, budget.slots)
        return slots_within(target, self.most(prefill), self.sizes(prefill))

    def floor(self, prefill: Prefill) -> Tensor:
        return self.sizes(prefill)(self.most(prefill).clamp(max=1))


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
        """How many oldest and newest slots stay whatever their score, at most k in all; k [B, H or 1], of each head."""
        return 0, 0

    def layout(self, prefill: Prefill) -> Layout:
        return dense_layout(prefill, "head" if self.per_head else "layer")

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        """k [B], or of each layer and head, [B, L, H or 1]: a head may keep none."""
        layers = []
        for layer in prefill.layers:
            own = prefill.slots(layer)
            kept = (k[:, None] if k.dim() == 1 else k[:, layer]).minimum(own.count)  # stacks of fewer events keep all
            index = self.index(prefill, layer, kept)
            slots = kept_slots(own, index, kept, prefill.state.length if prefill.uses_positions else None)
            layers.append((gather(prefill.segment(layer), index, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def index(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        """Kept slots in time order, [B, H or 1, max k]; k [B] or [B, H or 1]."""
        count = prefill.slots(layer).count.long()
        order = prefill.remember(("order", self, layer), lambda: ranked(self._scored(prefill, layer), count))
        heads = next(iter(prefill.segment(layer).fields.values())).shape[1] if self.per_head else 1
        oldest, newest = self.forced(k)
        return chosen(order, count, k, oldest, newest).expand(-1, heads, -1)

    def _scored(self, prefill: Prefill, layer: int) -> Tensor:
        """`scores`, of a shape that broadcasts over no users or slots unseen: [B, S] would where B is H."""
        b, h, s, _ = next(iter(prefill.segment(layer).fields.values())).shape
        scores, heads = self.scores(prefill, layer), (1, h) if self.per_head else (1,)
        shape = list(getattr(scores, "shape", ()))
        if shape not in [[b, n, s] for n in heads]:
            found = shape if isinstance(scores, Tensor) else type(scores).__name__
            want = f"[{b}, {' or '.join(map(str, sorted({*heads})))}, {s}]"
            raise ValueError(
                f"{self.name}: scores must be [B, H, S] (H 1 where all heads share), here {want}, not {found}"
            )
        return scores


def ranked(scores: Tensor, count: Tensor) -> Tensor:
    """Slots by falling score, the newer first where scores tie, padding last: [B, H, S] -> indices [B, H, S].

    Nothing is added to a score: in float32 a large constant would erase it; nor are whole numbers, be they seconds, cut
    to 32 bits. Raises ValueError where the score of a real slot is not finite.
    """
    real = torch.arange(scores.shape[-1], device=scores.device) < count.unsqueeze(-1)
    scores = scores if scores.is_floating_point() else scores.double()
    known = torch.where(real, scores, 0)
    if known.numel() and not bool(known.abs().amax().isfinite()):
        wrong = int((~known.isfinite()).sum())
        raise ValueError(f"scores of real slots are NaN or infinite: {wrong} of {int(real.expand_as(scores).sum())}")
    return ascending(torch.where(real, scores, -torch.inf)).flip(-1)


def ascending(x: Tensor) -> Tensor:
    """Indices that sort x [..., S] along its last dimension, the first of equal numbers first; int64.

    On CPUs what 32 bits hold is sorted as one whole number with its index: nothing ties then, and numpy's sort of whole
    numbers takes a fifth of the time of a stable sort of torch.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return x.argsort(dim=-1, stable=True)
    bits = (x.detach().float() + 0.0).view(torch.int32)  # -0 + 0 is 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # whole numbers in the order of the floats
    keys = (bits.long() << 32) | torch.arange(x.shape[-1])
    keys.numpy().sort(axis=-1)
    return keys & 0xFFFFFFFF


def chosen(order: Tensor, count: Tensor, k: Tensor, oldest: Tensor | int, newest: Tensor | int) -> Tensor:
    """The kept slots in time order, [B, H, max k]: forced ones first, then by `order`; order [B, H, S].

    k, oldest, newest: [B], or [B, H or 1], of each head. Raises ValueError where more are forced than are kept.
    """
    if isinstance(oldest, int) and isinstance(newest, int) and oldest == 0 and newest == 0:
        return filled(order, None, k)
    first, last = (beside_slots(x) if isinstance(x, Tensor) else x for x in (oldest, newest))
    if bool((first + last > beside_slots(k)).any()):
        raise ValueError(
            "forced(k) names more slots than the k that a head keeps: at most k in all, such as k // 4 each"
        )
    count = count.unsqueeze(-1)
    forced = order >= count - last
    if bool((count < order.shape[-1]).any()):  # padding
        forced &= order < count
    if not isinstance(oldest, int) or oldest:
        forced |= order < first
    return filled(order, forced, k)


def filled(order: Tensor, forced: Tensor | None, k: Tensor) -> Tensor:
    """The kept slots in time order, [B, H, max k]: of `order` [B, H, S] the `forced` ones, and the first of the rest;
    forced [B, H, S] bool, in that order; k [B], or [B, H or 1], of each head."""
    k = beside_slots(k)
    h = max(order.shape[1], k.shape[1])
    order = order.expand(-1, h, -1)
    b, _, s = order.shape
    size = int(k.max()) if b else 0
    wanted = torch.arange(s, device=order.device) < k
    if forced is not None:
        free = ~forced
        wanted = forced | (free & (free.cumsum(-1) <= k - forced.sum(-1, keepdim=True)))
    if (known := kernels.sorted_places(order, wanted.expand(b, h, s), size)) is not None:
        return known
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order, wanted.expand(b, h, s))
    found = kept.view(-1).nonzero().view(-1) % max(s, 1)  # in time order, head after head
    if len(found) == b * h * size:
        return found.view(b, h, size)
    index = torch.zeros(b, h, size, dtype=torch.long, device=order.device)
    return index.masked_scatter_(torch.arange(size, device=order.device) < kept.sum(-1, keepdim=True), found)


def beside_slots(k: Tensor) -> Tensor:
    """Numbers of each user [B] or head [B, H], as they stand beside slots: [B, H or 1, 1]."""
    return k[:, None, None] if k.dim() == 1 else k.unsqueeze(-1)


def gather(segment: Segment, index: Tensor, slots: Slots) -> Segment:
    """The segment's vectors at index [B, H or 1, K], and what is known of them."""
    return Segment({name: Dense(take(v.dense(), index)) for name, v in segment.fields.items()}, slots)


def kept_slots(old: Slots, index: Tensor, k: Tensor, length: Tensor | None) -> Slots:
    """What is stored of the slots at index [B, H', K], of which the first k [B] or [B, H'] count, beside their vectors.

    length: [B] events in all; None where positions need not be stored.
    """
    place = None
    if length is not None and old.positions is None:
        place = (index + (length[:, None] - old.count).unsqueeze(-1)).to(torch.int32)
    elif length is not None and old.positions is not None:
        place = take(old.positions, index)
    times = None if old.timestamps is None else take(old.timestamps, index)
    mass = None if old.mass is None else take(old.mass, index)
    return Slots(beside_slots(k).squeeze(-1).to(torch.int32), place, times, mass)
