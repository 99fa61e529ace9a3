"""Parts by name: what is found, who may bring more, and what a wrong name is told."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import malloc_bench
from malloc_bench import registry
from malloc_bench.cli import describe
from malloc_bench.compressors.windowing.recent import Recent
from malloc_bench.registry import UnknownName, find, load_part, names, register, suggest
from malloc_bench.testing.parts import part_checks

METHOD = """
from dataclasses import dataclass
from malloc_bench import register
from malloc_bench.compressors.windowing.recent import Recent

@register("{name}")
@dataclass(frozen=True)
class Theirs(Recent):
    step: int = 2
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, type]]:
    """The registry, put back as it was afterwards."""
    names("compressors"), names("backbones")
    own = copy.deepcopy(registry._parts)
    monkeypatch.setattr(registry, "_parts", own)
    return own


@pytest.fixture
def plugin(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> metadata.EntryPoint:
    """An installed distribution `their-methods` with one compressor under an entry point."""
    module = "their_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{module}.py").write_text(METHOD.format(name="theirs"))
    info = tmp_path / "their_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{module}.py,,\n")
    (info / "top_level.txt").write_text(f"{module}\n")
    (info / "entry_points.txt").write_text(f"[malloc_bench.compressors]\ntheirs = {module}:Theirs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_scanned", set())
    return metadata.EntryPoint("theirs", f"{module}:Theirs", "malloc_bench.compressors")


def test_ours_are_found_without_a_list() -> None:
    assert {"full", "recent", "snapkv", "kivi", "svd", "compose"} <= set(names("compressors"))
    assert {"hstu", "sasrec"} <= set(names("backbones"))
    assert find("compressors", "recent") is Recent
    assert Recent.name == "recent"


def test_a_wrong_name_is_told_the_nearest() -> None:
    with pytest.raises(
        UnknownName,
        match=r"^no compressor is named 'snapkw'\. Did you mean 'snapkv'\? One of yours: --use FILE.py:CLASS$",
    ):
        find("compressors", "snapkw")
    with pytest.raises(UnknownName, match=r"^no backbone is named 'zzz'\. Valid: .*hstu.*sasrec"):
        find("backbones", "zzz")
    assert suggest("x", ()) == ""
    many = [f"set-{i}" for i in range(500)]
    assert suggest("zzz", many).startswith(" Valid are 500, such as set-") and suggest("zzz", many).count(",") == 3


def test_a_name_is_taken_once(parts: Any) -> None:
    class Other(Recent):
        pass

    with pytest.raises(ValueError, match=r"'recent' is already malloc_bench\.compressors\.windowing\.recent\.Recent"):
        register("recent")(Other)
    assert find("compressors", "recent") is Recent


def test_the_same_class_may_come_again(parts: Any) -> None:
    """As when its module is read again."""

    def fresh() -> type:
        @dataclass(frozen=True)
        class Mine(Recent):
            pass

        return Mine

    register("mine")(fresh())
    again = register("mine")(fresh())
    assert find("compressors", "mine") is again


def test_an_entry_point_brings_a_part(plugin: metadata.EntryPoint) -> None:
    assert "theirs" in names("compressors")
    cls = find("compressors", "theirs")
    assert malloc_bench.get_compressor("theirs", step=3).step == 3  # type: ignore[attr-defined]
    assert describe.origin(cls) == "their-methods"
    assert describe.origin(Recent) == "malloc-bench"
    heads, rows = describe.listing("compressors")
    assert dict(zip(heads, next(row for row in rows if row[0] == "theirs")))["from"] == "their-methods"


BROKEN = [
    "import nothing_of_that_name", METHOD.format(name="recent"), "1 +", "raise SystemExit(0)", "raise ValueError",
    "Theirs = 5", "from pathlib import Path as Theirs", "from malloc_bench.backbones.hstu import HSTU as Theirs",
    METHOD.format(name="first") + METHOD.format(name="recent").replace("Theirs", "Second"),
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_package_does_not_stop_ours(
    text: str, plugin: metadata.EntryPoint, parts: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"{plugin.module}.py").write_text(text)
    before = set(parts["compressors"])
    with caplog.at_level(logging.WARNING):
        assert "recent" in names("compressors")
    (record,) = caplog.records
    message = record.getMessage()
    assert message.startswith(f"compressors 'theirs' of {plugin.value} is left out: ") and len(message.split(": ")[1])
    assert find("compressors", "recent") is Recent and set(parts["compressors"]) == before


def test_a_class_of_an_entry_point_needs_no_decorator(plugin: metadata.EntryPoint, tmp_path: Path) -> None:
    text = METHOD.format(name="").replace('@register("")', "")
    (tmp_path / f"{plugin.module}.py").write_text(text)
    assert find("compressors", "theirs").__name__ == "Theirs"


def test_a_card_folder_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry point holds the folder's path."""
    from malloc_bench.data.sources import cards
    from malloc_bench.paths import shipped

    card = (shipped("datasets") / "synthetic.yaml").read_text()
    (tmp_path / "theirs.yaml").write_text(card)

    class Entry:
        def load(self) -> Path:
            return tmp_path

    monkeypatch.setattr(cards.metadata, "entry_points", lambda group: [Entry()] * (group == "malloc_bench.datasets"))
    assert "theirs" in cards.list_datasets()
    (row,) = [row for row in describe.listing("datasets")[1] if row[0] == "theirs"]
    assert row[-1] == str(tmp_path)


@pytest.mark.parametrize("file", ["my_method.py", "random.py"])
def test_a_class_from_a_file(file: str, parts: Any, tmp_path: Path) -> None:
    path = tmp_path / file
    path.write_text(METHOD.format(name="mine"))
    assert load_part(f"{path}:Theirs") == "mine"
    assert find("compressors", "mine")().step == 2
    import random

    assert callable(random.shuffle)  # Python's own still


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Method", "names no class"),
        ("/nowhere/mine.py:Method", "no such file"),
        ("no.such.module:Method", "cannot be imported"),
        ("malloc_bench.compressors.windowing.recent:Recnt", "Did you mean 'Recent'"),
        ("malloc_bench.paths:home", "has no compressor or backbone class 'home', but <function home at .*>.$"),
    ],
)
def test_a_class_that_cannot_be_had(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_part(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit(3)", "cannot be imported: SystemExit: 3$"),
        ("1 +", "cannot be imported: SyntaxError: invalid syntax"),
        ("raise KeyError", "cannot be imported: KeyError$"),
        ("import nothing_of_that_name", "cannot be imported: No module named 'nothing_of_that_name'"),
        (METHOD.format(name="recent"), "cannot be imported: ValueError: compressors: 'recent' is already"),
    ],
)
def test_a_file_that_fails(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_part(f"{tmp_path / 'mine.py'}:Theirs")


# ---- public names


def test_public_names() -> None:
    import malloc_bench.compressors
    import malloc_bench.state

    assert malloc_bench.Prefill is malloc_bench.state.Prefill
    assert malloc_bench.get_compressor is malloc_bench.compressors.get_compressor
    assert malloc_bench.register is register
    assert malloc_bench.__version__ == metadata.version("malloc-bench")
    for name in malloc_bench.__all__:
        assert callable(getattr(malloc_bench, name))
        assert name in dir(malloc_bench)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        malloc_bench.nothing  # noqa: B018
    assert malloc_bench.get_backbone("sasrec", n_items=5, dim=8).n_items == 5
    assert malloc_bench.get_dataset("synthetic").n_users == 300


def test_the_package_itself_imports_nothing_heavy() -> None:
    heavy = "torch numpy polars pydantic yaml typer rich matplotlib"
    code = f"import sys, malloc_bench; print([m for m in {heavy.split()} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_name_of_ours_that_was_not_read_yet_is_refused_where_it_is_taken(tmp_path: Path) -> None:
    """In a fresh process: here ours have been read."""
    (tmp_path / "mine.py").write_text(
        "from malloc_bench import register\nfrom malloc_bench.compressors import Eviction\n"
        "@register('recent')\nclass Mine(Eviction):\n    scores = None\n"
    )
    code = "import sys; from malloc_bench.cli import main; sys.exit(main(['check', 'mine.py:Mine']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "'recent' is already malloc_bench.compressors.windowing.recent.Recent" in done.stderr
    assert f"choose another name for Mine of {tmp_path / 'mine.py'}" in done.stderr


@pytest.mark.parametrize("name", ["", "two words", "a\nb", "\x1b[31m", "n" * 101])
def test_what_is_no_name(name: str, parts: Any) -> None:
    class Mine(Recent):
        pass

    with pytest.raises(ValueError, match=r"Mine: .* is no name: expected text without blanks, at most 100"):
        register(name)(Mine)


def test_an_error_without_words_is_still_one_line(tmp_path: Path) -> None:
    class Mute(ValueError):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    odd = ValueError("said")
    odd.__notes__ = 5
    assert registry.told(Mute()) == "Mute: (its text cannot be made)" == f"Mute: {registry.in_a_line(Mute())}"
    assert registry.told(odd) == "ValueError: (its text cannot be made)" and registry.in_a_line(odd) == "said"
    (file := tmp_path / "mute.py").write_text(
        "class Mute(ImportError):\n    def __str__(self):\n        raise RuntimeError\nraise Mute"
    )
    with pytest.raises(ValueError, match=r"mute.py cannot be imported: \(its text cannot be made\)"):
        registry.load_part(f"{file}:Mine")


def test_words_for_messages_and_figures() -> None:
    error = ValueError("first line\n   second\tline \x1b[31m")
    error.add_note("and a note")
    assert registry.told(error) == "ValueError: first line second line \\x1b[31m and a note"
    assert registry.told(KeyError()) == "KeyError" and len(registry.told(ValueError("x" * 9999))) == 500
    long = ["a" * 200 + end for end in "xy"]
    assert registry.literal("a $x$ \x1b") == r"a \$x\$ \x1b" and registry.literal("日本 ok") == "日本 ok"
    assert len({*map(registry.literal, long)}) == 2 and max(len(registry.literal(each)) for each in long) == 120


def test_a_class_that_calls_itself_as_a_shipped_one_is_refused(tmp_path):
    file = tmp_path / "same.py"
    file.write_text(
        "from malloc_bench.compressors.windowing.recent import Recent\nclass Mine(Recent):\n    name = 'recent'\n"
    )
    with pytest.raises(
        ValueError, match=r"Mine is named 'recent', as malloc_bench\..*\.Recent is: give it a name of its own"
    ):
        registry.load_part(f"{file}:Mine")


def test_a_file_that_another_of_the_users_imports_may_stand_beside_it(parts: Any, tmp_path: Path) -> None:
    (tmp_path / "base_of_mine.py").write_text(METHOD.format(name="a_base"))
    (tmp_path / "more_of_mine.py").write_text(
        "from base_of_mine import Theirs\n" + METHOD.format(name="b_mine").replace("Theirs(Recent)", "Mine(Theirs)")
    )
    for order in (("base", "more"), ("more", "base")):
        for each in order:
            spec = f"{tmp_path / each}_of_mine.py:{'Theirs' if each == 'base' else 'Mine'}"
            assert load_part(spec) == {"base": "a_base", "more": "b_mine"}[each]
    assert find("compressors", "a_base").__qualname__ == "Theirs"


def test_a_backbone_that_cannot_be_made_says_how_it_would_be() -> None:
    class Short(find("backbones", "sasrec")):
        def __init__(self, config: Any, n_items: int) -> None:
            super().__init__(config, n_items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._parts["backbones"], "short", Short)
        patch.setattr(Short, "name", "short", raising=False)
        with pytest.raises(
            ValueError, match=r"Short cannot be made as Short\(config, n_items, has_time\) \(TypeError: "
        ):
            part_checks(Short)
