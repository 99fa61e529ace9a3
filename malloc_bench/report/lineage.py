"""Which rows belong together: those of one protocol on the same data, read from the same trained weights."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from malloc_bench.results import canonical_json, differing

FREE = ("compressor", "budget", "seed", "items")  # what rows of one table may differ in
APART = "apart"


def apart(frame: pl.DataFrame, group: Sequence[str]) -> pl.DataFrame:
    """The results frame with a column `apart`: what tells a row from others under the same names in `group`, or null.

    That is all of a cell but its method, budget and seed: `training.epochs=1`, `data.label.at_least=4`; and of rows
    that agree in it, `weights=1a2b3c4d` where their seed was trained twice: the weights of most rows, of the newest
    among equals, need no such word.
    """
    if APART in frame.columns:
        return frame
    rows = list(frame.select(*group, "seed", "cell", "hashes", "created_at").iter_rows(named=True))
    protocols = [_protocol(row) for row in rows]
    lines: dict[Any, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for row, protocol in zip(rows, protocols):
        lines[tuple(row[name] for name in group)][canonical_json(protocol)] = protocol
    words = {key: _words(each) for key, each in lines.items()}
    named = [words[tuple(row[name] for name in group)][canonical_json(own)] for row, own in zip(rows, protocols)]
    weights = [json.loads(row["hashes"] or "{}").get("reference") for row in rows]
    trained = [(*(row[name] for name in group), word, row["seed"]) for row, word in zip(rows, named)]
    counts = Counter((key, each) for key, each in zip(trained, weights) if each)
    last: dict[Any, str] = {}
    for row, key, each in zip(rows, trained, weights):
        last[key, each] = max(last.get((key, each), ""), row["created_at"] or "")
    main: dict[Any, str] = {}
    for key, each in sorted(counts, key=lambda pair: (counts[pair], last[pair])):
        main[key] = each  # the last one stays
    others = [f"weights={each[:8]}" if each and each != main[key] else "" for key, each in zip(trained, weights)]
    said = [", ".join(filter(None, pair)) or None for pair in zip(named, others)]
    return frame.with_columns(pl.Series(APART, said, pl.String))


def _protocol(row: Mapping[str, Any]) -> dict[str, Any]:
    cell = {key: value for key, value in json.loads(row["cell"] or "{}").items() if key not in FREE}
    if cell and "data" not in cell:  # of the first schema version
        cell["data"] = {"hash": json.loads(row["hashes"] or "{}").get("data")}
    return cell


def _words(protocols: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What each protocol says where they differ; nothing where there is one."""
    first, *others = protocols.values()
    paths = sorted({path for other in others for path in differing(first, other)})
    return {key: ", ".join(f"{path}={_at(each, path)}" for path in paths) for key, each in protocols.items()}


def _at(protocol: Mapping[str, Any], path: str) -> str:
    value: Any = protocol
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text[:8] if isinstance(value, str) and len(text) == 64 else text
