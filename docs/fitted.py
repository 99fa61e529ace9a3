"""Writes docs/fitted.md from committed rows (fitted_small, _codes, _wide, fit_ablations, horizon) and benchmarks.

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

TEXT = """# States fitted to what the catalogue asks

*Written by `python docs/fitted.py` from `results/fitted_small/` (`malloc-bench run fitted_small`: ML-100K, 943
users, three seeds), `results/benchmarks/why.md` and `results/benchmarks/fitted.md`. Of larger data
[results.md](results.md) has MovieLens-1M, behind SASRec and HSTU (`results/fitted/`, `results/methods/`) and in part
LSRM (`results/lsrm/`). Not run: fitted states behind MARM and Climber on more than ML-100K, and behind any backbone
on more than MovieLens-1M's million events.*

*Overlap@10, at floor, headroom, budget 1/k: [what the words mean](reading.md#words).*

## What

A recommender keeps, of each user, keys and values of the history in every layer. They are only ever read by
*catalogue items*: the newest event in retrieval, candidates in ranking. That set is finite and known
beforehand, so a state can be **fitted**: keep few slots and solve for what they weigh and hold, so that items
read from them what they would read from the whole history. At {best_budget} of the bytes, with 4 bits a number,
such a state keeps {low} to {high} of the top-10 lists of five backbones; keeping the newest events keeps
{recent_low} to {recent_high}.

## How

M items, *probes*, are sent through the stack over the full state, at the position and time of the next request.
Of a layer and head they give A, their weights on the n events (with softmax the token's own share s beside it),
and what they get, T = A V.

1. **Choose** k events by orthogonal matching pursuit: each next one is the column of A that leaves least of T
   once it stands beside those taken.
2. **Weigh** them, with softmax: masses m >= 0 with A_S m as near to A 1 as can be. SiLU has no normaliser and
   no masses.
3. **Fill** them: values by ridge regression of T on the re-normalised weights; where the token's own share
   moved from s to s', T + (s - s') v_own is asked for. Rows count by 1 over the deviation of the mixture where
   a layer norm follows it.
4. **Guard**: every fifth probe is held out; a head whose fit answers those worse than the chosen slots as they
   were is left as it was.
5. **Write** it in few bits. Masses and values are solved for again for keys as they were rounded, and values
   are rounded a few at a time, heaviest first, those that are left making up for what rounding took (as GPTQ
   does for weights); where each vector is written by itself, as by codebooks, none is written twice.

`moments` asks for no pursuit: beside the slots of any eviction rule it keeps of all other events one answer to
first order in the query: their weight, mean key, mean value, and a matrix of rank r from the query to the
answer (MomentKV), about the *mean query of probes*, not about zero. `fit_constant` is what is left without any
query: one vector a layer and head.

## Figures

Overlap@10 with the full state's lists, encoder `mxint` (4 bits a number, two bytes a vector), means of three
trainings; "larger": the smallest state that the method makes is, by a ninth or more;
{over}. Standard deviations over the trainings:
{spread}.

{overlap}

Behind HSTU and Climber `mxint` wrote times of slots in eight bytes when these rows and the ablations below were
made, in four today: a little more fits now.

The same of `fit_omp` without an encoder, and its keys in 3 bits: see `results/fitted_small/leaderboard.md`. The
curves of each backbone: `results/fitted_small/figures/`.

![Overlap and NDCG by bytes, HSTU](../results/fitted_small/figures/pareto-ml-100k-retrieval-leave_one_out-hstu.png)

What making it costs, in prefills:

{made}

What reading it costs beyond reading an empty state, as a share of what the full state costs beyond it (FLOPs: of
those of rebuilding the state from raw ids and reading it):

{read}

This is of a state that is read again: its first read also sees how each field of a layer is written. `fit_constant`, a
memory without slots, is read by plain products, which no kernel takes, and costs more than few slots do.

What the bytes hold (fit_omp + mxint):

{parts}

### What a fit depends on

Overlap@10 of `fit_omp` + `mxint` (`malloc-bench run fit_ablations`, ML-100K, one seed). Probes drawn by training
events, where nothing else is said; with `candidates` the very items that will read are the probes, which nobody
can have: a ceiling.

{ablations}

More than 64 to 128 probes add little, ridge hardly matters (but with many slots behind HSTU, where less is better:
[results.md](results.md)), and which probes matters most where slots are fewest: those that the model ranks first for
the user are as good as any (to .001) or better. At the ceiling, one known reader to a user, the same bytes keep
{ceiling} of the lists: it is not the rounding that is lost at 1/64, but what other readers ask.

### In which bits, and where

`fit_keys` chooses as above and then moves the keys by gradient; 256 top items as probes. `gain_shape` writes a
vector as a byte of size and twelve codes into codebooks that training users share, 13 bytes for 50 numbers where
`mxint` takes 27: fewer bits for more slots. `auto` takes curves of what each layer loses with how many bytes, of
either encoder, from training users, and divides the bytes by them. Overlap@10 (`malloc-bench run fitted_codes`, in
parts that [results.md](results.md) names):

{codes}

These rows of `auto` chose by probes less likely than readers are, and these of `gain_shape` coded some values twice;
what both keep since then: [results.md](results.md), *Since then two faults were found*.

What it costs in accuracy, on MovieLens-1M: NDCG@10 less that of the full state, each user's mean over the trainings,
with intervals over users; **bold** where less than 1 % of it is lost, surely (`malloc-bench tables results/fitted_codes
--table significance`: one-sided, at 2.5 %, Holm-corrected for all methods and bytes of a backbone).

{costs}

### Behind stronger backbones

The backbones above are small. Behind the strongest SASRec and HSTU of `suites/reference.yaml`, four layers of 128
numbers and two heads, {wide_kb} KB a user (MovieLens-1M, {wide_users:,} users; `malloc-bench run fitted_wide`,
`auto` left out; encoder `mxint`; {wide_seeds}):
overlap@10, and NDCG@10 less that of the full state with its interval (of each user's mean over the trainings).

{wide}

{wide_said}

### For whom it fails

Overlap@10 at 1/32 of the bytes, seed 0; users in thirds by history (fewest events first), by training events of the
item that reads and of the one that came next (rarest first); then those whose reader is one of 128 probes drawn, and
those whose is not; and the percentage of users with less than 7 of 10 kept (`examples/where.py`; HSTU and Climber, here
and under *Why it works*, of other weights than above: the same suite and seed on a CPU that sums in another order):

{where}

A fit serves readers that were no probes as well as those that were, and rare ones hardly worse than popular ones.

### Items that come later

A tenth of the items, the newest or the rarest, are kept from the probes (128; `fit_omp` + `mxint`, 1/32 of the bytes,
seed 0, 256 users; `examples/later.py`). Overlap@10 where items that were no probes read, and of the ten best of as many
candidates, each of the other items and of the tenth:

{later}

As candidates such items are found as well as others. As readers they ask for what probes drawn by their events never
asked; probes drawn of all items alike (`which: even`) make up for a quarter to three fifths of it (behind LSRM for
all), though none of the tenth is among them.

### In ranking

Where every candidate reads, reading depends on who reads more than above, and `auto` is ahead from 1/8 to 1/128:
[results.md](results.md), *Fitted states in ranking*.

### One plan for all

`auto` divides bytes over layers, methods and bits by what training users lose, one plan for all: a budget caps each
user, so that no bytes can move between them. Would users do better with plans of their own, of equal bytes? `bits`:
fewer slots in more or more in fewer; `layers`: how much of the bytes the lower layer has (overlap@10, seed 0;
`examples/choices.py`). `kept` is the best single plan; then what is gained on it where each third of users by length or
by rank of A gets the plan that was best for that third among others, where each user gets the one that 32 probes held
out lose least by, for which all must be made, and, luck included, by the outcome:

{choices}

Neither length nor rank tells: what they gain is noise, of either sign. Probes held out tell a little where bytes are
fewest, for the price of all plans. So `auto` stays one plan. What does help is the same for all: most of the bytes to
the lower layer.

## Why it works, and what that says of the backbones

{why}

A layer reads little more than one vector and one or two directions: the rank of its weights is small, a
constant explains most of what a held-out item gets, one linear direction most of the rest, and the lowest layer
of a stack reads most by query. So the finding is about backbones and data as much as about the method: on these
data, of five backbones {headroom} reading by query to be seen in NDCG@10 above that constant.

## How long it lasts

The adversary is a generated world in which each answer hangs on one old event, another one at each next position
(`malloc-bench run horizon`, HSTU, three seeds; the full state's HR@10 is {horizon_full}, {horizon_best} is possible).
A state is left as it was made while events come. Its probes stood at the positions of the next h requests
(`horizon`); overlap@10 at the last of these requests (of 51 at the 21st: after 50 events answers hang on what came
since, which every state has), and in brackets at the first one looked at beyond:

{horizon}

(Events of this world come again, and its suite ranks them too; what is told of later requests here left them out, as
drift did when these rows were made. It counts lists as its suite does now.)

At one known position every answer is the same for all who ask: a constant keeps {horizon_constant}, and
{horizon_constant_later} one event later; no history {horizon_none}, the newest {horizon_slots} slots {horizon_newest}.
With slots enough a fit holds to the end of its horizon; at the first position looked at beyond it, one event later
for the first row, much of it is lost. The horizon costs slots: of those tried it takes {enough} requests to keep .8.

## Limits

- A fit knows the positions it was made for. Where attention hangs on distance, probes must stand at those of all
  later requests that the state should serve (above).
- Items that come to the catalogue later were no probes, and read worse where probes are drawn by events (above);
  `which: even` serves them better. All that were looked at had been in training; of vectors that nobody has trained
  nothing is known.
- Fitting costs as long as one prefill or longer for 200 events, a fraction of one for 2,000 (the table above). A state
  that is read once is not worth it.
- 943 users of one data set are few. Compare `fit_constant` in your own table before you believe
  any of it.

## Try it

```
malloc-bench run fitted_small                     # these rows, two hours; --only seed=0 38 minutes
python examples/fitted.py                         # the same on plain tensors
python examples/why.py                            # the last table, of the backbones just trained
python examples/where.py runs/fitted_small --budget 1/32
python examples/later.py                          # items that were kept from the fit
python examples/choices.py                        # plans of users' own, half an hour
```
"""


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
                    f"| {data}, {NAMES[str(backbone)]} | {at['seeds_total'].min()} | {share} | "
                    + " | ".join(cells)
                    + " |"
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
    return TEXT.format(
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


if __name__ == "__main__":
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.exists() and PAGE.read_text() == text else "docs/fitted.md is stale: python docs/fitted.py")
    PAGE.write_text(text)
