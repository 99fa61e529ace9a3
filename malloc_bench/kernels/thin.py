"""Vectors that are products of two thin factors, read through the one and then the other."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from malloc_bench.kernels.affine import Affine
from malloc_bench.kernels.reading import Reader, dot, mix
from malloc_bench.kernels.switch import After, Loop


class Thin(NamedTuple):
    """left @ right: left [B, H', S, R], one head of which several may share, right [B, H, R, D]."""

    left: Affine
    right: Affine

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, _, d = self.right.shape
        return b, h, self.left.shape[2], d

    def tensors(self) -> list[Tensor]:
        return [*self.left.tensors(), *self.right.tensors()]

    def reader(self, queries: int) -> Through | None:
        left, right = self.left.reader(queries), self.right.reader(queries)
        return None if left is None or right is None else Through(self, left, right)


class Through(NamedTuple):
    """The loops over a `Thin`: those of its left factor, between which queries and sums meet the right one."""

    x: Thin
    left: Reader
    right: Reader

    @property
    def most(self) -> int:
        return self.left.most

    def dot(self, q: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> Loop:
        thin = dot(self.x.right, torch.from_numpy(q).unflatten(0, (-1, heads)))
        assert thin is not None
        return self.left.dot(thin.flatten(0, 1).numpy(), heads, count, out)

    def mix(self, w: np.ndarray, heads: int, count: np.ndarray, out: np.ndarray) -> tuple[Loop, After]:
        thin = torch.zeros(*w.shape[:2], self.x.right.shape[2])
        loop, end = self.left.mix(w, heads, count, thin.numpy())
        return loop, partial(self._end, end, thin.unflatten(0, (-1, heads)), torch.from_numpy(out))

    def _end(self, before: After, thin: Tensor, out: Tensor) -> None:
        if before is not None:
            before()
        found = mix(self.x.right, thin)
        assert found is not None
        out += found.flatten(0, 1)

    def rows(self, start: int, stop: int, room: Tensor) -> Tensor:
        _, h, s, d = self.x.shape
        each = h // self.x.left.shape[1]  # heads that share a left factor
        first, last = start // each, (stop - 1) // each + 1
        left = self.left.rows(first, last, torch.empty((last - first) * s * self.x.left.width))
        right = self.right.rows(start, stop, torch.empty((stop - start) * self.x.left.width * d))
        of = torch.arange(start, stop) // each - first
        return torch.bmm(left[of], right, out=room[: (stop - start) * s * d].view(stop - start, s, d))
