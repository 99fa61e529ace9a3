import io
import json

import polars as pl
import pytest

from malloc_bench.paths import shipped
from malloc_bench.report import render, tables
from malloc_bench.report.board import aggregate
from malloc_bench.results import budget_label, frame, label

SLICES = ("<50", "popularity 1/4", "tied with it", "of ml-1m")


@pytest.mark.parametrize("name", tables.TABLES)
@pytest.mark.parametrize("format", render.FORMATS)
def test_every_table_in_every_format(suite, name, format):
    measured = {
        "ceiling_full_hr@10": 0.9,
        "ceiling_none_hr@10": 0.0,
        "appended@1": 0.5,
        "requests": '{"1": {"request_ms_p50": 1.0}}',
        "measured_history": 10,
        "measured_history_long": 100,
        "read_flops_long": 4e7,
        "bytes_by_part": '{"keys": 60.0, "length": 4.0}',
        "slices": json.dumps({key: {"n_users": 9, "ndcg@10": 0.1} for key in SLICES}),
        "steps": '{"1": {"n_users": 9, "true_hr@10": 0.1}}',
    }
    suite = suite.with_columns(pl.lit(value).alias(name) for name, value in measured.items())
    suite = pl.concat([suite, suite.with_columns(pl.lit("retrieval(delete=0.5)").alias("task"))])
    text = tables.render_table(suite, name, format)
    assert (
        "hstu" in text and "sasrec" in text and "null" not in text and "None" not in text and "nan" not in text.lower()
    )
    assert tables.render_table(frame([]), name, format)


def test_unknown_names_come_with_the_nearest(suite):
    with pytest.raises(ValueError, match=r"no table is named 'acuracy'\. Did you mean 'accuracy'"):
        tables.table(suite, "acuracy")
    with pytest.raises(ValueError, match="no format is named 'tex'"):
        tables.render_table(suite, "accuracy", "tex")


def test_lines_that_were_asked_for_are_judged_among_all(suite, caplog):
    only = {"backbone": ["hstu"], "compressor": ["snapkv"], "budget": ["1/4"]}
    whole, asked = (tables.render_table(suite, "accuracy", "csv", only=each) for each in (None, only))
    assert asked.splitlines()[1:] == [
        line for line in whole.splitlines() if ",hstu,6040,,eviction,snapkv" in line and ",25 %," in line
    ]
    assert len(asked.splitlines()) > 1
    lines = [x for x in tables.render_table(suite, "taxonomy", only=only).splitlines() if x.startswith("| eviction")]
    assert len(lines) == 1 and "snapkv" in lines[0]
    assert caplog.messages == ["--only budget: the table taxonomy has no such column, and is not narrowed by it"]
    for name in tables.TABLES:
        assert "sasrec" not in tables.render_table(suite, name, only={"backbone": ["hstu"]})
        with pytest.raises(ValueError, match=r"--only seed=7: no row has it"):
            tables.render_table(suite, name, only={"seed": ["7"]})


@pytest.mark.parametrize(
    "asked, found",
    [
        ("kivi(bits=2)", ["kivi", "merge_adjacent + kivi"]),  # its line stands for all bits
        ("merge_adjacent + kivi", ["merge_adjacent + kivi"]),
        ("merge_adjacent + kivi(bits=2)", ["merge_adjacent + kivi"]),
        ("merge_adjacent", ["merge_adjacent", "merge_adjacent + kivi"]),
    ],
)
def test_lines_of_the_taxonomy_are_asked_for_by_any_label(suite, asked, found):
    text = tables.render_table(suite, "taxonomy", "csv", only={"compressor": [asked], "backbone": ["hstu"]})
    assert sorted(pl.read_csv(io.StringIO(text))["method"].to_list()) == found


def test_blocks_of_the_paper_are_asked_for_by_budget(suite):
    text = tables.render_table(suite, "paper", "csv", only={"budget": ["1/4"]})
    assert set(pl.read_csv(io.StringIO(text))["within"]) == {"25 %"}


def test_csv_reads_back(suite):
    text = tables.render_table(suite, "accuracy", "csv")
    assert pl.read_csv(io.StringIO(text))["ndcg@50"].to_list() == pytest.approx(
        tables.accuracy(suite)["ndcg@50"].to_list()
    )


def test_resources_say_units_and_leave_out_what_was_not_measured(suite):
    head = tables.render_table(suite, "resources").splitlines()[4]
    assert "bytes p99 (KB)" in head and "read p50 (ms)" in head and "read (MFLOPs)" in head
    assert "prefill" not in head and "peak" not in head


def test_resources_name_the_lengths_and_weights_that_were_measured(row, board_of):
    measured = {"measured_history": 35, "measured_history_long": 1200, "read_ms_p50": 0.5, "read_ms_p50_long": 2.5}
    measured |= {"read_cpu_ms_p50": 0.45, "read_ratio": 1.5, "read_ratio_lo": 1.4, "read_ratio_hi": 1.6}
    one = row(compressor="h2o", ratio=0.5, read_flops_long=3e6, measured_weights="fresh", timing="busy", **measured)
    lines = tables.render_table(board_of(one), "resources").splitlines()[4:7]
    cells = dict(zip(*([cell.strip() for cell in lines[i].split("|")] for i in (0, 2))))
    assert cells["measured at (events)"] == "35" and cells["longest (events)"] == "1,200"
    assert cells["read p50 (ms)"] == "0.500" and cells["longest: read p50 (ms)"] == "2.50"
    assert cells["read p50 (CPU ms)"] == "0.450" and cells["longest: read (MFLOPs)"] == "3.00"
    assert [cells[f"read (× full){end}"] for end in ("", " from", " to")] == ["1.50", "1.40", "1.60"]
    assert cells["on weights"] == "fresh" and cells["timing"] == "busy"


def test_taxonomy_finds_the_smallest_lossless_state(row, board_of):
    def cell(ratio, lo):
        values = {"ndcg@10": 0.2, "delta_ndcg@10": 0.0, "delta_ndcg@10_lo": lo}
        sizes = {"ratio": ratio, "bytes_mean": 1000 * ratio, "budget": ratio}
        return row(family="eviction", compressor="h2o", **values, **sizes)

    one = tables.taxonomy(board_of(cell(0.5, -0.001), cell(0.25, -0.0015), cell(0.125, -0.01))).row(0, named=True)
    assert one["lossless_smaller_x"] == 4 and one["lossless_bytes"] == 250 and one["states"] == 3
    assert one["smallest_smaller_x"] == 8 and one["smallest_kept"] == 1


def test_what_is_kept_is_of_the_trainings_that_both_have(row, board_of):
    """The second training's full state is half as good: a method that was not run there is no better for it."""
    full = [row(family="baseline", compressor="full", seed=s, **{"ndcg@10": n}) for s, n in enumerate((0.2, 0.1))]
    once = row(family="eviction", compressor="h2o", ratio=0.5, bytes_mean=9, **{"ndcg@10": 0.2, "delta_ndcg@10": 0.0})
    frame = board_of(full, once)
    assert tables.taxonomy(frame).filter(method="h2o")["smallest_kept"].to_list() == [1]
    board = aggregate(frame).filter(method="h2o")
    assert (board["seeds"].item(), board["seeds_total"].item()) == (1, 2)


def test_a_method_that_is_never_lossless_is_blank(row, board_of):
    lossy = row(family="eviction", compressor="h2o", ratio=0.5, bytes_mean=9, **{"ndcg@10": 0.1, "delta_ndcg@10": -0.1})
    assert tables.taxonomy(board_of(lossy))["lossless_smaller_x"].to_list() == [None]


def test_slices_by_history_length(row, board_of):
    def cell(seed, ndcg):
        return row(
            compressor="h2o", seed=seed, slices={"<50": {"n_users": 10, "ndcg@10": ndcg}, ">=500": {"n_users": 0}}
        )

    one = tables.slices(board_of(cell(0, 0.1), cell(1, 0.3))).row(0, named=True)
    assert one["ndcg@10 <50"] == pytest.approx(0.2) and one["n_users <50"] == 10
    assert one["ndcg@10 >=500"] is None and one["n_users 50-199"] is None


def test_labels():
    assert label("full", "{}") == label("full", None) == "full"
    assert label("kivi", '{"bits":2,"tail":0.5}') == "kivi(bits=2, tail=0.5)"
    assert label("compose", '{"parts":["h2o",{"kivi":{"bits":2}}]}') == "h2o + kivi(bits=2)"
    assert [budget_label(b) for b in (None, "0.0625", '{"bytes":4096}')] == ["", "6.25 %", "4096 bytes"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00123456, "0.00123"),
        (0.5, "0.500"),
        (12.345, "12.3"),
        (123456.0, "123,456"),
        (0.0, "0"),
        (None, ""),
        (1.23456e300, "1.23e+300"),
        (1e-300, "1e-300"),
        (-1e20, "-1e+20"),
        (9.87654e14, "987,654,000,000,000"),
    ],
)
def test_three_digits(value, text):
    assert render.three_digits(value) == text


def test_no_number_is_too_long_for_its_cell():
    for value in (1e-320, 5e-324, 1e300, 1.7e308, float("inf")):
        cells = [render.three_digits(value, 1e-3), render.digits(value, ",.0f"), render.digits(value, "+z.4f", 100)]
        assert max(map(len, cells)) <= 12, cells


def test_markdown_escapes_pipes():
    text = render.markdown(pl.DataFrame({"a": ["x|y"]}), [render.words("a", "a")])
    assert text == "| a |\n| :-- |\n| x\\|y |\n"


def test_drift_shows_what_was_measured_alone(row, board_of):
    gone = {"appended@1": 0.9, "appended@50": 0.7, "drift@1": 0.02, "drift@50": -0.01, "drift_users@1": 256}
    board = board_of(row(family="fitted", compressor="fit_omp", **gone), row(compressor="tova"))
    assert tables.drifts(board)["compressor"].to_list() == ["fit_omp"]
    text = tables.render_table(board, "drift")
    assert "| 1 appended | 50 appended | lost by 1 updates | lost by 50 updates | users of 1 |" in text
    assert "| 0.900 | 0.700 | +0.020 | -0.010 | 256 |" in text
    said = tables.render_table(board_of(row(compressor="tova")), "drift")
    assert tables.NOTHING in said and "malloc-bench run fitted" in said
    assert tables.SUITES.keys() <= tables.TABLES.keys() and {*tables.SUITES.values()} <= {
        path.stem for path in shipped("suites").glob("*.yaml")
    }


def test_shares_of_ceilings(row, board_of):
    def cell(name, hit, window, **more):
        best = {f"ceiling_{known}_hr@10": value for known, value in (("none", 0.1), ("full", 0.9), ("window", window))}
        return row(family="eviction", compressor=name, **best, **{"hr@10": hit}, **more)

    board = board_of(
        cell("h2o", 0.5, 0.3, seed=0), cell("h2o", 0.7, 0.5, seed=1), cell("none", 0.1, 0.1), row(compressor="tova")
    )
    found = {each["compressor"]: each for each in tables.ceilings(board).iter_rows(named=True)}
    assert found["h2o"]["hr@10 of full"] == pytest.approx(5 / 8)  # of the means over seeds
    assert found["h2o"]["hr@10 of window"] == pytest.approx(5 / 3)
    assert found["none"]["hr@10 of full"] == 0 and found["none"]["hr@10 of window"] is None  # nowhere to go
    assert found.keys() == {"h2o", "none"} and found["h2o"]["hr@50 of full"] is None
    text = tables.render_table(board, "ceilings")
    assert "166.7" in text and "62.5" in text and "HR@50" not in text
    assert tables.NOTHING in tables.render_table(board_of(row(compressor="tova")), "ceilings")


def test_parts_in_bytes_and_percent_and_older_rows_said(row, board_of):
    def cell(name, seed=0, **parts):
        return row(compressor=name, seed=seed, bytes_mean=sum(parts.values()), bytes_by_part=parts)

    old = row(compressor="tova", bytes_mean=64.0)
    board = board_of(
        cell("h2o", keys=48.0, positions=16.0), cell("h2o", 1, keys=80.0), cell("int8", keys=30.0, x=10.0), old
    )
    found = {each["compressor"]: each for each in tables.table(board, "parts").iter_rows(named=True)}
    assert [found["h2o"][f"bytes of {part}"] for part in ("keys", "positions", "x")] == [64, 8, 0]  # means over seeds
    assert sum(found["h2o"][f"bytes of {part}"] for part in ("keys", "positions", "x")) == found["h2o"]["bytes_mean"]
    assert found["tova"]["bytes of keys"] is None
    text = tables.render_table(board, "parts")
    assert "| state (bytes) | keys | positions | x |" in text and "| 72 | 64 (89%) | 8 (11%) |  |" in text
    assert "1 of 3 rows are older than bytes by part" in text and "tova" not in text
    assert "1 of 1 rows are older" in tables.render_table(board_of(old), "parts")


def test_requests_have_a_row_for_every_number_of_candidates(row, board_of):
    """Of two seeds the mean; a method that was not measured so has none."""
    asked = {"store": "redis", "measured_history": 50}
    both = [{"1": {"request_ms_p50": x, "request_timing": said}, "64": {"request_ms_p50": 9.0}} for x, said in
            ((1.0, "ok"), (3.0, "busy"))]  # fmt: skip
    rows = [{**row(compressor="recent", seed=seed), **asked, "requests": one} for seed, one in enumerate(both)]
    rows.append(row(compressor="full", seed=0))
    found = tables.table(board_of(*rows), "requests")
    columns = ("compressor", "measured_candidates", "request_ms_p50", "request_timing", "store")
    assert found.select(columns).rows() == [("recent", 1, 2.0, "busy", "redis"), ("recent", 64, 9.0, None, "redis")]
    assert tables.table(board_of(rows[-1]), "requests").is_empty()


def test_models_are_ranked_within_a_data_set_and_told_by_size(row, board_of):
    def full(backbone, params, ndcg, loss, **values):
        sizes = {"params": params, "bytes_full": 2e3, "prefill_flops": 3e6, "measured_history": 63}
        scores = {"ndcg@10": ndcg, "logloss": loss}
        return row(compressor="full", backbone=backbone, n_users=10, **sizes, **scores, **values)

    rows = [
        full("hstu", 3_000_000, 0.2, 0.5, seed=0),
        full("hstu", 3_000_000, 0.4, 0.5, seed=1),
        full("sasrec", 1_000_000, 0.1, 0.4),
        full("sasrec", 2_000_000, 0.9, 0.4, dataset="beauty"),
        row(compressor="h2o", backbone="sasrec", **{"ndcg@10": 0.99}),
    ]
    data = tables.table(board_of(rows), "models")
    assert data.select("dataset", "backbone", "params", "seeds", "ndcg@10_rank", "logloss_rank").rows() == [
        ("beauty", "sasrec", 2e6, 1, 1, 1),
        ("ml-1m", "sasrec", 1e6, 1, 2, 1),
        ("ml-1m", "hstu", 3e6, 2, 1, 2),
    ]
    assert data["ndcg@10"].to_list()[2] == pytest.approx(0.3) and data["prefill_mflops"].to_list()[2] == 3
    said = tables.render_table(board_of(rows), "models")
    assert "| hstu | 2 | 3.00 | 2.00 | 3.00 |" in said and "**0.3000**" in said and "**0.4000**" in said
    assert "FLOPs: of one user with 63 events." in said and "HR@10" not in said
