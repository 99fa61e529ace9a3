"""One short vector a slot from which keys and values are mapped up: what methods with fitted bases have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from malloc_bench.compressors.base import Compressor, Sources
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget, slots_within
from malloc_bench.state import Factor, Map, Prefill, Rebuilt, Segment, UserState, factor

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@dataclass(frozen=True)
class Latent:
    """x [B, 1, S, N] of the layers that share a latent, x down their latent, down [N, R], the leading column first, and
    by (layer, field) the map from it."""

    layer: int  # any of those that share it
    x: Tensor
    down: Tensor
    up: Mapping[tuple[int, str], Map]


@dataclass(frozen=True)
class LatentMethod(Compressor):
    """rank None: the largest that fits the budget, the same for all latents; a number: that rank. dtype: of latents."""

    rank: int | None = None
    dtype: Literal["float16", "float32"] = "float16"

    family = "low-rank"

    def __post_init__(self) -> None:
        if (self.rank is not None and self.rank < 1) or self.dtype not in ("float16", "float32"):
            raise ValueError(f"{self.name}: rank >= 1, dtype float16 or float32 are needed, not {self}")

    @property
    def takes_budget(self) -> bool:
        return self.rank is None

    def accepts(self, budget: Budget) -> str | None:
        return None if budget.slots is None else f"{self.name} keeps every slot: give its budget as a share or in bytes"

    def supports(self, backbone: Backbone) -> str | None:
        return None if backbone.has_slots else f"{backbone.name} keeps a memory of constant size: it has no slots"

    @abstractmethod
    def latents(self, prefill: Prefill) -> list[Latent]:
        """By what was fitted."""

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if budget is not None and budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        latents, rank = prefill.remember(("latents", self), lambda: self.latents(prefill)), self.rank
        ranks = torch.full_like(prefill.state.length, rank or 1).long()
        if rank is None:
            target = None if budget is None else budget.target(prefill.full_bytes())
            if target is None:
                raise ValueError(f"{self.name} needs a budget" if budget is None else self.accepts(budget))
            most = max(each.down.shape[1] for each in latents)
            ranks = slots_within(target, torch.full_like(ranks, most), self._sizes(prefill, latents))
        made: dict[tuple[int, str], Rebuilt] = {}
        for each in latents:
            most = each.down.shape[1]
            own = ranks.clamp(max=most)
            down = each.down[:, : int(own.max()) if len(own) else 1].to(each.x.device, torch.float32)
            left = factor(
                each.x.float() @ down, prefill.mask(each.layer), own[:, None], most, getattr(torch, self.dtype)
            )
            made |= {key: Rebuilt(left, up) for key, up in each.up.items()}
        layers = []
        for layer in prefill.layers:
            segment = prefill.segment(layer)
            layers.append((Segment({name: made[layer, name] for name in segment.fields}, segment.slots),))
        return UserState(tuple(layers), prefill.state.length)

    def _sizes(self, prefill: Prefill, latents: list[Latent]) -> Callable[[Tensor], Tensor]:
        """rank [B] -> bytes [B] of the state."""
        bare = tuple((Segment({}, prefill.slots(layer)),) for layer in prefill.layers)
        beside = UserState(bare, prefill.state.length).nbytes()
        number = getattr(torch, self.dtype).itemsize

        def bytes_of(rank: Tensor) -> Tensor:
            sizes = [prefill.rows(x.layer) * rank.clamp(max=x.down.shape[1]) * number for x in latents]
            return beside + 2 * COUNT_BYTES * len(latents) + sum(sizes)  # with a rank and a scale

        return bytes_of

    def floor(self, prefill: Prefill) -> Tensor:
        latents = prefill.remember(("latents", self), lambda: self.latents(prefill))
        return self._sizes(prefill, latents)(torch.full_like(prefill.state.length, self.rank or 1).long())

    def flops(self, state: UserState, of: Sources) -> int:
        """Every slot through the map down."""
        rebuilt = {id(v.base): v for s in state.segments() for v in s.fields.values() if isinstance(v, Rebuilt)}
        return sum(2 * v.base.shape[2] * v.base.shape[3] * self.wide(v) for v in rebuilt.values())

    def wide(self, vectors: Rebuilt) -> int:
        """N of the latent that vectors are rebuilt from."""
        assert isinstance(vectors.base, Factor)
        return vectors.base.most
