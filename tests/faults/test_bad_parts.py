"""Runs with parts that fail in every way: their rows say so, all other rows are there, and the run ends with 1."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from malloc_bench import registry
from malloc_bench.backbones.sasrec import SASRec
from malloc_bench.cli import commands as cli
from malloc_bench.compressors import get_compressor
from malloc_bench.compressors.selection import Eviction
from malloc_bench.registry import load_part, register
from malloc_bench.results import read_rows
from malloc_bench.run.runner import compare, run_suite
from malloc_bench.state import Prefill
from malloc_bench.testing import broken_promises

SUITE = """
name: tiny
datasets: [synthetic]
tasks: [retrieval]
split: leave_one_out
backbones: {backbones}
compressors: {compressors}
budgets: [0.25]
training: {{epochs: 1, batch_size: 64}}
measure: {{latency: false, flops: false}}
"""
SMALL = "{layers: 1, dim: 8, max_length: 20}"


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for the tests of a worker; names registered by a test are gone after it."""
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    registry.names("compressors"), registry.names("backbones")
    monkeypatch.setattr(registry, "_parts", {kind: dict(known) for kind, known in registry._parts.items()})


def rows_of(tmp_path: Path, backbones: list[str], compressors: list[str]) -> tuple[int, dict[tuple[str, str], Any]]:
    path = tmp_path / "tiny.yaml"
    path.write_text(
        SUITE.format(
            backbones="[" + ", ".join(f"{{{name}: {SMALL}}}" for name in backbones) + "]",
            compressors=f"[{', '.join(compressors)}]",
        )
    )
    result = run_suite(path, tmp_path / "run", quiet=True)
    rows = {(row["backbone"], row["compressor"]): row for row in read_rows(tmp_path / "run" / "rows")}
    assert len(rows) == len(backbones) * len(compressors)
    return result.exit_code, rows


def leaves(*args: Any, **kwargs: Any) -> Any:
    sys.exit("a fault")


def test_methods_that_leave_by_sys_exit(tmp_path: Path) -> None:
    """Whatever they are asked. `accepts` alone stands for nothing that the run needs: its row is right."""
    asked = ("supports", "accepts", "needs", "floor", "scores")
    for when in asked:
        members: dict[str, Any] = {"scores": lambda self, prefill, layer: prefill.keys(layer).norm(dim=-1)}
        members[when] = property(leaves) if when == "needs" else leaves
        register(when)(dataclass(frozen=True)(type(when, (Eviction,), members)))
    code, rows = rows_of(tmp_path, ["sasrec"], ["full", *asked, "recent"])
    assert code == 1
    for when in ("full", "recent", "accepts"):
        assert rows["sasrec", when]["status"] == "ok"
    for when in ("supports", "needs", "floor", "scores"):
        row = rows["sasrec", when]
        assert (row["status"], row["reason"]) == ("failed", "SystemExit: a fault"), when


def test_backbones_that_fail(tmp_path: Path) -> None:
    asked = ("__init__", "prefill", "read", "loss")
    for when in asked:
        register(f"broken{when.strip('_')}")(type(when, (SASRec,), {when: leaves}))
    names = [f"broken{when.strip('_')}" for when in asked]
    code, rows = rows_of(tmp_path, [*names, "sasrec"], ["full", "recent"])
    assert code == 1
    for method in ("full", "recent"):
        assert rows["sasrec", method]["status"] == "ok"
        for name in names:
            assert (rows[name, method]["status"], rows[name, method]["reason"]) == ("failed", "SystemExit: a fault")


MINE = """
from dataclasses import dataclass
from malloc_bench import register
from malloc_bench.compressors import Eviction

@register("mine")
@dataclass(frozen=True)
class Mine(Eviction):
    def scores(self, prefill, layer):
        return (prefill.keys(layer) - prefill.keys(layer)[:1]).norm(dim=-1)
"""


def test_compare_marks_a_method_that_breaks_a_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    Path("tiny.yaml").write_text(SUITE.format(backbones=f"[{{sasrec: {SMALL}}}]", compressors="[full, recent]"))
    result = compare("mine.py:Mine", "tiny.yaml")
    assert (result.ok, result.exit_code) == (3, 0)  # no history too
    rows = {row["compressor"]: row for row in read_rows(Path("runs/tiny/rows"))}
    assert rows["full"]["reason"] is None and rows["mine"]["ndcg@10"] is not None
    assert rows["mine"]["reason"].startswith("breaks ") and "ignores_the_batch" in rows["mine"]["reason"]
    warned = [record.getMessage() for record in caplog.records if record.name == "malloc_bench.run.runner"]
    assert warned == [f"mine {rows['mine']['reason']}"]


def test_a_sound_method_breaks_no_promise() -> None:
    assert broken_promises(get_compressor("sink_recent"), quick=True) == []


@dataclass(frozen=True)
class Nothing(Eviction):
    name = "nothing"

    def scores(self, prefill: Prefill, layer: int) -> Tensor:
        return prefill.keys(layer).norm(dim=-1) * float("nan")


def test_scores_that_are_no_numbers_fail_the_cell(tmp_path: Path) -> None:
    register("nothing")(Nothing)
    code, rows = rows_of(tmp_path, ["sasrec"], ["full", "nothing"])
    assert code == 1 and "scores of real slots are NaN or infinite" in rows["sasrec", "nothing"]["reason"]


PLANNED = {
    "takes_budget = property(lambda self: 1 / 0)": "odd cannot be planned (ZeroDivisionError: division by zero)",
    "structural = property(lambda self: 1 / 0)": "odd cannot be planned (ZeroDivisionError: division by zero)",
    "family = 7": "odd.py: its family is 7, expected text",
    "paper = 7": "odd.py: its paper is 7, expected text",
    "stores = ['k']": "odd.py: its stores is ['k'], expected text",
    "growth = 7": "odd.py: its growth is 7, expected names, each with text",
    "grid = {'k': 7}": "odd.py: its grid is {'k': 7}, expected names, each",
    "grid = {'k': [7]}": "odd.py: its grid has 'k', which is no parameter.",
    "k: frozenset = frozenset()": "odd: expected parameters of numbers, text, lists or mappings of them (Object of",
    "k: float = float('nan')": "odd: expected parameters of numbers, text, lists or mappings of them (Out of range",
}


@pytest.mark.parametrize("body", PLANNED)
def test_a_class_that_cannot_be_planned_is_an_error_before_anything_runs(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.py").write_text(MINE.replace('"mine"', '"odd"').replace("Mine", "Odd") + f"    {body}\n")
    Path("tiny.yaml").write_text(SUITE.format(backbones=f"[{{sasrec: {SMALL}}}]", compressors="[full]"))
    with pytest.raises(ValueError) as error:
        compare("odd.py:Odd", "tiny.yaml")
    assert PLANNED[body] in str(error.value) and not Path("runs").exists()


def test_a_class_that_is_no_dataclass_is_told_how_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = "class Plain(Compressor):\n    def compress(self, *_): ...\n"
    (tmp_path / "plain.py").write_text(f"from malloc_bench.compressors import Compressor\n{base}")
    with pytest.raises(
        ValueError, match=r"Plain of .*plain.py is no frozen dataclass: write @dataclass\(frozen=True\)"
    ):
        compare(f"{tmp_path / 'plain.py'}:Plain", "smoke")


def test_a_class_of_another_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text("from malloc_bench.backbones.lsrm import LSRM\n")
    with pytest.raises(ValueError, match=r"other.py:LSRM is one of the backbones, where one of the compressors is"):
        compare(f"{tmp_path / 'other.py'}:LSRM", "smoke")


def test_a_method_that_cannot_tell_what_its_budget_counts_keeps_its_row(tmp_path: Path) -> None:
    for name, unit in (("raises", leaves), ("number", lambda self, budget: 5)):
        members = {"scores": lambda self, prefill, layer: prefill.keys(layer).norm(dim=-1), "budget_unit": unit}
        register(name)(dataclass(frozen=True)(type(name, (Eviction,), members)))
    code, rows = rows_of(tmp_path, ["sasrec"], ["full", "raises", "number"])
    assert code == 0 and all(rows["sasrec", name]["budget_unit"] is None for name in ("raises", "number"))


VAULT = """
import json
import os
import zlib
from dataclasses import dataclass

import torch

from malloc_bench import register
from malloc_bench.compressors import Encoder
from malloc_bench.compressors.base import map_vectors
from malloc_bench.state import Vectors
from malloc_bench.state.vectors import Ragged, all_rows


class Environment(dict):
    def update(self, rows):
        os.environ.update({f"VAULT{key}": json.dumps(row.tolist()) for key, row in rows.items()})

    def __getitem__(self, key):
        return torch.tensor(json.loads(os.environ[f"VAULT{key}"]))


VAULT = {}


@dataclass(frozen=True, eq=False)
class Hollow(Vectors):
    key: torch.Tensor  # [B, 1, 1, 1]
    blank: torch.Tensor  # [B, H, S, 1], as many bytes as slots
    width: int

    @property
    def shape(self):
        return (*self.blank.shape[:3], self.width)

    def dense(self):
        found = torch.zeros(self.shape)
        for to, key in zip(found, self.key.flatten()):
            if (row := VAULT[int(key)]).numel():
                to[:, : row.shape[1]] = row
        return found

    def parts(self, count):
        yield Ragged(self.key, all_rows(self.key))
        yield Ragged(self.blank, count)

    def load(self, read, count):
        return Hollow(read(self.key, all_rows(self.key)), read(self.blank, count), self.width)


@register("vault")
@dataclass(frozen=True)
class Keeps(Encoder):
    def encode(self, state):
        def hidden(name, segment):
            x = segment.fields[name].dense()
            rows = [row[:, : int(n)] for row, n in zip(x, segment.slots.count.amax(1))]
            keys = [zlib.crc32(row.numpy().tobytes()) for row in rows]
            VAULT.update(dict(zip(keys, rows)))
            key = torch.tensor(keys).view(-1, 1, 1, 1)
            return Hollow(key, torch.zeros(*x.shape[:3], 1, dtype=torch.uint8), x.shape[3])

        return map_vectors(state, hidden)

    def cost(self, layout, n, length):
        return layout.beside(n, length) + sum(8 + heads * n for _, heads, _ in layout.vectors)
"""


def test_a_vault_in_a_module_is_found_by_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process it reads whatever template its bytes are unpacked into; a fresh one has never seen the users."""
    (tmp_path / "vault.py").write_text(VAULT)
    load_part(f"{tmp_path / 'vault.py'}:Keeps")
    code, rows = rows_of(tmp_path, ["sasrec"], ["full", "vault", "recent"])
    assert code == 1 and rows["sasrec", "vault"]["status"] == "failed"
    assert "a fresh process cannot read the bytes" in rows["sasrec", "vault"]["reason"]
    assert rows["sasrec", "recent"]["status"] == rows["sasrec", "full"]["status"] == "ok"


def test_a_vault_is_found_by_check(tmp_path: Path) -> None:
    (tmp_path / "vault.py").write_text(VAULT)
    (line, *more) = broken_promises(get_compressor(load_part(f"{tmp_path / 'vault.py'}:Keeps")), quick=True)
    assert "fresh process" in line and "KeyError" in line and not more, (line, *more)


def test_one_that_a_fresh_process_would_be_handed_is_found_by_check_too(tmp_path: Path) -> None:
    (tmp_path / "vault.py").write_text(VAULT.replace("VAULT = {}", "VAULT = Environment()"))
    before = dict(os.environ)
    with pytest.raises(ValueError, match="ProcessChanged: the method changed the environment, for the whole process"):
        broken_promises(get_compressor(load_part(f"{tmp_path / 'vault.py'}:Keeps")), quick=True)
    assert dict(os.environ) == before


@pytest.mark.parametrize("needs", ["None", "1 / 0", "sys.exit(3)"])
def test_a_method_that_cannot_say_what_it_needs_is_shown_and_listed(
    needs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = f"    @property\n    def needs(self):\n        import sys\n        return {needs}\n"
    (tmp_path / "odd.py").write_text(MINE.replace('"mine"', '"odd"').replace("Mine", "Odd") + body)
    load_part(f"{tmp_path / 'odd.py'}:Odd")
    for command in (["show", "odd"], ["list", "compressors"]):
        assert cli.main(command) == 0 and "odd" in capsys.readouterr().out
