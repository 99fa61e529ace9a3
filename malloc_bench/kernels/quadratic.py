"""What a quadratic form makes of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench.kernels.switch import array, fits, spread

_WIDEST = 256  # wider ones were not timed


def quadratic(x: Tensor, matrix: Tensor, mean: Tensor) -> Tensor | None:
    """mean.x + x' matrix x of the rows of x [n, S, D], matrix [n, G, D, D] symmetric, mean [n, G, D]: [n, G, S].

    Only half of a symmetric matrix is multiplied with, and no product is written down.
    """
    n, s, d = x.shape
    if (
        not (n * s * matrix.shape[1])
        or not 0 < d <= _WIDEST
        or any(t.dtype != torch.float32 for t in (x, matrix, mean))
    ):
        return None
    if not fits(x, matrix, mean):
        return None
    from malloc_bench.kernels.forms import forms  # here: its compiler takes half a second to load

    out = x.new_empty(n, matrix.shape[1], s)
    arrays = [array(t) for t in (x, matrix.tril() + matrix.tril(-1), mean, out)]
    call = forms(d)
    spread(lambda start, stop: call(*arrays, start, stop), n, x.numel())
    return out
