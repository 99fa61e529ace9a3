"""Climber: what it deals out, what its layers compute, what that costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.climber_partition import STRATEGIES, balanced
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.data import Dataset
from malloc_bench.data.tasks.batches import window
from malloc_bench.data.tasks.splits import only
from malloc_bench.measure import Workload, count_flops
from malloc_bench.state import Events, Stats
from malloc_bench.testing import histories
from malloc_bench.testing.backbones import append_equals_prefill, batch_and_padding_do_not_matter, read_equals_forward
from malloc_bench.testing.worlds import LENGTHS, check_packs, close

DAY = 86_400


def build(has_time=False, **params):
    torch.manual_seed(0)
    backbone = get_backbone("climber", 60, has_time, dim=16, heads=2, max_length=320, **params)
    if backbone.uses_categories:
        backbone.categorise(torch.arange(60) % 7)
    return backbone.eval().requires_grad_(False)


def test_times_fall_into_parts_of_days_and_weeks():
    monday = 4 * DAY  # 5 January 1970
    times = torch.tensor([monday, monday + DAY // 2, monday + DAY - 1, monday + 6 * DAY])
    events = Events(times, torch.tensor([4]), times)
    assert STRATEGIES["part_of_day"](events, times, 4).tolist() == [0, 2, 3, 0]
    assert STRATEGIES["day_of_week"](events, times, 7).tolist() == [0, 0, 0, 6]


def toy(**feedback):
    columns = {name: np.array(x, np.float32) for name, x in feedback.items()}
    n = max(len(x) for x in columns.values())
    return Dataset("toy", None, "x", np.arange(1), np.arange(n), np.array([0, n]), np.arange(n) + 1, None, columns, "")


def partition(dataset, n):
    events = window(dataset, np.array([0]), dataset.offsets[1:], dataset.n_events)
    return STRATEGIES["feedback"](events, torch.arange(dataset.n_events)[None], n)[0].tolist()


def test_feedback_is_bands_of_the_rating_s_scale():
    stars = toy(rating=[1, 2, 3, 4, 5, 2.5])
    assert partition(stars, 1) == [0] * 6
    assert partition(stars, 2) == [0, 0, 1, 1, 1, 0]
    assert partition(stars, 5) == [0, 1, 2, 3, 4, 2]
    halves = toy(rating=np.arange(1, 11) / 2)
    assert partition(halves, 10) == list(range(10))
    liked = only(stars, stars.feedback["rating"] >= 4)  # a part of the data: the same bands
    assert partition(liked, 5) == [3, 4]
    assert partition(toy(behavior=[1, 2, 3, 4]), 4) == [0, 1, 2, 3]
    assert partition(toy(rating=[0, 0]), 2) == [0, 0]


def test_feedback_is_the_strongest_behaviour():
    data = toy(
        is_click=[0, 1, 1, 0, 1], long_view=[0, 0, 1, 0, 1], is_like=[0, 0, 0, 1, 1], play_time_ms=[9, 0, 0, 0, 0]
    )
    assert data.kinds.tolist() == [0, 85, 170, 255, 255]
    assert partition(data, 4) == [0, 1, 2, 3, 3] and partition(data, 2) == [0, 0, 1, 1, 1]
    assert toy(watch_ratio=[0.5, 2]).kinds is None


def test_feedback_that_the_data_has_not_is_asked_for_in_a_word():
    backbone = build(strategy="feedback")
    history, tokens = histories(backbone, LENGTHS)
    bare, state = replace(history, kinds=None), backbone.prefill(history).state
    for call in (backbone, backbone.prefill, lambda events: backbone.append(state, events)):
        with pytest.raises(ValueError, match="strategy feedback reads what users did"):
            call(bare)
    unknown = replace(tokens, kinds=None)  # a candidate's is not known before it is shown
    assert torch.equal(backbone.read(unknown, state), backbone.read(tokens, state))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 10))
def test_whole_categories_are_partitioned_evenly(categories, n):
    known = torch.tensor(categories)
    if n > len(set(categories)):
        with pytest.raises(ValueError, match=f"{n} blocks, and {len(set(categories))} of them"):
            balanced(known, n)
        return
    blocks = balanced(known, n)
    assert blocks.shape == (len(known) + 1,) and blocks[0] == 0
    assert len({(c, b) for c, b in zip(categories, blocks[1:].tolist())}) == len(set(categories))
    sizes = blocks[1:].bincount(minlength=n)
    assert sizes.min() > 0 and sizes.max() - sizes.min() <= known.bincount().max()


def test_a_category_is_looked_up_by_the_item_and_kept_with_the_weights():
    unknowing = get_backbone("climber", 60, blocks=2, strategy="category", max_length=320)
    history, _ = histories(unknowing, LENGTHS)
    with pytest.raises(ValueError, match="does not know the items' categories"):
        unknowing(history)
    knowing = build(blocks=2, layers=1, strategy="category")
    state = knowing.prefill(history).state
    for layer, (segment,) in enumerate(state.layers):
        for user, n in enumerate(LENGTHS):
            places = segment.slots.positions[user, 0, : int(segment.slots.count[user, 0])].long()
            want = [t for t in range(n) if knowing.block_of[history.items[user, t]] == layer]
            assert places.tolist() == want
    again = get_backbone("climber", 60, blocks=2, layers=1, strategy="category", dim=16, heads=2, max_length=320)
    again.load_state_dict(knowing.state_dict())
    assert torch.equal(again.eval()(history), knowing(history))
    assert "block_of" not in build(strategy="stride").state_dict()


@pytest.mark.parametrize("strategy", ["category", "feedback", "stride"])
@pytest.mark.parametrize("promise", [append_equals_prefill, read_equals_forward, batch_and_padding_do_not_matter])
def test_promises_are_kept_by(promise, strategy):
    with torch.no_grad():
        promise(build(blocks=3, strategy=strategy))


@given(st.sampled_from(sorted(STRATEGIES)), st.integers(0, 2**31), st.integers(1, 7), st.integers(0, 40))
def test_an_event_never_changes_its_block(strategy, seed, n, known):
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(1, 60, (2, 40), generator=generator, dtype=torch.int32)
    times = torch.randint(0, 2 * 10**9, (2, 40), generator=generator)
    kinds = torch.randint(0, 256, (2, 40), generator=generator, dtype=torch.uint8)
    events, positions = Events(items, torch.full((2,), 40), times, times, kinds), torch.arange(40)[None]
    blocks = STRATEGIES[strategy](events, positions, n)
    assert blocks.shape == items.shape and 0 <= int(blocks.min()) <= int(blocks.max()) < n
    for part in (slice(None, known), slice(known, None)):
        some = events.each(lambda x: x[:, part], events.count)  # noqa: B023
        assert torch.equal(STRATEGIES[strategy](some, positions[:, part], n), blocks[:, part])


@pytest.mark.parametrize("strategy, each", [("feedback", 4 + 1), ("category", 4), ("stride", 4), ("item_hash", 4)])
def test_raw_events_keep_what_the_strategy_reads(strategy, each):
    backbone = build(blocks=3, strategy=strategy)
    history, tokens = histories(backbone, LENGTHS)
    full = backbone.prefill(history)
    state = get_compressor("recompute").compress(full)
    assert state.nbytes().tolist() == [4 + n * each for n in LENGTHS]
    check_packs(state, lambda s: backbone.read(tokens, s))
    close(backbone.read(tokens, state), backbone.read(tokens, full.state), "rebuilt", 1e-5)
    short = get_compressor("truncate").compress(full, Budget(slots=5))
    assert short.nbytes().tolist() == [4 + min(n, 5) * each for n in LENGTHS]
    rebuilt = backbone.prefill(history.last(torch.full((len(LENGTHS),), 5))).state
    close(backbone.read(tokens, short), backbone.read(tokens, rebuilt), "truncated", 1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_event_is_stored_once_in_the_block_of_its_own(strategy):
    backbone = build(True, blocks=3, strategy=strategy)
    history, _ = histories(backbone, LENGTHS)
    kinds = STRATEGIES[strategy](history, torch.arange(history.items.shape[1])[None], 3)
    state = backbone.prefill(history).state
    for user, n in enumerate(LENGTHS):
        for layer, (segment,) in enumerate(state.layers):
            places = segment.slots.positions[user, 0, : int(segment.slots.count[user, 0])]
            assert places.tolist() == [t for t in range(n) if kinds[user, t] == layer // 2]


def test_layers_divide_biased_products_by_their_temperature():
    """One user's first block by the paper's formula, in loops and float64, from the embedding to the stored keys."""
    backbone = build(blocks=2, layers=2)
    history, _ = histories(backbone, (12,))
    mine = [t for t in range(12) if STRATEGIES["item_hash"](history, torch.arange(12)[None], 2)[0, t] == 0]
    p = {name: x.double() for name, x in backbone.state_dict().items()}
    x = (p["items.weight"][history.items[0].long()] * 4 + p["positions.weight"][:12])[mine]

    def norm(x, name):
        return torch.layer_norm(x, x.shape[-1:], p[f"blocks.0.{name}.weight"], p[f"blocks.0.{name}.bias"])

    def linear(x, name):
        return x @ p[f"blocks.0.{name}.weight"].T + p[f"blocks.0.{name}.bias"]

    q, k, v = linear(norm(x, "norm_attention"), "qkv").chunk(3, -1)
    mixed = torch.zeros_like(x)
    for head in (slice(0, 8), slice(8, 16)):
        for row in range(len(mine)):
            bias = torch.stack([p["blocks.0.position_bias"][mine[row] - mine[c]] for c in range(row + 1)])
            logits = (k[: row + 1, head] @ q[row, head] + bias) / p["blocks.0.temperature"][0].exp()
            mixed[row, head] = logits.softmax(0) @ v[: row + 1, head]
    x = x + linear(mixed, "out")
    x = x + linear(torch.relu(linear(norm(x, "norm_ffn"), "up")), "down")
    second = {k.removeprefix("blocks.1."): w for k, w in p.items() if k.startswith("blocks.1.")}
    x = torch.layer_norm(x, (16,), second["norm_attention.weight"], second["norm_attention.bias"])
    keys = (x @ second["qkv.weight"].T + second["qkv.bias"]).chunk(3, -1)[1]
    (segment,) = backbone.prefill(history).state.layers[1]
    got = segment.fields["keys"].dense()[0, :, : len(mine)].transpose(0, 1).flatten(1)
    close(got.double(), keys, "keys of the second layer", 1e-5)


def test_temperatures_are_those_of_the_moment_of_the_request():
    backbone = build(True, scenario="weekend")
    history, tokens = histories(backbone, (20,))
    state = backbone.prefill(history).state
    friday = torch.full_like(tokens.times, 19_699 * DAY)
    day = {n: replace(tokens, times=friday + n * DAY, next_times=friday + n * DAY) for n in (0, 1)}
    before = [backbone.read(day[n], state) for n in (0, 1)]
    backbone.blocks[0].temperature[1] += 2.0
    after = [backbone.read(day[n], state) for n in (0, 1)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


@pytest.mark.parametrize(
    "strategy, blocks", [("item_hash", 1), ("item_hash", 2), ("category", 2), ("feedback", 2), ("stride", 3)]
)
@pytest.mark.parametrize("method", ["full", "recent", "h2o", "svd", "recompute"])
def test_the_closed_form_is_what_the_counter_counts(method, strategy, blocks):
    backbone, work, method = build(strategy=strategy, blocks=blocks), Workload(2, 300, 5, 2), get_compressor(method)
    events, tokens, new = work.events(60)
    with torch.inference_mode():
        full = backbone.prefill(events, stats=method.needs)
        state = method.compress(full, Budget(0.4) if method.takes_budget else None)
        counted = {
            "prefill": count_flops(lambda: backbone.prefill(events)),
            "read": count_flops(lambda: backbone.read(tokens, state)),
        }
        assert counted["prefill"] == 2 * backbone.flops("prefill", 300, full.state) > 0
        assert counted["read"] == 2 * backbone.flops("read", 5, state) > 0
        if state.events is None:
            assert count_flops(lambda: backbone.append(state, new)) == 2 * backbone.flops("append", 2, state)
        for stats in (Stats(True), Stats(window=4)):
            added = count_flops(lambda: backbone.prefill(events, stats=stats)) - counted["prefill"]  # noqa: B023
            assert added == 2 * backbone.flops("statistics", 300, full.state, stats) > 0


def test_attention_of_a_prefill_is_divided_by_the_number_of_blocks():
    """Equal blocks: the quadratic part of the closed form falls as 1 / N_b, the linear part stays."""
    sizes = {n: [build(blocks=n).flops("prefill", s) for s in (16_384, 32_768)] for n in (1, 2, 4, 8)}
    quadratic = {n: twice - 2 * once for n, (once, twice) in sizes.items()}
    for n in (2, 4, 8):
        assert abs(quadratic[1] / quadratic[n] / n - 1) < 0.05


@pytest.mark.parametrize(
    "params, why",
    [
        ({"strategy": "behaviours"}, "strategy must be one of item_hash"),
        ({"scenario": "sunny"}, "scenario must be one of one"),
        ({"blocks": 0}, "blocks must be 1 to"),
        ({"strategy": "day_of_week", "blocks": 8}, "1 to 7"),
        ({"strategy": "feedback", "blocks": 257}, "1 to 256"),
        ({"strategy": "part_of_day"}, "reads times"),
        ({"scenario": "weekend"}, "reads times"),
    ],
)
def test_configurations_that_make_no_model_are_refused(params, why):
    with pytest.raises(ValueError, match=why):
        build(**params)
