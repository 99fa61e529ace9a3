"""Slots by lot: what a score must beat."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import register
from malloc_bench.state import Prefill

_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # odd constants of splitmix64, as int64


def _hash(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, which wraps around."""
    x = x * _MIX[0]
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * _MIX[1]
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * _MIX[2]
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def hashed(prefill: Prefill, layer: int, what: Tensor) -> Tensor:
    """Numbers between 0 and 1, both excluded, from (seed, user id, layer) and integers `what` [B, M, N], uniform."""
    user = _hash(prefill.users.to(what.device) + 1_000_003 * (prefill.seed + 1) + 7_919 * layer).view(-1, 1, 1)
    return (_hash(user + what) & 0xFFFFFF).to(torch.float32).clamp(min=0.5) / 2**24  # 24 bits: exact in float32


def proportional(score: Tensor, k: Tensor) -> Tensor:
    """Chances min(1, c score) of slots, c such that they come to k [B, H or 1]; score [B, H, S] >= 0 in float64, at
    least k of them above 0."""
    if not score.shape[-1]:
        return score
    falling = _falling(score) if score.is_cpu else score.sort(-1, descending=True).values
    rest = falling.flip(-1).cumsum(-1).flip(-1)  # each with all smaller ones
    left = (k.unsqueeze(-1) - torch.arange(score.shape[-1], device=k.device)).clamp(min=0).expand_as(rest)
    sure = (left * falling <= rest).int().argmax(-1, keepdim=True)  # so many are certain: all larger ones
    scale = left.gather(-1, sure) / rest.gather(-1, sure).clamp(min=1e-300)
    return (scale * score).clamp(max=1)


def _falling(x: Tensor) -> Tensor:
    """Numbers on a CPU, largest first: numpy takes a twentieth of torch's time."""
    return torch.from_numpy(np.sort(-x.detach().numpy(), axis=-1)).neg_()


def drawn(chance: Tensor, start: Tensor, k: int) -> Tensor:
    """k slots [B, H, k] in order, each with its chance [B, H, S] in float64, by one number start [B, H, 1] from 0 to 1:
    systematic sampling, evenly along the sum of chances."""
    turn = start.double() + torch.arange(k, device=chance.device)
    return torch.searchsorted(chance.cumsum(-1), turn, right=True).clamp(max=max(chance.shape[-1] - 1, 0))


@register("random")
@dataclass(frozen=True)
class Random(Eviction):
    """Keeps slots by lot, by a number from (seed, user id, layer, position): no batch or order of cells changes it."""

    family = "eviction"
    per_head = False
    paper = "none: the floor of every eviction method"
    formula = "score = hash(seed, user, layer, position)"
    stores = "keys and values of k events per layer, and their positions where the backbone reads them"

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        slots = prefill.slots(layer)
        width = prefill.segment(layer).width
        place = slots.places(width, prefill.state.length[:, None])[:, :1]  # [B, 1, S]
        return hashed(prefill, layer, place) * 2**24
