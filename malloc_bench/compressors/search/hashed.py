"""Keys as bits of a hash, which queries are compared with."""

from __future__ import annotations

import torch

from malloc_bench.compressors.base import Sources
from malloc_bench.compressors.search.searched import Search
from malloc_bench.state import Dense, Prefill, UserState, hash_flops, signs


class Hashed(Search):
    """Searches by random planes. Keys are hashed less their mean over the user's slots, which adds the same to each
    logit of a query and so changes no order, but hides the angles between keys."""

    bits: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 8 or self.bits % 8:
            raise ValueError(f"{self.name}: bits must be whole bytes, 8 or more, not {self.bits}")

    def codes(self, prefill: Prefill, layer: int) -> Dense:
        real, keys = prefill.mask(layer).unsqueeze(-1), prefill.keys(layer).float()
        count = prefill.slots(layer).count.clamp(min=1)[..., None, None]
        mean = torch.where(real, keys, 0.0).sum(2, keepdim=True) / count
        return Dense(signs(keys - mean, self.bits))

    def flops(self, state: UserState, of: Sources) -> int:
        """Of the hashes."""
        shapes = [segment.fields["keys"].shape for segment in state.segments()]
        return sum(hash_flops(slots, h, width, self.bits) for _, h, slots, width in shapes)
