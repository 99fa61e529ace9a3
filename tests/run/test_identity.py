"""Whatever a number depends on is in its identity: change it, run again, and nothing old is served."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from malloc_bench import registry
from malloc_bench.data.sources import cards
from malloc_bench.measure import STORES, StoreError
from malloc_bench.report.leaderboard import leaderboard
from malloc_bench.results import load_results, read_rows
from malloc_bench.run import rows
from malloc_bench.run.runner import reproduce, run_suite
from malloc_bench.suite import cells, suite, tuning
from malloc_bench.training import fit as training

SASREC = {"sasrec": {"layers": 1, "dim": 8, "max_length": 12}}
CATEGORIES = {"climber": {"layers": 1, "dim": 8, "max_length": 12, "blocks": 2, "strategy": "category"}}
ABOUT = dict.fromkeys(("title", "description", "licence", "citation", "homepage"), "-")


class World:
    """A card, its files and a suite of one cell, in a cache of its own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        (folder / "cards").mkdir()
        monkeypatch.setenv("MALLOC_BENCH_DATA", str(folder))
        monkeypatch.setattr(cards, "shipped", lambda kind: folder / "cards")
        draw, lines = np.random.default_rng(0), ["userId,movieId,rating,timestamp"]
        for user in range(1, 41):
            for place, item in enumerate(draw.permutation(30)[:16], 1):
                lines.append(f"{user},{item + 1},{draw.integers(1, 6)},{1000 * user + 60 * place}")
        lines.append(lines[-1])  # one event twice
        (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
        self.card()
        self.home("home")

    def home(self, name: str) -> None:
        self.patch.setenv("MALLOC_BENCH_HOME", str(self.folder / name))

    def card(self, **changes: Any) -> None:
        source = {"format": "movielens-csv", "sources": [{"local": "ratings.csv"}]}
        (self.folder / "cards" / "toy.yaml").write_text(yaml.safe_dump({**ABOUT, **source, **changes}))

    def categories(self, names: str) -> None:
        """A card whose items are of these categories in turn."""
        lines = [f"{item},film {item},{names[item % len(names)]}" for item in range(1, 31)]
        (self.folder / "movies.csv").write_text("\n".join(["movieId,title,genres", *lines]) + "\n")
        self.card(categories=[{"local": "movies.csv", "format": "movielens-movies-csv"}])

    def run(self, out: str = "run", backbone: Any = SASREC, **changes: Any) -> tuple[Any, dict[str, Any]]:
        """What the run came to, and the row of its cell."""
        content = {
            "name": "toy", "datasets": ["toy"], "tasks": ["retrieval"], "split": "ratio", "backbones": [backbone],
            "compressors": ["full"], "training": {"epochs": 1, "amp": "fp32"},
            "measure": {"latency": False, "flops": False},
        } | changes  # fmt: skip
        path = self.folder / "toy.yaml"
        path.write_text(yaml.safe_dump(content))
        planned = [each.id for each in run_suite(path, self.folder / out, dry_run=True).plan]
        result = run_suite(path, self.folder / out, quiet=True)
        assert [each.id for each in result.plan] == planned and result.failed == 0
        (row,) = [row for row in read_rows(self.folder / out / "rows") if row["cell_id"] == planned[0]]
        return result, row


NUMBERS = ("hr@10", "ndcg@10", "mrr", "auc", "gauc", "logloss", "bytes_mean", "amp")


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in NUMBERS}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def changed(world: World, first: Callable[[], None], second: Callable[[], None], **suite: Any) -> None:
    """After the change nothing is reused, and the numbers are those of a cache that never saw the first."""
    first()
    _, before = world.run(**suite)
    second()
    again, after = world.run(**suite)
    assert again.reused == 0 and before["hashes"]["checkpoint"] != after["hashes"]["checkpoint"]
    world.home("other")
    _, alone = world.run(out="other-run", **suite)
    assert numbers(after) == numbers(alone) and after["cell_id"] == alone["cell_id"]
    assert after["hashes"]["weights"] == alone["hashes"]["weights"]


@pytest.mark.parametrize(
    ("first", "second", "task"),
    [
        ({"label": {"column": "rating", "at_least": 4}}, {"label": {"column": "rating", "at_least": 2}}, "ranking"),
        ({"keep": ["rating"]}, {"keep": []}, "retrieval"),
        ({"on_bad": {"duplicates": "keep"}}, {"on_bad": {"duplicates": "drop"}}, "retrieval"),
    ],
    ids=["label", "keep", "on_bad"],
)
def test_what_a_card_says_of_the_data(world: World, first: Any, second: Any, task: str) -> None:
    changed(world, lambda: world.card(**first), lambda: world.card(**second), tasks=[task])


def test_categories_count_where_they_are_used(world: World) -> None:
    changed(world, lambda: world.categories("ABCD"), lambda: world.categories("AABC"), backbone=CATEGORIES)
    assert world.run(backbone=SASREC)[0].ok == 1
    world.categories("ABBB")
    assert world.run(backbone=SASREC)[0].reused == 1


def test_what_tune_chose_may_read_categories(world: World) -> None:
    """The identity of a cell is that of the method which it runs, not of the one that this stands for."""
    world.categories("ABCD")
    result, _ = world.run(compressors=["recent"], budgets=[0.3])
    cell, path = result.plan[0].cell, world.folder / "tuned.yaml"
    about: dict[str, Any] = {"dataset": "toy", "task": "retrieval", "split": cell.split.label}
    about |= {"backbone": cell.backbone.label, "compressor": "recent", "use": {"category_cover": {}}}
    tuning.write(path, "toy", "mrr", [tuning.Choice(**about, score=1.0, default=1.0, trials=1)])
    result, row = world.run(compressors=["recent"], budgets=[0.3], tuned=str(path))
    assert row["compressor"] == "category_cover" and row["tuned"]
    assert world.run(compressors=["category_cover"], budgets=[0.3])[0].reused == 1
    world.categories("AABC")
    assert world.run(compressors=["recent"], budgets=[0.3], tuned=str(path))[0].reused == 0


def test_categories_that_no_source_has_are_a_failed_row(world: World) -> None:
    world.categories("AB")
    (world.folder / "movies.csv").unlink()
    with pytest.raises(AssertionError):  # it did not go well
        world.run(backbone=CATEGORIES)
    (row,) = read_rows(world.folder / "run" / "rows")
    assert row["status"] == "failed" and "no source of its items' categories answered" in row["reason"]
    world.categories("AB")
    assert world.run(backbone=CATEGORIES)[0].ok == 1


def test_the_arithmetic_that_auto_comes_to(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines have two ids; what is asked for by name is what auto comes to."""
    rows = {}
    for fast, name in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(training, "fast_bfloat16", lambda device, fast=fast: fast)
        result, rows[name] = world.run(training={"epochs": 1, "amp": "auto"})
        assert result.ok == 1 and rows[name]["amp"] == name and rows[name]["cell"]["training"]["amp"] == name
        assert world.run(training={"epochs": 1, "amp": name})[0].reused == 1
    assert rows["bf16"]["hashes"]["checkpoint"] != rows["fp32"]["hashes"]["checkpoint"]
    assert rows["bf16"]["hashes"]["weights"] != rows["fp32"]["hashes"]["weights"]
    assert reproduce(world.folder / "run", rows["bf16"]["cell_id"]) == []  # on a machine where auto is fp32


def test_reproduce_says_when_the_cell_is_another_one_today(world: World) -> None:
    world.card(label={"column": "rating", "at_least": 4})
    _, row = world.run()
    world.card(label={"column": "rating", "at_least": 3})
    (said,) = reproduce(world.folder / "run", row["cell_id"])
    assert "another cell today: data.label.at_least: 4.0 then, 3.0 now" in said


METHOD = """
from dataclasses import dataclass
from pathlib import Path
from malloc_bench import register
from malloc_bench.compressors import Eviction

@register("scaled")
@dataclass(frozen=True)
class Scaled(Eviction):
    book: str = "none"
    family, paper, formula, stores = "eviction", "none", "score = c |v|", "k events"

    @property
    def files(self):
        return (self.book,)

    def scores(self, prefill, layer):
        return prefill.values(layer).norm(dim=-1) * float(Path(self.book).read_text())
"""


@pytest.mark.parametrize("chain", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_file_that_a_method_reads(chain: bool, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    (world.folder / "scaled.py").write_text(METHOD)
    registry.load_part(f"{world.folder / 'scaled.py'}:Scaled")

    def run(book: Path) -> tuple[Any, dict[str, Any]]:
        step = {"scaled": {"book": str(book)}}
        return world.run(compressors=[{"compose": [step, "int8"]} if chain else step], budgets=[0.2])

    book, moved = world.folder / "book.txt", world.folder / "moved.txt"
    book.write_text("1.0")
    _, first = run(book)
    moved.write_text("1.0")
    assert run(moved)[0].reused == 1  # where it lies changes nothing
    book.write_text("-1.0")
    again, second = run(book)
    assert again.ok == 1 and first["overlap@10"] != second["overlap@10"]
    assert first["hashes"]["checkpoint"] == second["hashes"]["checkpoint"]
    assert str(book) not in json.dumps(first["cell"])
    book.unlink()
    with pytest.raises(
        ValueError,
        match=r"compressors\[0\]\..*: scaled reads the file .*book.txt, which is not there or cannot be read$",
    ):
        run(book)


def test_one_suite_object_sees_a_file_that_changes_between_two_runs(world: World, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    (world.folder / "scaled.py").write_text(METHOD)
    registry.load_part(f"{world.folder / 'scaled.py'}:Scaled")
    part, seen = cells.Part("scaled", {"book": str(world.folder / "book.txt")}), []
    for text in ("1.0", "2.0"):
        (world.folder / "book.txt").write_text(text)
        seen.append(suite._anew([part])[0].content["files"])
    assert seen[0] != seen[1]


@pytest.mark.slow
def test_an_edit_that_is_taken_back_is_no_longer_what_tables_show(world: World, monkeypatch) -> None:
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    monkeypatch.setattr(rows, "_now", map("2026-01-01T00:00:{:02d}+00:00".format, range(60)).__next__)
    (world.folder / "scaled.py").write_text(METHOD)
    registry.load_part(f"{world.folder / 'scaled.py'}:Scaled")
    book, shown = world.folder / "book.txt", []
    for text in ("1.0", "-1.0", "1.0", "-1.0"):
        book.write_text(text)
        world.run(compressors=["full", {"scaled": {"book": str(book)}}], budgets=[0.3])
        board = leaderboard(load_results(world.folder / "run"))
        shown.append(board.filter(family="eviction")["overlap@10"].to_list())
    assert shown[0] == shown[2] != shown[1] == shown[3] and len(shown[0]) == 1
    assert len(read_rows(world.folder / "run/rows")) == 3  # all as written


HELPED = """
from dataclasses import dataclass

AT_THE_TOP
from malloc_bench import register
from malloc_bench.compressors import Eviction


@register("helped")
@dataclass(frozen=True)
class Helped(Eviction):
    def scores(self, prefill, layer):
        WHEN_CALLED
        return SIGN * prefill.keys(layer).norm(dim=-1)
"""
FOUND = {
    "a module": ("import helper_of_mine", "SIGN = helper_of_mine.SIGN"),
    "a number of it": ("from helper_of_mine import SIGN", "pass"),
    "when called": ("", "from helper_of_mine import SIGN"),
    "of a package, when called": ("", "from helpers_of_mine.inner import SIGN"),
    "through another": ("from helpers_of_mine import SIGN", "pass"),
    "by name": ("import importlib; helper = importlib.import_module('helper_of_mine')", "SIGN = helper.SIGN"),
}


@pytest.mark.parametrize("how", FOUND)
def test_a_module_that_a_methods_file_imports(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    monkeypatch.setattr(sys, "path", [*sys.path])
    top, called = FOUND[how]
    (tmp_path / "mine.py").write_text(HELPED.replace("AT_THE_TOP", top).replace("WHEN_CALLED", called))
    (tmp_path / "helpers_of_mine").mkdir()
    (tmp_path / "helpers_of_mine" / "__init__.py").write_text("def SIGN():\n    from .inner import SIGN\n")
    found = []
    for sign in ("1", "-1", "1"):
        for file in ("helper_of_mine.py", "helpers_of_mine/inner.py"):
            (tmp_path / file).write_text(f"SIGN = {sign}\n")
        for name in ("helper_of_mine", "helpers_of_mine", "helpers_of_mine.inner"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        registry.load_part(f"{tmp_path / 'mine.py'}:Helped")
        found.append(cells.Part("helped").content["source"])
    assert found[0] == found[2] != found[1]


def test_another_workload_is_measured_again(world: World) -> None:
    workloads = [{"latency": False, "users": 2}, {"latency": False, "users": 2, "candidates": 5}]
    flops = [world.run(measure=workload)[1]["read_flops"] for workload in workloads]
    assert flops[1] > flops[0]
    assert world.run(measure=workloads[1])[0].reused == 1


def test_drift_that_is_asked_for_later_is_computed(world: World) -> None:
    """Of those too that have none: no run goes on computing them."""
    methods: dict[str, Any] = {"compressors": ["full", "recompute", {"recent": {}}], "budgets": [0.3]}
    off = {"latency": False, "flops": False}
    assert world.run(**methods)[0].ok == 3
    for steps, ok in (([1], 3), ([1], 0), ([1, 5], 3), ([5], 0), ([50], 3), ([50], 0), ([], 0)):
        result, row = world.run(**methods, measure={**off, "drift": steps})
        assert (result.ok, result.reused) == (ok, 3 - ok), steps
        assert all(row[f"drift@{n}"] == 0 for n in steps if n < 50)


def test_drift_too_is_of_the_budgets_that_are_measured(world: World) -> None:
    methods: dict[str, Any] = {"compressors": ["full", {"recent": {}}], "budgets": [0.3, 0.1]}
    measure = {"latency": False, "flops": False, "drift": [1], "budgets": [0.1]}
    assert world.run(**methods, measure=measure)[0].ok == 3
    known = {row["budget"]: row["drift_users@1"] for row in read_rows(world.folder / "run/rows")}
    assert known["0.3"] is None and known["0.1"] > 0 and known[None] > 0
    assert world.run(**methods, measure=measure)[0].reused == 3


def test_another_store_or_other_candidates_are_measured_again(world: World) -> None:
    def run(store: str | None, candidates: Any) -> tuple[int, dict[str, Any]]:
        measure = {"latency": False, "flops": False, "users": 2, "seconds": 0.01}
        result, row = world.run(measure={**measure, "candidates": candidates, **({"store": store} if store else {})})
        return result.reused, row

    reused, row = run(None, 1)
    assert reused == 0 and row["store"] is row["requests"] is None
    for store, candidates in (("dict", 2), ("lmdb", 2), ("lmdb", [2, 5]), ("lmdb", [5, 2])):
        reused, row = run(store, candidates)
        many = candidates if isinstance(candidates, list) else [candidates]
        assert reused == 0 and row["store"] == store and row["measured_candidates"] == many[0]
        assert row["requests"].keys() == set(map(str, many))
        assert row["request_ms_p50"] == row["requests"][str(many[0])]["request_ms_p50"] > 0
        assert run(store, candidates)[0] == 1
    assert run("lmdb", [5])[0] == 1  # one of those that are there


def test_a_store_that_is_not_installed_is_one_line_before_anything_runs(world: World, monkeypatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(StoreError, match=r"^redis: there is no redis-server"):
        world.run(measure={"store": "redis"})
    assert not (world.folder / "run").exists()


def test_a_store_that_fails_costs_a_row_nothing_but_its_requests(world: World, monkeypatch) -> None:
    def start(self: Any) -> None:
        raise StoreError("lmdb: no room")

    measure = {"flops": False, "users": 2, "seconds": 0.01, "store": "lmdb"}
    with monkeypatch.context() as patch:
        patch.setattr(STORES["lmdb"], "__init__", start)
        result, row = world.run(measure=measure)
    assert result.ok == 1 and row["ndcg@10"] is not None and row["read_ms_p50"] > 0
    assert row["request_timing"] == "failed: lmdb: no room" and row["request_ms_p50"] is None
    result, row = world.run(measure=measure)
    assert (
        result.reused == 0
        and row["request_ms_p50"] > 0
        and row["request_timing"] in ("ok", "noisy", "busy", "noisy, busy")
    )
