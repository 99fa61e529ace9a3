"""The fleet plan against sums done by hand."""

import itertools

import numpy as np
import pytest

from malloc_bench.measure.fleet import Costs, Fleet, Plan, Prices, at_candidates, costs, read_prices, rebuilt, slopes
from malloc_bench.measure.fleet.costs import MOVING
from malloc_bench.measure.fleet.fleet import at, break_even
from malloc_bench.measure.fleet.sweep import sweep
from malloc_bench.measure.fleet.times import flops_at, pace, times
from malloc_bench.paths import shipped

#: 1e6 users, 864 requests and 86.4 events a day each
FLEET = Fleet(
    users=1e6, events=1000, requests_per_second=10_000, appends_per_second=1000, cores_per_machine=50,
    ram_gb_per_machine=100, ssd_gb_per_machine=1000, utilisation=0.5, rebuild_every=10,
)  # fmt: skip
KEPT = Costs("kept", 500_000, read=1, append=2, rebuild=30, build=40, raw=False, growth="", by_request=False)
IDS = Costs("recompute", 4_000, read=21, append=0, rebuild=0, build=0, raw=True, growth="", by_request=False)
PRICES = Prices(
    usd_per_gb_month_ram=3.0, usd_per_gb_month_ssd=0.1, usd_per_core_hour=0.02,
    watts_per_core=10.0, watts_per_gb_ram=0.5, watts_per_gb_ssd=0.01,
)  # fmt: skip


def test_totals_by_hand():
    kept, ids = Plan(FLEET, KEPT), Plan(FLEET, IDS)
    assert kept.bytes == 5e11 and ids.bytes == 4e9
    # 10,000 x 1 ms + 1,000 x (2 + 30 / 10) ms = 15 core seconds a second, at a half of the time
    assert kept.cores == pytest.approx(30)
    assert ids.cores == pytest.approx(10_000 * 0.021 / 0.5)  # 420
    assert (kept.machines("ram"), kept.machines("ssd")) == (5, 1)  # 500 GB / 100, and 30 cores of 50
    assert (ids.machines("ram"), ids.machines("ssd")) == (9, 9)  # 420 cores / 50 = 8.4
    assert kept.build_core_hours == pytest.approx(1e6 * 0.040 / 3600 / 0.5)
    assert ids.build_core_hours == 0
    assert kept.usd_month(PRICES, "ram") == pytest.approx(500 * 3 + 30 * 0.02 * 730)  # 1,938
    assert kept.usd_month(PRICES, "ssd") == pytest.approx(500 * 0.1 + 30 * 0.02 * 730)
    assert ids.usd_month(PRICES, "ram") == pytest.approx(4 * 3 + 420 * 0.02 * 730)  # 6,144
    assert kept.kwh_month(PRICES, "ram") == pytest.approx((500 * 0.5 + 30 * 0.5 * 10) * 0.730)
    assert kept.kwh_month(PRICES.model_copy(update={"watts_per_core": None}), "ram") is None


def test_break_even_by_hand():
    kept, ids = Plan(FLEET, KEPT), Plan(FLEET, IDS)
    # USD: x requests per user and day are 1e6 x / 86,400 a second, each 1 or 21 ms at a half: x / 43.2 and 21 x / 43.2
    # cores of 14.6 USD; kept holds 1,500 USD of RAM and 10 cores for appends, ids 12 USD
    x = (1500 + 10 * 14.6 - 12) / (20 / 43.2 * 14.6)
    assert break_even(kept.in_usd(PRICES, "ram"), ids.in_usd(PRICES, "ram")) == pytest.approx(x)  # 241.7
    x = (50 + 146 - 0.4) / (20 / 43.2 * 14.6)
    assert break_even(kept.in_usd(PRICES, "ssd"), ids.in_usd(PRICES, "ssd")) == pytest.approx(x)
    # machines: kept is 5 of RAM until (10 + x / 43.2) / 50 is more, ids 21 x / 43.2 / 50: equal at 5 x 50 x 43.2 / 21
    assert break_even(kept.in_machines("ram"), ids.in_machines("ram")) == pytest.approx(250 * 43.2 / 21)  # 514.3
    # on SSD 0.5 of memory and 0.2 of cores for appends: 25 x 43.2 / 21
    assert break_even(kept.in_machines("ssd"), ids.in_machines("ssd")) == pytest.approx(25 * 43.2 / 21)
    assert at(kept.in_machines("ram"), 864) == pytest.approx(5)


@pytest.mark.parametrize(
    ("kept", "ids", "want"),
    [
        (((1, 1),), ((2, 1),), 0.0),  # always cheaper
        (((2, 2),), ((1, 2),), None),  # never
        (((2, 3),), ((4, 1),), None),  # only while few ask
        (((2, 1),), ((2, 1),), 0.0),  # the same
        (((10, 1),), ((0, 2),), 10.0),
        (((10, 0), (0, 1)), ((1, 0), (0, 2)), 5.0),
        (((10, 0), (0, 3)), ((0, 2), (0, 1)), None),
        (((4, 0), (0, 1)), ((0, 2), (3, 0)), 2.0),
    ],
)
def test_where_keeping_begins_to_pay(kept, ids, want):
    assert break_even(kept, ids) == want
    if want is not None:
        for x in (want, want + 0.1, 2 * want + 1, 1000):
            assert at(kept, x) <= at(ids, x) * (1 + 1e-9)
    if want:
        assert at(kept, want * 0.999) > at(ids, want * 0.999)


BATCH = {
    "compressor": "recent", "method": "recent", "budget": "25 %", "family": "windowing",
    "measured_history": 100, "measured_history_long": 300, "measured_bytes": 1000.0, "measured_bytes_long": 3000.0,
    "bytes_p50": 999.0, "bytes_p99": 5000.0, "measured_candidates": 1,
    "prefill_cpu_ms_p50": 4.0, "compress_cpu_ms_p50": 1.0, "append_cpu_ms_p50": 0.5, "read_cpu_ms_p50": 2.0,
    **{f"{step}_ms_p50": x for step, x in (("prefill", 8.0), ("compress", 2.0), ("append", 1.0), ("read", 4.0))},
    **{f"{step}_ms_p50_long": x for step, x in (("prefill", 40.0), ("compress", 2.0), ("append", 1.0), ("read", 6.0))},
}  # fmt: skip


def test_costs_of_a_row_by_hand():
    """Lines through 100 and 300 events, at 200 and at 500."""
    half = costs(BATCH, 200)
    assert half == Costs(
        "recent at 25 %", 2000.0, read=2.5, append=0.5, rebuild=13.0, build=13.0, raw=False,
        growth="10 bytes an event", by_request=False,
    )  # fmt: skip
    far = costs(BATCH, 500)
    assert far.bytes == 5000 and far.read == pytest.approx(4.0) and far.build == pytest.approx(4 * 9 + 1)
    assert costs({**BATCH, "method": "full"}, 200).rebuild == 0
    raw = costs({**BATCH, "append_cpu_ms_p50": None, "append_ms_p50": None}, 200)
    assert raw.raw and raw.append == raw.rebuild == raw.build == 0 and raw.read == 2.5
    fixed = costs({**BATCH, "measured_bytes_long": 1000.0}, 5000)
    assert fixed.bytes == 1000 and fixed.growth == "constant"


def test_requests_are_costs_where_they_were_measured():
    steps = {"load": 1.0, "unpack": 2.0, "read": 4.0, "append": 8.0, "pack": 16.0, "write": 32.0}
    row = {**BATCH, "request_ms_p50": 63.0, **{f"request_{step}_ms_p50": x for step, x in steps.items()}}
    found = costs(row, 200)  # 1,000 bytes more, reads 1.25 times as long, appends alike
    assert found.by_request
    assert found.read == pytest.approx(1 + 2 + 4 * 1.25) and found.append == pytest.approx(1 + 2 + 16 + 32 + 8)
    raw = costs({**row, "append_cpu_ms_p50": None}, 200)  # a prefill's growth of 1 ms a user of a batch, added
    assert raw.raw and raw.read == pytest.approx(1 + 2 + 4 + 4 * 0.25)
    slope = dict(zip(MOVING, (0.001, 0.002, 0.003, 0.004)))
    found = costs(row, 200, slope)
    assert found.read == pytest.approx(2 + 4 + 4 * 1.25)
    assert found.append == pytest.approx(2 + 4 + 19 + 36 + 8)
    assert costs(row, 101, dict.fromkeys(MOVING, 0.0)) == costs(row, 101)
    assert found.build == costs(BATCH, 200).build


def test_what_a_byte_takes_is_a_methods_own_or_that_of_the_full_state():
    def row(name, size, load, unpack):
        steps = dict(zip(MOVING, (load, unpack, 7.0, 7.0)))
        return {"compressor": name, "measured_history": 100, "measured_bytes": size, "bytes_p99": size, **steps}

    own = [row("recent", 100.0, 1.0, 9.0), row("recent", 300.0, 2.0, 8.0), row("recent", 500.0, 3.0, 7.0)]
    found = slopes([row("none", 0.0, 0.0, 1.0), row("full", 1000.0, 1.0, 3.0), row("kivi", 50.0, 5.0, 5.0), *own])
    still = {"read": 0.0, "append": 0.0}
    assert found["recent"] == pytest.approx({**dict(zip(MOVING, (1 / 200, 0, 0, 0))), **still})  # what falls is noise
    assert found["kivi"] == pytest.approx({**dict(zip(MOVING, (0.001, 0.002, 0, 0))), **still}) == found["full"]
    assert slopes([row("kivi", 50.0, 5.0, 5.0)]) == {"kivi": still} and slopes([BATCH]) == {"recent": still}


def test_noise_neither_shrinks_a_time_nor_makes_a_read_more_than_proportional():
    assert costs({**BATCH, "read_ms_p50_long": 1.0}, 10_000).read == 2.0
    assert costs({**BATCH, "read_ms_p50_long": 400.0}, 10_000).read == pytest.approx(2.0 * 100)


FLOPS = {
    "prefill_flops": 1.1e6,
    "prefill_flops_long": 3.9e6,
    "read_flops": 2e4,
    "read_flops_long": 4e4,
}  # 1e4 n + 10 n^2


def test_beyond_what_was_measured_times_grow_with_work():
    """By hand: at 1,100 events a prefill is 23.1 MFLOPs, a read 2e4 + 100 x 1000 = 1.2e5 FLOPs."""
    row = {**BATCH, **FLOPS}
    assert flops_at(row, "prefill", 1100, True) == pytest.approx(23.1e6)
    assert flops_at(row, "read", 1100, False) == pytest.approx(1.2e5)
    # between both a prefill took 32 ms of 2.8 MFLOPs, more than its share 40 / 3.9 of the longest's: the share is taken
    assert times(row, "prefill", 1100) == pytest.approx((40 + 40 / 3.9 * 19.2) / 8)
    assert flops_at(row, "prefill", 1100, False) == pytest.approx(1.1e6 + 1.4e4 * 1000)  # a line
    assert times(row, "read", 1100) == pytest.approx((6 + 2 / 2e4 * 8e4) / 4)
    flat = {**row, "read_ms_p50_long": 4.0}  # noise: as if history cost nothing
    assert times(flat, "read", 1100) == 1.0
    assert times(flat, "read", 1100, pace=2e-5) == pytest.approx((4 + 2e-5 * 8e4) / 4)
    assert times(flat, "read", 1100, pace=1.0) == pytest.approx(3.0)  # never more than in proportion: 1.2e5 / 4e4
    assert times({**row, "read_flops_long": 2e4}, "read", 1e6) == 1.5  # the same work: as long as at the longest
    assert times(row, "read", 200) == pytest.approx(1.25)  # between both FLOPs are not asked


@pytest.mark.parametrize("more", [{}, FLOPS, {"append_cpu_ms_p50": None}, {"budget": None, "measured_bytes": 2000.0}])
def test_costs_grow_with_events_from_one_on(more):
    """Nothing is free below what was measured, and nothing jumps where it was."""
    steps = dict.fromkeys(("load", "unpack", "append", "pack", "write"), 0.5)
    row = {**BATCH, **FLOPS, **more, "request_ms_p50": 9.0, **{f"request_{s}_ms_p50": x for s, x in steps.items()}}
    for each in (row, {**row, "request_read_ms_p50": 6.0}):
        found = [costs(each, n) for n in (1, 10, 99, 100, 101, 200, 299, 300, 301, 1000, 100_000)]
        assert all(one.bytes > 0 and one.read > 0 and (one.raw or one.append > 0) for one in found)
        for one, two in itertools.pairwise(found):
            assert one.bytes <= two.bytes and one.read <= two.read * (1 + 1e-9) and one.build <= two.build * (1 + 1e-9)
        for i in (2, 3, 6, 7):
            assert found[i + 1].read == pytest.approx(found[i].read, rel=0.05)


def test_a_row_that_lacks_any_one_number_has_costs_or_none():
    steps = dict.fromkeys(("load", "unpack", "read", "append", "pack", "write"), 0.5)
    row = {**BATCH, **FLOPS, "request_ms_p50": 9.0, **{f"request_{s}_ms_p50": x for s, x in steps.items()}}
    for name in set(row) - {"compressor", "method"}:
        for n in (10, 200, 5000):
            found = costs({**row, name: None}, n)
            assert found is None or (found.read >= 0 and found.bytes >= 0)


def test_states_of_a_share_stay_in_their_share():
    """Of 2 slots of 94 and 6 of 199 a line makes none at 20, and too many at 5,000."""
    row = {
        **BATCH,
        "measured_history": 94,
        "measured_history_long": 199,
        "measured_bytes": 2.0,
        "measured_bytes_long": 6.0,
    }
    assert [costs(row, n).bytes for n in (1, 47, 94, 199, 1990)] == pytest.approx([2 / 94, 1, 2, 6, 60])
    none = costs({**BATCH, "compressor": "none", "method": "none"}, 200)
    assert none.build == none.rebuild == 0


def test_more_candidates_read_as_many_times_what_history_adds():
    """At most in proportion to FLOPs: 1.5 times of 6 ms at 200 events of 100."""
    row = {**BATCH, **FLOPS, "request_ms_p50": 9.0, "measured_candidates": 8, "batch_candidates": 1}
    row |= {
        f"request_{s}_ms_p50": x
        for s, x in zip(("load", "unpack", "append", "pack", "write", "read"), [0.0] * 5 + [6.0])
    }
    assert costs(row, 200).read == pytest.approx(6 + min(8 * 4 * 0.25, 6 * 0.5))
    assert costs({**row, "measured_candidates": 1}, 200).read == pytest.approx(6 + 4 * 0.25)


def test_what_a_flop_takes_is_the_full_states_beyond_no_history():
    full = {**BATCH, **FLOPS, "compressor": "full", "method": "full"}
    none = {**full, "compressor": "none", "method": "none", "read_ms_p50_long": 3.0, "read_flops_long": 1e4}
    assert pace(full, none, "read") == pytest.approx(3 / 3e4)
    assert pace(full, none, "append") == pace(full, None, "read") == pace(none, full, "read") == 0.0
    assert slopes([full, none, BATCH])["recent"] == {"read": pytest.approx(3 / 3e4), "append": 0.0}


def test_rows_that_are_older_than_measured_bytes():
    old = {**BATCH, "measured_bytes": None, "measured_bytes_long": None}
    found = costs(old, 1000)
    assert found.bytes == pytest.approx(9990) and found.growth == "9.99 bytes an event (assumed)"
    assert costs({**old, "budget": "16 slots"}, 1000).bytes == 999
    assert costs({**old, "bytes_p99": 999.0}, 1000).growth == "constant (assumed)"
    assert costs({**old, "measured_history_long": 100}, 1000) is None  # a suite's own length is no median user's
    assert costs({**BATCH, "read_cpu_ms_p50": None}, 1000) is None
    assert costs({**BATCH, "measured_history": None}, 1000) is None


def test_ids_are_made_up_of_the_full_states_costs():
    found = rebuilt({**BATCH, "compressor": "full", "method": "full", "budget": None}, 200)
    assert found.raw and found.bytes == 2400 and found.read == pytest.approx(4 * 3 + 2 * 1.25)


def test_candidates_are_those_that_were_measured():
    row = {**BATCH, "requests": {"1": {"request_ms_p50": 3.0}, "128": {"request_ms_p50": 7.0}}}
    many, lacks = at_candidates([row, BATCH], 128)
    assert many["request_ms_p50"] == 7.0 and many["measured_candidates"] == 128
    assert costs(lacks, 200) is None
    assert at_candidates([row, BATCH], 1) == [row, BATCH]
    with pytest.raises(ValueError, match=r"^--candidates 64: measured were 1, 128$"):
        at_candidates([row], 64)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"users": 0}, "--users: expected a number above 0, not 0"),
        ({"users": float("nan")}, "--users: expected a number above 0, not nan"),
        ({"events": float("inf")}, "--events: expected at most 1e+15, not inf"),
        ({"requests_per_second": -1}, "--requests-per-second: expected a number of at least 0, not -1"),
        ({"ram_gb_per_machine": 0}, "--ram-gb-per-machine: expected a number above 0, not 0"),
        ({"utilisation": 1.5}, "--utilisation: expected a share of at most 1, not 1.5"),
    ],
)
def test_what_no_fleet_can_be(given, said):
    asked = {"users": 1e9, "events": 10, "requests_per_second": 1, "appends_per_second": 0, **given}
    with pytest.raises(ValueError) as error:
        Fleet(**asked)
    assert str(error.value) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("usd_per_gb_month_rom: 1", "usd_per_gb_month_rom: unknown key. Did you mean 'usd_per_gb_month_ram'?"),
        ("usd_per_gb_month_ram: 1", "usd_per_gb_month_ssd: missing"),
        ("usd_per_core_hour: cheap", "usd_per_core_hour: expected a number from 0 to 1e+12, not 'cheap'"),
        ("usd_per_core_hour: -1", "usd_per_core_hour: expected a number from 0 to 1e+12, not -1"),
        ("usd_per_core_hour: .nan", "usd_per_core_hour: expected a number from 0 to 1e+12, not nan"),
        (
            "usd_per_core_hour: 1e3",
            "usd_per_core_hour: expected a number from 0 to 1e+12, not '1e3' (YAML reads 1e3 as text: write 1000.0)",
        ),
        (
            "usd_per_core_hour: 1e99",
            "usd_per_core_hour: expected a number from 0 to 1e+12, not '1e99' (YAML reads 1e99 as text: write 1.0e+99)",
        ),
        ("usd_per_core_hour: 1.0e+308", "usd_per_core_hour: expected a number from 0 to 1e+12, not 1e+308"),
        ("- 1", "expected keys and values, found [1]"),
        ("a: [", "line 2: "),
    ],
)
def test_prices_are_read_strictly(text, said, tmp_path):
    base = "usd_per_gb_month_ram: 1\nusd_per_gb_month_ssd: 1\n" if text.startswith("usd_per_core_hour") else ""
    path = tmp_path / "prices.yaml"
    path.write_text(base + text + "\n")
    with pytest.raises(ValueError) as error:
        read_prices(path)
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)


def test_prices_of_nothing_are_a_warning(tmp_path, caplog):
    path = tmp_path / "prices.yaml"
    path.write_text("usd_per_gb_month_ram: 0\nusd_per_gb_month_ssd: 0\nusd_per_core_hour: 0\n")
    assert read_prices(path).usd_per_core_hour == 0
    assert caplog.messages == [
        f"{path}: every price is 0, so that all methods cost the same: write down what yours cost"
    ]


def test_a_row_that_lacks_a_part_of_its_times_still_has_costs():
    row = {"compressor": "h2o", "measured_history": 10, "measured_bytes": 100.0, "measured_history_long": 20,
           "measured_bytes_long": 200.0, "read_cpu_ms_p50": 1.0, "request_ms_p50": 2.0}  # fmt: skip
    assert not costs(row, 10).by_request and costs({**row, "measured_history": 0}, 10) is None


def test_the_shipped_prices_are_said_to_be_made_up():
    path = shipped("suites").parent / "examples" / "prices_made_up.yaml"
    assert read_prices(path).watts_per_core == 5.0 and path.read_text().startswith("# Made up")


def test_a_sweep_goes_around_where_keeping_begins_to_pay():
    kept, ids = Plan(FLEET, KEPT), Plan(FLEET, IDS)
    paid = {name: kept.in_usd(PRICES, "ram") for name in ("kept", "costs the same")}
    found = sweep(paid, ids.in_usd(PRICES, "ram"), 864.0)
    assert found.paid.keys() == {"kept"} == found.evens.keys()  # what costs about the same is told once
    requests, cost = found.evens["kept"]
    assert requests == pytest.approx(241.7, rel=1e-3) and found.asked[0] < requests < 864 < found.asked[-1]
    for own, lines in ((found.paid["kept"], paid["kept"]), (found.rebuilt, ids.in_usd(PRICES, "ram"))):
        np.testing.assert_allclose(own[[0, -1]], [at(lines, found.asked[i]) for i in (0, -1)])
        assert at(lines, requests) == pytest.approx(cost)


def test_compressing_bends_only_where_the_method_says_so():
    """From 100 to 300 events FLOPs grow 13 times: n^2 + n/10 of h2o; of svd, whose terms are linear in n, a line."""
    rising = {**BATCH, "compress_ms_p50_long": 26.0, "compress_flops": 1e6, "compress_flops_long": 1.3e7}
    square = costs({**rising, "compressor": "h2o"}, 1100).build - costs({**BATCH, "compressor": "h2o"}, 1100).build
    line = costs({**rising, "compressor": "svd + int8"}, 1100).build - costs(BATCH, 1100).build
    assert line == pytest.approx(0.5 * (26 - 2 + 26 / 1.3e7 * 4.8e7)) and square > 2 * line
