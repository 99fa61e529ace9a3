"""What a fitted law says: a table, a line a group, and a figure of curves and what they leave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from matplotlib import colormaps

from malloc_bench.report.laws.equal import COLUMNS as EQUAL
from malloc_bench.report.laws.equal import equal
from malloc_bench.report.laws.forms import LINE, PLANE
from malloc_bench.report.laws.judged import NEEDED, Judged, Points
from malloc_bench.report.laws.laws import LOSSES, Found, law
from malloc_bench.report.lines import human_ticks, sheets
from malloc_bench.report.render import Column, markdown, number, words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS: tuple[Column, ...] = (
    words("group", "group"),
    words("form", "form"),
    words("theta", "parameters [95 %]"),
    number("points", "points", ".0f"),
    number("error", "error held out", ".4f"),
    number("same", "× as the last", ".2f"),
    number("line", "× a log line", ".2f"),
    number("won", "bootstraps won", ".2f"),
    words("verdict", "law"),
)
_NUMBERS = ("error", "same", "line", "won")
_NOTHING = 1e-9  # is rounding
_COLOURS = colormaps["turbo"]
_DRAWN = 12  # groups in a figure


def table(found: Sequence[Found]) -> pl.DataFrame:
    """A row for each group and form. error: mean |log(predicted / seen)| of what was held out; same, line: what it is
    of that of the two plain guesses."""
    rows = []
    for group in found:
        for form in group.forms:
            over = [form.error / max(each, 1e-12) for each in (form.same, form.line)]
            rows.append({
                "group": group.group, "form": f"{form.form.name}: {form.form.formula}", "theta": _parameters(form),
                "points": None if group.points is None else len(group.points.y), "error": form.error, "same": over[0],
                "line": over[1], "won": form.won, "verdict": _verdict(group, form),
            })  # fmt: skip
        if not group.forms:
            rows.append({"group": group.group, "form": "none", "verdict": group.why})
    schema: dict[str, type[pl.DataType]] = dict.fromkeys(("group", "form", "theta", "verdict"), pl.String)
    return pl.DataFrame(rows, schema=schema | {"points": pl.Int64} | dict.fromkeys(_NUMBERS, pl.Float64))


def _parameters(form: Judged) -> str:
    parts = []
    for i, (name, value) in enumerate(zip(form.form.names, form.theta)):
        ends = [value, *form.intervals[i]] if len(form.intervals) else [value]
        if name.startswith("log "):
            name, ends = name[4:], [float(np.exp(min(each, 700.0))) for each in ends]
        said = [f"{0 if abs(each) < _NOTHING else each:.3g}" for each in ends]
        parts.append(f"{name} {said[0]}" + (f" [{said[1]}, {said[2]}]" if len(said) > 1 else ""))
    return ", ".join(parts)


def _verdict(group: Found, form: Judged) -> str:
    if form is not group.forms[0]:
        return ""
    if form.holds:
        return "predicts what was held out"
    if not np.isfinite(form.won):
        return "not tested: no bootstraps"
    return (
        "none: a line in log x is as good" if form.form in (LINE, PLANE) else "none: does not beat both plain guesses"
    )


def told(name: str, found: Sequence[Found]) -> str:
    """The law of a run as Markdown."""
    what = law(name)
    metrics = ", ".join(dict.fromkeys(each.metric if each.metric in LOSSES else f"1 - {each.metric}" for each in found))
    best = [each.forms[0] for each in found if each.forms]
    forms = Counter(each.form.name for each in best)
    said = [f"# The law `{name}`: {metrics} over {' and '.join(what.x)}", "", f"{what.paper}.", ""]
    said += [
        "A form is fitted to what is not held out, by Huber's loss of log residuals, from many starts; how far off it "
        "is at the largest, which are held out, stands beside two plain guesses: as at the largest that was fitted, "
        f"and a line in log x. A law is claimed where it beats both in {NEEDED:.0%} of the bootstraps.",
        "",
        f"{len(best)} groups fitted; least error held out: "
        + (", ".join(f"{form} {count}" for form, count in forms.most_common()) or "none")
        + f"; a law in {sum(each.holds for each in best)}.",
        "",
        markdown(table(found), COLUMNS),
    ]
    if name == "flops":
        said += [
            "", "## At equal FLOPs", "",
            f"{metrics.removeprefix('1 - ')} within each doubling of FLOPs of a request from scratch over the longest "
            "history, over all shapes that were run there. The best shape is picked by the figure itself, among as "
            "many as `shapes` says, which flatters who has more of them; the mean does not.",
            "", markdown(equal(found), EQUAL),
        ]  # fmt: skip
    return "\n".join(said)


def drawn(name: str, found: Sequence[Found]) -> Figure | None:
    """Above what was seen and the best form, what was held out hollow; below, residuals. The first dozen groups."""
    some = [each for each in found if each.forms and each.points is not None][:_DRAWN]
    if not some:
        return None
    figure, (upper, lower), font = sheets(2, 7.0, 3.4, f"The law {name}: {_alike(some)}")
    for i, (group, said) in enumerate(zip(some, _apart(some))):
        points, form, colour = group.points, group.forms[0], _COLOURS(i / _DRAWN)
        assert isinstance(points, Points)
        x = points.x[:, 0]
        residual = np.log(np.maximum(form.form.predict(form.theta, points.x), 1e-9) / points.y)
        for held, face in ((False, colour), (True, "none")):
            at = points.held == held
            upper.plot(x[at], points.y[at], "o", ms=3, mec=colour, mfc=face)
            lower.plot(x[at], residual[at], "o", ms=3, mec=colour, mfc=face)
        if points.x.shape[1] == 1:
            line = np.geomspace(x.min(), x.max(), 100)
            upper.plot(line, form.form.predict(form.theta, line[:, None]), "-", lw=0.9, color=colour, label=said)
        else:
            upper.plot([], [], "o", ms=3, color=colour, label=said)
    grows = next(iter(law(name).x))
    metric = some[0].metric if some[0].metric in LOSSES else f"1 - {some[0].metric}"
    lower.axhline(0, color="#999999", lw=0.6)
    ends = [end(group.points.x[:, 0].tolist()) for end in (min, max) for group in some if group.points is not None]
    upper.set_yscale("log")
    upper.tick_params(which="minor", labelsize=font - 0.5)
    if upper.dataLim.y1 < 10 * upper.dataLim.y0:  # there is no whole power to read others by
        upper.yaxis.set_minor_formatter("{x:.3g}")
    for each, named in ((upper, metric), (lower, "log(fitted / seen)")):
        each.set_xscale("log")
        human_ticks(each.xaxis, min(ends), max(ends), None)
        each.set_xlabel(grows)
        each.set_ylabel(named)
    figure.legend(
        *upper.get_legend_handles_labels(), loc="outside lower left", ncols=2, fontsize=font - 1, frameon=False
    )
    return figure


def _alike(groups: Sequence[Found]) -> str:
    """What all groups have in common."""
    return " · ".join(
        str(v) for k, v in groups[0].columns.items() if k != "family" and all(v == each.columns[k] for each in groups)
    )


def _apart(groups: Sequence[Found]) -> list[str]:
    """What tells each group from the others; a backbone by its bare name where no two have the same."""
    keys = [key for key, value in groups[0].columns.items() if any(value != each.columns[key] for each in groups)]
    bare = {str(each.columns.get("backbone")).split("(")[0] for each in groups}
    short = len(bare) == len({each.columns.get("backbone") for each in groups})

    def said(group: Found) -> str:
        words = {key: str(group.columns[key]) for key in keys if key != "family"}
        if short and "backbone" in words:
            words["backbone"] = words["backbone"].split("(")[0]
        return " · ".join(words.values()) or group.group

    return [said(group) for group in groups]
