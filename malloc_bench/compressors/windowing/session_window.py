"""Whole last sessions, and the end of each earlier one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.selection import filled, ranked
from malloc_bench.compressors.windowing.recent import Window
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Stats


@register("session_window")
@dataclass(frozen=True)
class SessionWindow(Window):
    """Keeps the newest sessions as far as they fit whole, then the last event of each earlier session, newest first.

    gap: seconds without an event after which a new session begins; half an hour is the web's custom, a day suits data
    of purchases. The newest session stays before all else, cut to its newest events where it does not fit. What is
    still free goes to the newest events left. Where the data has no times, or nothing but one session, that is
    `recent`, with the positions stored.
    """

    gap: int = 1800

    family = "windowing"
    paper = "none: sessions cut at gaps, as in session-based recommendation"
    formula = (
        "order: newest session; sessions that fit whole behind it; last event of each other; the rest; newer first"
    )
    stores = "keys and values of k events, and their positions where the backbone reads them"

    def __post_init__(self) -> None:
        if self.gap < 1:
            raise ValueError(f"session_window: a gap of at least 1 second is needed, not {self.gap}")

    @property
    def needs(self) -> Stats:
        return Stats(events=True)

    def chosen(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        count, times = prefill.slots(layer).count.long(), prefill.slot_times(layer)
        width = prefill.segment(layer).width
        slot = torch.arange(width, device=k.device)
        last = (slot == count - 1) if width else slot.new_zeros(len(k), 0).bool()  # of its session, [B, S]
        if times is not None:
            last = last | torch.nn.functional.pad(times[:, 0].diff(dim=1) > self.gap, (0, 1)) & (slot < count)
        first = torch.nn.functional.pad(last[:, :-1], (1, 0), value=True)[:, :width]
        start = torch.where(first, slot, 0).cummax(1).values if width else slot.expand(len(k), 0)
        newest = start == start.gather(1, (count - 1).clamp(min=0)) if width else last
        whole = newest | (count - start <= k[:, None])
        score = torch.where(whole, 2, last.long()).float()[:, None]
        return filled(ranked(score, count), None, k)[:, 0]
