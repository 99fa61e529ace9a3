"""What a row may hold, by its column's kind and inside of nested values; what is wrong with it, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from malloc_bench.registry import clipped

STATUSES = ("ok", "skipped", "failed")
NAMED = ("dataset", "task", "backbone", "compressor", "seed")  # no cell is without
SIGNED = ("delta_", "drift@")  # columns of differences: no other number lies below 0
#: columns of shares and of metrics, none above 1
SHARES = ("hr@", "ndcg@", "mrr", "auc", "gauc", "recall@", "overlap@", "agreement", "appended@", "share_at_floor")
DELTAS = ("ndcg@10", "gauc", "auc")  # metrics whose difference to the full state is a column
LARGEST = 1e100  # of a number: what is made of it stays finite
DEEPEST = 32  # of a nested value: labels are made of it level by level


def fault(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """What is wrong with a row, or None. columns: the kind of each."""
    if not row.get("cell_id") or not isinstance(row["cell_id"], str):
        return "no cell_id"
    if row.get("status") not in STATUSES:
        return f"status {clipped(repr(row.get('status')))} is none of {', '.join(STATUSES)}"
    special = {"budget": "budget", "per_user": "below"}
    inside: dict[str, Any] = {
        "hashes": {"files": ("below", "text"), "reference": "text", "data": "text"},
        **dict.fromkeys(("slices", "steps"), ("text", ("text", "real"))),
        "requests": ("digits", columns),
    }
    for name, kind in columns.items():
        value = row.get(name)
        if value is None and name in NAMED:
            return f"{name} is missing"
        if why := _wrong(name, value, special.get(name, kind)) or _wrong(name, value, inside.get(name, {})):
            return why
    n, longest = row.get("measured_history"), row.get("measured_history_long")
    if n is not None and longest is not None and longest < n:
        return f"measured_history_long is {longest}, less than measured_history, {n}"
    for name in DELTAS:  # a difference is one of two numbers, an interval one of a difference
        for one, of in ((f"delta_{name}{end}", f"delta_{name}" if end else name) for end in ("", "_lo", "_hi")):
            if row.get(one) is not None and row.get(of) is None:
                return f"{one} is {row[one]!r}, but {of} is missing"
    return None


def _wrong(where: str, value: Any, kind: Any) -> str | None:
    """What is wrong with a value. kind: of _KINDS; or the kind of each of some keys; or that of all keys and of all

    that they hold.
    """
    if value is None or not kind:
        return None
    if isinstance(kind, str):
        kind = "signed" if kind == "real" and where.startswith(SIGNED) else kind
        kind = "share" if kind == "real" and where.startswith(SHARES) else kind
        expected, fits = _KINDS[kind]
        return None if fits(value) else f"{where} is {clipped(repr(value))}, expected {expected}"
    if not isinstance(value, Mapping):
        return f"{where} is {clipped(repr(value))}, expected {_KINDS['json'][0]}"
    for key, each in value.items():
        if isinstance(kind, tuple) and (odd := _wrong(f"a key of {where}", key, kind[0])):
            return odd
        inner = kind[1] if isinstance(kind, tuple) else kind.get(key)
        each = "null" if each is None and inner and not isinstance(inner, str) else each
        if odd := _wrong(f"{where}.{clipped(key)}", each, inner):
            return odd
    return None


# ---- kinds


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _signed(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _share(value: Any) -> bool:
    return _signed(value) and 0 <= value <= 1 + 1e-6


def _text(value: Any) -> bool:
    return isinstance(value, str) and (value.isascii() or _writable(value))


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping) and _depth(value) <= DEEPEST and _writable(value)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1 + max(map(_depth, inner), default=0)


def _writable(value: Any) -> bool:
    """Whether JSON and UTF-8 have words for it: not for NaN, nor for half a character."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _budget(text: Any) -> bool:
    """As `labels.budget_text` writes it."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError):
        return False
    if isinstance(value, Mapping) and len(value) == 1:
        ((unit, size),) = value.items()
        return unit in ("slots", "bytes") and _whole(size) and size > 0
    return _signed(value) and value > 0


def _below(text: Any) -> bool:
    path = PurePosixPath(text) if isinstance(text, str) else PurePosixPath()
    parts = path.parts
    return (
        bool(parts) and not path.is_absolute() and ".." not in parts and "\0" not in text and max(map(len, parts)) < 256
    )


#: kind -> what is expected, in words, and whether a value is that
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "text": ("text", _text),
    "share": ("a number from 0 to 1", _share),
    "whole": ("a whole number of at least 0", _whole),
    "real": ("a number of at least 0", lambda value: _signed(value) and value >= 0),
    "signed": ("a number", _signed),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "json": (f"keys and values, at most {DEEPEST} levels deep", _nested),
    "budget": ("a share such as 0.25, or slots or bytes with a whole number", _budget),
    "below": ("a path below the run's folder", _below),
    "digits": ("a whole number", lambda value: re.fullmatch(r"[0-9]{1,9}", value) is not None),
}


def no_results(folder: Path) -> FileNotFoundError:
    """Where somebody has looked for a run in vain."""
    if folder.exists():
        return FileNotFoundError(f"{folder} holds no results: expected rows/*.json or results.parquet")
    elsewhere = folder.is_absolute() or folder.parts[:1] == ("runs",) or Path("runs", folder).exists()
    usual = "" if elsewhere else f", nor runs/{folder}"
    return FileNotFoundError(f"{folder} holds no results: there is no such folder{usual}")
