import itertools
import xml.etree.ElementTree

import numpy as np
import polars as pl
import pytest
from matplotlib.text import Text

from malloc_bench.report import figures, write_report
from malloc_bench.report.bars import latency_figure, parts_figure
from malloc_bench.report.board import aggregate
from malloc_bench.report.break_even import break_even_figure
from malloc_bench.report.curves import FLOORS, curves_figure, few, history_figure
from malloc_bench.report.figures import file_stems, write_figures
from malloc_bench.report.lines import REFERENCES, WIDTHS, Curve
from malloc_bench.report.pareto import NAMED, front, pareto_figure
from malloc_bench.report.parts import told_apart
from malloc_bench.report.style import COLOURS, MARKS, human
from malloc_bench.report.tables import SLICES, sliced
from malloc_bench.results import frame, write_row

FAMILIES = {"windowing", "eviction", "merging", "quantization", "low-rank", "recompute"}


def lines(axes, kind):
    return [line for line in axes.lines if (line.get_gid() or "").split(":")[0] == kind]


@pytest.fixture
def board(suite):
    return aggregate(suite).filter(pl.col("backbone") == "sasrec")


def drawn_panels(figure):
    figure.draw_without_rendering()
    return {(axes.get_xlabel(), axes.get_ylabel()): axes for axes in figure.axes}


SIZE = "state (bytes a user)"


def test_panels_and_lines(board):
    wide = drawn_panels(pareto_figure(board, "sasrec"))
    assert list(wide) == [(x, y) for x in (SIZE, "read (ms, p50)") for y in ("fidelity", "NDCG@10")]
    assert list(drawn_panels(pareto_figure(board, "sasrec", 3.3))) == [key for key in wide if key[1] == "fidelity"]
    for axes in wide.values():
        assert axes.get_xscale() == "log"
        assert {line.get_gid() for line in lines(axes, "family")} == {f"family:{family}" for family in FAMILIES}
        assert [len(lines(axes, kind)) for kind in ("full", "none", "front")] == [1, 1, 1]
        (none,) = lines(axes, "none")
        assert len(set(none.get_ydata())) == 1


def test_points_are_the_numbers_of_the_board(board):
    axes = drawn_panels(pareto_figure(board, "x"))[SIZE, "NDCG@10"]
    (evicted,) = [line for line in lines(axes, "family") if line.get_gid() == "family:eviction"]
    rows = board.filter(pl.col("family") == "eviction")
    assert sorted(evicted.get_xdata()) == sorted(rows["bytes_mean"])
    assert sorted(evicted.get_ydata()) == sorted(rows["ndcg@10"])
    (full,) = lines(axes, "full")
    assert list(full.get_xdata()) == [133_000]


def test_a_method_of_fewer_trainings_stands_where_its_paired_difference_puts_it(board):
    """Its mean of a lucky training stood above the full state's mean of all."""
    one = pl.col("method") == "h2o"
    lucky = board.with_columns(
        pl.when(one).then(1).otherwise(3).alias("seeds"),
        pl.lit(3).alias("seeds_total"),
        pl.when(one).then(pl.col("ndcg@10") + 0.05).otherwise("ndcg@10").alias("ndcg@10"),
    )
    before, after = (
        {
            line.get_gid(): line.get_ydata()
            for line in lines(drawn_panels(pareto_figure(each, "x"))[SIZE, "NDCG@10"], "family")
        }
        for each in (board, lucky)
    )
    assert after.keys() == before.keys() and all(list(after[key]) == pytest.approx(list(before[key])) for key in before)


@pytest.mark.parametrize("width", WIDTHS.values())
def test_what_is_on_the_front_is_named_and_no_two_names_touch(board, width):
    figure = pareto_figure(board, "x", width)
    for axes in drawn_panels(figure).values():
        (line,) = lines(axes, "front")
        on_front = set(zip(line.get_xdata(), line.get_ydata()))
        names, boxes = names_of(axes)
        assert "no history" in names and 2 <= len(names) <= NAMED + len(FLOORS)
        where = [text.xy for text in axes.texts if text.get_text() not in FLOORS.values()]
        assert all((float(x), float(y)) in on_front for x, y in where)
        drawn_points = [axes.transData.transform(point)[0] for point in on_front]
        assert max(box.x1 for box in boxes) < max(drawn_points)


def test_an_interval_is_that_of_the_row(board):
    axes = drawn_panels(pareto_figure(board, "x"))[SIZE, "NDCG@10"]
    bars = {gid: each for each in axes.collections if (gid := str(each.get_gid())).startswith("bar:")}
    assert bars
    for gid, bar in bars.items():
        (path,) = bar.get_segments()
        rows = board.filter(pl.col("compressor") == gid.removeprefix("bar:"))
        ends = [(row["ndcg@10"] - row["delta_ndcg@10"] + row["delta_ndcg@10_lo"]) for row in rows.iter_rows(named=True)]
        assert any(abs(float(path[0][1]) - each) < 1e-9 for each in ends), gid


def test_flops_stand_in_for_latency(board):
    figure = pareto_figure(board.with_columns(pl.lit(None, pl.Float64).alias("read_ms_p50")), "x")
    assert ("read (FLOPs)", "NDCG@10") in drawn_panels(figure)


def test_without_any_cost_of_a_read_no_panel_shows_it(board):
    nothing = pl.lit(None, pl.Float64)
    figure = pareto_figure(board.with_columns(read_ms_p50=nothing, read_flops=nothing), "x")
    assert list(drawn_panels(figure)) == [(SIZE, "fidelity"), (SIZE, "NDCG@10")]


def test_ratios_to_the_full_state_stand_before_milliseconds(board):
    """Milliseconds on the wall tell a busy machine's mood."""
    figure = pareto_figure(board.with_columns(read_ratio=pl.col("read_ms_p50") / 2), "x")
    assert ("read (× full)", "NDCG@10") in drawn_panels(figure)


def test_families_are_told_apart_by_colour_and_by_mark_and_alone_are_in_the_legend(board):
    figure = pareto_figure(board, "x")
    looks = [(line.get_color(), line.get_marker()) for line in lines(figure.axes[0], "family")]
    for each in zip(*looks):
        assert len(set(each)) == len(looks)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == sorted({"full state", "front of kept states", "95 %, paired", *FAMILIES})
    assert set(MARKS) == {*COLOURS, "chain"} and len(set(MARKS.values())) == len(MARKS)


@pytest.mark.parametrize("width", WIDTHS.values())
def test_tick_labels_do_not_overlap(board, width):
    figure = pareto_figure(board, "x", width)
    for axes in drawn_panels(figure).values():
        low, high = axes.get_xlim()
        boxes = [
            tick.label1.get_window_extent() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high
        ]
        assert len(boxes) >= 2 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        assert axes.get_window_extent().y0 >= figure.legends[0].get_window_extent().y1


def test_floors_are_levels(row, board_of):
    rows = [("full", 100.0, 0.2), ("none", 4.0, 0.1), ("fit_constant", 8.0, 0.17), ("h2o", 20.0, 0.15)]
    board = aggregate(board_of([row(compressor=name, bytes_mean=x, **{"ndcg@10": y}) for name, x, y in rows]))
    figure = pareto_figure(board, "x")
    level = {line.get_gid(): set(line.get_ydata()) for line in figure.axes[0].lines}
    assert level["none"] == {0.1} and level["fit_constant"] == {0.17}
    assert names_of(drawn_panels(figure)[SIZE, "NDCG@10"])[0].count("a constant") == 1


def test_what_cannot_be_deployed_is_not_drawn(row, board_of):
    rows = [("full", 100.0, 0.2, "baseline"), ("oracle", 20.0, 0.3, "ceiling"), ("h2o", 20.0, 0.15, "eviction")]
    made = [row(compressor=name, bytes_mean=x, family=kind, **{"ndcg@10": y}) for name, x, y, kind in rows]
    chain = {"steps": ["oracle_evict", "int8"]}
    made.append(row(compressor="compose", compressor_params=chain, family="chain", bytes_mean=9.0, **{"ndcg@10": 0.4}))
    board = aggregate(board_of(made))
    assert "oracle_evict + int8" in set(board["compressor"])
    figure = pareto_figure(board, "x")
    assert {line.get_gid() for line in lines(figure.axes[0], "family")} == {"family:eviction"}


def test_front_is_what_nothing_beats():
    points = [(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9), (1, 0.3)]
    assert front(points) == [(1, 0.5), (2, 0.7), (3, 0.9)]
    assert front([]) == []


def test_human_units():
    found = [human(value, 1) for value in (500, 1e3, 3e4, 1e6, 2e9)]
    assert found == ["500 B", "1 KB", "30 KB", "1 MB", "2 GB"]
    assert human(3e6, 2) == "3 M" and human(0.03, None) == "0.03"


def test_sparse_results_still_draw(row, board_of):
    only = board_of(row(family="eviction", compressor="h2o", **{"ndcg@10": 0.1}), row(family="new", compressor="mine"))
    assert pareto_figure(aggregate(only), "x") is None


def test_no_history_alone_is_no_figure(row, board_of):
    assert pareto_figure(aggregate(board_of(row(compressor="none", bytes_mean=4.0, **{"ndcg@10": 0.1}))), "x") is None


def test_without_any_cost_measured_the_others_still_draw(row, board_of):
    """A level that spans an axis without points must not be taken for one."""
    cells = [("full", 100.0, 0.2), ("none", 4.0, 0.1), ("h2o", 20.0, 0.15)]
    rows = [row(compressor=name, bytes_mean=size, **{"ndcg@10": gain}) for name, size, gain in cells]
    pareto_figure(aggregate(board_of(rows)), "x").draw_without_rendering()


def test_ranking_is_drawn_by_gauc_and_agreement(row, board_of):
    cells = [("full", 100.0, 0.7, 1.0), ("h2o", 20.0, 0.68, 0.9)]
    rows = [
        row(task="ranking", compressor=name, bytes_mean=size, gauc=gauc, agreement=alike, delta_gauc=gauc - 0.7,
            delta_gauc_lo=gauc - 0.71, delta_gauc_hi=gauc - 0.69, read_flops=size, **{"ndcg@10": 0.5})
        for name, size, gauc, alike in cells
    ]  # fmt: skip
    figure = pareto_figure(aggregate(board_of(rows)), "x")
    assert [axes.get_ylabel() for axes in figure.axes] == ["agreement", "GAUC"] * 2
    (bar,) = figure.axes[1].collections
    assert bar.get_segments()[0][:, 1] == pytest.approx([0.67, 0.69])


def test_the_same_results_make_the_same_files(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "PRINTED", {"pareto": pareto_figure, "latency": latency_figure})
    one = suite.filter(pl.col("backbone") == "hstu")
    first, again = (figures.write_figures(one, tmp_path / name, formats=("svg",)) for name in "ab")
    stem = "ml-1m-retrieval-leave_one_out-hstu"
    assert [path.name for path in first] == [
        f"{name}-{stem}{end}.svg" for name in ("pareto", "latency") for end in WIDTHS
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert b"<text" in first[1].read_bytes()  # and text is text


@pytest.mark.parametrize(("end", "said"), [(0.001, True), (-0.001, False)])
def test_a_figure_without_headroom_says_so(row, board_of, end, said, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr(figures, "PRINTED", {"any": lambda board, title, width: titles.append(title)})
    floor = {"ndcg@10": 0.19, "delta_ndcg@10": -0.01, "delta_ndcg@10_lo": -0.02, "delta_ndcg@10_hi": end}
    rows = row(compressor="full", bytes_mean=9, **{"ndcg@10": 0.2}), row(compressor="none", bytes_mean=1, **floor)
    figures.write_figures(board_of(*rows), tmp_path, formats=("svg",))
    assert ["no headroom" in title for title in titles] == [said] * len(WIDTHS)


def test_write_report(suite, row, tmp_path):
    for one in (row(family="baseline", compressor="full", **{"ndcg@10": 0.2, "bytes_mean": 10, "ratio": 1.0}),):
        write_row(tmp_path / "rows", one)
    names = {str(path.relative_to(tmp_path)) for path in write_report(tmp_path)}
    stem = "figures/pareto-ml-1m-retrieval-leave_one_out-sasrec"
    assert names == {
        "results.parquet",
        "leaderboard.md",
        "leaderboard.csv",
        "leaderboard.tex",
        "report.html",
        *(f"{stem}{end}.{suffix}" for end in WIDTHS for suffix in ("png", "svg")),
    }
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_no_results_no_figures(tmp_path):
    assert figures.write_figures(frame([]), tmp_path) == []


def boxes_of(texts):
    return sorted((each.get_window_extent() for each in texts if each.get_text()), key=lambda box: (box.x0, box.y0))


def drawn(figure, width):
    """The only axes of a figure of that width, whose ticks do not touch one another, nor anything its edges."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert figure.get_figwidth() == width and axes.get_legend() is None
    ticks = boxes_of(axes.get_xticklabels())
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ticks))
    edge = figure.get_tightbbox()
    for name in figure.texts:  # the title
        assert name.get_window_extent().x1 <= figure.bbox.x1
    assert edge.x0 > -0.02 and edge.x1 < width + 0.02 and edge.y1 < figure.get_figheight() + 0.02
    return axes


def names_of(axes):
    """What is written beside lines: no two names touch."""
    names = [each for each in axes.texts if each.arrow_patch is not None]
    boxes = sorted((Text.get_window_extent(each) for each in names), key=lambda box: box.y0)  # without its line
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    return [each.get_text() for each in names], boxes


def ends(axes, at):
    """Where lines that have a name begin or end, in pixels."""
    named = [line for line in axes.lines if str(line.get_gid()).startswith("line:")]
    return [axes.transData.transform((line.get_xdata()[at], line.get_ydata()[at]))[0] for line in named]


@pytest.mark.parametrize("width", WIDTHS.values())
def test_curves_name_each_line_at_its_end_and_no_two_names_touch(board, width):
    axes = drawn(curves_figure(board, "a table", width), width)
    said, boxes = names_of(axes)
    assert {"random", "recent"} <= set(said) and any("merge_adjacent +" in each for each in said)
    assert len(ends(axes, 0)) == len(said) >= 6
    assert max(box.x1 for box in boxes) < min(ends(axes, 0)) + 2  # no name lies on a line


def test_a_chain_looks_like_its_first_step_and_seeds_are_bars(row, board_of):
    """Of two chains that begin in one family the better is drawn."""
    rows = []
    for first, kept in (("h2o", 0.5), ("tova", 0.6), ("svd", 0.4)):
        steps = {"steps": [first, "int8"]}
        for seed, (n, size) in itertools.product((0, 1), enumerate((10.0, 20.0, 40.0))):
            at = {"budget": size / 100, "bytes_mean": size, "seed": seed, "overlap@10": kept + 0.1 * n + 0.02 * seed}
            rows.append(row(compressor="compose", compressor_params=steps, family="chain", **at))
    axes = drawn(curves_figure(aggregate(board_of(rows)), "x"), 7.0)
    lines = {line.get_gid(): line for line in axes.lines if str(line.get_gid()).startswith("line:")}
    colours = {name: line.get_color() for name, line in lines.items()}
    assert colours == {"line:tova + int8": COLOURS["eviction"], "line:svd + int8": COLOURS["low-rank"]}
    ((x, low), (_, high)), *_ = axes.collections[0].get_segments()
    assert x == 10.0 and (low, high) == pytest.approx((0.6, 0.62))
    assert lines["line:tova + int8"].get_ydata()[0] == pytest.approx(0.61)
    assert axes.get_xlabel().endswith("the range of seeds")


def test_a_chain_is_a_whole_line_and_a_method_alone_a_broken_one(row, board_of):
    sizes = [{"budget": n / 10, "bytes_mean": 10.0 * n, "overlap@10": 0.2 * n} for n in (1, 2, 3)]
    alone = [row(compressor=name, family=family, **at) for name, family in ALONE.items() for at in sizes]
    chained = [
        row(compressor="compose", compressor_params={"steps": [name, "int8"]}, family="chain", **at)
        for name in ALONE
        for at in sizes
    ]
    for rows, whole in ((alone, False), (chained, True)):
        lines = drawn(curves_figure(aggregate(board_of(rows)), "x"), 7.0).lines
        assert len(lines) == len(ALONE) and {line.get_linestyle() == "-" for line in lines} == {whole}


ALONE = {"random": "eviction", "recent": "windowing", "tova": "eviction"}


def test_no_curves_without_sizes(board):
    assert curves_figure(board.filter(pl.col("budget").is_null()), "a table") is None


@pytest.fixture
def whole(suite):
    return sliced(*told_apart(suite)).filter(pl.col("backbone") == "sasrec")


def test_few_are_the_best_of_each_family_within_the_smallest_share(board):
    rows, share = few(board)
    assert (
        share == "6.25 %" and rows["family"].n_unique() == rows.filter(~pl.col("method").is_in(REFERENCES)).height == 6
    )
    within = board.filter((pl.col("budget") == share) & (pl.col("family") == "eviction"))
    best = within.filter(pl.col("overlap@10") == within["overlap@10"].max())["compressor"].item()
    assert {best, "random", "recent", "recompute"} <= set(rows["compressor"])
    over = rows.filter(pl.col("over") > 0)  # nothing in 2 bits is as small
    assert over["compressor"].to_list() == ["kivi(bits=2)"]


def test_few_are_compared_where_half_of_the_methods_reach(row, board_of):
    """The others' floors lie above the smallest share; without budgets there is no share, and nothing is beyond it."""
    sizes = {("fitted", "still"): (0.25, 0.01), ("eviction", "h2o"): (0.25, 0.2), ("merging", "tome"): (0.25, 0.2)}
    rows = [
        row(family=family, compressor=name, budget=budget, ratio=ratio, bytes_mean=100 * ratio, **{"overlap@10": ratio})
        for (family, name), own in sizes.items()
        for budget, ratio in zip((0.25, 0.01), own)
    ]
    found, share = few(aggregate(board_of(rows)))
    assert share == "25 %" and found.select("compressor", "ratio").rows() == [(name, 0.25) for _, name in sizes]
    found, share = few(aggregate(board_of([one | {"budget": None, "seed": i} for i, one in enumerate(rows[::2])])))
    assert share is None and found["over"].to_list() == [0.0] * 3


@pytest.mark.parametrize("width", WIDTHS.values())
def test_history_names_each_line_at_its_right(whole, width):
    axes = drawn(history_figure(whole, "a table", width), width)
    said, boxes = names_of(axes)
    assert {"random", "recent", "no history"} <= set(said) and "recompute" not in said
    assert min(box.x0 for box in boxes) > max(ends(axes, -1)) - 2
    (line,) = (line for line in axes.lines if line.get_gid() == "line:snapkv(window=16)")
    row = whole.filter((pl.col("compressor") == "snapkv(window=16)") & (pl.col("budget") == "6.25 %"))
    assert list(line.get_ydata()) == [row[f"overlap@10 {part}"].item() for part in SLICES]
    assert [each.get_text() for each in axes.get_xticklabels()][-1] == ">=500\n1,510 users"


@pytest.mark.parametrize("width", WIDTHS.values())
@pytest.mark.parametrize(("draw", "parts"), [(parts_figure, 5), (latency_figure, 3)])
def test_bars_are_stacked_below_the_full_state(whole, width, draw, parts):
    figure = draw(whole, "a table", width)
    axes = drawn(figure, width)
    rows = [each.get_text() for each in axes.get_yticklabels()]
    assert rows[0] == "full" and {"random", "recent"} <= set(rows) and len(axes.containers) == parts
    labels = sorted((each.get_window_extent() for each in axes.get_yticklabels()), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(labels))
    said = [each.get_window_extent() for each in axes.texts]
    assert len(said) == len(rows) and max(box.x1 for box in said) <= axes.get_window_extent().x1 + 2
    (legend,) = figure.legends
    assert len(legend.get_texts()) == parts and legend.get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0


def test_a_title_of_wide_letters_fits_its_figure(whole):
    drawn(curves_figure(whole, "W" * 300, 7.0), 7.0)


def test_a_long_title_fits_its_figure(whole):
    drawn(latency_figure(whole, "ml-100k · retrieval · " + "gated_delta(dim=64, heads=2, layers=2) " * 3, 7.0), 7.0)


def test_bars_are_the_numbers_of_the_rows(whole):
    bytes_, times = parts_figure(whole, "x").axes[0], latency_figure(whole, "x").axes[0]
    rows = [each.get_text() for each in times.get_yticklabels()]
    keys, scales, *_ = bytes_.containers
    assert [each.get_width() for each in keys] == pytest.approx([40.0] * len(rows))
    assert [each.get_x() for each in scales] == pytest.approx([40.0] * len(rows))  # in percent, behind one another
    compress, append, read = times.containers
    for at, name in enumerate(rows):
        name, _, over = name.partition(" at ")  # beyond the share that the others are compared at
        row = whole.filter(pl.col("compressor") == name).sort("bytes_mean").row(0, named=True)
        assert bool(over) is (name == "kivi(bits=2)") and (not over or over == f"{100 * row['ratio']:.2g} %")
        cut = times.texts[at].get_text() == "→ 4.20"  # a read of ids is 14 of the full state's
        assert cut is (name == "recompute")
        assert cut or read[at].get_width() == pytest.approx(row["read_ms_p50"])
        assert compress[at].get_width() == (row["compress_ms_p50"] or 0)
        assert read[at].get_x() == pytest.approx(compress[at].get_width() + append[at].get_width())


def test_a_run_without_the_data_does_not_make_the_figure(suite, monkeypatch):
    monkeypatch.setattr(figures, "written", lambda figure, path: path)

    def names(frame):
        return {path.name.split("-ml-1m")[0] for path in figures.write_figures(frame, ".", formats=("svg",))}

    one = suite.filter(pl.col("backbone") == "hstu")
    assert names(one) == {"pareto", *figures.PRINTED}
    assert names(one.with_columns(bytes_by_part=None, slices=None, read_ms_p50=None)) == {"pareto", "curves"}


@pytest.mark.parametrize("width", WIDTHS.values())
def test_break_even_marks_where_keeping_begins_to_pay(width):
    x = np.geomspace(0.1, 1e4, 50)
    lines = {
        "recompute": ("recompute", 1 + 5 * x),
        "full": ("baseline", 900 + 0 * x),
        "h2o at 6.25 %": ("eviction", 60 + x),
    }
    curves = [Curve(name, family, x, y) for name, (family, y) in lines.items()]
    figure = break_even_figure(curves, {"full": (179.8, 900.0)}, 864.0, "USD a month", "a table", width)
    axes = drawn(figure, width)
    assert set(names_of(axes)[0]) == set(lines)
    found = {line.get_gid(): line for line in axes.lines}
    assert found["even:full"].get_xdata() == [179.8] and found["asked"].get_xdata()[0] == 864
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("requests per user and day", "USD a month")


def test_names_of_any_kind_make_figures_of_their_own_without_a_warning(row, board_of, tmp_path, recwarn):
    odd = ["日本 🎉", "$x^{$", "a" * 300, "a" * 300 + "b", "x\x1b[31m", "_hidden", "سلام"]
    rows = [row(compressor="full", dataset=name, **{"ndcg@10": 0.2, "bytes_mean": 1e3}) for name in odd[2:4]]
    for name in odd:
        for budget in (0.5, 0.25, 0.125):
            rows.append(row(family=name, compressor=name, dataset="a/b", budget=budget,
                            **{"ndcg@10": 0.1, "overlap@10": budget, "bytes_mean": budget * 1e3}))  # fmt: skip
    paths = write_figures(board_of(rows), tmp_path, ("svg",))
    assert len({path.name for path in paths}) == len(paths) and max(len(path.name) for path in paths) < 160
    assert all(path.name.isascii() for path in paths) and not recwarn.list
    for path in paths:
        xml.etree.ElementTree.parse(path)
    assert any("$x^{$" in path.read_text() for path in paths)


def test_no_two_tables_have_one_file():
    names = {("a b", "c"): ("a b", "c"), ("a/b", "c"): ("a/b", "c"), ("ml-1m", "c"): ("ml-1m", "c(x=1)")}
    stems = file_stems(names)
    assert len({*stems.values()}) == 3 and stems["ml-1m", "c"] == "ml-1m-c_x_1"
