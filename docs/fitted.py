"""Writes docs/fitted.md: the words of docs/fitted.txt with figures of committed rows and benchmarks.

python docs/fitted.py            --check: says whether the page is what the rows say, and writes nothing
"""

from __future__ import annotations

import re
import sys
import textwrap
from itertools import groupby
from pathlib import Path

import polars as pl

from malloc_bench.report.board import aggregate
from malloc_bench.report.evidence import pooled, significance
from malloc_bench.report.users import Users
from malloc_bench.results import load_results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "fitted.md"
NAMES = {"sasrec": "SASRec", "hstu": "HSTU", "lsrm": "LSRM", "marm": "MARM", "climber": "Climber"}
BUDGETS = {0.125: "1/8", 0.03125: "1/32", 0.015625: "1/64", 0.0078125: "1/128", 0.00390625: "1/256"}
FITTED = "fit_omp(probes=128, which=top) + mxint"
METHODS = {
    FITTED: "fit_omp, 128 top items as probes",
    "moments + mxint": "moments about the mean query",
    "fit_recent + mxint": "fit_recent",
    "kmeans + mxint": "kmeans",
    "merge_adjacent + mxint": "merge_adjacent",
    "h2o + mxint": "h2o",
    "recent + mxint": "recent",
}


def rows() -> pl.DataFrame:
    return pl.read_csv(ROOT / "results" / "fitted_small" / "leaderboard.csv", infer_schema_length=None)


def overlap(found: pl.DataFrame, method: str, budget: float) -> dict[str, float]:
    """By backbone, where the smallest state is no larger; a row may stand for budgets that come to one state."""
    return dict(at(found, budget).filter(compressor=method).select("backbone", "overlap@10").iter_rows())


def at(found: pl.DataFrame, budget: float) -> pl.DataFrame:
    """The rows of a budget that come near to it: those whose smallest state is larger by a ninth do not."""
    listed = pl.col("budget").str.strip_suffix(" %").str.split(", ").list.contains(f"{100 * budget:.6g}")
    return found.filter(listed & (pl.col("smaller_x") * budget > 0.9))


def over(found: pl.DataFrame) -> str:
    """What stands at a budget and is more than one percent larger."""
    said = [
        f"{METHODS[row['compressor']]} behind {NAMES[row['backbone']]} at {share} takes 1/{row['smaller_x']:.0f}"
        for budget, share in BUDGETS.items()
        for row in at(found, budget).filter(pl.col("compressor").is_in(METHODS.keys())).iter_rows(named=True)
        if row["smaller_x"] * budget < 0.99
    ]
    return ", ".join(said) or "none that stands here is larger by a hundredth"


def spread() -> str:
    """Standard deviations over seeds of fit_omp's overlaps and of all others: the median and the largest."""
    constant = pl.col("compressor") == "fit_constant"
    found = load_results(ROOT / "results" / "fitted_small").filter(pl.col("budget").is_not_null() | constant)
    seeds = pl.col("overlap@10")
    by_cell = found.group_by("backbone", "compressor", "compressor_params", "budget").agg(
        seeds.std().alias("sd"), pl.len().alias("n")
    )
    by_cell = by_cell.filter(pl.col("n") == 3)
    ours = (by_cell["compressor"] + by_cell["compressor_params"]).str.contains("fit_omp", literal=True)
    groups = (by_cell["sd"].filter(some) for some in (ours, ~ours))
    said = (f"{sd.median():.3f} in the median, {sd.max():.3f} at most" for sd in groups)
    return " for fit_omp, ".join(said) + " for the others"


def table(found: pl.DataFrame) -> str:
    lines = ["| method | bytes | " + " | ".join(NAMES.values()) + " |", "|---|--:|" + "--:|" * len(NAMES)]
    for budget, share in BUDGETS.items():
        for method, label in METHODS.items():
            known = overlap(found, method, budget)
            if known:
                cells = (f"{known[name]:.3f}" if name in known else "larger" for name in NAMES)
                lines.append(f"| {label} | {share} | " + " | ".join(cells) + " |")
    for method, label in (("fit_constant", "fit_constant: no query"), ("none", "none: no history")):
        known = dict(found.filter(pl.col("compressor") == method).select("backbone", "overlap@10").iter_rows())
        size = dict(found.filter(pl.col("compressor") == method).select("backbone", "smaller_x").iter_rows())
        share = f"1/{min(size.values()):.0f} to 1/{max(size.values()):.0f}" if method == "fit_constant" else "0"
        lines.append(f"| {label} | {share} | " + " | ".join(f"{known[name]:.3f}" for name in NAMES) + " |")
    return "\n".join(lines)


def committed(name: str, number: int = 0) -> str:
    """The table of so high a number in a committed benchmark."""
    text = (ROOT / "results" / "benchmarks" / name).read_text()
    tables = [list(lines) for is_table, lines in groupby(text.splitlines(), lambda x: x.startswith("|")) if is_table]
    return "\n".join(tables[number])


def ablations() -> str:
    """A row for each fit, a column for each backbone and budget."""
    found = pl.read_csv(ROOT / "results" / "fit_ablations" / "leaderboard.csv", infer_schema_length=None)
    fits = found.filter(pl.col("compressor").str.ends_with("+ mxint"))
    columns = sorted(set(fits.select("backbone", "budget").iter_rows()), key=lambda c: (c[0], -float(c[1].split()[0])))
    lines = [
        "| fit_omp | " + " | ".join(f"{NAMES[name]}, {share}" for name, share in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    by_number = {
        x: (x.count("="), re.sub(r"[\d.]+", "", x), *map(float, re.findall(r"[\d.]+", x)))
        for x in set(fits["compressor"])
    }
    for method in sorted(by_number, key=by_number.__getitem__):
        known = {(b, s): x for b, s, x in fits.filter(pl.col("compressor") == method).select(
            "backbone", "budget", "overlap@10").iter_rows()}  # fmt: skip
        cells = (f"{known[c]:.3f}" if c in known else "" for c in columns)
        lines.append(f"| {method.removeprefix('fit_omp(').removesuffix(') + mxint')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: requests -> events behind a state where it is looked at; 50 events later answers hang on events that came since
HORIZONS = {1: 0, 2: 1, 6: 5, 21: 20, 51: 20}
BEYOND = {1: 1, 2: 5, 6: 20}


def horizon() -> dict[str, str]:
    """What fits to the next h requests keep at the last of them, and one look beyond it; and what bounds them."""
    found = aggregate(load_results(ROOT / "results" / "horizon"))
    slots = pl.col("budget").str.extract(r"^(\d+) slots").cast(pl.Int64)
    asked = pl.col("compressor").str.extract(r"horizon=(\d+)").cast(pl.Int64).fill_null(1)
    fits = found.filter(pl.col("method") == "fit_omp").with_columns(slots.alias("slots"), asked.alias("h"))
    kept = {(row["h"], row["slots"]): row for row in fits.iter_rows(named=True)}
    sizes = sorted({size for _, size in kept})
    at = {0: "overlap@10"} | {n: f"appended@{n}" for n in (1, 5, 20, 50)}

    def cell(h: int, size: int) -> str:
        row, past = kept[h, size], BEYOND.get(h)
        return f"{row[at[HORIZONS[h]]]:.3f}" + ("" if past is None else f" ({row[at[past]]:.3f})")

    lines = ["| requests | " + " | ".join(f"{n} slots" for n in sizes) + " |", "|--:|" + "--:|" * len(sizes)]
    lines += [f"| {h} | " + " | ".join(cell(h, size) for size in sizes) + " |" for h in HORIZONS]
    enough = {h: next((n for n in sizes if kept[h, n][at[HORIZONS[h]]] >= 0.8), None) for h in HORIZONS}
    one = {name: found.filter(pl.col("method") == name).row(0, named=True) for name in ("full", "fit_constant", "none")}
    newest = found.filter((pl.col("method") == "recent") & (slots == sizes[-2])).row(0, named=True)
    return {
        "horizon": "\n".join(lines),
        "enough": ", ".join(f"{n or 'more'} for {h}" for h, n in enough.items()),
        "horizon_full": f"{one['full']['hr@10']:.3f}",
        "horizon_best": f"{one['full']['ceiling_full_hr@10']:.3f}",
        "horizon_none": f"{one['none']['overlap@10']:.3f}",
        "horizon_constant": f"{one['fit_constant']['overlap@10']:.3f}",
        "horizon_constant_later": f"{one['fit_constant']['appended@1']:.3f}",
        "horizon_newest": f"{newest['overlap@10']:.3f}",
        "horizon_slots": str(sizes[-2]),
    }


#: the columns of what fitted_codes has, by name
CODES = {
    "fit_keys(probes=256, rounds=30, which=top) + mxint": "fit_keys + mxint",
    "fit_keys(probes=256, rounds=30, which=top) + gain_shape": "fit_keys + gain_shape",
    "auto": "auto",
    "fit_constant": "fit_constant",
}


def codes() -> str:
    """What each encoder keeps by data set, backbone and bytes; means over the trainings that all of them have."""
    rows, of = load_results(ROOT / "results" / "fitted_codes"), ("dataset", "backbone")
    methods = pl.struct("compressor", "compressor_params", "budget").n_unique()
    whole = methods.over(*of, "seed") == methods.over(*of)
    found = aggregate(rows.filter(whole))
    lines = ["| | trainings | bytes | " + " | ".join(CODES.values()) + " |", "|---|--:|--:|" + "--:|" * len(CODES)]
    for (data, backbone), own in found.group_by("dataset", "backbone", maintain_order=True):
        kept = {row["compressor"]: row["overlap@10"] for row in own.filter(pl.col("budget").is_null()).to_dicts()}
        for budget, share in BUDGETS.items():
            at = own.filter(pl.col("budget") == f"{100 * budget:.6g} %")
            known = kept | dict(at.select("compressor", "overlap@10").iter_rows())
            if len(at):
                cells = (f"{known[name]:.3f}" if name in known else "" for name in CODES)
                lines.append(
                    f"| {data}, {NAMES[str(backbone)]} | {at['seeds'].min()} | {share} | " + " | ".join(cells) + " |"
                )
    return "\n".join(lines)


def costs() -> str:
    """Of the same on MovieLens-1M, what is lost of NDCG@10, and where surely less than 1 %."""
    folder = ROOT / "results" / "fitted_codes"
    found = significance(load_results(folder), folder).filter(dataset="ml-1m")
    names = [name for name in CODES if name != "fit_constant"]
    sizes = [share for share in BUDGETS if (found["budget"] == f"{100 * share:.6g} %").any()]
    lines = ["| | " + " | ".join(BUDGETS[share] for share in sizes) + " |", "|---|" + "--:|" * len(sizes)]
    for backbone, own in found.group_by("backbone", maintain_order=True):
        for name in names:
            cells = []
            for share in sizes:
                at = own.filter(compressor=name, budget=f"{100 * share:.6g} %").to_dicts()
                said = "".join("{delta:+.4f} [{delta_lo:+.4f}, {delta_hi:+.4f}]".format(**one) for one in at)
                cells.append(f"**{said}**" if at and at[0]["lossless"] else said)
            lines.append(f"| {NAMES[str(backbone[0])]}, {CODES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


#: the rows of what fitted_wide has, by name
WIDE = {
    "fit_keys(probes=256, rounds=30, which=top) + mxint": "fit_keys",
    "kmeans + mxint": "kmeans",
    "h2o + mxint": "h2o",
    "recent + mxint": "recent",
}


def wide() -> dict[str, object]:
    """What fitted slots and others keep behind wider backbones, by bytes; means over the trainings."""
    folder = ROOT / "results" / "fitted_wide"
    found = pooled(aggregate(rows := load_results(folder)), Users(rows, folder))
    own = {name: found.filter(backbone=name) for name in NAMES if name in found["backbone"]}
    names = list(own)
    full = {n: own[n].row(by_predicate=pl.col("method") == "full", named=True) for n in names}
    constant = {n: own[n].row(by_predicate=pl.col("method") == "fit_constant", named=True) for n in names}

    def cells(row: dict | None) -> list[str]:
        delta = ("delta_ndcg@10", "delta_ndcg@10_lo", "delta_ndcg@10_hi")
        if row is None:
            return ["", ""]
        return [f"{row['overlap@10']:.3f}", "{:+.4f} [{:+.4f}, {:+.4f}]".format(*map(row.get, delta))]

    lines = ["| | bytes | " + " | ".join(f"{NAMES[n]} | NDCG@10, full {full[n]['ndcg@10']:.4f}" for n in names) + " |"]
    lines.append("|---|--:|" + "--:|--:|" * len(names))
    for budget, share in BUDGETS.items():
        for method, label in WIDE.items():
            known = {n: next(at(own[n], budget).filter(compressor=method).iter_rows(named=True), None) for n in names}
            if any(known.values()):
                lines.append(f"| {label} | {share} | " + " | ".join(x for n in names for x in cells(known[n])) + " |")
    for method, label in (("fit_constant", "fit_constant: no query"), ("none", "none: no history")):
        known = {n: own[n].row(by_predicate=pl.col("method") == method, named=True) for n in names}
        share = f"1/{min(x['smaller_x'] for x in known.values()):.0f}" if method != "none" else "0"
        lines.append(f"| {label} | {share} | " + " | ".join(x for n in names for x in cells(known[n])) + " |")
    surely = [NAMES[n] for n in names if constant[n]["delta_ndcg@10_hi"] < 0]
    before = aggregate(load_results(ROOT / "results" / "fitted"))
    small = {(r["backbone"], r["method"]): r["ndcg@10"] for r in before.iter_rows(named=True)}
    costs = "; ".join(
        f"{NAMES[n]} {-constant[n]['delta_ndcg@10']:.4f} of {full[n]['ndcg@10']:.4f} "
        f"({small[n, 'full'] - small[n, 'fit_constant']:.4f} of {small[n, 'full']:.4f})"
        for n in names
    )
    trained = [f"{NAMES[n]} {full[n]['seeds']} training{'s' * (full[n]['seeds'] > 1)}" for n in names]
    return {
        "wide": "\n".join(lines),
        "wide_kb": f"{min(x['bytes_mean'] for x in full.values()) / 1e3:.0f}",
        "wide_users": int(full[names[0]]["n_users"]),
        "wide_seeds": ", ".join(trained),
        "wide_said": textwrap.fill(
            f"A constant is surely below the full state behind {' and '.join(surely) or 'neither'}. It costs (and "
            f"behind the smaller one of `results/fitted/`, all 6,040 users): {costs}.",
            118,
        ),
    }


def ceiling() -> str:
    """Of fits to the very items that read, at 1/64."""
    found = pl.read_csv(ROOT / "results" / "fit_ablations" / "leaderboard.csv", infer_schema_length=None)
    best = found.filter(pl.col("compressor").str.contains("candidates") & (pl.col("budget") == "1.5625 %"))[
        "overlap@10"
    ]
    return f"{best.min():.1%} and {best.max():.1%}"


def page() -> str:
    found = rows()
    budget = 0.03125
    fitted, recent = (overlap(found, method, budget).values() for method in (FITTED, "recent + mxint"))
    above = dict(found.filter(pl.col("compressor") == "full").select("backbone", "query_headroom").iter_rows())
    some = [NAMES[name] for name in NAMES if above.get(name)]
    return (
        (ROOT / "docs" / "fitted.txt")
        .read_text()
        .format(
            best_budget=BUDGETS[budget],
            low=f"{min(fitted):.0%}",
            high=f"{max(fitted):.0%}",
            recent_low=f"{min(recent):.0%}",
            recent_high=f"{max(recent):.0%}",
            overlap=table(found),
            spread=spread(),
            over=over(found),
            made=committed("fitted.md"),
            read=committed("fitted.md", 1),
            parts=committed("fitted.md", 2),
            ablations=ablations(),
            ceiling=ceiling(),
            where=committed("where.md"),
            later=committed("later.md"),
            choices=committed("choices.md"),
            why=committed("why.md"),
            **horizon(),
            **wide(),
            codes=codes(),
            costs=costs(),
            headroom=f"only {' and '.join(some)} shows" if len(some) == 1 else f"{len(some)} show",
        )
    )


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == text else "docs/fitted.md is stale: python docs/fitted.py")
    PAGE.write_text(text)
