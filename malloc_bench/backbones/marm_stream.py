"""MARM in a stream: training in time order with entries that age, and what their age does to a read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.backbones.marm import MARM
from malloc_bench.backbones.marm_cache import MemoryCache
from malloc_bench.state import Batch, Events


def stream(
    backbone: MARM,
    log: Events,
    optimizer: torch.optim.Optimizer,
    memories: Sequence[MemoryCache],
    *,
    epochs: int,
    chunk: int = 512,
) -> None:
    """Train through the log in time order, the next `chunk` events of all users a step, epoch after epoch.

    log: row u is user u of the memories; without times all users' first events come first, then their second ones.
    After each step its events attend to what a memory holds of the past, and their outputs are written to it with the
    parameters of that step, so in one epoch entries differ in age. A `cached` model also trains on entries: those of
    the first memory.
    """
    backbone.entries = memories[0] if backbone.config.cached else None
    for epoch in range(epochs):
        before = torch.zeros_like(log.count)
        for after in slices(log, chunk):
            users = (after > before).nonzero().squeeze(1)
            start, stop, items = before[users, None], after[users], log.items[users]
            seen = _first(items, stop)
            place = torch.arange(seen.items.shape[1])
            new = (place >= start) & seen.mask()
            targets = torch.where(new, seen.items, 0)[:, 1:]  # of the events before them
            steps = [memory.now + 1 for memory in memories]
            if bool(targets.any()):
                backbone.train()
                optimizer.zero_grad()
                backbone.loss(Batch(_first(items, (stop - 1)), targets, users=users)).backward()
                optimizer.step()
            backbone.eval()
            with torch.no_grad():
                for memory, step in zip(memories, steps):
                    memory.now.copy_(step)  # a loss over its entries has counted the step already
                    renewed = memory.refresh > 0 and epoch % memory.refresh == 0
                    due = new if renewed else new & ~memory.held(users, seen)
                    if bool(due.any()):
                        state = backbone.recall(memory, users, _first(items, start[:, 0]))
                        memory.write(users, seen, backbone.append(state, seen.last(stop - start[:, 0])), due)
            before = after


def slices(log: Events, chunk: int) -> Tensor:
    """How many events of each user have happened after each step, [K, U]; what happens at one time stays together."""
    moments = torch.arange(log.items.shape[1]).expand_as(log.items) if log.times is None else log.times
    real = log.mask()
    ordered = moments[real].sort().values
    ends = torch.cat([ordered[chunk - 1 :: chunk], ordered[-1:]]).unique()
    return torch.stack([(real & (moments <= end)).sum(1, dtype=log.count.dtype) for end in ends])


@dataclass(frozen=True)
class Gap:
    """What a cache of older parameters does to a read; age: mean training steps since the entries were written.

    error: |read - fresh read| / |fresh read|; overlap: share of the fresh top ten items that stay in the top ten.
    """

    hit_rate: float
    age: float
    error: float
    overlap: float


def read_gap(backbone: MARM, memory: MemoryCache, users: Tensor, history: Events, tokens: Events) -> Gap:
    """How far reads of tokens [B, M] from the memory are from reads of a state built with today's parameters."""
    held, age = memory.held(users, history), memory.now - memory.steps[users, : history.items.shape[1]]
    with torch.no_grad():
        fresh = backbone.read(tokens, backbone.prefill(history).state)[tokens.mask()]
        stale = backbone.read(tokens, backbone.recall(memory, users, history))[tokens.mask()]
        top, kept = ((x @ backbone.catalogue().T).topk(min(10, backbone.n_items)).indices for x in (fresh, stale))
    same = (top.unsqueeze(-1) == kept.unsqueeze(-2)).any(-1).float().mean()
    return Gap(
        hit_rate=float(held.sum() / history.count.sum()),
        age=float(age[held].float().mean()),
        error=float((stale - fresh).norm() / fresh.norm()),
        overlap=float(same),
    )


def _first(items: Tensor, count: Tensor) -> Events:
    """The oldest events of each user, so many."""
    return Events(items[:, : int(count.max())], count)
