"""The page of a run: one HTML file that needs no network, from its results only."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from string import Template
from typing import Any

import polars as pl

from malloc_bench.report.page.content import content
from malloc_bench.report.recommend import best_per_budget
from malloc_bench.report.style import COLOURS
from malloc_bench.report.users import Users

_HERE = Path(__file__).parent


def to_html(frame: pl.DataFrame, folder: str | Path, best: pl.DataFrame | None = None) -> str:
    """The page of a results frame and the run folder that it is of. The same rows make the same bytes.

    best: of `best_per_budget`, where it is known already.
    """
    run = Path(folder).resolve().name.encode(errors="replace").decode()
    best = best_per_budget(frame, Users(frame, folder)) if best is None else best
    shown = content(frame, best) | {"run": run, "colours": COLOURS}
    parts = {
        "vega": f'(() => {{"use strict"; {_file("vendor/vega.bundle.js")}}})()',  # its names would clash with ours
        "tabulator": _file("vendor/tabulator.min.js"),
        "app": "".join(map(_file, ("rows.js", "plots.js", "app.js"))),
    }
    hashes = " ".join(f"'sha256-{_hash(script)}'" for script in parts.values())
    return Template(_file("template.html")).substitute(
        parts,
        # text that slips into the page as markup would still run nothing and reach nobody
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:",
        title=_escaped(run),
        css=_file("vendor/tabulator.min.css") + _file("style.css"),
        licences="\n\n".join(_escaped(_file(f"vendor/LICENSE.{name}")) for name in ("vega", "tabulator")),
        data=_json(shown),
        specs=_json(json.loads(_file("charts.json"))),
    )


def _file(path: str) -> str:
    return (_HERE / path).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
