"""What is promised of where slots stand in the history."""

from __future__ import annotations

from torch import Tensor

from malloc_bench.compressors import Compressor
from malloc_bench.state import Segment
from malloc_bench.testing.learning import budgets
from malloc_bench.testing.worlds import World


def keeps_places(compressor: Compressor, world: World) -> None:
    """A slot with the key of an event stands at that event's position and time, where the backbone reads them."""
    prefill = world.full(compressor.needs)
    reads_times = world.backbone is not None and world.backbone.uses_times
    if not (prefill.uses_positions or reads_times):
        return
    for budget in budgets(compressor, some=True):
        state = world.made(compressor, budget)
        for number, (layer, whole) in enumerate(zip(state.layers, prefill.state.layers)):
            if len(layer) == len(whole) == 1 and _plain(layer[0]) and _plain(whole[0]):
                where = f"{budget}: layer {number}"
                _compare(layer[0], whole[0], state.length, where, prefill.uses_positions, reads_times)


def _plain(segment: Segment) -> bool:
    return segment.slots is not None and "keys" in segment.fields


def _compare(found: Segment, whole: Segment, length: Tensor, where: str, positions: bool, times: bool) -> None:
    assert found.slots is not None and whole.slots is not None
    keys, events = found.fields["keys"].dense(), whole.fields["keys"].dense()
    k, n = keys.shape[2], events.shape[2]
    same = (keys.unsqueeze(3) == events.unsqueeze(2)).all(-1)  # [B, H, K, S]
    same &= found.slots.mask(k).unsqueeze(3) & whole.slots.mask(n).unsqueeze(2)
    of = same.int().argmax(-1)
    one, end = same.sum(-1) == 1, length[:, None]

    def check(what: str, told: Tensor, was: Tensor) -> None:
        want = was.expand(*same.shape[:2], n).gather(2, of)
        wrong = (one & (told.expand_as(want) != want)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            said, right = int(told.expand_as(want)[at]), int(want[at])
            who = f"{where}: user {at[0]}, head {at[1]}"
            what = f"the key of the event at {what} {right} is said to be at {said}: keep `slots.{what}s`"
            raise AssertionError(f"{who}: {what}, as `kept_slots` does")

    if positions:
        check("position", found.slots.places(k, end), whole.slots.places(n, end))
    if times and found.slots.timestamps is not None and whole.slots.timestamps is not None:
        check("timestamp", found.slots.timestamps, whole.slots.timestamps)
