"""What a user's own class is made of: its file and all of the user's that this imports, as one hash."""

from __future__ import annotations

import ast
import hashlib
import inspect
import secrets
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

_UNSAVED = secrets.token_hex(8)  # stands for the source of a class that was typed into a prompt: never the same again


@cache  # of the class as it was imported: its file may be edited while the class stays
def source_hash(cls: type) -> str:
    """sha256 over a class's file, those of its bases, and the user's own modules that these import."""
    try:
        files = {inspect.getfile(cls)}
        for base in cls.__mro__:
            files |= _files(base.__module__)
        content = [Path(file).read_bytes() for file in sorted(files, key=lambda file: Path(file).name)]
        return hashlib.sha256(b"\0".join(hashlib.sha256(each).digest() for each in content)).hexdigest()
    except (OSError, TypeError):
        return f"unsaved {_UNSAVED}"


def _files(module: str) -> set[str]:
    """Files of a module and of those of the user's that it imports, and so on."""
    found: dict[str, str | None] = {}
    todo = [module]
    while todo:
        if (each := todo.pop()) not in found:
            found[each] = file = _own_file(each)
            todo += [] if file is None else [*_written(each, file), *_held(each)]
    return {file for file in found.values() if file}


def _own_file(module: str) -> str | None:
    """The file of a module, imported yet or not; None of ours, whose versions are told, and of what is installed."""
    there = sys.modules.get(module)
    file = getattr(there, "__file__", None) if there is not None else _to_be_found(module)
    installed = not file or "site-packages" in file or file.startswith(sys.base_prefix)
    return None if module.split(".")[0] == "malloc_bench" or installed else file


def _to_be_found(module: str) -> str | None:
    """Where a module would be imported from, found without importing the packages that it is in."""
    name, path, file = "", None, None
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return None
        path, file = spec.submodule_search_locations or [], spec.origin
    return file


def _written(module: str, file: str) -> Iterator[str]:
    """Modules that a file names in an import, also in a function that was not called yet; of a name it may be one."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (SyntaxError, ValueError):  # no Python
        return
    package = module.split(".") if Path(file).stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [each.name for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else str(node.module)
            names = [base, *(f"{base}.{each.name}" for each in node.names)]
        else:
            continue
        for parts in (name.split(".") for name in names):
            yield from (".".join(parts[:i]) for i in range(1, len(parts) + 1))  # packages run before what is in them


def _held(module: str) -> Iterator[str]:
    """Modules that one has imported otherwise, or has something of."""
    for value in vars(sys.modules[module]).values() if module in sys.modules else ():
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        if isinstance(name, str) and name in sys.modules:
            yield name
