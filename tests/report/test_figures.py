import itertools
import xml.etree.ElementTree

import polars as pl
import pytest

from malloc_bench.report import figures, write_report
from malloc_bench.report.board import aggregate
from malloc_bench.report.curves import WIDTHS, curves_figure
from malloc_bench.report.figures import file_stems, write_figures
from malloc_bench.report.style import COLOURS, human
from malloc_bench.results import frame, write_row

FAMILIES = {"windowing", "eviction", "merging", "quantization", "low-rank", "recompute"}


def lines(axes, kind):
    return [line for line in axes.lines if (line.get_gid() or "").split(":")[0] == kind]


@pytest.fixture
def board(suite):
    return aggregate(suite).filter(pl.col("backbone") == "sasrec")


def test_panels_and_lines(board):
    figure = figures.pareto_figure(board, "sasrec")
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        assert {line.get_gid() for line in lines(axes, "family")} == {f"family:{family}" for family in FAMILIES}
        assert len(lines(axes, "method")) == 12  # kivi's three widths are one method; full and the floors are none
        assert [len(lines(axes, kind)) for kind in ("full", "none", "random", "front")] == [1, 1, 1, 1]
        (none,) = lines(axes, "none")
        assert len(set(none.get_ydata())) == 1
    assert [axes.get_xlabel() for axes in figure.axes] == ["state (bytes per user)"] * 2 + ["read (ms, p50)"]


def test_points_are_the_numbers_of_the_board(board):
    axes = figures.pareto_figure(board, "x").axes[0]
    (snapkv,) = [line for line in lines(axes, "method") if line.get_gid() == "method:snapkv"]
    rows = board.filter(pl.col("method") == "snapkv")
    assert sorted(snapkv.get_xdata()) == sorted(rows["bytes_mean"])
    assert sorted(snapkv.get_ydata()) == sorted(rows["ndcg@10"])
    (full,) = lines(axes, "full")
    assert list(full.get_xdata()) == [133_000]


def test_flops_stand_in_for_latency(board):
    figure = figures.pareto_figure(board.with_columns(pl.lit(None, pl.Float64).alias("read_ms_p50")), "x")
    assert figure.axes[2].get_xlabel() == "read (FLOPs)" and len(lines(figure.axes[2], "method")) == 12


def test_without_any_cost_of_a_read_no_panel_shows_it(board):
    nothing = pl.lit(None, pl.Float64)
    figure = figures.pareto_figure(board.with_columns(read_ms_p50=nothing, read_flops=nothing), "x")
    assert [axes.get_title() for axes in figure.axes] == [
        "Accuracy against memory", "Overlap@10 with the full state against memory",
    ]  # fmt: skip


def test_ratios_to_the_full_state_stand_before_milliseconds(board):
    """Milliseconds on the wall tell a busy machine's mood."""
    figure = figures.pareto_figure(board.with_columns(read_ratio=pl.col("read_ms_p50") / 2), "x")
    assert figure.axes[2].get_xlabel() == "read (× full)"


def test_methods_of_a_family_have_their_own_markers_and_labels(board):
    figure = figures.pareto_figure(board, "x")
    for family in FAMILIES:
        colour = COLOURS[family]
        markers = [line.get_marker() for line in lines(figure.axes[0], "method") if line.get_color() == colour]
        assert len(set(markers)) == len(markers) > 0
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"full state", "none (floor)", "random (floor)", "kivi", "merge_adjacent + kivi(bits=2)", *FAMILIES} <= set(
        labels
    )


def test_tick_labels_do_not_overlap(board):
    figure = figures.pareto_figure(board, "x")
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        boxes = [
            tick.label1.get_window_extent() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high
        ]
        assert len(boxes) >= 2 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
        assert axes.get_window_extent().x1 <= figure.legends[0].get_window_extent().x0


def test_floors_without_a_budget_are_levels(row, board_of):
    rows = [("full", 100.0, 0.2), ("none", 4.0, 0.1), ("fit_constant", 8.0, 0.17), ("h2o", 20.0, 0.15)]
    board = aggregate(board_of([row(compressor=name, bytes_mean=x, **{"ndcg@10": y}) for name, x, y in rows]))
    figure = figures.pareto_figure(board, "x")
    level = {line.get_gid(): set(line.get_ydata()) for line in figure.axes[0].lines}
    assert level["none"] == {0.1} and level["fit_constant"] == {0.17} and "method:fit_constant" not in level
    assert "fit_constant (floor)" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_front_is_what_nothing_beats():
    points = [(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9), (1, 0.3)]
    assert figures.front(points) == [(1, 0.5), (2, 0.7), (3, 0.9)]
    assert figures.front([]) == []


def test_human_units():
    found = [human(value, 1) for value in (500, 1e3, 3e4, 1e6, 2e9)]
    assert found == ["500 B", "1 KB", "30 KB", "1 MB", "2 GB"]
    assert human(3e6, 2) == "3 M" and human(0.03, None) == "0.03"


def test_sparse_results_still_draw(row, board_of):
    only = board_of(row(family="eviction", compressor="h2o", **{"ndcg@10": 0.1}), row(family="new", compressor="mine"))
    figures.pareto_figure(aggregate(only), "x").draw_without_rendering()


def test_without_any_cost_measured_the_others_still_draw(row, board_of):
    """A level that spans an axis without points must not be taken for one."""
    cells = [("full", 100.0, 0.2), ("none", 4.0, 0.1), ("h2o", 20.0, 0.15)]
    rows = [row(compressor=name, bytes_mean=size, **{"ndcg@10": gain}) for name, size, gain in cells]
    figures.pareto_figure(aggregate(board_of(rows)), "x").draw_without_rendering()


def test_ranking_is_drawn_by_gauc_and_agreement(row, board_of):
    cells = [("full", 100.0, 0.7, 1.0), ("h2o", 20.0, 0.68, 0.9)]
    rows = [
        row(task="ranking", compressor=name, bytes_mean=size, gauc=gauc, agreement=alike, delta_gauc=gauc - 0.7,
            delta_gauc_lo=gauc - 0.71, delta_gauc_hi=gauc - 0.69, read_flops=size, **{"ndcg@10": 0.5})
        for name, size, gauc, alike in cells
    ]  # fmt: skip
    figure = figures.pareto_figure(aggregate(board_of(rows)), "x")
    assert [axes.get_ylabel() for axes in figure.axes] == ["GAUC", "agreement", "GAUC"]
    (bars,) = figure.axes[0].containers
    assert bars.lines[2][0].get_segments()[0][:, 1] == pytest.approx([0.67, 0.69])


def test_the_same_results_make_the_same_file(suite, tmp_path):
    one = suite.filter(pl.col("backbone") == "hstu")
    first, again = (figures.write_figures(one, tmp_path / name, formats=("svg",))[0] for name in "ab")
    assert first.name == "pareto-ml-1m-retrieval-leave_one_out-hstu.svg"
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.parametrize(("end", "said"), [(0.001, True), (-0.001, False)])
def test_a_figure_without_headroom_says_so(row, board_of, end, said, tmp_path, monkeypatch):
    titles, draw = [], figures.pareto_figure
    monkeypatch.setattr(figures, "pareto_figure", lambda board, title: titles.append(title) or draw(board, title))
    floor = {"ndcg@10": 0.19, "delta_ndcg@10": -0.01, "delta_ndcg@10_lo": -0.02, "delta_ndcg@10_hi": end}
    rows = row(compressor="full", bytes_mean=9, **{"ndcg@10": 0.2}), row(compressor="none", bytes_mean=1, **floor)
    figures.write_figures(board_of(*rows), tmp_path, formats=("svg",))
    assert ["no headroom" in title for title in titles] == [said]


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
        f"{stem}.png",
        f"{stem}.svg",
    }
    assert (tmp_path / f"{stem}.png").read_bytes().startswith(b"\x89PNG")


def test_no_results_no_figures(tmp_path):
    assert figures.write_figures(frame([]), tmp_path) == []


def test_of_very_many_methods_a_legend_names_those_on_a_front(board, monkeypatch):
    def named():
        return {text.get_text() for text in figures.pareto_figure(board, "x").legends[0].get_texts()}

    every = named()
    monkeypatch.setattr(figures, "MOST_NAMED", 1)
    few, gone = named(), every - named()
    assert gone and few < every
    methods = board.filter(~pl.col("method").is_in(["full", *figures.FLOORS]))
    for name in gone:  # another of its family is as small and better, or as good and smaller
        own = methods.with_columns(figures._name()).filter(pl.col("name") == name)
        rest = methods.filter(pl.col("family") == own["family"][0])
        for x, y in own.select("bytes_mean", "ndcg@10").iter_rows():
            assert (x, y) not in figures.front(list(rest.select("bytes_mean", "ndcg@10").iter_rows()))


@pytest.mark.parametrize("width", WIDTHS.values())
def test_curves_name_each_line_at_its_end_and_no_two_names_touch(board, width):
    figure = curves_figure(board, "a table", width)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert figure.get_figwidth() == width and axes.get_legend() is None
    names = [each for each in axes.texts if each.arrow_patch is not None]
    said = [each.get_text() for each in names]
    assert {"random", "recent"} <= set(said) and any("merge_adjacent +" in each for each in said)
    assert len([each for each in axes.lines if len(each.get_xdata()) == 4]) == len(names) >= 6
    boxes = sorted((each.get_window_extent() for each in names), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in itertools.pairwise(boxes))
    ticks = [each.get_window_extent() for each in axes.get_xticklabels() if each.get_text()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(ticks))
    drawn = [each.get_xdata()[0] for each in axes.lines if len(each.get_xdata()) == 4]
    begins = [axes.transData.transform((each, 0.5))[0] for each in drawn]
    assert max(box.x1 for box in boxes) < min(begins) + 2  # no name lies on a line


def test_no_curves_without_sizes(board):
    assert curves_figure(board.filter(pl.col("budget").is_null()), "a table") is None


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
