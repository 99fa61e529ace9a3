"""The rows of a layer's state: how many each user has, and what is known of each beside its vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.state.packing import Reader
from malloc_bench.state.vectors import Ragged

_ONE = torch.ones(1, 1, dtype=torch.long)
_LAST = torch.iinfo(torch.int16).max
_KNOWN = ("positions", "timestamps", "mass", "score")
_MOMENTS = (1 << 32) - 1  # seconds from 1970 to 2106, as 32 bits hold them


@dataclass(frozen=True, eq=False)
class Slots:
    """Left-aligned slots of B users; H' is the number of heads, or 1 where all heads keep the same slots.

    count: [B, H'] int32.
    positions: [B, H', S] int32, the event's place in the user's history. None: the slots are consecutive events that
        end where the next segment begins, or with the newest event; nothing needs to be stored.
    timestamps: [B, H', S] int64 seconds; None where the backbone does not read times.
    mass: [B, H', S] float32, events folded into the slot; None: one each.
    score: [B, H', S] float32, what a method will want to know of the slot when the user goes on; no backbone reads it.
    short: positions are stored as int16, masses, which are rounded to it, as bfloat16, and timestamps in 32 bits, see
        `shortened`.
    """

    count: Tensor
    positions: Tensor | None = None
    timestamps: Tensor | None = None
    mass: Tensor | None = None
    score: Tensor | None = None
    short: bool = False

    def __init_subclass__(cls) -> None:
        if own := {"parts", "load"} & vars(cls).keys():
            raise TypeError(
                f"{cls.__name__}: {', '.join(sorted(own))} of Slots are final, bytes are counted in one place"
            )

    def __repr__(self) -> str:
        known = [name for name in _KNOWN if getattr(self, name) is not None]
        least, most = self.count.aminmax() if self.count.numel() else (0, 0)
        return f"Slots({int(least)} to {int(most)} of {len(self.count)} users{''.join(f', {name}' for name in known)})"

    def each(self, fn: Callable[[Tensor], Tensor], count: Tensor) -> Self:
        """fn of all that is known of every slot, [B, H', S] each, of which the first count [B, H'] are real."""
        known: dict[str, Any] = {name: fn(x) for name in _KNOWN if (x := getattr(self, name)) is not None}
        return replace(self, count=count, **known)

    def shortened(self) -> Slots:
        """The same in fewer bytes; raises ValueError for positions beyond int16, and for times beyond uint32."""
        if self.positions is not None and self.positions.numel():
            last = torch.where(self.mask(self.positions.shape[-1]), self.positions, 0).max()
            if int(last) > _LAST:
                raise ValueError(f"positions in 16 bits reach {_LAST}, not {int(last)}: histories too long")
        if self.timestamps is not None and self.timestamps.numel():
            first, last = torch.where(self.mask(self.timestamps.shape[-1]), self.timestamps, 0).aminmax()
            if int(first) < 0 or int(last) > _MOMENTS:
                raise ValueError(f"times in 32 bits are seconds from 0 to {_MOMENTS}, not {int(first)} to {int(last)}")
        mass = None if self.mass is None else self.mass.to(torch.bfloat16).float()
        return replace(self, mass=mass, short=True)

    def mask(self, width: int) -> Tensor:
        """True where a slot is real: [B, H', width] bool."""
        return torch.arange(width, device=self.count.device) < self.count.unsqueeze(-1)

    def places(self, width: int, end: Tensor) -> Tensor:
        """Positions [B, H', width], implied ones written out; end [B, H'] is the position after the last slot."""
        if self.positions is not None:
            return self.positions
        return (end - self.count).unsqueeze(-1) + torch.arange(width, device=self.count.device)

    def parts(self, length: Tensor) -> Iterator[Ragged]:
        """Stored arrays; length [B]. Where every event has its own slot, positions and mass need not be stored."""
        yield Ragged(self.count[..., None, None], _ONE.to(self.count.device).expand(len(self.count), 1), None, "counts")
        index = self.count * (self.count < length[:, None])
        positions, mass, times = self._written()
        each = {
            "positions": (positions, index),
            "masses": (mass, index),
            "times": (times, self.count),
            "scores": (self.score, self.count),
        }
        for what, (tensor, rows) in each.items():
            if tensor is not None:
                yield Ragged(tensor.unsqueeze(-1), rows, None, what)

    def _written(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Positions, masses and times as they are stored."""
        if not self.short:
            return self.positions, self.mass, self.timestamps
        places = None if self.positions is None else self.positions.clamp(max=_LAST).to(torch.int16)  # of padding any
        times = None if self.timestamps is None else self.timestamps.to(torch.int32)  # the lower 32 bits
        return places, None if self.mass is None else self.mass.to(torch.bfloat16), times

    def load(self, read: Reader, length: Tensor) -> Slots:
        """The inverse of `parts`; raises ValueError for more slots than events, or than bytes that could hold them."""
        count = read.numbers(self.count, length[:, None], "has less than 0 or more slots than events")
        read.refuse(count > read.left.to(count.device), "has more slots than bytes")
        whole = count >= length[:, None]
        width = int(count.max()) if count.numel() else 0

        def rows(tensor: Tensor | None, stored: Tensor) -> Tensor | None:
            if tensor is None:
                return None
            x = read(tensor.unsqueeze(-1), stored).squeeze(-1)
            return F.pad(x, (0, width - x.shape[-1]))

        *index, moments = self._written()
        positions, mass = (rows(each, count * ~whole) for each in index)
        if positions is not None:
            positions = positions.int()
            wrong = (positions < 0) | (positions >= length[:, None, None].clamp(min=1))
            read.refuse(wrong, "has a position outside its history")
            positions = torch.where(
                whole[..., None], torch.arange(width, dtype=positions.dtype, device=count.device), positions
            )
        if mass is not None:
            mass = torch.where(whole[..., None], 1.0, mass.float())
        times = rows(moments, count)
        if times is not None and self.short:
            times = times.long() & _MOMENTS
        return Slots(count, positions, times, mass, rows(self.score, count), self.short)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, S, ...] by index [B, H, K] (either H may be 1) -> [B, H, K, ...]; copies whole rows, fast."""
    b, h, s = x.shape[:3]
    first_row = torch.arange(b * h, device=x.device).view(b, h, 1) * s
    rows = index + first_row
    return x.reshape(b * h * s, *x.shape[3:]).index_select(0, rows.reshape(-1)).view(*rows.shape, *x.shape[3:])
