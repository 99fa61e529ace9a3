"""The tables that a paper prints, on rows made by hand."""

import re
import shutil
import subprocess

import numpy as np
import polars as pl
import pytest

from malloc_bench.evaluation import metrics
from malloc_bench.report import evidence, render, tables
from malloc_bench.results import budget_labels, frame


def scored(row, name, ndcg, overlap=None, ratio=None, **more):
    """A row whose full state has NDCG@10 0.2 and whose floor has none; differences are sure."""
    lost = ndcg - 0.2
    values = {"ndcg@10": ndcg, "delta_ndcg@10": lost, "delta_ndcg@10_lo": lost - 0.01, "delta_ndcg@10_hi": lost + 0.01}
    family = {"full": "baseline", "none": "baseline", "oracle_evict": "ceiling"}.get(name, "eviction")
    size = {} if ratio is None else {"ratio": ratio, "bytes_mean": 1000 * ratio}
    return row(compressor=name, **{"family": family, "overlap@10": overlap} | size | values | more)


def lines(text, title):
    """The cells of a Markdown table, row by row: header -> text."""
    part = text.split(f"## {title}\n")[1].split("## ")[0]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
    return [dict(zip(found[0], each)) for each in found[2:]]


@pytest.fixture
def two_sets(row, board_of):
    """Two data sets; at 25 % h2o, tova and an oracle, kivi at 0.2 of the bytes, int8 at 0.3, mla only on the first."""
    rows = []
    for data, shift in (("ml-1m", 0.0), ("beauty", 0.01)):
        rows += [
            scored(row, "full", 0.2, 1.0, 1.0, dataset=data),
            scored(row, "none", 0.02, 0.5, 0.0, dataset=data),
            scored(row, "oracle_evict", 0.3, 0.99, 0.25, budget=0.25, dataset=data),
            scored(row, "h2o", 0.15 + shift, 0.75, 0.25, budget=0.25, dataset=data),
            scored(row, "tova", 0.16, 0.8, 0.25, budget=0.25, dataset=data),
            scored(row, "tova", 0.1, 0.6, 0.125, budget=0.125, dataset=data),
            scored(row, "kivi", 0.19, 0.9, 0.2, family="quantization", dataset=data),
            scored(row, "int8", 0.19, 0.9, 0.3, family="quantization", dataset=data),
        ]
    skipped = {"status": "skipped", "reason": "needs 50 % & a_time #1\nmore"}
    rows.append(scored(row, "snap", 0.1, 0.6, 0.25, budget=0.25, dataset="ml-1m"))
    rows.append(row(family="eviction", compressor="snap", budget=0.25, dataset="beauty", **skipped))
    rows.append(row(family="eviction", compressor="h2o", budget=0.25, dataset="kuai", **skipped))
    return board_of(rows)


def test_best_and_second_of_every_column(two_sets):
    found = {each["compressor"]: each for each in lines(tables.render_table(two_sets, "paper"), "Budget 25 %")}
    assert list(found) == ["full", "none", "oracle_evict", "h2o", "snap", "tova", "kivi"]  # floors, then by family
    ndcg, fidelity = ({name: each[f"ml-1m · sasrec: {of}"] for name, each in found.items()} for of in
                      ("NDCG@10", "fidelity"))  # fmt: skip
    assert ndcg["kivi"] == "**0.1900**" and ndcg["tova"] == "<u>0.1600</u>" and ndcg["h2o"] == "0.1500"
    assert (ndcg["full"], ndcg["none"], ndcg["oracle_evict"]) == ("0.2000", "0.0200", "0.3000")
    assert fidelity["kivi"] == "**0.800**" and fidelity["tova"] == "<u>0.600</u>"  # (0.9 - 0.5) / 0.5
    beauty = {name: each["beauty · sasrec: NDCG@10"] for name, each in found.items()}
    assert beauty["h2o"] == "<u>0.1600</u>" == beauty["tova"]  # printed alike, marked alike


def test_skipped_cells_have_a_footnote_and_skipped_sets_a_line(two_sets):
    text = tables.render_table(two_sets, "paper")
    found = {each["compressor"]: each for each in lines(text, "Budget 25 %")}
    assert found["snap"]["beauty · sasrec: NDCG@10"] == "–[1]"
    assert "- [1] skipped: needs 50 % & a_time #1 more\n" in text
    assert "- kuai, retrieval, leave_one_out, sasrec: skipped: needs 50 % & a_time #1 more\n" in text
    assert "kuai" not in "".join(found["h2o"])


def test_one_block_a_budget_and_one_for_what_fits_none(two_sets):
    text = tables.render_table(two_sets, "paper")
    assert re.findall("## (.*)", text) == ["Budget 25 %", "Budget 12.5 %", "Of any size"]
    assert [each["compressor"] for each in lines(text, "Budget 12.5 %")] == ["full", "none", "tova"]
    assert [each["compressor"] for each in lines(text, "Of any size")] == ["full", "none", "int8"]
    data = tables.table(two_sets, "paper")
    best = data.filter(pl.col("value_rank") == 1, pl.col("dataset") == "ml-1m").select("within", "compressor").rows()
    assert best == [("25 %", "kivi"), ("12.5 %", "tova"), ("no budget", "int8")]


def test_without_headroom_nothing_is_the_best(row, board_of):
    wide = {"delta_ndcg@10_lo": -0.3, "delta_ndcg@10_hi": 0.1}
    rows = [scored(row, "full", 0.2, 1.0, 1.0), scored(row, "none", 0.19, 0.5, 0.0) | wide]
    text = tables.render_table(board_of([*rows, scored(row, "h2o", 0.15, 0.7, 0.2, budget=0.25)]), "paper")
    assert "**" not in text and "<u>" not in text and "No headroom" in text


def test_ranking_shows_gauc(row, board_of):
    judged = {"gauc": 0.7, "delta_gauc": -0.1, "agreement": 0.9}
    text = tables.render_table(board_of(row(family="eviction", compressor="h2o", task="ranking", **judged)), "paper")
    assert lines(text, "Of any size")[0] == {
        "family": "eviction", "compressor": "h2o",
        "ml-1m · sasrec: GAUC": "**0.7000**", "ml-1m · sasrec: agreement": "**0.900**",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("label", "each"),
    [(None, []), ("50 %", ["50 %"]), ("50, 12.5 %", ["50 %", "12.5 %"]), ("50 %, 16 slots", ["50 %", "16 slots"])],
)
def test_a_joined_budget_comes_apart(label, each):
    assert budget_labels(label) == each


def test_fronts(row, board_of):
    def cell(name, overlap, ratio, ms, **more):
        return scored(row, name, 0.1, overlap, ratio, read_ms_p50=ms, **more)

    found = evidence.pareto(board_of(
        cell("full", 1.0, 1.0, 1.0), cell("none", 0.1, 0.0, 0.1),
        cell("h2o", 0.8, 0.25, 2.0), cell("tova", 0.7, 0.5, 0.5), cell("snap", 0.6, 0.6, 1.5),
        cell("oracle_evict", 0.99, 0.2, 0.1),
    ))  # fmt: skip
    flags = {row["compressor"]: (row["by_bytes"], row["by_read"], row["by_all"]) for row in found.to_dicts()}
    assert flags == {"h2o": (True, False, True), "tova": (False, True, True), "full": (True, True, True)}
    assert found["compressor"].to_list() == ["h2o", "tova", "full"]


def test_significance_against_the_full_state_and_the_best(row, board_of, with_users, tmp_path):
    better, worse = [0.9, 0.8] * 50, [0.5, 0.6] * 50
    cells = [
        with_users(scored(row, "h2o", 0.19, ratio=0.25, budget=0.25, p_value=0.01), better),
        with_users(scored(row, "tova", 0.15, ratio=0.25, budget=0.25, p_value=0.02), worse),
        scored(row, "full", 0.2, 1.0, 1.0),
    ]
    found = {each["compressor"]: each for each in evidence.significance(board_of(cells), tmp_path).to_dicts()}
    assert found.keys() == {"h2o", "tova"} and found["h2o"]["best"] == found["tova"]["best"] == "h2o"
    assert found["h2o"]["apart"] is None and found["h2o"]["p_best"] is None  # of itself
    assert found["tova"]["apart"] == pytest.approx(-0.3) and found["tova"]["p_best"] < 0.001
    assert found["tova"]["apart_lo"] <= -0.3 <= found["tova"]["apart_hi"] < 0
    assert found["tova"]["delta"] == pytest.approx(-0.05) and found["tova"]["delta_lo"] == pytest.approx(-0.06)
    assert (found["h2o"]["p_holm"], found["tova"]["p_holm"]) == (0.02, 0.02)  # of 0.01 and 0.02
    assert found["tova"]["lossless"] is False
    text = tables.render_table(board_of(cells), "significance", folder=tmp_path)
    assert "-0.0500 [-0.0600, -0.0400]" in text and "| <0.001 |" in text
    assert evidence.significance(board_of(cells))["apart"].null_count() == 2  # values by user are elsewhere


def test_trainings_are_pooled_by_user_in_the_table_of_tests(row, board_of, with_users, tmp_path):
    """What is tested is each user's mean over the trainings; weights of a row's own, and one training, stay as are."""
    rng, n = np.random.default_rng(0), 400
    ranks = {name: rng.integers(0, 12, (3, n)) for name in ("full", "h2o")}
    cells = [
        with_users(
            scored(row, name, 0.2 if name == "full" else 0.15, seed=seed, p_value=0.5), [0.5] * n, ranks[name][seed]
        )
        for name in ranks
        for seed in range(3)
    ]
    cells += [with_users(scored(row, "tova", 0.15, p_value=0.5), [0.4] * n, 3)]
    cells += [with_users(scored(row, "recompute", 0.2, seed=s), [1.0] * n, ranks["full"][s]) for s in range(3)]
    cells += [with_users(scored(row, "mqa", 0.15, structural=True, seed=s), [0.4] * n, 3) for s in range(3)]
    found = {each["compressor"]: each for each in evidence.significance(board_of(cells), tmp_path).to_dicts()}
    mine, full = (metrics.ndcg(ranks[name], 10).mean(0) for name in ("h2o", "full"))
    delta, lo, hi, p = metrics.paired_bootstrap(mine, full)
    h2o = found["h2o"]
    assert (h2o["delta"], h2o["delta_lo"], h2o["delta_hi"], h2o["pooled"]) == pytest.approx((delta, lo, hi, n))
    spread = np.std(metrics.ndcg(ranks["h2o"], 10) - metrics.ndcg(ranks["full"], 10), axis=1).mean()
    assert (hi - lo) < 2 * 1.96 * spread / np.sqrt(n) / 1.5  # three trainings: a root of three narrower than one
    for name in ("tova", "mqa"):
        assert found[name]["delta"] == pytest.approx(-0.05) and found[name]["pooled"] is None
    assert found["recompute"]["p_holm"] is None  # its lists are the full state's: there is nothing to test
    (alone,) = evidence.significance(board_of(cells[:6]), tmp_path).to_dicts()
    assert (alone["p_holm"], alone["p_lossless"]) == pytest.approx((p, metrics.noninferiority(mine[None], full)[0]))
    apart = {each["compressor"]: each["delta"] for each in evidence.significance(board_of(cells)).to_dicts()}
    assert apart.pop("recompute") == 0 and list(apart.values()) == [pytest.approx(-0.05)] * 3


def test_growth_between_two_lengths(row, board_of):
    sizes = {"measured_history": 10, "measured_history_long": 1000, "measured_bytes": 5.0, "measured_bytes_long": 500.0}
    times = {"read_flops": 10.0, "read_flops_long": 1e5, "read_ms_p50": 1.0, "read_ms_p50_long": 10.0}
    near = {**sizes, **times, "measured_history_long": 12}
    found = evidence.complexity(board_of(row(compressor="h2o", **sizes, **times), row(compressor="tova", **near)))
    one, tova = found.sort("compressor").to_dicts()
    assert (one["said compress"], tova["said compress"]) == ("h n² L", "w n L d") and tova["memory"] is None
    assert [one[name] for name in ("memory", "read FLOPs", "read ms")] == pytest.approx([1.0, 2.0, 0.5])
    assert one["compress ms"] is None and one["compressor"] == "h2o"
    text = tables.render_table(board_of(row(compressor="h2o", **sizes, **times)), "complexity")
    assert "| 10 | 1,000 | 1.00 | 2.00 | 0.50 |" in text
    assert text.count("e: slope between both lengths") == 1 and text.rstrip().endswith("other parts of the work lead.")


def test_growth_of_a_read_beyond_one_of_no_history(row, board_of):
    """Of 100 + n and 100 FLOPs the part that grows is n."""
    lengths = {"measured_history": 10, "measured_history_long": 1000}
    h2o = row(compressor="h2o", read_flops=110.0, read_flops_long=1100.0, **lengths)
    none = row(compressor="none", read_flops=100.0, read_flops_long=100.0, **lengths)
    found = {each["compressor"]: each for each in evidence.complexity(board_of(h2o, none)).to_dicts()}
    assert found["h2o"]["read FLOPs beyond none"] == pytest.approx(1.0) and found["h2o"]["read FLOPs"] == 0.5
    assert found["none"]["read FLOPs beyond none"] is None and found["none"]["read FLOPs"] == 0.0


@pytest.mark.parametrize("name", evidence.PAPER)
def test_nothing_to_show(name, row, board_of):
    for data in (frame([]), board_of(row(compressor="h2o", status="skipped", reason="no data"))):
        assert len(tables.table(data, name).columns) > 5
        assert tables.render_table(data, name).count("\n") >= 2
        assert tables.render_table(data, name, "latex").startswith("%")


def test_an_unknown_name_is_one_line_with_the_nearest():
    with pytest.raises(ValueError, match=r"^no table is named 'signifcance'\. Did you mean 'significance'\?"):
        tables.table(frame([]), "signifcance")


# ---- LaTeX

HOSTILE = r"a&b%c_d#e{f}g$h~i^j\k|l<m>[n] é–Δ 日本" + "\n\r\t"


def cells_of(line):
    return len(re.split(r"(?<!\\)&", line))


@pytest.fixture
def hostile(row, board_of):
    def cell(name, ndcg, **more):
        return scored(row, name, ndcg, 0.5 + ndcg, ratio=0.25, dataset=HOSTILE, backbone=HOSTILE, **more)

    gone = row(compressor="[x]", family="f", budget=0.25, dataset=HOSTILE, backbone=HOSTILE, status="failed",
               reason=f"[1cm] {HOSTILE}")  # fmt: skip
    long = {"measured_history": 10, "measured_history_long": 100, "read_flops": 1.0, "read_flops_long": 9.0}
    rows = [cell("full", 0.2), cell("h2o", 0.1, budget=0.25, **long), cell(HOSTILE, 0.15, budget=0.25, family=HOSTILE)]
    return board_of([*rows, gone])


@pytest.mark.parametrize("name", evidence.PAPER)
def test_latex_is_whole(name, hostile):
    text = tables.render_table(hostile, name, "latex")
    bare = re.sub(r"\\[\\{}&%$#_]", "", text)
    assert bare.count("{") == bare.count("}") > 10 and bare.count("$") % 2 == 0
    assert not set("&%#_~^<>|日") & set(re.sub(r"(?m) & |\$[<>|]\$|^% .*|\{%$", "", bare))
    for part in text.split(r"\begin{tabular}")[1:]:
        columns = len(re.match(r"\{([lr]+)\}", part)[1])
        body = [line for line in part.split(r"\end{tabular}")[0].splitlines() if line.endswith(r"\\")]
        wide = [cells_of(line) + sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", line)) for line in body]
        assert len(body) > 1 and set(wide) == {columns}
    assert text.count(r"\begin{") == text.count(r"\end{")


def test_latex_marks_the_best(two_sets):
    text = tables.render_table(two_sets, "paper", "latex")
    assert r"\textbf{0.1900}" in text and r"\underline{0.1600}" in text
    assert r"\multicolumn{2}{c}{ml-1m $\cdot$ sasrec}" in text and r"\cmidrule(lr){3-4}" in text
    assert r"--{[}1{]}" in text and r"{[}1{]} skipped: needs 50 \% \& a\_time \#1" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_compiles(hostile, two_sets, suite, tmp_path):
    frames = ((hostile, evidence.PAPER), (two_sets, ("paper",)), (suite, ("paper", "pareto", "accuracy", "resources")))
    body = "".join(tables.render_table(data, name, "latex") for data, names in frames for name in names)
    head = r"\documentclass{article}\usepackage{booktabs,amssymb,graphicx}\begin{document}"
    (tmp_path / "t.tex").write_text(f"{head}\n{body}\n\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, [line for line in done.stdout.splitlines() if line.startswith("!")]


def test_a_near_letter_stands_for_what_latex_has_not():
    assert render.escape("é ﬁ 日 \x1b") == "é fi ? ?"


def test_a_front_by_reads_is_of_kept_states_whose_reads_were_measured(row, board_of):
    size = {"bytes_mean": 10.0, "overlap@10": 0.9}
    rows = [
        row(compressor="full", family="baseline", bytes_mean=100.0, **{"overlap@10": 1.0}),
        row(compressor="h2o", **size),
        row(compressor="recompute", family="recompute", bytes_mean=1.0, **{"overlap@10": 1.0}),
    ]
    found = {each["compressor"]: each for each in evidence.pareto(board_of(*rows)).to_dicts()}
    assert set(found) == {"full", "h2o"} and found["h2o"]["by_bytes"] and found["h2o"]["by_read"] is None
    rows[1] |= {"read_flops": 5.0}
    found = {each["compressor"]: each for each in evidence.pareto(board_of(*rows)).to_dicts()}
    assert found["h2o"]["by_read"]
