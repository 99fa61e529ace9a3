"""A card's file: its keys and values, one of its variants, and what is wrong with it in one line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from malloc_bench.data.errors import DataError
from malloc_bench.registry import clipped, suggest
from malloc_bench.strict_yaml import YamlError, read_yaml

MAX_CARD_BYTES = 1 << 18
MAX_WORD = 200  # characters or entries that stand for a {name}: a card cannot grow without end
# what a variant may say for itself
VARIANT = ("title", "description", "published", "keep", "label", "on_bad", "sources", "categories", "format")


def content(path: Path) -> dict[str, Any]:
    """The keys and values of a card; not to be changed. Raises DataError."""
    try:
        state = path.stat()
        return _read(path, state.st_mtime_ns, state.st_ctime_ns, state.st_size)
    except (OSError, ValueError) as error:  # ValueError: YamlError, and names that no file can have
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


@lru_cache(maxsize=256)
def _read(path: Path, *state: int) -> dict[str, Any]:
    """Cards stand for dozens of data sets each, and are asked for by name: one parse a file."""
    found = read_yaml(path, MAX_CARD_BYTES, "card", whole_keys=True)  # the lags of a generated world
    if odd := [key for key in found if not isinstance(key, str)]:
        raise YamlError(f"the key {clipped(repr(odd[0]))} is no text")
    return found


def variants(keys: Mapping[str, Any]) -> list[str]:
    """The names that a card's variants add to its own; empty where it stands for one data set."""
    found = keys.get("variants")
    return [str(name) for name in found] if isinstance(found, dict) else []


def variant(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A card's keys with a variant's in them: its sources after the common ones, its other words for {names}.

    A {name} alone may stand for a list. Raises ValueError.
    """
    if not isinstance(keys.get("variants") or {}, dict):
        raise ValueError(f"variants: expected keys and values, not {clipped(repr(keys['variants']))}")
    if not name:
        return {key: value for key, value in keys.items() if key != "variants"}
    own = next(each for key, each in keys["variants"].items() if str(key) == name)
    if not isinstance(own, dict):
        raise ValueError(f"variants.{name}: expected keys and values, not {clipped(repr(own))}")
    words = {str(key): value for key, value in own.items() if key not in VARIANT}
    for key, value in words.items():
        entries = value if isinstance(value, list) else [value]
        long = [each for each in entries if isinstance(each, dict | list) or len(str(each)) > MAX_WORD]
        if long or len(entries) > MAX_WORD:
            what = f"expected at most {MAX_WORD} characters, or a list of as many such texts"
            raise ValueError(f"variants.{name}.{clipped(key)}: {what}")

    def word(found: re.Match[str]) -> str:
        value = words.get(found[1], found[0])
        if isinstance(value, list):
            raise ValueError(f"variants.{name}.{clipped(found[1])}: a list cannot stand inside other text")
        return str(value)

    def put(value: Any) -> Any:
        if isinstance(value, str):
            alone = words.get(value[1:-1]) if value[:1] + value[-1:] == "{}" else None
            return alone if isinstance(alone, list) else re.sub(r"\{([^{}]*)\}", word, value)
        if isinstance(value, dict):
            return {key: put(each) for key, each in value.items()}
        return [put(each) for each in value] if isinstance(value, list) else value

    merged = {key: value for key, value in keys.items() if key != "variants"}
    merged |= {key: value for key, value in own.items() if key in VARIANT}
    common, more = keys.get("sources", []), own.get("sources", [])
    if isinstance(common, list) and isinstance(more, list) and (common or more):
        merged["sources"] = [*common, *more]
    return {key: put(value) for key, value in merged.items()}


def first_problem(error: ValidationError, card: type[BaseModel], models: Mapping[str, type[BaseModel]]) -> str:
    """The gravest problem of a card's keys; `models`: what stands under which key."""
    # a misspelt key first: that another one is missing follows from it
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    path = problem["loc"]
    listed = path[:1] in (("sources",), ("categories",))  # the third names the kind
    where = clipped(".".join(map(str, path[:2] + path[3:] if listed else path)), 200)
    if problem["type"] != "extra_forbidden":
        return f"{where or 'card'}: {clipped(problem['msg'].removeprefix('Value error, '), 500)}"
    model = next((models[key] for key in map(str, reversed(path[:-1])) if key in models), card)
    return f"{where}: unknown key.{suggest(str(path[-1]), model.model_fields.keys() - {'name', 'family'})}"
