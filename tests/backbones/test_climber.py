"""Climber: what it deals out, what its layers compute, what that costs."""

from dataclasses import replace

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.climber_deal import STRATEGIES
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload, count_flops
from malloc_bench.state import Stats
from malloc_bench.testing import histories
from malloc_bench.testing.worlds import LENGTHS, close

DAY = 86_400


def build(has_time=False, **params):
    torch.manual_seed(0)
    backbone = get_backbone("climber", 60, has_time, dim=16, heads=2, max_length=320, **params)
    return backbone.eval().requires_grad_(False)


def test_times_fall_into_parts_of_days_and_weeks():
    monday = 4 * DAY  # 5 January 1970
    times = torch.tensor([monday, monday + DAY // 2, monday + DAY - 1, monday + 6 * DAY])
    assert STRATEGIES["part_of_day"](times, times, 4).tolist() == [0, 2, 3, 0]
    assert STRATEGIES["day_of_week"](times, times, 7).tolist() == [0, 0, 0, 6]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_event_is_stored_once_in_the_block_of_its_own(strategy):
    backbone = build(True, blocks=3, strategy=strategy)
    history, _ = histories(backbone, LENGTHS)
    kinds = STRATEGIES[strategy](history.items, history.times, 3)
    state = backbone.prefill(history).state
    for user, n in enumerate(LENGTHS):
        for layer, (segment,) in enumerate(state.layers):
            places = segment.slots.positions[user, 0, : int(segment.slots.count[user, 0])]
            assert places.tolist() == [t for t in range(n) if kinds[user, t] == layer // 2]


def test_layers_divide_biased_products_by_their_temperature():
    """One user's first block by the paper's formula, in loops and float64, from the embedding to the stored keys."""
    backbone = build(blocks=2, layers=2)
    history, _ = histories(backbone, (12,))
    mine = [t for t in range(12) if STRATEGIES["item_hash"](history.items, history.items, 2)[0, t] == 0]
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


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("method", ["full", "recent", "h2o", "svd", "recompute"])
def test_the_closed_form_is_what_the_counter_counts(method, blocks):
    backbone, work, method = build(blocks=blocks), Workload(2, 300, 5, 2), get_compressor(method)
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
        ({"strategy": "stride"}, "strategy must be one of item_hash"),
        ({"scenario": "sunny"}, "scenario must be one of one"),
        ({"blocks": 0}, "blocks must be 1 to"),
        ({"strategy": "day_of_week", "blocks": 8}, "1 to 7"),
        ({"strategy": "part_of_day"}, "reads times"),
        ({"scenario": "weekend"}, "reads times"),
    ],
)
def test_configurations_that_make_no_model_are_refused(params, why):
    with pytest.raises(ValueError, match=why):
        build(**params)
