"""Keep the raw events, their ids in as few bits as popularity allows, and rebuild the state when it is asked for."""

from dataclasses import dataclass
from typing import Any

import torch

from malloc_bench.compressors.base import Compressor, grows
from malloc_bench.compressors.recompute.recompute import raw_events
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import CodedEvents, Fitted, ItemFrequencies, MissingStatistic, Prefill, Sample, Stats, UserState


@register("ids_coded")
@dataclass(frozen=True)
class IdsCoded(Compressor):
    """`recompute` with its ids entropy-coded: log2(1 / popularity) bits an event, and not a number read otherwise.

    Popularity is that in training events, those of the sample of users counted twice, and one for every item. Times
    and kinds stay as they are.
    """

    family = "recompute"
    paper = "none: Duda's asymmetric numeral systems, arXiv 1311.2540, under a static model"
    formula = "bytes = floor(sum over events of log2(1 / p(item)) / 8) and 5 for the coder's state; read as recompute"
    growth = grows(memory="n", read="n^2 L d + n L d^2")
    stores = "a size (int32), coded item ids, times (int64) and kinds (uint8) where read; fixed bytes: counts of items"

    @property
    def needs(self) -> Stats:
        return Stats(events=True, popularity=True)

    @property
    def takes_budget(self) -> bool:
        return False

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        counts = None
        for prefill in sample:
            if prefill.items is None or "popularity" not in prefill.items:
                raise MissingStatistic("ids are coded by popularity, which is not known here")
            counts = prefill.items["popularity"].cpu() + 1 if counts is None else counts
            events = raw_events(prefill)
            counts = counts + torch.bincount(events.items[events.mask()].cpu() - 1, minlength=len(counts))
        return Fitted({} if counts is None else {"counts": counts.int()})

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        events, table = raw_events(prefill), ItemFrequencies(fitted["counts"])
        return UserState((), events.count, CodedEvents.of(events, table))
