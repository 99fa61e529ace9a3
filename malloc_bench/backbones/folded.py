"""Tokens folded into the batch, where each has slots of its own: itself, or those that a look-up finds for it; and

what a layer knows of a history without slots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from malloc_bench import kernels
from malloc_bench.backbones.block import Block, Places
from malloc_bench.kernels import Written
from malloc_bench.state import Dense, Layer, Segment, take

CELLS = 1 << 24  # weights at a time over a state: 64 MB


def apart(x: Tensor) -> Tensor:
    """[B, H, M, D] -> [B x M, H, 1, D]"""
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def back(x: Tensor, like: Tensor) -> Tensor:
    """[B x M, H, 1, D] -> [B, H, M, D], B and M those of like [B, H, M, ...]"""
    return x.squeeze(2).unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def _apart(x: Places) -> Places:
    if x.positions.shape[2] == 1:
        return x
    times = None if x.times is None else apart(x.times.unsqueeze(-1)).squeeze(-1)
    return Places(apart(x.positions.unsqueeze(-1)).squeeze(-1), times)


def alone(
    block: Block, q: Tensor, own: dict[str, Tensor], asked: Places, places: Places
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Logits [B, H, M, 1] of tokens over themselves, and what mixes them: M products a head, not M x M."""
    itself = Segment({k: Dense(apart(v)) for k, v in own.items()}, None)
    logits = back(block.logits(apart(q), itself, _apart(asked), _apart(places)), q)
    return logits, lambda weights: back(block.mix(apart(weights), itself), q)


def in_one_pass(
    block: Block, q: Tensor, own: dict[str, Tensor], layer: Layer, length: Tensor, places: Places, asked: Places
) -> Tensor | None:
    """What tokens mix of themselves and of a layer of one segment, or none, [B, H, M, D], where a kernel weighs as the
    block does and knows how vectors are written; None where it does not."""
    if block.weighing is None or len(layer) > 1 or own.keys() != {"keys", "values"}:
        return None
    if block.biased and not kernels.reads(q):  # its bias takes a while
        return None
    mass, slots, segment = None, None, layer[0] if layer else None
    width = 0 if segment is None else segment.width
    m = q.shape[2]
    if m > 1 and m > (step := max(1, CELLS // max(1, width * (len(q) if block.biased else block.heads)))):
        parts = []
        for start in range(0, m, step):
            rows = slice(start, start + step)
            mine = {name: x[:, :, rows] for name, x in own.items()}
            part = in_one_pass(block, q[:, :, rows], mine, layer, length, places.rows(rows), asked.rows(rows))
            if part is None:
                return None
            parts.append(part)
        return torch.cat(parts, 2)
    if segment is None or not width:
        written: list[Written | None] = [kernels.Plain(own[name][:, :, :0]) for name in ("keys", "values")]
        count = length.new_zeros(1, 1)
        if block.biased:
            slots = Places(places.positions[..., :0], None)
    elif segment.slots is None or segment.lookup is not None or segment.fields.keys() != own.keys():
        return None
    else:
        written = [segment.fields[name].known() for name in ("keys", "values")]
        count, mass = segment.slots.count, segment.slots.mass
        if block.biased:
            slots = Places(segment.slots.places(width, length[:, None]), segment.slots.timestamps)
    keys, values = written
    if keys is None or values is None:
        return None
    bias = None
    if slots is not None:
        over, itself = block.bias(asked, slots), block.bias(_apart(asked), _apart(places))
        if over is None or itself is None:
            return None
        bias = over, itself.view(-1, q.shape[2], itself.shape[1]).transpose(1, 2)
    normaliser = None if block.weighing == "softmax" else float(block.normaliser)
    return kernels.attend(q, own, keys, values, count, mass, bias, normaliser)


def looked_up(
    block: Block, q: Tensor, segment: Segment, asked: Places, slots: Places
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Logits [B, H, M, K] of tokens over the slots that the segment's look-up finds for each, which of the K it has
    found, and what mixes them; no other slot is touched."""
    b, h = q.shape[:2]
    lookup = segment.lookup
    assert lookup is not None and segment.slots is not None and asked.items is not None
    every = block.logits(q, segment, asked, slots) if lookup.keys else None
    index, found = lookup.find(q, asked.items[:, 0], segment.slots.mask(segment.width), every)
    index, found = index.expand(b, h, -1, -1), found.expand(b, h, -1, -1)

    def rows(x: Tensor) -> Tensor:  # [B, H, S, ...] -> [B x M, H, K, ...]
        picked = take(x, index.flatten(2)).unflatten(2, tuple(index.shape[2:]))
        return picked.transpose(1, 2).flatten(0, 1)

    def column(x: Tensor) -> Tensor:
        return rows(x.expand(b, h, -1))

    few = Segment({k: Dense(rows(v.dense())) for k, v in segment.fields.items() if every is None or k != "keys"}, None)
    if every is not None:
        return every.gather(-1, index), found, lambda weights: back(block.mix(apart(weights), few), q)
    where = Places(column(slots.positions), None if slots.times is None else column(slots.times))
    logits = back(block.logits(apart(q), few, _apart(asked), where), q)
    return logits, found, lambda weights: back(block.mix(apart(weights), few), q)


def summed(
    block: Block, q: Tensor, segment: Segment, asked: Places
) -> tuple[Tensor, Tensor, None, Callable[[Tensor], Tensor]]:
    """Logits [B, H, M, 1] of tokens over a memory that answers as one slot, its mask, no mass, and what mixes it.

    Fields: `constant` [B, H', 1, D'], the answer, to which a query adds its products with `asks` [B, H', R, D] times
    `answers` [B, H', R, D'], if there are any. Where weights are normalised, `weight` [B, H', 1, 1], its logit, to
    which the product with `key` [B, H', 1, D] is added, if there is one; where not, the answer is what the mixture
    gains.
    """
    known = {name: block.each(vectors.dense()).to(q.dtype) for name, vectors in segment.fields.items()}
    answer, logits = known["constant"], q.new_zeros(*q.shape[:3], 1)
    query = block.asking(q, asked) if known.keys() & {"key", "asks"} else q
    if "asks" in known:
        answer = answer + query @ known["asks"].mT @ known["answers"]
    if "weight" in known:
        logits = logits + known["weight"]
    if "key" in known:
        logits = logits + query @ known["key"].mT
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device)
    if block.normalised:
        return logits, mask, None, lambda weights: weights * answer
    return logits, mask, None, lambda weights: answer.expand(*weights.shape[:3], -1)


def over_segment(
    block: Block, q: Tensor, segment: Segment, asked: Places, slots: Places | None
) -> tuple[Tensor, Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Logits [B, H, M, S] over a segment's slots, or the K that its look-up finds; mask, mass, and what mixes them."""
    if segment.slots is None or slots is None:
        return summed(block, q, segment, asked)
    if segment.lookup is not None:
        logits, found, mix = looked_up(block, q, segment, asked, slots)
        return logits, found, None, mix
    mask = segment.slots.mask(segment.width).unsqueeze(2)
    return block.logits(q, segment, asked, slots), mask, segment.slots.mass, partial(block.mix, segment=segment)


def row_size(segment: Segment) -> int:
    """Numbers that one query of a head needs room for."""
    if segment.lookup is None:
        return segment.width
    return segment.width + segment.lookup.top * sum(v.shape[3] for v in segment.fields.values())


def read_flops(block: Block, queries: int, segment: Segment) -> int:
    """Of `logits` and `mix` over a segment as queries read it, per user."""
    if segment.slots is None:
        asked = [segment.fields[name] for name in ("key", "asks", "answers") if name in segment.fields]
        return sum(block.heads // v.shape[1] * v.flops(queries) for v in asked)  # of each query head
    if segment.lookup is None:
        return block.attend_flops(queries, segment)
    _, heads, _, width = segment.fields["keys"].shape
    few = Segment({k: Dense(v.dense()[:, :, : segment.lookup.top]) for k, v in segment.fields.items()}, None)
    read = queries * block.attend_flops(1, few)
    if segment.lookup.keys:  # their logits are those of the search
        read += block.logit_flops(queries, segment) - queries * block.logit_flops(1, few)
    return read + segment.lookup.flops(queries, heads, width)
