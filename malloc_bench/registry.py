"""Parts by name: `@register("snapkv")` on a class, a folder scan for ours, entry points for everyone else's."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import logging
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T", bound=type)

MANY = 40  # valid names: more are no help in a line
LONGEST = 120  # letters of a name in a figure

#: kind -> name -> class. A kind is also a sub-package of ours and an entry point group.
_parts: dict[str, dict[str, type]] = {"compressors": {}, "backbones": {}}
_scanned: set[str] = set()
_USER = "malloc_bench_user_"  # begins the name of a module that is a file of the user's


class UnknownName(ValueError):
    """A name that nothing is registered under; the message lists the nearest valid ones."""


# ---- words

# what a terminal would obey, and what turns the direction of writing
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """Text with what a terminal would obey as escapes: a colour code reads \\x1b[31m."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def folded(text: str) -> str:
    """Text on one line."""
    return " ".join(text.split())


def clipped(text: str, most: int = 60) -> str:
    """Text short enough for a message."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def literal(text: str) -> str:
    """A name as a figure draws it: no mathematics, no control characters, and of a length that there is room for."""
    text = shown(folded(text))
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 9]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"  # no two the same
    return text.replace("$", r"\$")


def in_a_line(error: BaseException) -> str:
    """What went wrong, in one line; the kind of error where it says nothing."""
    return folded(_words(error)) or type(error).__name__


def told(error: BaseException) -> str:
    """What kind of error and all that it says, in one line of a length that one reads: `ValueError: no such slot`."""
    said = shown(folded(_words(error, notes=True)))
    return clipped(": ".join(filter(None, (type(error).__name__, said))), 500)


def _words(error: BaseException, notes: bool = False) -> str:
    try:
        return " ".join([str(error), *(getattr(error, "__notes__", ()) if notes else ())])
    except (Exception, SystemExit):  # a class of a user's
        return "(its text cannot be made)"


def suggest(name: str, valid: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the nearest valid name; where none is near, all, or of many the three nearest."""
    names, name = sorted(valid), name[:100]
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f" Did you mean '{near[0]}'?"
    if not names:
        return ""
    if len(names) <= MANY:
        return f" Valid: {', '.join(names)}."
    return f" Valid are {len(names)}, such as {', '.join(difflib.get_close_matches(name, names, n=3, cutoff=0.0))}."


# ---- parts


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make a `Compressor` or `Backbone` known under `name`.

    Raises ValueError where another class already has that name.
    """

    def add(cls: T) -> T:
        if not _is_name(name):
            raise ValueError(
                f"{place(cls)}: {clipped(repr(name))} is no name: expected text without blanks, at most 100"
            )
        if odd := _odd(cls):
            raise ValueError(f"{place(cls)}: {odd}")
        kind: str = cls.kind  # type: ignore[attr-defined]
        if cls.__module__.split(".")[0] != "malloc_bench":
            _scan(kind)  # a name of ours is refused here, and not when ours are read
        parts = _parts[kind]
        other = parts.get(name)
        if other is not None and not _is_again(cls, other):
            raise ValueError(f"{kind}: '{name}' is already {place(other)}; choose another name for {place(cls)}")
        cls.name = name  # type: ignore[attr-defined]
        parts[name] = cls
        return cls

    return add


def _odd(cls: type) -> str | None:
    """What is wrong with what a class says of itself, which every listing shows; None: nothing."""
    for name in _TEXTS:
        if not isinstance(text := getattr(cls, name, ""), str):
            return f"its {name} is {clipped(repr(text))}, expected text"
    for name, kind in _MAPS.items():
        held = getattr(cls, name, {})
        if not isinstance(held, Mapping) or not all(isinstance(each, kind) for each in held.values()):
            return f"its {name} is {clipped(repr(held))}, expected names, each with {_WORDS[kind]}"
    grid = getattr(cls, "grid", {})
    known = {each.name for each in fields(cls)} if is_dataclass(cls) else grid
    unknown = next((name for name in grid if name not in known), None)
    return None if unknown is None else f"its grid has '{unknown}', which is no parameter.{suggest(unknown, known)}"


_TEXTS = ("family", "paper", "formula", "stores", "note")
_MAPS = {"growth": str, "grid": Sequence, "presets": Mapping}
_WORDS = {str: "text", Sequence: "a list of values", Mapping: "parameters"}


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
        own = " One of yours: --use FILE.py:CLASS" if kind in ("compressors", "backbones") else ""
        known = suggest(name, _parts[kind])
        raise UnknownName(f"no {kind[:-1]} is named '{clipped(name)}'.{known}{own}") from None


def _scan(kind: str) -> None:
    if kind in _scanned:
        return
    _scanned.add(kind)
    package = importlib.import_module(f"malloc_bench.{kind}")
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
    for entry in metadata.entry_points(group=f"malloc_bench.{kind}"):
        _load(kind, entry)


def _load(kind: str, entry: metadata.EntryPoint) -> None:
    """Register what somebody else's package brings; what is wrong with it is one warning, and nothing of it stays."""
    parts = _parts[kind]
    before = dict(parts)
    try:
        found = entry.load()
        if isinstance(found, type) and getattr(found, "kind", None) == kind:
            if "name" not in vars(found):
                register(entry.name)(found)
        elif not isinstance(found, ModuleType) or parts == before:
            what = "a module that registers nothing" if isinstance(found, ModuleType) else f"no class of {kind}"
            raise TypeError(f"it is {what}")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also sys.exit
        parts.clear()
        parts.update(before)
        log.warning("%s '%s' of %s is left out: %s", kind, entry.name, entry.value, in_a_line(error))


def load_part(spec: str, kind: str | None = None) -> str:
    """`load_class`, and its name. Raises ValueError too where it is none of the kind."""
    cls = load_class(spec)
    if kind is not None and cls.kind != kind:
        raise ValueError(
            f"{spec} is one of the {cls.kind}, where one of the {kind} is expected: --use {spec} has it known"
        )
    return str(cls.name)


def load_class(spec: str) -> Any:
    """Import `file.py:Class` or `module:Class` and register the class if it has not done so.

    Raises ValueError where the file, the module or the class is missing.
    """
    where, _, attribute = spec.rpartition(":")
    if not where:
        raise ValueError(f"'{spec}' names no class; expected my_method.py:MyMethod or my_package.my_module:MyMethod")
    path = Path(where)
    if path.suffix == ".py" and not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        module = load_file(path) if path.suffix == ".py" else importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"{where} cannot be imported: {in_a_line(error)}") from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} cannot be imported: {told(error)}") from error
    cls: Any = getattr(module, attribute, None)
    if not _is_part(cls):
        there = f", but {clipped(repr(cls))}" if hasattr(module, attribute) else ""
        ours = [name for name, value in vars(module).items() if _is_part(value)]
        raise ValueError(f"{where} has no compressor or backbone class '{attribute}'{there}.{suggest(attribute, ours)}")
    if "name" not in vars(cls):
        register(cls.__name__.lower())(cls)
    elif not _is_name(cls.name):
        raise ValueError(f"{where}: the name of {attribute} is {clipped(repr(cls.name))}, expected text without blanks")
    elif cls.name in names(cls.kind) and not _is_again(cls, other := find(cls.kind, cls.name)):
        raise ValueError(f"{where}: {attribute} is named '{cls.name}', as {place(other)} is: give it a name of its own")
    return cls


def foreign() -> list[tuple[str, str, str, str, str | None]]:
    """Classes that are not ours, for `adopt` in another process: kind, name, module, class, and the module's file."""
    return [
        (kind, name, cls.__module__, cls.__qualname__, getattr(sys.modules.get(cls.__module__), "__file__", None))
        for kind, parts in _parts.items()
        for name, cls in parts.items()
        if cls.__module__.split(".")[0] not in ("malloc_bench", "__main__") and "<locals>" not in cls.__qualname__
    ]


def adopt(classes: Iterable[tuple[str, str, str, str, str | None]]) -> None:
    """Import and register what `foreign` has named; raises whatever an import raises."""
    for kind, name, module, cls, file in classes:
        if file is not None and (module.startswith(_USER) or (module not in sys.modules and not _importable(module))):
            found = sys.modules[module] if module in sys.modules else load_file(Path(file), module)
        else:
            found = importlib.import_module(module)
        if name not in names(kind):
            register(name)(attrgetter(cls)(found))


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= 100 and name.isprintable() and len(name.split()) == 1


def place(cls: type) -> str:
    """Where a class stands: `Mine of my_method.py`, or its module and name."""
    if cls.__module__.startswith(_USER) and (file := getattr(sys.modules.get(cls.__module__), "__file__", None)):
        return f"{cls.__qualname__} of {file}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _is_again(cls: type, other: type) -> bool:
    """Whether a class is another one, made again or of a file that was imported under two names."""
    where, there = (getattr(sys.modules.get(each.__module__), "__file__", each.__module__) for each in (cls, other))
    return cls.__qualname__ == other.__qualname__ and (cls.__module__ == other.__module__ or where == there)


def _is_part(value: Any) -> bool:
    return isinstance(value, type) and getattr(value, "kind", None) in _parts


def load_file(path: Path, name: str = "") -> ModuleType:
    """Import a Python file as the module `name`; the default stands in for no module that is there: not random.py's.

    What it imports may lie beside it.
    """
    name = name or f"{_USER}{path.stem}"
    if (beside := str(path.resolve().parent)) not in sys.path:
        sys.path.append(beside)  # last: it hides nothing
    found = spec_from_file_location(name, path)
    assert found is not None and found.loader is not None, "a .py file"
    module = module_from_spec(found)
    sys.modules[name] = module  # so that the class can be pickled and its source found
    found.loader.exec_module(module)
    return module
