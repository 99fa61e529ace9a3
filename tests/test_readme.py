"""What the README tells a new user to do, done."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
TINY = """
name: tiny
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 30}}]
compressors: [full, recent, {snapkv: {window: 4}}, knorm]
budgets: [0.25]
training: {epochs: 1, batch_size: 64}
measure: {latency: false}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (tmp_path / "my_method.py").write_text(code)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def typed(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of the README, in an empty folder."""
    words = line.split("#")[0].split()
    assert words[0] == "malloc-bench"
    return subprocess.run(
        [sys.executable, "-m", "malloc_bench.cli", *words[1:]], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_snippet_is_compared_with_baselines(folder: Path) -> None:
    (line,) = re.findall(r"^malloc-bench compare my_method.*$", README, re.M)
    done = typed(line.replace("--suite quick", "--suite tiny.yaml"), folder)
    assert done.returncode == 0, done.stderr
    for name in ("my_method", "snapkv", "recent", "full"):
        assert re.search(rf"^\W*{name}\b", done.stdout, re.M), done.stdout
    assert not re.search(r"^\W*knorm\b", done.stdout, re.M)
    assert re.search(r"[+-]\d\.\d{4} \[[+-]\d\.\d{4}, [+-]\d\.\d{4}\]", done.stdout)
    assert "5 ok" in done.stdout and "0 failed" in done.stdout


def test_the_snippet_keeps_every_promise(folder: Path) -> None:
    (line,) = re.findall(r"^malloc-bench check my_method.*$", README, re.M)
    done = typed(line, folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["Unusual", "Shallow"])
def test_the_other_snippets_keep_every_promise(name: str, folder: Path) -> None:
    (code,) = [code for code in re.findall(r"```py\n(.*?)```", README, re.S) if f"class {name}(" in code]
    (folder / "snippet.py").write_text(code)
    done = typed(f"malloc-bench check snippet.py:{name}", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    kept, total = re.findall(r"^(\d+) of (\d+) promises", done.stdout, re.M)[0]
    assert kept == total and int(total) > 50


def test_every_command_of_the_table_is_there() -> None:
    table = re.findall(r"^\| `malloc-bench ([a-z]+)", README, re.M)
    known = subprocess.run(
        [sys.executable, "-m", "malloc_bench.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert len(table) > 8 and all(f" {name} " in known.stdout for name in table)
