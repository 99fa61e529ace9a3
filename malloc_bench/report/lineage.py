"""Which rows belong together: those of one protocol on the same data, read from the same trained weights."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from malloc_bench.results import canonical_json, differing

FREE = ("compressor", "budget", "seed", "items")  # what rows of one table may differ in
COMMON = ("data", "task", "split", "evaluation")  # what backbones that stand side by side must have in common
APART = "apart"


def apart(frame: pl.DataFrame, group: Sequence[str], weights: bool = True) -> pl.DataFrame:
    """The results frame with a column `apart`: what tells a row from others under the same names in `group`, or null.

    That is all of a cell but its method, budget and seed: `training.epochs=1`, `data.label.at_least=4`; and of rows
    that agree in it, `weights=1a2b3c4d` where their seed was trained twice: the weights of most rows, of the newest
    among equals, need no such word. Data and task are also told apart between backbones. group: data set, task and
    split first.
    """
    if APART in frame.columns:
        return frame
    rows = list(frame.select(*group, "seed", "cell", "hashes", "created_at").iter_rows(named=True))
    protocols = [protocol(row) for row in rows]
    whole = _differences(rows, protocols, group)
    common = _differences(rows, [_common(each) for each in protocols], group[:3])
    named = [_said(own, one | other) for own, one, other in zip(protocols, whole, common)]
    made = [json.loads(row["hashes"] or "{}").get("reference") if weights else None for row in rows]
    trained = [(*(row[name] for name in group), word, row["seed"]) for row, word in zip(rows, named)]
    counts = Counter((key, each) for key, each in zip(trained, made) if each)
    last: dict[Any, str] = {}
    for row, key, each in zip(rows, trained, made):
        last[key, each] = max(last.get((key, each), ""), row["created_at"] or "")
    main: dict[Any, str] = {}
    for key, each in sorted(counts, key=lambda pair: (counts[pair], last[pair])):
        main[key] = each  # the last one stays
    others = [f"weights={each[:8]}" if each and each != main[key] else "" for key, each in zip(trained, made)]
    said = [", ".join(filter(None, pair)) or None for pair in zip(named, others)]
    return frame.with_columns(pl.Series(APART, said, pl.String))


def protocol(row: Mapping[str, Any]) -> dict[str, Any]:
    """All of a row's cell, nested values as JSON text, but its method, budget and seed."""
    cell = {key: value for key, value in json.loads(row["cell"] or "{}").items() if key not in FREE}
    if cell and "data" not in cell:  # of the first schema version
        cell["data"] = {"hash": json.loads(row["hashes"] or "{}").get("data")}
    return cell


def _common(protocol: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: protocol[key] for key in COMMON if key in protocol}
    if isinstance(data := found.get("data"), Mapping):  # categories are in it where a backbone uses them
        found["data"] = {key: value for key, value in data.items() if key != "categories"}
    return found


def _differences(
    rows: Sequence[Mapping[str, Any]], protocols: Sequence[Mapping[str, Any]], group: Sequence[str]
) -> list[frozenset[str]]:
    """Of each row the paths of keys in which protocols of its group differ."""
    keys = [tuple(row[name] for name in group) for row in rows]
    lines: dict[Any, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for key, each in zip(keys, protocols):
        lines[key][canonical_json(each)] = each
    paths = {}
    for key, (first, *others) in ((key, each.values()) for key, each in lines.items()):
        paths[key] = frozenset(path for other in others for path in differing(first, other))
    return [paths[key] for key in keys]


def _said(protocol: Mapping[str, Any], paths: frozenset[str]) -> str:
    """Of what tells it from others that which it has: an option that is left at its default is nowhere recorded."""
    found = ((path, _at(protocol, path)) for path in sorted(paths))
    return ", ".join(f"{path}={text}" for path, text in found if text is not None)


def _at(protocol: Mapping[str, Any], path: str) -> str | None:
    value: Any = protocol
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, str):
        return value[:8] if value and len(value) == 64 else value
    return json.dumps(value, sort_keys=True)
