"""The rows of a layer's state: how many each user has, and what is known of each beside its vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.state.vectors import Ragged, Read

_ONE = torch.ones(1, 1, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class Slots:
    """Left-aligned slots of B users; H' is the number of heads, or 1 where all heads keep the same slots.

    count: [B, H'] int32.
    positions: [B, H', S] int32, the event's place in the user's history. None: the slots are consecutive events that
        end where the next segment begins, or with the newest event; nothing needs to be stored.
    timestamps: [B, H', S] int64 seconds; None where the backbone does not read times.
    mass: [B, H', S] float32, events folded into the slot; None: one each.
    """

    count: Tensor
    positions: Tensor | None = None
    timestamps: Tensor | None = None
    mass: Tensor | None = None

    def mask(self, width: int) -> Tensor:
        """True where a slot is real: [B, H', width] bool."""
        return torch.arange(width, device=self.count.device) < self.count.unsqueeze(-1)

    def places(self, width: int, end: Tensor) -> Tensor:
        """Positions [B, H', width], implied ones written out; end [B, H'] is the position after the last slot."""
        if self.positions is not None:
            return self.positions
        return (end - self.count).unsqueeze(-1) + torch.arange(width, device=self.count.device)

    def parts(self) -> Iterator[Ragged]:
        yield Ragged(self.count[..., None, None], _ONE.to(self.count.device).expand(len(self.count), 1))
        for tensor in (self.positions, self.timestamps, self.mass):
            if tensor is not None:
                yield Ragged(tensor.unsqueeze(-1), self.count)

    def load(self, read: Read) -> Slots:
        count = read(self.count[..., None, None], _ONE)[..., 0, 0]

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else read(tensor.unsqueeze(-1), count).squeeze(-1)

        return Slots(count, rows(self.positions), rows(self.timestamps), rows(self.mass))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, S, ...] by index [B, H, K] (either H may be 1) -> [B, H, K, ...]; copies whole rows, fast."""
    b, h, s = x.shape[:3]
    first_row = torch.arange(b * h, device=x.device).view(b, h, 1) * s
    rows = index + first_row
    return x.reshape(b * h * s, *x.shape[3:]).index_select(0, rows.reshape(-1)).view(*rows.shape, *x.shape[3:])
