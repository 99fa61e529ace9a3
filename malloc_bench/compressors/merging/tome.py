"""The most similar pairs of events become one, round after round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, grows
from malloc_bench.compressors.merging.clusters import ASKED, Clusters, compared_shapes, placed, unit
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats, UserState, grouped, take


@register("tome")
@dataclass(frozen=True)
class ToMe(Clusters):
    """Bipartite soft matching on keys: of every second slot the most similar merge into their match among the others.

    Each round at most halves the slots, so rounds go on until k are left; means are weighted by the events merged so
    far. The newest slot is among those that are matched, never merged away.
    """

    family = "merging"
    version_placed = 3
    needs_at_best = True
    paper = "Token Merging, Bolya et al., ICLR 2023, arXiv 2210.09461 (proportional attention)"
    formula = "a in A -> argmax over B of cos(k_a, k_b), the most similar first; key and value = mean, mass = events"
    growth = grows(compress="n^2 L d")
    stores = "k mean keys and values a layer and head, their counts, and mean positions where the backbone reads them"

    @property
    def needs(self) -> Stats:
        return ASKED

    def owners(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        made: list[_Left] = prefill.remember(("tome", layer), lambda: [_Left.of(prefill, layer)])
        turn, now = 0, made[0]
        while bool((now.number > k).any()):
            gone, most = now.number - k, now.number // 2
            if turn < len(made) and bool((gone >= most).all()):  # a round that smaller budgets begin with too
                turn += 1
                if turn == len(made):
                    made.append(now.merged(most))
                now = made[turn]
            else:
                turn, now = len(made), now.merged(gone.minimum(most))
        return now.owner

    def flops(self, state: UserState, of: Sources) -> int:
        """Cosines of every second slot that is left with the others, each round."""
        total = 0
        for x, (h, kept, width) in zip(of, compared_shapes(state)):
            left = x.events
            while left > kept:
                total += 2 * h * ((left + 1) // 2) ** 2 * width
                left -= min(left - kept, left // 2)
        return total


class _Left(NamedTuple):
    """Slots that are left: means x [B, H, N, D] and masses [B, H, N] of the events merged, their number [B], and in
    which of them each slot of the beginning is, owner [B, H, S]."""

    x: Tensor
    mass: Tensor
    number: Tensor
    owner: Tensor

    @staticmethod
    def of(prefill: Prefill, layer: int) -> _Left:
        x, slots = placed(prefill, layer), prefill.slots(layer)
        b, h, s, _ = x.shape
        mass = prefill.mask(layer).expand(b, h, s).to(x.dtype)
        mass = mass if slots.mass is None else mass * slots.mass
        count = slots.count[:, 0].long()  # alike in all heads
        return _Left(x, mass, count, torch.arange(s, device=x.device).expand(b, h, s))

    def merged(self, gone: Tensor) -> _Left:
        """After a round in which so many slots of each user, [B], at most half of them, merge into others."""
        x, mass, count, owner = self
        b, h, n = mass.shape
        slot, twos = torch.arange(n, device=x.device), torch.arange(0, n, 2, device=x.device)
        real = slot < count[:, None]
        # A and B, [B, N/2]; the newest is in B
        first, other = ((count[:, None] + odd) % 2 + twos for odd in (0, 1))
        rows = unit(x)
        near = _rows(rows, first) @ _rows(rows, other).mT  # [B, H, N/2, N/2] cosines
        alike = int(count.min()) // 2  # so many columns are real of all users
        near[..., alike:].masked_fill_((other >= count[:, None])[:, None, None, alike:], -torch.inf)
        best, match = near.max(-1)
        best = best.masked_fill((first >= count[:, None])[:, None], -torch.inf)
        order = best.argsort(dim=-1, descending=True, stable=True)
        going, into = (side[:, None].expand_as(order).gather(2, at) for side, at in ((first, order), (other, match)))
        going = torch.where(twos < 2 * gone[:, None, None], going, n)  # n: stays, a column that is dropped
        target = torch.arange(n + 1, device=x.device).repeat(b, h, 1)
        target = target.scatter_(2, going, into.gather(2, order))[..., :n]
        place = (real[:, None] & (target == slot)).long().cumsum(-1) - 1  # the new number of each slot that stays
        new = place.gather(2, target).clamp(min=0)  # [B, H, N]
        count = count - gone
        size = int(count.max())
        kept = torch.where(real[:, None], new, size)
        sums, weight = grouped(x, kept, size, mass), grouped(mass.unsqueeze(-1), kept, size)
        return _Left(sums / weight.clamp(min=1e-30), weight.squeeze(-1), count, new.gather(2, owner.clamp(max=n - 1)))


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` [B, K] of x [B, H, N, D], the last where there is none such: [B, H, K, D]."""
    return take(x, at.clamp(max=max(x.shape[2] - 1, 0))[:, None])
