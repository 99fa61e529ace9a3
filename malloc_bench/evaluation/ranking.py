"""Full-catalogue ranking in blocked matmuls, by counting: nothing is sorted; how alike two rankings are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from malloc_bench.data.dataset import Dataset

TOP = 10
_FOLD = 16  # the catalogue is folded so often to find the top 10
_ROWS = 64  # outputs at a time: their scores stay in cache


@dataclass(frozen=True)
class Question:
    """What B users are asked: target [B] int64 in [0, n_items), penalty [B, n_items], -inf where one cannot rank."""

    target: Tensor
    penalty: Tensor


def question(dataset: Dataset, users: np.ndarray, at: np.ndarray, filter_seen: bool = True) -> Question:
    """The targets at flat places `at` [B]; with filter_seen, items of the user's whole earlier history cannot rank.

    The target itself always can, even where the user has met it before.
    """
    target = torch.from_numpy(dataset.items[at].astype(np.int64) - 1)
    penalty = torch.zeros(len(users), dataset.n_items)
    if filter_seen:
        first = dataset.offsets[users]
        count = at - first
        rows = np.repeat(np.arange(len(users)), count)
        places = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
        penalty[torch.from_numpy(rows), torch.from_numpy(dataset.items[places].astype(np.int64) - 1)] = -torch.inf
        penalty[torch.arange(len(users)), target] = 0.0
    return Question(target, penalty)


def rank(hidden: Tensor, table: Tensor, asked: Question, tops: bool = False) -> tuple[Tensor, Tensor | None]:
    """Ranks [C, B] int32 of the targets under C methods' outputs [C, B, d], 0 = best, and their top 10 [C, B, 10].

    The top 10 is unordered; where fewer items may rank it is filled up with -1.

    A tie counts against the target, so outputs that cannot tell items apart rank last, not first.
    Raises ValueError where outputs, items or the targets' scores are not finite.
    """
    if not bool(hidden.isfinite().all() and table.isfinite().all()):
        raise ValueError("the model's outputs are not finite")
    cells, users, _ = hidden.shape
    ranks = torch.empty(cells, users, dtype=torch.int32, device=hidden.device)
    top = torch.empty(cells, users, TOP, dtype=torch.int64, device=hidden.device) if tops else None
    width = -(-len(table) // _FOLD) * _FOLD
    padded = hidden.new_full((_ROWS, width), -torch.inf)
    ahead = hidden.new_empty(_ROWS, len(table))
    step = _ROWS if hidden.device.type == "cpu" else users
    if step != _ROWS:
        padded, ahead = hidden.new_full((users, width), -torch.inf), hidden.new_empty(users, len(table))
    for start in range(0, users, step):
        rows = slice(start, min(start + step, users))
        size = rows.stop - rows.start
        scores, better = padded[:size, : len(table)], ahead[:size]
        target = asked.target[rows, None]
        for cell in range(cells):
            torch.addmm(asked.penalty[rows], hidden[cell, rows], table.T, out=scores)
            torch.ge(scores, scores.gather(1, target), out=better)  # float: summing bools is slower
            ranks[cell, rows] = better.sum(1).to(torch.int32) - 1
            if top is not None:
                top[cell, rows] = _top(padded[:size])
    if bool((ranks < 0).any()):  # NaN: not even the target is ahead of itself
        raise ValueError("the model's scores are not finite")
    return ranks, top


def losses(hidden: Tensor, table: Tensor, asked: Question, scale: float = 1.0) -> Tensor:
    """Cross-entropy [C, B] of the targets among all that may rank, in nats; hidden [C, B, d], scale: of the logits."""
    found = hidden.new_empty(hidden.shape[:2])
    for start in range(0, hidden.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        for cell, own in enumerate(hidden[:, rows] * scale):
            logits = torch.addmm(asked.penalty[rows], own, table.T)
            found[cell, rows] = logits.logsumexp(1) - logits.gather(1, asked.target[rows, None])[:, 0]
    return found


def _top(scores: Tensor) -> Tensor:
    """Columns of the 10 highest scores of each row, -1 for scores of -inf.

    A row's 10 best lie in the 10 folds with the best heads.
    """
    rows, width = scores.shape
    if width < TOP * _FOLD * 2:
        values, columns = scores.topk(TOP, 1, sorted=False)
        return columns.masked_fill_(values == -torch.inf, -1)
    folded = scores.view(rows, _FOLD, width // _FOLD)
    heads = folded.amax(1).topk(TOP, 1, sorted=False).indices  # [rows, 10] columns of the fold
    few = folded.gather(2, heads[:, None].expand(-1, _FOLD, -1)).flatten(1)
    values, best = few.topk(TOP, 1, sorted=False)
    columns = best // TOP * (width // _FOLD) + heads.gather(1, best % TOP)
    return columns.masked_fill_(values == -torch.inf, -1)


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Share of the items of b [B, 10] that are in a [..., B, 10]: [..., B] float32."""
    return (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).sum(-1).float() / b.shape[-1]


def agreement(scores: Tensor, reference: Tensor, real: Tensor) -> Tensor:
    """Share [B] of the pairs of real candidates that scores [B, M] order as the reference [B, M] does, ties half.

    Pairs that the reference does not tell apart do not count; NaN where there is no other.
    """

    def order(x: Tensor) -> Tensor:
        return (x[:, :, None] - x[:, None, :]).sign()  # [B, M, M], each pair twice

    want = order(reference) * (real[:, :, None] & real[:, None, :])
    return (1 + (order(scores) * want).sum((1, 2)) / want.abs().sum((1, 2))) / 2
