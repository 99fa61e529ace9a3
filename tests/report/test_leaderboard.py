import io
import math
import re

import polars as pl
import pytest
from rich.console import Console

from malloc_bench.report import leaderboard as lb
from malloc_bench.report.render import Column, number, terminal, words
from malloc_bench.results import frame

DELTA = ("delta_ndcg@10", "delta_ndcg@10_lo", "delta_ndcg@10_hi")


def full(row, **values):
    measured = {"ndcg@10": 0.2, "hr@10": 0.3, "delta_ndcg@10": 0.0, "bytes_mean": 160_000, "ratio": 1.0}
    return row(**{"family": "baseline", "compressor": "full", **measured, **values})


def method(row, name="snapkv", ndcg=0.19, **values):
    measured = {"ndcg@10": ndcg, "hr@10": 0.28, "bytes_mean": 40_000, "ratio": 0.25, "budget": 0.25}
    measured |= dict(zip(DELTA, (ndcg - 0.2, ndcg - 0.203, ndcg - 0.197)))
    return row(**{"family": "eviction", "compressor": name, **measured, **values})


def cells_of(text, name):
    """The cells of a Markdown row by its header."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    head = next(line for line in lines if line[0] == "compressor")
    return dict(zip(head, next(line for line in lines if line[0] == name)))


def test_exact_cells(row, board_of):
    one = method(
        row, compressor_params={"window": 16}, p_value=0.0123, share_at_floor=0.031, read_ms_p50=0.01234,
        compress_ms_p50=12.34, read_flops=4_560_000, **{"overlap@10": 0.8125},
    )  # fmt: skip
    text = lb.to_markdown(board_of(full(row), one))
    assert "## ml-1m · retrieval · sasrec (leave_one_out, 6,040 users)" in text
    assert cells_of(text, "snapkv(window=16)") == {
        "compressor": "snapkv(window=16)",
        "family": "eviction",
        "budget": "25 %",
        "state (KB/user)": "40.0",
        "× smaller": "4.0",
        "× smaller than float16": "2.0",
        "at floor (% users)": "3",
        "HR@10": "0.2800",
        "NDCG@10": "0.1900",
        "ΔNDCG@10 [95 % interval]": "-0.0100 [-0.0130, -0.0070]",
        "p (Holm)": "0.012",
        "overlap@10": "0.812",
        "read (ms, p50)": "0.0123",
        "compress (ms, p50)": "12.3",
        "read (MFLOPs)": "4.56",
    }
    reference = cells_of(text, "full")
    assert reference["ΔNDCG@10 [95 % interval]"] == reference["p (Holm)"] == reference["read (ms, p50)"] == ""
    assert reference["state (KB/user)"] == "160" and reference["× smaller"] == "1.0"


def test_columns_that_nobody_measured_are_left_out(row, board_of):
    head = lb.to_markdown(board_of(full(row), method(row))).splitlines()[4]
    assert "ms" not in head and "MFLOPs" not in head and "p (Holm)" not in head and "seeds" not in head
    assert "NDCG@10" in head


def test_holm_within_dataset_and_backbone(row, board_of):
    rows = [method(row, f"m{i}", p_value=p) for i, p in enumerate([0.01, 0.04, 0.03, 0.005])]
    rows += [method(row, "m0", p_value=0.04, backbone="hstu"), method(row, "untested", p_value=None)]
    board = lb.leaderboard(board_of(full(row, p_value=0.001), rows))
    found = {(backbone, name): p for backbone, name, p in board.select("backbone", "compressor", "p_holm").iter_rows()}
    assert found.pop(("sasrec", "untested")) is None and found.pop(("sasrec", "full")) is None
    assert found == pytest.approx(
        {
            ("sasrec", "m0"): 0.03,
            ("sasrec", "m1"): 0.06,
            ("sasrec", "m2"): 0.06,
            ("sasrec", "m3"): 0.02,
            ("hstu", "m0"): 0.04,
        }
    )


def test_tiny_p_is_not_printed_as_zero(row, board_of):
    assert cells_of(lb.to_markdown(board_of(method(row, p_value=1e-9))), "snapkv")["p (Holm)"] == "<0.001"


def test_a_difference_of_nothing_has_no_minus(row, board_of):
    one = method(row) | dict(zip(DELTA, (-1e-9, -0.001, 0.001)))
    assert cells_of(lb.to_markdown(board_of(one)), "snapkv")["ΔNDCG@10 [95 % interval]"] == "+0.0000 [-0.0010, +0.0010]"


def test_order_is_full_then_size_then_accuracy(row, board_of):
    rows = [
        method(row, "small", budget=0.125),
        method(row, "worse", 0.18),
        method(row, "own_size", budget=None, ratio=0.2),
        method(row, "none", 0.1, budget=None, ratio=0.0, bytes_mean=0),
        method(row, "slots", budget={"slots": 16}, ratio=0.05),
        method(row, "better", 0.195),
        method(row, "half", 0.15, budget=0.5),
        full(row),
    ]
    board = lb.leaderboard(board_of(rows))
    expected = ["full", "half", "better", "worse", "own_size", "small", "slots", "none"]
    assert board["compressor"].to_list() == expected
    text = lb.to_markdown(board_of(rows))
    assert cells_of(text, "none")["× smaller"] == "∞" and cells_of(text, "none")["state (KB/user)"] == "0"
    assert cells_of(text, "slots")["budget"] == "16 slots"


@pytest.mark.parametrize(("lo", "mark"), [(-0.0019, True), (-0.0021, False), (None, None)])
def test_lossless_is_less_than_one_percent_lost_for_sure(row, board_of, lo, mark):
    one = method(row, ndcg=0.2) | {"delta_ndcg@10": 0.0, "delta_ndcg@10_lo": lo}
    assert lb.leaderboard(board_of(one))["lossless"].to_list() == [mark]


def test_seeds_are_averaged_over_ok_rows_with_coverage(row, board_of):
    rows = [method(row, ndcg=n, p_value=p, seed=s) for s, (n, p) in enumerate([(0.18, 0.01), (0.20, 0.03)])]
    rows.append(method(row, seed=2, status="failed", reason="out of memory", ndcg=0.0))
    board = lb.leaderboard(board_of(rows)).row(0, named=True)
    assert board["ndcg@10"] == pytest.approx(0.19) and board["p_holm"] == pytest.approx(0.04)
    assert (board["seeds"], board["seeds_total"]) == (2, 3)
    assert cells_of(lb.to_markdown(board_of(rows)), "snapkv")["seeds ok"] == "2/3"


@pytest.mark.parametrize(("seeds", "blank"), [(1, True), (2, True), (3, False)])
def test_structural_methods_need_three_seeds(row, board_of, seeds, blank):
    rows = [method(row, "mla", 0.2, structural=True, seed=seed) for seed in range(seeds)]
    board = lb.leaderboard(board_of(rows)).row(0, named=True)
    assert (board["p_holm"] is None) == blank and (board["lossless"] is None) == blank


def test_the_luck_of_trainings_counts_against_structural_methods(row, board_of):
    """No seed of theirs has a p: the error is that over users and that of the mean over the seeds."""
    error = 0.003 / 1.959964  # of `method`'s intervals

    def board(*lost):
        rows = [method(row, "mla", 0.2 - each, structural=True, seed=seed) for seed, each in enumerate(lost)]
        return lb.leaderboard(board_of(rows))["p_holm"][0]

    assert board(0.004, 0.004, 0.004) == pytest.approx(math.erfc(0.004 / error / math.sqrt(2)))
    luck = math.hypot(error, 0.003 / math.sqrt(3))
    assert board(0.001, 0.004, 0.007) == pytest.approx(math.erfc(0.004 / luck / math.sqrt(2)))


def test_a_seed_whose_lists_are_the_full_states_counts_as_no_difference(row, board_of):
    def p(*each):
        rows = [method(row, p_value=one, seed=seed) for seed, one in enumerate(each)]
        return lb.leaderboard(board_of(rows))["p_holm"][0]

    assert p(None, None, 0.01) == 1 and p(0.01, 0.03) == pytest.approx(0.04) and p(None, None) is None


def test_a_rerun_replaces_the_older_row(row, board_of):
    old, new = method(row, ndcg=0.1), method(row, ndcg=0.19, created_at="2026-11-23T09:00:00+00:00")
    board = lb.leaderboard(board_of(new, old))
    assert board["ndcg@10"].to_list() == [0.19] and board["seeds_total"].to_list() == [1]


def test_backbone_parameters_show_only_where_they_tell_apart(row, board_of):
    deep = method(row, backbone_params={"layers": 4})
    assert lb.leaderboard(board_of(method(row)))["backbone"].to_list() == ["sasrec"]
    both = lb.leaderboard(board_of(method(row), deep))["backbone"].to_list()
    assert both == ["sasrec(layers=2)", "sasrec(layers=4)"]


def test_skipped_and_failed_are_listed_with_their_reason(row, board_of):
    rows = [
        row(compressor="svd", status="failed", reason="not finite\n  at all", budget=0.5, n_users=None),
        row(compressor="mla", status="skipped", reason="hstu has no softmax"),
        row(compressor="odd", status="skipped"),
    ]
    data = board_of(full(row), rows)
    assert lb.problems(data) == [
        "failed: ml-1m, retrieval, sasrec, svd at 50 %, seed 0: not finite at all",
        "skipped: ml-1m, retrieval, sasrec, mla, seed 0: hstu has no softmax",
        "skipped: ml-1m, retrieval, sasrec, odd, seed 0: no reason recorded",
    ]
    text = lb.to_markdown(data)
    assert "- failed: ml-1m, retrieval, sasrec, svd at 50 %, seed 0: not finite at all\n" in text
    assert "| svd" not in text
    assert "% skipped: ml-1m, retrieval, sasrec, mla" in lb.to_latex(data)


def ranked(row, name="snapkv", gauc=0.68, **values):
    deltas = dict(zip((f"delta_gauc{end}" for end in ("", "_lo", "_hi")), (gauc - 0.7, gauc - 0.7015, gauc - 0.69)))
    measured = {"task": "ranking", "family": "eviction", "compressor": name, "gauc": gauc, "auc": 0.74, "logloss": 0.51}
    measured |= {"agreement": 0.9, "ndcg@10": 0.5, "bytes_mean": 40_000, "ratio": 0.25, "budget": 0.25}
    return row(**{**measured, **deltas, **values})


def test_ranking_is_ordered_and_judged_by_gauc(row, board_of):
    """Lossless is less than 1 % lost of what the full state has above guessing: here 0.002 of 0.2."""
    rows = [
        ranked(row, "worse", 0.69, p_value=0.02, p_auc=0.5), ranked(row, "better", 0.6999, p_value=0.03, p_auc=0.01),
        ranked(row, "full", 0.7, budget=None, ratio=1.0), full(row), method(row),
    ]  # fmt: skip
    board = lb.aggregate(board_of(rows))
    ranking = board.filter(pl.col("task") == "ranking")
    assert ranking["method"].to_list() == ["full", "better", "worse"]
    assert ranking["lossless"].to_list() == [None, True, False]
    assert ranking["p_holm"].to_list() == pytest.approx([None, 0.04, 0.04])
    assert ranking["p_auc_holm"].to_list() == pytest.approx([None, 0.02, 0.5])
    text = lb.to_markdown(board_of(rows))
    ranking, retrieval = text.index("· ranking ·"), text.index("· retrieval ·")
    assert ranking < retrieval and "GAUC |" not in text[retrieval:].split("\n- ")[0]
    cells = cells_of(text[ranking:retrieval], "better")
    assert cells["GAUC"] == "0.6999" and cells["ΔGAUC [95 % interval]"] == "-0.0001 [-0.0016, +0.0099]"
    assert cells["agreement"] == "0.900" and cells["lossless"] == "✓ GAUC"
    assert not {"HR@10", "overlap@10", "ΔNDCG@10 [95 % interval]"} & cells.keys()


def test_csv_is_unrounded_and_blank_for_null(row, board_of):
    text = lb.to_csv(board_of(method(row, ndcg=0.123456789)))
    head, line = text.splitlines()
    values = dict(zip(head.split(","), line.split(",")))
    assert values["ndcg@10"] == "0.123456789" and values["read_ms_p50"] == "" and values["bytes_mean"] == "40000.0"


def test_latex_escapes(row, board_of):
    text = lb.to_latex(board_of(method(row, "merge_adjacent", share_at_floor=0.5)))
    assert r"merge\_adjacent" in text and r"25 \%" in text and r"leave\_one\_out" in text and r"$\Delta$NDCG@10" in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in rows}) == 1 and len(rows) == 2


def test_names_and_reasons_are_text_in_markdown_and_latex(row, board_of):
    evil = "<script>x</script> [a](javascript:x) a|b &lt;b\n\n# head\x1b[31m"
    rows = [method(row, evil, dataset=evil), full(row, dataset=evil)]
    rows += [row(compressor="svd", dataset=evil, status="failed", reason=evil)]
    text = lb.to_markdown(board_of(rows))
    assert "<script" not in text and "](java" not in text and "\x1b" not in text and "\n# head" not in text
    assert r"&lt;script>x&lt;/script> [a]\(javascript:x) a\|b &amp;lt;b # head\x1b[31m" in text
    latex = lb.to_latex(board_of(rows))
    assert "\x1b" not in latex and "\n#" not in latex and "\n\n#" not in latex


def test_empty_frame():
    empty = frame([])
    assert lb.leaderboard(empty).columns == list(lb.SHOWN) and lb.problems(empty) == []
    assert lb.EMPTY in lb.to_markdown(empty) and lb.EMPTY in lb.to_latex(empty)
    assert lb.to_csv(empty).strip() == ",".join(lb.SHOWN)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    lb.print_leaderboard(empty, console)
    assert lb.EMPTY in console.export_text()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 240])
def test_terminal_fits_and_keeps_what_matters(suite, width, tmp_path):
    with (tmp_path / "out").open("w+") as out:
        lb.print_leaderboard(suite, Console(width=width, file=out))
        out.seek(0)
        lines = out.read().splitlines()
    assert max(map(len, lines)) <= width
    if width < 60:
        return
    best, heads = ([line for line in lines if name in line and "(KB/user)" in line] for name in ("best", "compressor"))
    assert len(best) == len(heads) == 2 and all("fidelity" in head for head in best + heads)
    assert all("[95 % interval]" in head for head in heads) == (width >= 80)
    assert ("(MFLOPs)" in heads[0]) == (width == 240) and "…" not in "".join(lines)
    assert sum("snapkv(window=16)" in line for line in lines) == 8


def test_a_narrow_terminal_shows_what_counts_and_names_the_rest(suite):
    text = shown(suite, only={"backbone": ["hstu"]}, width=80)
    (head,) = (line for line in text.splitlines() if line.startswith("compressor"))
    assert head.split()[:4] == ["compressor", "budget", "(KB/user)", "fidelity"] and "interval]" in head
    left = " ".join(text.split("No room for: ")[1].split())
    assert left.startswith("NDCG@10, lossless, ") and "p (Holm)" in left
    enough = int(re.search(r"A width of (\d+) shows all \(COLUMNS=\1\)", left)[1])
    assert "No room for" not in shown(suite, only={"backbone": ["hstu"]}, width=enough)
    assert "No room for" in shown(suite, only={"backbone": ["hstu"]}, width=enough - 1)


def test_no_heading_is_cut_where_words_of_a_left_column_are_long():
    """Two columns of words, either longer than it is given: the numbers beside them keep their place."""
    rows = pl.DataFrame({"a": ["x" * 19], "b": ["50, 25, 12.5 %"], "c": [1.0], "d": ["+0.0 [-0.0, +0.0]"]})
    columns = [words("a", "compressor", most=19), words("b", "budget", most=9), number("c", "fidelity", ".3f"),
               Column("ΔNDCG [95 % interval]", lambda row: row["d"]), number("c", "read (× full)", ".2f"),
               number("c", "more (× full)", ".2f")]  # fmt: skip
    out = io.StringIO()
    Console(width=76, file=out).print(terminal(rows, columns, "title", 76))
    text = out.getvalue()
    assert text.count("(× full)") == 2 and text.split().count("1.00") == 2 and "No room" not in text


def test_rows_of_one_budget_stand_by_what_they_keep(suite):
    board = lb.aggregate(suite).filter((pl.col("backbone") == "hstu") & (pl.col("budget") == "25 %"))
    assert board["overlap@10"].is_sorted(descending=True) and len(board) == 10


def shown(frame, width=200, **options):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    lb.print_leaderboard(frame, console, **options)
    return console.export_text()


def test_rows_columns_and_order_of_ones_own(suite):
    text = shown(suite, only={"backbone": ["sasrec"], "compressor": ["svd", "kivi"], "budget": ["1/4", "none"]})
    names = [line.split()[0] for line in text.splitlines() if line[:3] in ("svd", "kiv")]
    assert {"kivi(bits=2)", "kivi(bits=4)", "kivi(bits=8)", "svd"} == set(names)
    assert "hstu" not in text and "best per budget" not in text
    by = shown(suite, only={"backbone": ["hstu"]}, sort="bytes_mean", columns=["bytes_mean", "cell_ids"])
    lines = [line.split() for line in by.splitlines()]
    sizes = [float(line[0].replace(",", "")) for line in lines if len(line) == 2 and len(line[1]) >= 40]
    assert sizes == sorted(sizes) and len(sizes) == 47


def test_a_label_is_asked_for_with_its_parameters_in_any_order(suite):
    longer = suite.with_columns(compressor_params=pl.lit('{"bits":2,"group":8}'))
    for label in ("kivi(bits=2, group=8)", "kivi(group=8,bits=2)"):
        assert "kivi(bits=2, group=8)" in shown(longer, only={"compressor": [label]})
    with pytest.raises(ValueError, match="no row has it"):
        shown(longer, only={"compressor": ["kivi(group=2,bits=8)"]})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sort": "ndgc@10"}, "no column 'ndgc@10'. Did you mean 'ndcg@10'"),
        ({"columns": ["bytes"]}, "no column 'bytes'"),
        ({"only": {"compressor": ["snapvk"]}}, "--only compressor=snapvk: no row has it. Did you mean 'snapkv'"),
        ({"only": {"color": ["red"]}}, "--only color=red: unknown key"),
    ],
)
def test_a_wrong_name_is_a_line_with_the_nearest(options, said, suite):
    with pytest.raises(ValueError, match=r".+") as error:
        shown(suite, **options)
    assert said in str(error.value)


def test_whole_suite(suite):
    board = lb.leaderboard(suite)
    assert len(board) == 2 * (2 + 10 * 4 + 5)
    assert board["backbone"].unique(maintain_order=True).to_list() == ["hstu", "sasrec"]
    assert "merge_adjacent + kivi(bits=2)" in board["compressor"].to_list()
    lossless = board.filter(pl.col("lossless"))["compressor"].to_list()
    assert lossless.count("kivi(bits=8)") == 2 and "knorm" not in lossless


def test_ceilings_are_shown_and_explained_only_where_they_are_known(row, board_of):
    best = {"ceiling_none_hr@10": 0.1, "ceiling_full_hr@10": 0.9, "ceiling_window_hr@10": 0.3, "hr@10": 0.5}
    known, unknown = method(row, "h2o", **best), method(row, "tova", dataset="ml-100k")
    text = lb.to_markdown(board_of(known))
    assert "| 50.0 | 0.3000 | 200.0 |" in text and lb.CEILINGS in text
    text = lb.to_markdown(board_of(unknown))
    assert "ceiling" not in text.lower()


def test_chains_that_come_to_one_state_are_one_line(row, board_of):
    def chain(first, digest, size=10_000, budget=0.25):
        params = {"steps": [first, "int4_token"]}
        one = method(row, "compose", compressor_params=params, values_digest=digest, bytes_mean=size, budget=budget)
        return one | {"family": "chain"}

    rows = [full(row), chain("recent", "a"), chain("h2o", "a"), chain("kmeans", "b"), chain("tova", "a", 9_000)]
    rows += [method(row, "snapkv", values_digest="a", bytes_mean=10_000), chain("lu", None), chain("cam", None)]
    frame = board_of(rows)
    text = lb.to_markdown(frame)
    assert text.count(" = 1 more |") == 1 and text.count("int4_token") == 5
    assert "| snapkv |" in text  # no chain: a line of its own
    assert lb.to_csv(frame).count("int4_token") == 6  # every row, for programs
    assert "= 1 more" in shown(frame)


@pytest.mark.parametrize("name", ["compressor", "lossless", "cell_ids", "headroom", "note", "fidelity"])
def test_any_column_sorts(name, suite):
    assert "snapkv" in shown(suite, sort=name)
