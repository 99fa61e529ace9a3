"""Vectors as the product of two thin factors, absorbed into the query: they are never multiplied out to be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows


@dataclass(frozen=True, eq=False)
class LowRank(Vectors):
    """x = left @ right; left [B, H, S, R], right [B, H, R, D], of which `rank` [B, H'] int32 columns count."""

    left: Tensor
    right: Tensor
    rank: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.left.shape
        return b, h, s, self.right.shape[3]

    def _real(self, x: Tensor) -> Tensor:
        """x [B, H, M, R] with zeros at and beyond each user's rank: what stands there in the other factor counts 0."""
        ranks = torch.arange(self.left.shape[3], device=x.device) < self.rank[..., None, None]
        return torch.where(ranks, x, 0.0)

    def dense(self) -> Tensor:
        return self._real(self.left) @ self.right

    def dot(self, q: Tensor) -> Tensor:
        return self._real(q @ self.right.transpose(-1, -2)) @ self.left.transpose(-1, -2)

    def mix(self, w: Tensor) -> Tensor:
        return self._real(w @ self.left) @ self.right

    def flops(self, queries: int) -> int:
        _, heads, slots, width = self.shape
        return 2 * queries * heads * self.left.shape[3] * (slots + width)

    def dense_flops(self) -> int:
        _, heads, slots, width = self.shape
        return 2 * heads * slots * self.left.shape[3] * width

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        one = torch.ones(len(self.rank), 1, dtype=torch.long, device=self.rank.device)
        yield Ragged(self.rank[..., None, None], one)
        yield Ragged(self.left, all_rows(self.left) if count is None else count, self.rank)
        yield Ragged(self.right, self.rank)

    def load(self, read: Read, count: Tensor | None) -> LowRank:
        rank = read.numbers(self.rank, self.right.shape[3], f"has a rank below 0 or above {self.right.shape[3]}")
        left = read(self.left, all_rows(self.left) if count is None else count, rank)
        right = read(self.right, rank)
        return LowRank(left, right, rank)


def low_rank(x: Tensor, mask: Tensor, rank: Tensor, basis: Tensor | None = None) -> LowRank:
    """Best approximation of x [B, H, S, D] of at most `rank` [B, 1] per user and head (Eckart-Young).

    basis: `principal(x, mask)` if it is known already, since it serves every rank.
    """
    basis = principal(x, mask) if basis is None else basis
    width = max(int(rank.max()), 1) if rank.numel() else 1
    right = basis[..., :width]
    return LowRank(torch.where(mask.unsqueeze(-1), x, 0.0) @ right, right.mT.contiguous(), rank.to(torch.int32))


def principal(x: Tensor, mask: Tensor) -> Tensor:
    """Right singular vectors of x [B, H, S, D] as columns [B, H, D, D], the leading one first.

    They are the eigenvectors of x'x, cheaper than an SVD of x where S > D.
    """
    x = torch.where(mask.unsqueeze(-1), x, 0.0)
    gram = x.mT @ x
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)[..., None, None]
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)  # eigenvalues come in rising order
