"""Full-catalogue ranking in blocked matmuls, by counting: nothing is sorted; how alike two rankings are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from malloc_bench import kernels
from malloc_bench.data.dataset import Dataset
from malloc_bench.data.tasks.splits import between

TOP = 10
_ROWS = 96  # outputs at a time: their scores stay in cache


@dataclass(frozen=True)
class Question:
    """What B users are asked: target [B] int64 in [0, n_items), penalty [B, n_items], -inf where one cannot rank."""

    target: Tensor
    penalty: Tensor


def question(dataset: Dataset, users: np.ndarray, at: np.ndarray, filter_seen: bool = True) -> Question:
    """The targets at flat places `at` [B]; with filter_seen, items of the user's whole earlier history cannot rank.

    The target itself always can, even where the user has met it before. Of data sets that were joined, only items of
    the target's own can.
    """
    target = torch.from_numpy(dataset.items[at].astype(np.int64) - 1)
    penalty = torch.zeros(len(users), dataset.n_items)
    if filter_seen:
        penalty[met(dataset, users, at)] = -torch.inf
        penalty[torch.arange(len(users)), target] = 0.0
    if dataset.domains is not None:
        domains = torch.from_numpy(dataset.domains)
        penalty[domains[target][:, None] != domains] = -torch.inf
    return Question(target, penalty)


def met(dataset: Dataset, users: np.ndarray, at: np.ndarray) -> tuple[Tensor, Tensor]:
    """(row, column of the catalogue) of every event of users [B] before the flat places at [B]."""
    rows, places = between(dataset.offsets[users], at)
    return torch.from_numpy(rows), torch.from_numpy(dataset.items[places].astype(np.int64) - 1)


def best(hidden: Tensor, table: Tensor, asked: Question) -> Tensor:
    """Columns [B, 10] of the highest scores of outputs [B, d], or of all where there are fewer."""
    found = [
        torch.addmm(penalty, own, table.T).topk(min(TOP, len(table)), 1).indices
        for own, penalty in zip(hidden.split(_ROWS), asked.penalty.split(_ROWS))
    ]
    return torch.cat(found)


def rank(hidden: Tensor, table: Tensor, asked: Question) -> Tensor:
    """Ranks [C, B] int32 of the targets under C methods' outputs [C, B, d], 0 = best.

    A tie counts against the target, so outputs that cannot tell items apart rank last, not first.
    Raises ValueError where outputs, items or the targets' scores are not finite.
    """
    return _counts(hidden, table, asked, asked.target[:, None])[..., 0] - 1


def compare(hidden: Tensor, table: Tensor, asked: Question, top: Tensor) -> tuple[Tensor, Tensor]:
    """`rank`, and overlap@10 [C, B] float32: which share of top [B, 10], the full state's `best`, each has in its own.

    A tie counts against an item too; those that cannot rank, where fewer than 10 can, count as kept.
    """
    counts = _counts(hidden, table, asked, torch.cat([asked.target[:, None], top], 1))
    kept = (counts[..., 1:] <= TOP) | (asked.penalty.gather(1, top) == -torch.inf)
    return counts[..., 0] - 1, kept.float().mean(-1)


def _counts(hidden: Tensor, table: Tensor, asked: Question, marked: Tensor) -> Tensor:
    """How many items score no less than each of marked [B, M], the target first: [C, B, M] int32, see `_reach`."""
    if not bool(hidden.isfinite().all() and table.isfinite().all()):
        raise ValueError("the model's outputs are not finite")
    cells, users, _ = hidden.shape
    counts = torch.empty(cells, *marked.shape, dtype=torch.int32, device=hidden.device)
    step = _ROWS if hidden.device.type == "cpu" else max(users, 1)
    room = hidden.new_empty(min(step, users), len(table))
    for start in range(0, users, step):
        rows = slice(start, min(start + step, users))
        scores = room[: rows.stop - rows.start]
        for cell in range(cells):
            torch.addmm(asked.penalty[rows], hidden[cell, rows], table.T, out=scores)
            if not kernels.reach(scores, marked[rows], counts[cell, rows]):
                counts[cell, rows] = _reach(scores, scores.gather(1, marked[rows]))
    if bool((counts[..., 0] < 1).any()):  # NaN: not even the target is as good as itself
        raise ValueError("the model's scores are not finite")
    return counts


def _reach(scores: Tensor, marks: Tensor) -> Tensor:
    """How many of scores [B, n] are no less than each of marks [B, M], [B, M] int32; but for the first mark, more than
    10 may be any such number."""
    first = (scores >= marks[:, :1]).float().sum(1, keepdim=True)  # float: summing bools is slower
    if marks.shape[1] == 1 or scores.shape[1] <= TOP:
        return first.int().expand_as(marks)
    beyond = scores.topk(TOP + 1, 1, sorted=False).values.amin(1, keepdim=True)
    return torch.cat([first, TOP + (marks[:, 1:] <= beyond)], 1).int()


def losses(hidden: Tensor, table: Tensor, asked: Question, scale: float = 1.0) -> Tensor:
    """Cross-entropy [C, B] of the targets among all that may rank, in nats; hidden [C, B, d], scale: of the logits."""
    found = hidden.new_empty(hidden.shape[:2])
    for start in range(0, hidden.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        for cell, own in enumerate(hidden[:, rows] * scale):
            logits = torch.addmm(asked.penalty[rows], own, table.T)
            found[cell, rows] = logits.logsumexp(1) - logits.gather(1, asked.target[rows, None])[:, 0]
    return found


def agreement(scores: Tensor, reference: Tensor, real: Tensor) -> Tensor:
    """Share [B] of the pairs of real candidates that scores [B, M] order as the reference [B, M] does, ties half.

    Pairs that the reference does not tell apart do not count; NaN where there is no other.
    """

    def order(x: Tensor) -> Tensor:
        return (x[:, :, None] - x[:, None, :]).sign()  # [B, M, M], each pair twice

    want = order(reference) * (real[:, :, None] & real[:, None, :])
    return (1 + (order(scores) * want).sum((1, 2)) / want.abs().sum((1, 2))) / 2
