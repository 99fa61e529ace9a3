"""The charts of a run's page, drawn by Altair; `python -m malloc_bench.report.page.charts` writes what the page takes.

That is `charts.json`, Vega-Lite specifications without data, and `vendor/vega.bundle.js`, the code that draws them: to
make both takes longer than all else in a report. The page fills in rows, `$ink` and `$paper` (the colours of text and
ground), `$x` and `$y` (the titles of axes), `$families` and `$colours`.
"""
# mypy: disable-error-code="arg-type, return-value, call-arg"
# (Altair declares narrower types than it takes)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt

from malloc_bench.report.style import FLOOR

INK, PAPER = "$ink", "$paper"
#: what is written at a mark of an axis
BYTES = (
    "datum.value >= 1e9 ? format(datum.value / 1e9, '~g') + ' GB' : datum.value >= 1e6 ? "
    "format(datum.value / 1e6, '~g') + ' MB' : datum.value >= 1e3 ? format(datum.value / 1e3, '~g') + ' KB' : "
    "format(datum.value, '~g') + ' B'"
)
PLAIN = "format(datum.value, '~g')"
FLOPS = "format(datum.value, '~s')"
SHARE = "format(datum.value * 100, '~g') + ' %'"

MOUSE = "[mousedown, window:mouseup] > window:mousemove!"  # a finger scrolls
PICKED = "indexof(picked, datum.id) >= 0"
TIP = ("method", "budget", "fidelity", "accuracy", "interval", "KB a user", "read")
STAR = "M0,-1L.225,-.309L.951,-.309L.363,.118L.588,.809L0,.382L-.588,.809L-.363,.118L-.951,-.309L-.225,-.309Z"
COLOUR = alt.Color(
    "family:N",
    scale=alt.Scale(domain=["$families"], range=["$colours"]),
    legend=None,  # the page has one for all charts
)


def charts() -> dict[str, dict[str, Any]]:
    """Specifications by name."""
    made = {
        "bytes": scatter(BYTES),
        "cost": scatter(PLAIN),
        "flops": scatter(FLOPS),
        "curves": curves(),
        "slices": slices(),
        "parts": parts(),
    }
    whole = {name: chart.properties(width="container", height=300).to_dict() for name, chart in made.items()}
    return {name: {k: v for k, v in spec.items() if k not in ("$schema", "config")} for name, spec in whole.items()}


def scatter(label: str) -> alt.LayerChart:
    """Points of rows with intervals, the front of what keeps a state, and the levels of floors whatever the budget."""
    rows = _rows()
    place = {"x": _x(label), "y": _y()}
    points = (
        _point(rows, 60)
        .encode(**place, color=COLOUR, opacity=_opacity(1, 0.8, 0.9), tooltip=_tip())
        .transform_filter("datum.kind != 'full'")
        .add_params(_brush(), *_shared())
    )
    full = (
        rows.mark_point(shape=STAR, filled=True, size=260, color=INK, stroke=PAPER, strokeWidth=0.8, aria=False)
        .encode(**place, tooltip=_tip())
        .transform_filter("datum.kind == 'full'")
    )
    front = _rows("front").mark_line(interpolate="step-after", color=INK, strokeWidth=1.2, aria=False)
    return alt.layer(*_levels(), front.encode(**place, order="x:Q"), _bars(label, 0.16), points, full)


def curves() -> alt.LayerChart:
    """A line a method through its budgets, with the interval of what it loses."""
    place = {"x": _x(SHARE), "y": _y(), "color": COLOUR}
    shown = alt.value(alt.expr("indexof(lines, datum.line) >= 0 ? 1 : few && !length(lines) ? 0.8 : 0.15"))
    lines = _rows().mark_line(strokeWidth=1.6, aria=False).encode(**place, detail="line:N", order="x:Q", opacity=shown)
    points = (
        _point(_rows(), 40)
        .encode(**place, opacity=_opacity(1, 0.55, 0.9), tooltip=_tip())
        .add_params(_brush(), *_shared(), alt.param(name="lines", value=[]))
    )
    return alt.layer(*_levels(), _bars(SHARE, 0.08), lines, points)


def slices() -> alt.LayerChart:
    """A line a row over the lengths of histories."""
    axis = alt.Axis(labelAngle=0, labelExpr="split(datum.label, '|')", grid=False)
    base = _rows().encode(
        x=alt.X("slice:N", title="$x", sort=alt.SortField("order"), axis=axis),
        y=_y(),
        color=COLOUR,
        detail="id:Q",
        tooltip=[*_tip(), alt.Tooltip("users:Q", format=",")],
    )
    named = alt.Shape("label:N", title=None, legend=alt.Legend(orient="bottom", columns=1, symbolFillColor=FLOOR))
    points = base.mark_point(filled=True, size=80, stroke=PAPER, strokeWidth=0.6, aria=False).encode(shape=named)
    return alt.layer(base.mark_line(strokeWidth=1.8, aria=False), points.add_params(*_shared()))


def parts() -> alt.Chart:
    """A bar a row: what its bytes hold, in shares of them."""
    colour = alt.Color("part:N", scale=alt.Scale(domain=["$parts"], range=["$tints"]), legend=None)
    axis = alt.Axis(labelLimit=190, labelExpr="split(datum.label, '|')", domain=False, ticks=False)
    tip = [
        *(alt.Tooltip(f"{name}:N") for name in ("method", "budget", "part", "share")),
        alt.Tooltip("bytes:Q", format=",.1f"),
    ]
    bars = _rows().mark_bar(stroke=PAPER, strokeWidth=0.5, aria=False)
    return bars.encode(
        x=alt.X("bytes:Q", title="$x", stack="normalize", axis=alt.Axis(format="%", tickCount=5)),
        y=alt.Y("label:N", title=None, sort=alt.SortField("order"), scale=alt.Scale(paddingInner=0.3), axis=axis),
        color=colour,
        order="at:Q",
        tooltip=tip,
    ).add_params(*_shared())


# ---- what they share


def _rows(name: str = "rows") -> alt.Chart:
    return alt.Chart(alt.NamedData(name))


def _x(label: str) -> alt.X:
    axis = alt.Axis(labelExpr=label, tickCount=6, labelOverlap="greedy", labelSeparation=8, grid=False)
    return alt.X("x:Q", title="$x", scale=alt.Scale(type="log", nice=False, padding=14), axis=axis)


def _y() -> alt.Y:
    return alt.Y("y:Q", title="$y", scale=alt.Scale(zero=False, padding=10), axis=alt.Axis(tickCount=6))


def _point(chart: alt.Chart, size: int) -> alt.Chart:
    mark = chart.mark_point(filled=True, stroke=PAPER, strokeWidth=0.6, aria=False)
    return mark.encode(size=alt.value(alt.expr(f"{PICKED} ? {3 * size} : {size}")))


def _bars(label: str, others: float) -> alt.Chart:
    """The interval of each row; faint where many overlap."""
    mark = _rows().mark_rule(strokeWidth=1.2, aria=False).transform_filter("isValid(datum.lo)")
    place = {"x": _x(label), "y": alt.Y("lo:Q", title="$y"), "y2": alt.Y2("hi:Q", title="$y")}
    return mark.encode(**place, color=COLOUR, opacity=_opacity(1, others, 0.5))


def _levels() -> tuple[alt.Chart, alt.Chart]:
    """Dashed lines with their names, of what holds whatever the budget."""
    levels = _rows("levels").encode(y=_y())
    named = levels.mark_text(align="right", baseline="bottom", dx=-4, dy=-2, color=FLOOR, fontSize=11, aria=False)
    rule = levels.mark_rule(color=FLOOR, strokeDash=[5, 3], strokeWidth=1.3, aria=False)
    return rule, named.encode(x=alt.value(alt.expr("width")), text="name:N")


def _opacity(picked: float, others: float, few: float) -> Any:
    """Of rows that are picked in any chart or the table; of all while none is; faint while others are picked."""
    return alt.value(alt.expr(f"{PICKED} ? {picked} : length(picked) ? {others / 2} : few ? {few} : {others}"))


def _brush() -> alt.Parameter:
    mark = alt.BrushConfig(fill=FLOOR, fillOpacity=0.15, stroke=FLOOR)
    return alt.selection_interval(name="brush", encodings=["x", "y"], on=MOUSE, translate=False, zoom=False, mark=mark)


def _shared() -> list[alt.Parameter]:
    """What the page tells every chart: the rows that are picked anywhere, and whether there are few."""
    return [alt.param(name="picked", value=[]), alt.param(name="few", value=False)]


def _tip() -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:N") for name in TIP]


if __name__ == "__main__":
    import vl_convert

    here = Path(__file__).parent
    (here / "charts.json").write_text(json.dumps(charts(), indent=1, sort_keys=True) + "\n")
    (here / "vendor" / "vega.bundle.js").write_text(vl_convert.javascript_bundle())
