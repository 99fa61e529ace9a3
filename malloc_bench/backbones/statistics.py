"""The attention statistics that some compressors ask for, gathered beside a prefill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from malloc_bench.backbones.block import Block, Places
from malloc_bench.backbones.probing import Seen
from malloc_bench.backbones.sums import tiled
from malloc_bench.state import Dense, Segment, Stats, UserState, newest_rows


def observed(
    block: Block, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places, real: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain causal attention with the sum of |weights| that each key received: ([B, H, S, D], [B, H, S])."""
    if q.device.type == "cpu" and not q.requires_grad and (tiles := block.in_tiles(own, places, asked)):
        keys, values, weigher = tiles
        return tiled(q, keys, values, real, weigher)
    received = q.new_zeros(q.shape[:3])
    mixed: list[Tensor] = []
    for weights, part, rows in block.causal_blocks(q, own, places, asked):
        mixed.append(block.mix(weights, part))
        asks = real[:, None, None, rows].to(q.dtype)  # padding asks nothing
        received[:, :, : rows.stop] += (asks @ weights.abs()).squeeze(2)
    return torch.cat(mixed, dim=2), received


def newest(
    block: Block, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places, count: Tensor, window: int
) -> Tensor:
    """Weights of each user's newest `window` queries, oldest first, [B, H, window, S]; zeros where there is no such."""
    b, h, s, _ = q.shape
    if s == 0:
        return q.new_zeros(b, h, window, 0)
    at = count.long()[:, None] - window + torch.arange(window, device=q.device)  # [B, W]
    index, queries = at.clamp(min=0), newest_rows(q, count, window)
    times = None if asked.times is None else asked.times[:, 0].gather(1, index)[:, None]
    places_asked = asked.positions[:, 0].expand(b, -1).gather(1, index)[:, None]
    everything = Segment({k: Dense(v) for k, v in own.items()}, None)
    logits = block.logits(queries, everything, Places(places_asked, times), places)
    mask = (torch.arange(s, device=q.device) <= at[..., None])[:, None]  # [B, 1, W, S]
    (weights,) = block.weigh([logits], [mask | (at < 0)[:, None, :, None]], [None])
    return weights * (at >= 0)[:, None, :, None]


def standing(block: Block, q: Tensor, segment: Segment, slots: Places, asked: Places, count: Tensor) -> Tensor:
    """What the logits of a token to come have of where each slot of `segment` stands, not of its key, [B, Hq, S].

    It asks a place behind the newest of queries q [B, Hq, M, D] that stand at `asked`, count [B] of them, at its time.
    """
    last = (count.long() - 1).clamp(min=0)[:, None]
    if not q.shape[2]:
        return q.new_zeros(*q.shape[:2], segment.width)
    places = asked.positions[:, 0].expand(len(count), -1).gather(1, last)[:, None] + 1
    times = None if asked.times is None else asked.times[:, 0].gather(1, last)[:, None]
    return block.logits(torch.zeros_like(q[:, :, :1]), segment, Places(places, times), slots).squeeze(2)


def newcomers(seen: Sequence[Seen], grown: UserState, new: Tensor, stats: Stats) -> dict[str, list[Tensor]]:
    """What the newest new [B] events asked of `grown`, one segment a layer, which ends with them: by name, as `Prefill`

    has it. seen: the new events as they passed, layer by layer. Of queries no more are known than events are new.
    """
    found: dict[str, list[Tensor]] = {}
    for layer, (segment, *_) in zip(seen, grown.layers):  # a memory beside the slots is not asked
        slots, block, turn = segment.slots, layer.block, torch.arange(layer.q.shape[2], device=new.device)
        assert slots is not None
        places = Places(slots.places(segment.width, grown.length[:, None]), slots.timestamps)
        if stats.queries:
            asked = newest_rows(block.asking(layer.q, layer.asked), new, min(stats.queries, len(turn)))
            found.setdefault("queries", []).append(asked)
            if block.biased:
                found.setdefault("standing", []).append(standing(block, layer.q, segment, places, layer.asked, new))
        rank, count = torch.arange(segment.width, device=new.device), slots.count[:, :, None, None]
        mask = (rank < count) & (rank <= count - new[:, None, None, None] + turn[:, None])  # [B, H', M, S]
        (weights,) = block.weigh([block.logits(layer.q, segment, layer.asked, places)], [mask], [slots.mass])
        real = (turn < new[:, None])[:, None, :, None] & block.each(mask)
        weights = over_group(torch.where(real, weights, 0.0), {name: v.dense() for name, v in segment.fields.items()})
        if stats.column_sum:
            found.setdefault("column_sum", []).append(weights.abs().sum(2))
        if stats.window:
            found.setdefault("window", []).append(newest_rows(weights, new, stats.window))
    return found


def over_group(weights: Tensor, own: dict[str, Tensor]) -> Tensor:
    """Mean |weight| over the query heads that share a stored head, [B, H, ...] -> [B, H', ...]; as it is without any.

    Absolute values, for signs of different heads do not make up for one another.
    """
    stored = next(iter(own.values())).shape[1]
    return weights if weights.shape[1] == stored else weights.unflatten(1, (stored, -1)).abs().mean(2)
