"""Each user's keys and values as a product of two thin matrices."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from malloc_bench.compressors.base import COUNT_BYTES, Budget, Encoder, Layout, dense_layout, map_vectors
from malloc_bench.registry import register
from malloc_bench.state import LowRank, Prefill, Segment, UserState, low_rank, principal


def _made(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    return make()


@register("svd")
@dataclass(frozen=True)
class SVD(Encoder):
    """Stores keys and values as two thin factors: a truncated SVD per user, layer and head (Eckart and Young, 1936).

    rank None: the largest rank that fits the budget, one for all layers and fields. A number: that rank (at most the
    number of slots), the size follows. Of a memory without slots the matrix itself is factored.
    """

    rank: int | None = None

    family = "low-rank"
    paper = "Eckart and Young 1936; absorbed factors as in DeepSeek-V2's latent attention, arXiv 2405.04434"
    formula = "X = U V with rank r: q.X' is read as (q V') U'"
    stores = "n x r and r x d factors per layer, head and field"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"svd: rank >= 1 is needed, not {self.rank}")

    @property
    def takes_budget(self) -> bool:
        return self.rank is None

    def accepts(self, budget: Budget) -> str | None:
        return None if budget.slots is None else "svd keeps every slot: give its budget as a fraction or in bytes"

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if self.rank is not None:
            return self.encode(prefill.state)
        if budget is None:
            raise ValueError("svd needs a budget or a rank")
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        target = budget.target(prefill.full_bytes())
        if target is None:
            raise ValueError(self.accepts(budget))
        fixed, step = self._sizes(prefill)
        rows = torch.stack([view.rows(0) for view in prefill.apart()]).amax(0)
        most = rows.clamp(max=max(width for _, _, width in dense_layout(prefill, "state").vectors))
        rank = ((target - fixed) // step.clamp(min=1)).clamp(min=1).minimum(most)
        return self._factor(prefill.state, rank, prefill.remember)

    def encode(self, state: UserState) -> UserState:
        assert self.rank is not None
        return self._factor(state, torch.full_like(state.length, self.rank).long())

    def _factor(self, state: UserState, rank: Tensor, once: Callable[..., Tensor] = _made) -> UserState:
        def factors(name: str, segment: Segment) -> LowRank:
            vectors = segment.fields[name]
            x = vectors.dense()
            mask = segment.real(x)
            fits = rank[:, None].minimum(mask.sum(-1)).clamp(max=x.shape[3])
            return low_rank(x, mask, fits, once(("principal", id(vectors)), lambda: principal(x, mask)))

        return map_vectors(state, factors)

    def _sizes(self, prefill: Prefill) -> tuple[Tensor, Tensor]:
        """Bytes [B] at rank 0, and bytes [B] that one more rank takes."""
        length = prefill.state.length.long()
        step = torch.zeros_like(length)
        fixed = step - COUNT_BYTES * (prefill.stacks - 1)  # one length for all stacks
        for view in prefill.apart():
            layout, n = dense_layout(view, "state", consecutive=True), view.rows(0)
            fixed = fixed + layout.beside(n, length) + COUNT_BYTES * len(layout.vectors)
            for _, heads, width in layout.vectors:
                step += 4 * heads * (n + width) * (n > 0)
        return fixed, step

    def floor(self, prefill: Prefill) -> Tensor:
        fixed, step = self._sizes(prefill)
        return fixed + step

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        assert self.rank is not None
        total = layout.beside(n, length) + COUNT_BYTES * len(layout.vectors)
        for _, heads, width in layout.vectors:
            total = total + 4 * heads * (n + width) * n.clamp(max=min(self.rank, width))
        return total

    def flops(self, state: UserState, history: int) -> int:
        """Gram matrix, eigenvectors (about 9 d^3: tridiagonal QR, Golub and Van Loan) and projection of each field."""
        total = 0
        for x in {id(v): v for s in state.segments() for v in s.fields.values() if isinstance(v, LowRank)}.values():
            _, heads, slots, width = x.shape
            total += heads * (2 * slots * width * (width + x.left.shape[3]) + 9 * width**3)
        return total
