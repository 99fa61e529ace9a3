"""What methods and budgets are called: in tables, in rows, and by who asks for some of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from malloc_bench.files import canonical_json
from malloc_bench.registry import clipped

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def budget_text(budget: float | Mapping[str, int] | None) -> str | None:
    """The `budget` column: `0.25`, `{"slots":16}`, or null where the method has no budget."""
    if budget is None:
        return None
    return canonical_json(float(budget) if isinstance(budget, (int, float)) else budget)


@lru_cache(4096)  # of many cells, few budgets
def budget_label(budget: str | None) -> str:
    """`50 %`, `16 slots`, `4096 bytes`, or blank, from the `budget` column."""
    value = json.loads(budget) if budget else None
    if isinstance(value, dict):
        return ", ".join(f"{size} {unit}" for unit, size in value.items())
    return "" if value is None else f"{100 * value:g} %"


def budget_labels(label: str | None) -> list[str]:
    """`50 %` and `25 %` of `50, 25 %`, the label of one state under several budgets."""
    found, unit = [], ""
    for part in reversed((label or "").split(", ")):
        unit = part.partition(" ")[2] or unit
        found += [f"{part.split()[0]} {unit}"] if part else []
    return found[::-1]


def budget_asked(text: str) -> str:
    """The label of a budget that somebody asks for: `25 %` of `25%`, `.250`, `1/4` and `{"slots":16}` of `16 slots`.

    Other text as it is, `none` among it.
    """
    value = share(text)
    try:
        return budget_label(text if value is None else budget_text(value))
    except (ValueError, TypeError):
        return text


def size(text: str) -> float:
    """Bytes from `5KB`, `300`, `1.5 MiB`; raises ValueError."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(?:([kmg]i?)b?|b)?\s*", text.lower(), re.ASCII)
    value = 0.0 if found is None else float(found[1]) * _UNITS[found[2] or ""]
    if not 0 < value < math.inf:
        raise ValueError(f"'{clipped(text)}' is no size: expected bytes above 0, such as 5KB, 300 or 1.5MiB")
    return value


def share(text: str) -> float | None:
    """A number from `1/32`, `3.125%`, `3.125 %` or `0.03`; None where it is none."""
    found = re.fullmatch(r"\s*([\d.]+(?:e-?\d+)?)\s*(?:(%)|/\s*([\d.]+))?\s*", text, re.ASCII)
    try:
        return None if found is None else float(found[1]) / (100.0 if found[2] else float(found[3] or 1.0))
    except (ValueError, ZeroDivisionError):
        return None


def label(name: str, params: str | None) -> str:
    """`snapkv(window=16)` from a name and its parameters as JSON; a chain reads `merge_adjacent + kivi(bits=2)`."""
    return _named(name, json.loads(params) if params else {})


def _named(name: str, params: Any) -> str:
    if not isinstance(params, dict):
        return name if params is None else f"{name}({_show(params)})"
    if name == "compose" and len(params) == 1 and isinstance(chain := next(iter(params.values())), list):
        return _show(chain)
    return f"{name}({', '.join(f'{key}={_show(value)}' for key, value in params.items())})" if params else name


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " + ".join(map(_show, value))
    if isinstance(value, dict):
        return " + ".join(_named(name, params) for name, params in value.items())
    return value if isinstance(value, str) else json.dumps(value)


@lru_cache(4096)
def spelled(label: str) -> str:
    """A label as all of its spellings come out: without spaces, parameters in order of the alphabet."""
    label = label.replace(" ", "")
    while (done := re.sub(r"\(([^()]*)\)", lambda each: f"{{{','.join(sorted(parted(each[1])))}}}", label)) != label:
        label = done  # from the innermost brackets on
    return label


def parted(text: str) -> list[str]:
    """What commas outside of brackets part."""
    depth, parts = 0, [""]
    for each in text:
        depth += (each in "([{") - (each in ")]}")
        if each == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += each
    return parts


@lru_cache(4096)
def bare(label: str) -> str:
    """`h2o + kivi` of `h2o(window=8) + kivi(bits=2)`."""
    while (less := re.sub(r"\([^()]*\)", "", label)) != label:
        label = less
    return label


def first_step(label: str) -> str:
    """The bare name of a method, or of a chain's first step, from the label of either."""
    return label.split(" + ")[0].split("(")[0]
