"""YAML as cards and suites are written: plain data only, and whatever else a file may hold is refused in one line."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from malloc_bench.registry import clipped

MAX_DEPTH = 32  # the C parser's own recursion ends in a crash
MAX_WHOLE = 2**63
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")

# what a terminal would obey, and what no encoding can write
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")


class YamlError(ValueError):
    """What is wrong with a file, in one line that begins with `line N` where there is one."""


def read_yaml(path: Path, most: int, kind: str, *, whole_keys: bool = False) -> dict[Any, Any]:
    """The keys and values of a `kind` of file of at most `most` bytes: null, true, numbers, text, lists, mappings.

    Keys are text, or with `whole_keys` whole numbers too. Dates stay text. Refused with a YamlError: no UTF-8, control
    characters, aliases, tags, a key that is there twice, more than 32 levels, whole numbers beyond 63 bits. What is not
    a number (.nan) or endless (.inf) is left to be refused by key.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise YamlError(getattr(error, "strerror", None) or str(error)) from None
    if len(data) > most:
        raise YamlError(f"over {most >> 10} KB is no {kind}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError(f"line {_line(data[: error.start])}: not UTF-8 text") from None
    if found := _CONTROL.search(text):
        raise YamlError(f"line {_line(data[: len(text[: found.start()].encode())])}: {_named(found[0])}")
    content = _parsed(text, _Loader if whole_keys else _TextKeys)
    if not isinstance(content, dict):
        raise YamlError(f"expected keys and values, found {'nothing' if content is None else clipped(repr(content))}")
    return content


def number_hint(value: Any) -> str:
    """What to write in place of a number that YAML 1.1 reads as text, such as 2e-3; nothing for anything else."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    digits, e, power = repr(number).partition("e")
    dotted = digits if "." in digits else f"{digits}.0"  # without a dot it would be text again
    return f" (YAML reads {clipped(value)} as text: write {dotted}{e}{power})"


def _parsed(text: str, loader: type[_Loader]) -> Any:
    try:
        _bounded(text)
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(str(error.problem or error.context or "not YAML").split())
        raise YamlError((f"line {mark.line + 1}: " if mark else "") + clipped(what, 300)) from None
    except yaml.YAMLError as error:
        raise YamlError(clipped(" ".join(str(error).split()), 300)) from None


def _bounded(text: str) -> None:
    """Refuse, before anything is built, what grows without end: aliases, and nesting."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.AliasEvent):
            raise _error(f"aliases (*{event.anchor}) are not allowed", event.start_mark)
        if (tag := getattr(event, "tag", None)) is not None:
            raise _error(f"tags ({tag}) are not allowed", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _error(f"nested more than {MAX_DEPTH} levels deep", event.start_mark)


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Knows the types of JSON and no others."""

    key_types: tuple[type, ...] = (str, int)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.tag.endswith(":merge"):
                raise _error("merged keys (<<) are not allowed", key.start_mark)
            if key.value in seen:
                raise _error(f"the key {clipped(repr(key.value))} is there twice", key.start_mark)
            seen.add(key.value)
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) < len(node.value):  # 1 and 0x1
            raise _error("a key is there twice", node.start_mark)
        if odd := [key for key in found if type(key) not in self.key_types]:
            raise _error(f"the key {clipped(repr(odd[0]))} is no text", node.start_mark)
        return found

    def text(self, node: Any) -> str:
        value: str = self.construct_scalar(node)
        if found := _CONTROL.search(value):
            raise _error(_named(found[0]), node.start_mark)
        return value

    def number(self, node: Any) -> int | float:
        whole = node.tag.endswith(":int")
        try:
            value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        except (ValueError, OverflowError, IndexError):
            raise _error(f"{clipped(repr(node.value))} is no number", node.start_mark) from None
        if whole and not -MAX_WHOLE <= value < MAX_WHOLE:
            raise _error(f"{clipped(str(node.value))} is beyond 63 bits", node.start_mark)
        return value  # type: ignore[no-any-return]


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_constructors = {
    **{_TAG + name: yaml.SafeLoader.yaml_constructors[_TAG + name] for name in _PLAIN},
    **{_TAG + name: _Loader.text for name in ("str", "timestamp")},
    **{_TAG + name: _Loader.number for name in ("int", "float")},
    None: yaml.SafeLoader.construct_undefined,
}


class _TextKeys(_Loader):
    key_types = (str,)


def _error(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


def _line(before: bytes) -> int:
    return before.count(b"\n") + 1


def _named(character: str) -> str:
    return f"the control character U+{ord(character):04X} is not allowed"
