"""What manifest.json says of a run: its suite, its data, its checkpoints and its sessions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from malloc_bench.data import Dataset
from malloc_bench.results import canonical_json
from malloc_bench.run.folder import read_manifest, write_manifest
from malloc_bench.suite.plan import RunResult
from malloc_bench.suite.suite import Suite

KEPT = ("datasets", "ceilings", "checkpoints")  # by name: what a later session knows is added


def add_session(
    folder: Path,
    suite: Suite,
    datasets: Mapping[str, Dataset],
    result: RunResult,
    environment: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write down a session that ends, beside those before it. known: `ceilings` and `checkpoints` of the session."""
    sets = {
        name: {"hash": data.hash, "card": suite.cards.get(name, name), "source": data.source,
               "has_time": data.has_time, "users": data.n_users, "items": data.n_items, "events": data.n_events,
               "notes": dict(data.notes)}
        for name, data in datasets.items()
    }  # fmt: skip
    session = {
        "seconds": round(result.seconds, 1),
        **{name: getattr(result, name) for name in ("ok", "skipped", "failed", "reused")},
        "environment": environment,
    }
    text = suite.path.read_text(encoding="utf-8") if suite.path.is_file() else None
    now = {"suite": {"name": suite.name, "text": text}, **known, "datasets": sets, "sessions": [session]}
    write_manifest(folder, joined([read_manifest(folder), now]))


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One manifest of several: everyone's data, ceilings, checkpoints and sessions, the last one's suite; where there

    were others, or it was changed between sessions, `suites` has all, the last one last.
    """
    suites: dict[str, Any] = {}
    for suite in (each for part in parts for each in part.get("suites", [part.get("suite")]) if each):
        suites.pop(key := canonical_json(suite), None)
        suites[key] = suite
    every = [*suites.values()]
    whole: dict[str, Any] = {"suite": every[-1] if every else None} | ({"suites": every} if every[1:] else {})
    for name in KEPT:
        whole[name] = {key: value for part in parts for key, value in part.get(name, {}).items()}
    return {**whole, "sessions": [each for part in parts for each in part.get("sessions", [])]}
