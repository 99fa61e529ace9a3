"""Vectors as a map, shared by all users, of coefficients that several of them share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from malloc_bench.state.vectors import Ragged, Read, Vectors


class Basis:
    """mean [H, D], and rows [H, R, D] that coefficients multiply; a plain class: no user has a part in it."""

    def __init__(self, mean: Tensor, rows: Tensor) -> None:
        self.mean, self.rows = mean, rows


@dataclass(frozen=True, eq=False)
class Turned(Vectors):
    """x = mean + coefficients @ rows, absorbed into the query; coefficients [B, 1, S, R]."""

    coefficients: Vectors
    basis: Basis

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, _, s, _ = self.coefficients.shape
        heads, _, width = self.basis.rows.shape
        return b, heads, s, width

    def shared(self) -> tuple[Vectors, ...]:
        return (*self.coefficients.shared(), self.coefficients)

    def over(self, shared: tuple[Vectors, ...]) -> Turned:
        return replace(self, coefficients=shared[-1])

    def dense(self) -> Tensor:
        found = self.coefficients.dense()
        return found @ self.basis.rows.to(found.device) + self.basis.mean.to(found.device).unsqueeze(1)

    def dot(self, q: Tensor) -> Tensor:
        b, h, m, _ = q.shape
        rows, mean = (x.to(q.device, q.dtype) for x in (self.basis.rows, self.basis.mean))
        thin = (q @ rows.mT).reshape(b, 1, h * m, rows.shape[1])
        found = thin @ self.coefficients.dense().mT.to(q.dtype)
        return found.view(b, h, m, found.shape[3]) + (q * mean.unsqueeze(1)).sum(-1, keepdim=True)

    def mix(self, w: Tensor) -> Tensor:
        b, h, m, s = w.shape
        rows, mean = (x.to(w.device, w.dtype) for x in (self.basis.rows, self.basis.mean))
        thin = w.reshape(b, 1, h * m, s) @ self.coefficients.dense().to(w.dtype)
        return thin.view(b, h, m, rows.shape[1]) @ rows + w.sum(-1, keepdim=True) * mean.unsqueeze(1)

    def flops(self, queries: int) -> int:
        _, heads, slots, width = self.shape
        return 2 * queries * heads * self.basis.rows.shape[1] * (slots + width) + self.coefficients.dense_flops()

    def dense_flops(self) -> int:
        _, heads, slots, width = self.shape
        return 2 * heads * slots * self.basis.rows.shape[1] * width + self.coefficients.dense_flops()

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield from ()

    def load(self, read: Read, count: Tensor | None) -> Turned:
        return self
