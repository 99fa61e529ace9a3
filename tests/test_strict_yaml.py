"""The reader of cards and suites: plain data, and one line for whatever else a file holds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from malloc_bench.strict_yaml import YamlError, read_yaml


def read(folder: Path, text: str | bytes) -> dict:
    path = folder / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path, 1 << 20, "toy")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("a: [1, 2.5, null, true, x]\nb: {c: d}", {"a": [1, 2.5, None, True, "x"], "b": {"c": "d"}}),
        ("a: 2024-01-01\nb: 2024-13-45", {"a": "2024-01-01", "b": "2024-13-45"}),
        ("\ufeffa: b\r\nc: d\r\n", {"a": "b", "c": "d"}),
        ("a: &x [1]", {"a": [1]}),
        (f"a: {2**63 - 1}\nb: {-(2**63)}", {"a": 2**63 - 1, "b": -(2**63)}),
        ("a: " + "[" * 31 + "]" * 31, {"a": eval("[" * 31 + "]" * 31)}),
        ('a: "tab\\t line\\n"', {"a": "tab\t line\n"}),
    ],
)
def test_plain_data_are_read(text: str, content: dict, tmp_path: Path) -> None:
    assert read(tmp_path, text) == content


HOSTILE = [
    ("", "expected keys and values, found nothing"),
    ("[1]", "expected keys and values, found [1]"),
    ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is there twice"),
    ("b: 2\n1: a\n0x1: b", "line 1: a key is there twice"),
    ("a: {b: {2: 1}}", "line 1: the key 2 is no text"),
    ("no: 1", "line 1: the key False is no text"),
    ("a: {.nan: 1}", "line 1: the key nan is no text"),
    ("a: &x [1]\nb: *x", "line 2: aliases (*x) are not allowed"),
    ("a: &x [*x]", "line 1: aliases (*x) are not allowed"),
    ("a: {<<: {b: 1}}", "line 1: merged keys (<<) are not allowed"),
    ("a: !!python/object:os.x {}", "line 1: tags (tag:yaml.org,2002:python/object:os.x) are not allowed"),
    ("a: !!bool x", "line 1: tags (tag:yaml.org,2002:bool) are not allowed"),
    ("a: !!set {b}", "line 1: tags (tag:yaml.org,2002:set) are not allowed"),
    ("? [a]\n: b", "line 1: found unhashable key"),
    ("a: " + "9" * 401, "line 1: " + "9" * 57 + "... is beyond 63 bits"),
    ("a: " + "9" * 9000, "line 1: '" + "9" * 56 + "... is no number"),
    ("a: " + "1:" * 5000 + "1.0", "line 1: '1:1:"),
    ("a: 0x_", "line 1: '0x_' is no number"),
    ("a: =", "line 1: could not determine a constructor"),
    (b"a: 1\nb: \xff", "line 2: not UTF-8 text"),
    ("a: 1\nb: \x1b[31m", "line 2: the control character U+001B is not allowed"),
    ('a: 1\n\nb: "\\e[31m"', "line 3: the control character U+001B is not allowed"),
    ("a: \0", "line 1: the control character U+0000 is not allowed"),
    ("a: 'x\n", "line "),
    ("a: b\n---\nc: d", "line 2: "),
    ("#" * (1 << 20) + "#", "over 1024 KB is no toy"),
    *((opening * 100_000, "line 1: nested more than 32 levels deep") for opening in ("[", "- ", "? ", "{a: ")),
]


@pytest.mark.parametrize(("text", "message"), HOSTILE, ids=[repr(text[:20]) for text, _ in HOSTILE])
def test_all_else_is_refused_in_one_line_and_at_once(text: str | bytes, message: str, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(YamlError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert time.monotonic() - began < 2


def test_keys_may_be_whole_numbers_where_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: {50: 1}")
    assert read_yaml(tmp_path / "a.yaml", 100, "toy", whole_keys=True) == {"a": {50: 1}}
    (tmp_path / "a.yaml").write_text("a: {true: 1}")
    with pytest.raises(YamlError, match="the key True is no text"):
        read_yaml(tmp_path / "a.yaml", 100, "toy", whole_keys=True)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.yaml", tmp_path / ("x" * 300), Path("a\0b")):
        with pytest.raises(YamlError):
            read_yaml(path, 100, "toy")
