"""Parts by name: `@register("snapkv")` on a class, a folder scan for ours, entry points for everyone else's."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

#: kind -> name -> class. A kind is also a sub-package of ours and an entry point group.
_parts: dict[str, dict[str, type]] = {"compressors": {}, "backbones": {}}
_scanned: set[str] = set()


class UnknownName(ValueError):
    """A name that nothing is registered under; the message lists the nearest valid ones."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the nearest valid name, or the list of valid names where none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else f" Valid: {', '.join(names)}."


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make a `Compressor` or `Backbone` known under `name`.

    Raises ValueError where another class already has that name.
    """

    def add(cls: T) -> T:
        parts = _parts[cls.kind]  # type: ignore[attr-defined]
        other = parts.get(name)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"{cls.kind}: '{name}' is already {other.__module__}.{other.__qualname__}; choose another name"
            )
        cls.name = name  # type: ignore[attr-defined]
        parts[name] = cls
        return cls

    return add


def names(kind: str) -> list[str]:
    """Every registered name of a kind ('compressors' or 'backbones'), sorted."""
    _scan(kind)
    return sorted(_parts[kind])


def find(kind: str, name: str) -> type[Any]:
    """The class registered under `name`; raises UnknownName with the nearest valid name."""
    _scan(kind)
    try:
        return _parts[kind][name]
    except KeyError:
        raise UnknownName(f"no {kind[:-1]} is named '{name}'.{suggest(name, _parts[kind])}") from None


def _scan(kind: str) -> None:
    if kind in _scanned:
        return
    _scanned.add(kind)
    package = importlib.import_module(f"malloc_bench.{kind}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for entry in metadata.entry_points(group=f"malloc_bench.{kind}"):
        entry.load()
