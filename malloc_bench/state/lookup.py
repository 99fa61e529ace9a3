"""Which few slots of a segment a token touches: look-ups that cut what is read, not what is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.state.named import Named
from malloc_bench.state.quantized import pack_bits
from malloc_bench.state.vectors import Vectors


@dataclass(frozen=True, eq=False)
class Lookup(ABC):
    """Every token and head attends to the `top` slots that it rates highest, and touches no other.

    codes: what is stored of each slot to be rated by, [B, H or 1, S, W]; None: its key. keys: it asks for the logits of
    all slots, for which all keys are read.
    """

    top: int
    codes: Vectors | None = None

    keys: ClassVar[bool] = False

    @abstractmethod
    def rate(self, q: Tensor, items: Tensor, logits: Tensor | None) -> Tensor:
        """[B, H or 1, M, S], higher is found first, -inf never; beyond a user's count nothing is read.

        q: [B, H, M, D]; items: the tokens' own, [B, M]; logits: [B, H, M, S], where it asks for them.
        """

    def find(self, q: Tensor, items: Tensor, mask: Tensor, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Slots [B, H or 1, M, K] of each token, and which of them are found; mask [B, H or 1, S]: the real ones."""
        rated = self.rate(q, items, logits).masked_fill(~mask.unsqueeze(2), -torch.inf)
        newest_first = rated.flip(-1)  # topk is slow where later ones are ever better
        best = newest_first.topk(min(self.top, rated.shape[-1]), -1, sorted=False)
        return rated.shape[-1] - 1 - best.indices, best.values > -torch.inf

    def flops(self, queries: int, heads: int, width: int) -> int:
        """Of `rate` beside the logits, per user; heads and width are those of queries."""
        return 0

    def over(self, codes: Vectors | None) -> Self:
        """The same look-up in the codes of other users."""
        return replace(self, codes=codes)


@dataclass(frozen=True, eq=False)
class ByLogit(Lookup):
    """The slots of the largest logits: all keys are read, few values."""

    keys = True

    def rate(self, q: Tensor, items: Tensor, logits: Tensor | None) -> Tensor:
        assert logits is not None
        return logits


@dataclass(frozen=True, eq=False)
class ByLabel(Lookup):
    """The newest slots with the token's own label. codes: [B, 1, S, 1] integers; labels: `Named` of one table,
    [n_items], a fact of the catalogue."""

    labels: Named | None = None

    def rate(self, q: Tensor, items: Tensor, logits: Tensor | None) -> Tensor:
        assert self.codes is not None and self.labels is not None
        (table,) = self.labels.values()
        asked = table.to(items.device)[(items.long() - 1).clamp(min=0)]
        held = self.codes.dense()[..., 0].unsqueeze(2)  # [B, 1, 1, S]
        age = torch.arange(held.shape[-1], dtype=torch.float32, device=items.device)
        return torch.where(held == asked[:, None, :, None], age, -torch.inf)


@dataclass(frozen=True, eq=False)
class ByHash(Lookup):
    """The slots whose hash agrees with the query's in most runs of `run` bits, the newer where they tie.

    codes: [B, H, S, bits / 8] uint8. least: runs in which a slot must agree to be found at all.
    """

    run: int = 1
    least: int = 0

    def rate(self, q: Tensor, items: Tensor, logits: Tensor | None) -> Tensor:
        assert self.codes is not None
        held = self.codes.dense()
        slots, bits = held.shape[2], 8 * held.shape[3]
        asked, held = _words(signs(q, bits)), _words(held)
        runs = torch.full((*q.shape[:3], slots), bits // self.run, dtype=torch.int32, device=q.device)
        for word in range(held.shape[-1]):
            runs -= _differing(asked[..., word].unsqueeze(-1) ^ held[..., word].unsqueeze(-2), self.run)
        rated = (runs * slots + torch.arange(slots, dtype=torch.int32, device=q.device)).float()  # exact up to 2^24
        return rated.masked_fill(runs < self.least, -torch.inf)

    def flops(self, queries: int, heads: int, width: int) -> int:
        assert self.codes is not None
        return hash_flops(queries, heads, width, 8 * self.codes.shape[3])


def signs(x: Tensor, bits: int) -> Tensor:
    """On which sides of `bits` random planes vectors [B, H, S, D] lie: [B, H, S, bits / 8] uint8."""
    return pack_bits((x.float() @ _planes(x.shape[-1], bits).to(x.device) > 0).byte(), 1)


def hash_flops(vectors: int, heads: int, width: int, bits: int) -> int:
    """Of `signs`."""
    return 2 * vectors * heads * width * bits


@lru_cache(maxsize=64)
def _planes(width: int, bits: int) -> Tensor:
    """[D, bits], the same everywhere: nothing to store."""
    return torch.randn(width, bits, generator=torch.Generator().manual_seed(bits))


def _words(codes: Tensor) -> Tensor:
    """Bytes [..., W] as int32 [..., ceil(W / 4)]."""
    words = F.pad(codes, (0, -codes.shape[-1] % 4)).reshape(-1, 4).long() << torch.arange(0, 32, 8, device=codes.device)
    return words.sum(-1).int().view(*codes.shape[:-1], -(-codes.shape[-1] // 4))


def _differing(x: Tensor, run: int) -> Tensor:
    """How many runs of `run` bits of int32 x are not 0; x is overwritten. Bits are added up side by side,
    as torch has no count of them."""
    for step in (1, 2, 4):
        if step < run:
            x |= x >> step
    x &= {1: -1, 2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[run]  # the lowest of each run knows of all
    if run == 1:
        x -= (x >> 1) & 0x55555555
    if run <= 2:
        x = (x & 0x33333333).add_((x >> 2) & 0x33333333)
    if run <= 4:
        x = (x & 0x0F0F0F0F).add_((x >> 4) & 0x0F0F0F0F)
    return (x * 0x01010101 >> 24) & 0xFF
