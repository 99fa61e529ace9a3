"""Training losses and the dropout that does not fall off the CPU's fast path."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

_ROWS = 256  # logits of so many targets exist at a time: they stay in cache
_SAFE = 60.0  # exp of logits up to here neither overflows nor needs the maximum taken off


class _FullSoftmax(torch.autograd.Function):
    """Mean cross-entropy of hidden @ table.T, its gradient made in the forward pass, chunk by chunk.

    Probabilities are never normalised in place: 1/z is carried on the thin side of both products.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden, d_table = torch.empty_like(hidden), torch.zeros_like(table)
        mean = 1.0 / max(len(hidden), 1)
        bounded = bool(len(hidden)) and float(hidden.norm(dim=1).max() * table.norm(dim=1).max()) < _SAFE
        across = table.T.contiguous()
        for start in range(0, len(hidden), _ROWS):
            h, t = hidden[start : start + _ROWS], targets[start : start + _ROWS]
            p = table @ h.T  # [n_items, rows]: the tall way round is a fifth faster
            if not bounded:
                p -= p.amax(0)
            picked = p.gather(0, t[None]).squeeze(0)
            z = p.exp_().sum(0, dtype=torch.float32)
            total += (z.log() - picked).sum()
            weight = (mean / z)[:, None]
            d_table += p @ (h * weight)  # not addmm_: in autocast p is a bfloat16
            d_hidden[start : start + _ROWS] = (across @ p).T * weight
        d_hidden -= table[targets] * mean
        d_table.index_add_(0, targets, hidden, alpha=-mean)
        ctx.save_for_backward(d_hidden, d_table)
        return total * mean

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        d_hidden, d_table = ctx.saved_tensors
        return d_hidden * grad, d_table * grad, None


def next_item_loss(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the whole catalogue: hidden [N, d], table [n_items, d], targets [N] int64 from 0.

    Under autocast either may come as bfloat16: sums and gradients are kept in float32 at least.
    """
    wide = torch.promote_types(torch.promote_types(hidden.dtype, table.dtype), torch.float32)
    return _FullSoftmax.apply(hidden.to(wide), table.to(wide), targets)


def sampled_loss(hidden: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, each: float = 1.0) -> Tensor:
    """Mean cross-entropy of each target against negatives: hidden [B, S, d], targets [B, S] from 0 (below: none).

    negatives [B, K] are shared by the targets of a row of the batch; one that is the target itself is left out of it
    (as in the code of arXiv 2402.17152, which draws anew for each target). each: so many items one stands for.
    """
    own = (hidden * table[targets.clamp(min=0)]).sum(2, keepdim=True)
    others = hidden @ table[negatives].mT
    others = others if each == 1 else others + math.log(each)
    others = others.masked_fill(negatives[:, None] == targets[..., None], -torch.inf)
    logits = torch.cat([own, others.to(own.dtype)], dim=2)[targets >= 0]  # in autocast a product is a bfloat16
    return F.cross_entropy(logits, targets.new_zeros(len(logits)))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout by comparing uniform numbers, about twice as fast on CPUs as F.dropout's Bernoulli draws."""
    if not training or p == 0:
        return x
    if x.is_cuda:
        return F.dropout(x, p)
    return x * (torch.rand_like(x) >= p).to(x.dtype).mul_(1 / (1 - p))
