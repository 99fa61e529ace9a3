"""Drift: what went on is held against what was made from scratch, and what new events ask is what a plain pass says."""

from __future__ import annotations

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.evaluation.drift import drift
from malloc_bench.evaluation.evaluate import Job
from malloc_bench.state import MissingStatistic, Stats
from malloc_bench.testing import World
from malloc_bench.testing.worlds import close, histories

LENGTHS = (6, 9, 23, 40)


@pytest.mark.parametrize("case", ["sasrec-2-heads", "hstu-times-2-heads", "sasrec-gqa", "marm-2-heads", "sasrec-mla"])
def test_what_new_events_ask_is_what_a_prefill_saw(case, trained):
    """Over the full state, whose newest three events are appended instead."""
    backbone, stats = trained(case), Stats(column_sum=True, window=3, queries=3)
    history, _ = histories(backbone, LENGTHS)
    whole = backbone.prepare(history, stats=stats)
    before = backbone.prepare(history.each(lambda x: x, history.count - 3))
    grown = backbone.go_on(before, before.state, history.last(torch.full_like(history.count, 3)), stats)
    for layer in whole.layers:
        want = whole.newest_attention(layer, 3)
        close(grown.newest_attention(layer, 3), want, "window", 1e-5)
        close(grown.attention_received(layer), want.abs().sum(2), "sums", 1e-5)
        close(grown.newest_queries(layer, 3)[0], whole.newest_queries(layer, 3)[0], "queries", 1e-5)
        assert (whole.standing is None) == (grown.standing is None) == (not backbone.blocks[0].biased)
        if whole.standing is not None and grown.standing is not None:
            seen, want = (x.standing[layer] * x.mask(layer) for x in (grown, whole))
            close(seen, want, "standing", 1e-5)
        with pytest.raises(MissingStatistic):
            grown.newest_queries(layer, 4)


def test_sums_go_on(trained):
    """h2o_stream's, on a state that evicts nothing: those of the whole history."""
    backbone, method = trained("sasrec-2-heads"), get_compressor("h2o_stream")
    history, _ = histories(backbone, LENGTHS)
    before = World("x", backbone).prefill(method.needs, LENGTHS)
    before = backbone.prepare(history.each(lambda x: x, history.count - 2), stats=method.needs)
    state = method.keep(before, before.state.length.long())
    new = history.last(torch.full_like(history.count, 2))
    state = method.update(backbone.go_on(before, state, new, method.needs), Budget(slots=64))
    want = backbone.prepare(history, stats=method.needs)
    for layer, (segment,) in enumerate(state.layers):
        real = want.mask(layer)
        close(segment.slots.score * real, want.attention_received(layer) * real, "sums", 1e-5)


def test_one_eviction_an_append(trained):
    """The slot that goes is the one of the smallest sum outside the newest half."""
    backbone, method = trained("sasrec"), get_compressor("h2o_stream")
    history, _ = histories(backbone, LENGTHS)
    before = backbone.prepare(history.each(lambda x: x, history.count - 1), stats=method.needs)
    state = method.compress(before, {"slots": 4})
    grown = backbone.go_on(before, state, history.last(torch.ones_like(history.count)), method.needs)
    after = method.update(grown, {"slots": 4})
    for layer in grown.layers:
        total = method.scores(grown, layer)[:, 0]
        for user in range(len(LENGTHS)):
            out = int(total[user, :3].argmin())  # of five the newest two are forced
            kept = [i for i in range(5) if i != out]
            close(after.layers[layer][0].slots.score[user, 0], total[user, kept], "kept", 1e-6)


@pytest.mark.parametrize("after", [{"kivi": {"bits": 8, "tail": 2}}, {"by_age": {"bits": 8, "old_bits": 8}}, "mxint"])
def test_sums_are_kept_by_what_writes_slots_apart(trained, after):
    """They are charged to the budget, so they are stored; the next update adds to them."""
    backbone, chain = trained("sasrec"), get_compressor("compose", steps=("h2o_stream", after))
    history, _ = histories(backbone, LENGTHS)
    before = backbone.prepare(history.each(lambda x: x, history.count - 1), stats=chain.needs)
    state = chain.compress(before, {"slots": 5})
    grown = backbone.go_on(before, state, history.last(torch.ones_like(history.count)), chain.needs)
    plain = chain.steps[0].compress(before, {"slots": 5})
    for layer in grown.layers:
        close(grown.slots(layer).score[..., :5], plain.layers[layer][0].slots.score, "sums", 1e-6)


def test_columns(trained, synthetic):
    backbone = trained("sasrec")
    jobs = [
        Job("full", get_compressor("full")), Job("recent", get_compressor("recent"), Budget(0.3)),
        Job("h2o", get_compressor("h2o"), Budget(0.3)), Job("dedup", get_compressor("dedup"), Budget(0.3)),
        Job("recompute", get_compressor("recompute")), Job("fit", get_compressor("fit_recent", probes=8), Budget(0.3)),
    ]  # fmt: skip
    told: list[tuple[int, int]] = []
    found, failed = drift(backbone, synthetic, jobs, (1, 10), report=lambda *part: told.append(part))
    assert not failed
    assert [done for done, _ in told] == list(range(len(told))) and {total for _, total in told} == {len(told)}
    assert found["full"] == {
        f"{name}@{n}": value for n in (1, 10) for name, value in (("drift", 0), ("appended", 1), ("drift_users", 256))
    }
    assert found["dedup"] == found["recompute"] == {"drift_users@1": 0, "drift_users@10": 0}
    for name in ("h2o", "recent", "fit"):
        assert -1 <= found[name]["drift@10"] <= 1 and found[name]["drift_users@10"] == 256
        # of 11 events or more ten are there as they are, behind what was kept of those before
        assert found[name]["appended@10"] > found[name]["appended@1"] - 0.1 and 0 < found[name]["appended@1"] < 1
    again = drift(backbone, synthetic, jobs[:2], (1, 10))[0]
    assert again == {name: found[name] for name in ("full", "recent")}
    seen_too = drift(backbone, synthetic, jobs[:2], (1, 10), filter_seen=False)[0]
    assert seen_too["full"] == found["full"] and seen_too["recent"] != found["recent"]  # other lists, as the suite's
