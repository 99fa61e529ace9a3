"""What reaches a terminal: control characters as escapes, any encoding, and never a traceback."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from malloc_bench.cli import commands as cli
from malloc_bench.cli import text
from malloc_bench.results import cell_id, write_row
from malloc_bench.run.folder import write_manifest

SUITE = """
name: toy
datasets: [synthetic]
backbones: [sasrec]
compressors: [full]
"""
EVIL = "\x1b[31m"

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["show", f"ha{EVIL}"],
        ["run", f"{EVIL}.yaml"],
        ["run", "smoke", "--only", f"dataset={EVIL}"],
        ["data", "get", f"./{EVIL}.yaml"],
        ["data", "stats", f"{EVIL}\x07\x9b"],
        ["tables", f"{EVIL}"],
        ["list", f"{EVIL}"],
        [f"--{EVIL}"],
    ],
    ids=repr,
)
def test_what_a_user_or_a_file_names_cannot_steer_the_terminal(words: list[str], capsys: Capture) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\x9b" not in err and "\\x1b[31m" in err
    assert err.startswith("malloc-bench: ") and err.count("\n") == 1


def test_a_file_with_control_characters_in_its_text(tmp_path: Path, capsys: Capture) -> None:
    for evil in (EVIL, '"\\e[31m"'):
        (tmp_path / "toy.yaml").write_text(SUITE.replace("synthetic", evil))
        assert cli.main(["run", "toy.yaml", "--dry-run"]) == 2
        assert "line 3: the control character U+001B is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["20", "200", "999999999"])
def test_what_rows_name_cannot_steer_the_terminal(
    width: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    evil = f"a{EVIL}[red]:smile: \x9b"
    named = {"dataset": evil, "task": "retrieval", "split": evil, "backbone": evil, "seed": 0, "n_users": 5}
    values = {"ndcg@10": 0.1, "delta_ndcg@10": 0.0, "bytes_mean": 9.0, "ratio": 0.5, "overlap@10": 0.5}
    for name, more in ((evil, values), ("full", values), ("x", {"status": "failed", "reason": f"{evil}\nmore"})):
        row = {"compressor": name, "family": evil, "suite": evil, "compressor_params": {evil: evil}, **named}
        write_row(tmp_path / "run" / "rows", {"status": "ok", **row, **more, "cell_id": cell_id([name])})
    write_manifest(tmp_path / "run", {})
    commands = [["leaderboard", "run"], ["recommend", "run"], ["compare", "run", "run"], ["verify", "run"]]
    commands += [["tables", "run", "--table", "accuracy", "--format", each] for each in ("md", "csv", "latex")]
    for words in [*commands, ["recommend", "run", "--bytes", "1"], ["leaderboard", "run", "--columns", "compressor"]]:
        assert cli.main(words) == 0, words
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "\x9b" not in out + err and out, words
    assert width == "20" or ("[red]:smile:" in out and "\\x1b" in out)


@pytest.mark.parametrize("said, width", [("0", 80), ("2000", 2000), ("2001", 2000)])
def test_a_terminal_has_a_width_that_one_can_fill(said: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", said)
    assert text.console().width == width


def test_warnings_are_one_line_without_control_characters(capsys: Capture) -> None:
    text.set_up()
    text.set_up()
    logging.getLogger("malloc_bench.x").warning("a %s\nb", EVIL)
    assert capsys.readouterr().err == "a \\x1b[31m b\n"


def test_any_encoding_takes_any_text() -> None:
    code = "from malloc_bench.cli import text; text.set_up(); text.say('Δ ≤ é … 日 \\x1b \\udc80')"
    for encoding, shown in (("ascii", "d <= e ... ? \\x1b \\udc80"), ("utf-8", "Δ ≤ é … 日 \\x1b \\udc80")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
        )
        assert (done.returncode, done.stdout.decode(encoding)) == (0, shown + "\n"), done.stderr


def test_an_ascii_terminal_is_no_reason_to_fall(tmp_path: Path) -> None:
    commands = [["list", "datasets"], ["list", "suites"], ["show", "kuairand-pure"], ["show", "snapkv"], ["--help"]]
    code = f"from malloc_bench.cli import main; print([main(words) for words in {commands}])"
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=tmp_path)
    assert done.stdout.endswith(f"{[0] * len(commands)}\n".encode()) and done.stdout.isascii(), done.stderr.decode()


def test_an_unknown_name_is_answered_in_a_line_one_can_read(capsys: Capture) -> None:
    long = "q" * 5000
    named = [
        ["data", "get", "zz"],
        ["show", "zzzz"],
        ["show", "x" * 100_000],
        *(["data", it, long] for it in ("get", "card")),
    ]
    for words in [*named, *([it, long] for it in ("run", "plan", "report", "verify", "recommend", "check", "compare"))]:
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert len(err) < 300 and err.count(",") <= 3, err


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "home").write_text("a file where a folder should be")
    (tmp_path / "toy.yaml").write_text(SUITE)
    assert cli.main(["run", "toy.yaml", "--quiet"]) != 0
    out, err = capsys.readouterr()
    assert "MALLOC_BENCH_HOME" in out + err


def test_json_for_programs_has_any_name(capsys: Capture) -> None:
    text.say_json([{EVIL: '\x85\u202e\ud800é\n"'}])
    said = capsys.readouterr().out
    assert json.loads(said) == [{EVIL: '\x85\u202e\ud800é\n"'}] and "é" in said
    assert not any(sign in said for sign in "\x1b\x85\u202e")
