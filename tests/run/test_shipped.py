"""Every shipped suite runs with every one of its backbones, and every backbone in either arithmetic: at a tiny size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from malloc_bench.data import Dataset, load_card
from malloc_bench.data.dataset import Rows, group
from malloc_bench.data.tasks.splits import LeaveOneOut
from malloc_bench.data.tasks.tasks import Ranking, Retrieval
from malloc_bench.data.worlds.synthetic import generate
from malloc_bench.paths import shipped
from malloc_bench.registry import names
from malloc_bench.results import read_rows
from malloc_bench.run import runner
from malloc_bench.run.runner import run_suite
from malloc_bench.suite.cells import Part
from malloc_bench.suite.file import Measure
from malloc_bench.suite.suite import Suite, load_suite
from malloc_bench.training import fit as training
from malloc_bench.training.fit import Training

SUITES = sorted(path.stem for path in shipped("suites").glob("*.yaml"))
LENGTH = 16
RUN_BEFORE = ("heads", "papers", "scaling")  # their committed rows are older than the second floor
NO_SLOTS = ("recurrent",)  # a memory of constant size cannot read it
#: Built as another that is tried with every change; `make test-slow`: these too.
ALIKE = (
    "climber", "fitted", "fitted_codes", "fitted_sets", "fitted_short", "fitted_wide", "lsrm", "lsrm_ablation",
    "lsrm_repeats", "malloc", "methods", "ml1m", "papers", "recurrent", "reference_amazon", "reference_fast",
    "reference_small", "requests", "synthetic",
)  # fmt: skip


@cache
def small(name: str, **options: Any) -> Dataset:
    """Under a shipped card: 40 users, 30 items, ratings, times and categories; a generated world in small."""
    card = load_card(name)
    if card.parameters is not None:
        sizes = {"users": 40, "items": 30, "median": 14, "shortest": 6, "longest": 20}
        card = card.model_copy(update={"parameters": card.parameters.model_copy(update=sizes)})
        return group(card, generate(card.parameters), "test")
    draw = np.random.default_rng(0)
    users = np.repeat(np.arange(40), draw.integers(8, 20, 40))
    items = np.concatenate([draw.permutation(30)[:count] for count in np.bincount(users)])
    stars = draw.integers(1, 6, len(users)).astype(np.float32)
    data = group(card, Rows(users, items, 3_000 * np.arange(len(users)), True, {"rating": stars}), "test")
    data.__dict__["categories"] = np.arange(data.n_items) % 4
    return data


def shrunk(suite: Suite) -> Suite:
    """The same structure: few, small and short; the full state, the first method with a budget, and the last one."""

    def less(part: Part) -> Part:
        params = {**part.params, "layers": 1, "dim": 8 * part.params.get("heads", 1), "max_length": LENGTH}
        return replace(part, params=params, training={**part.training, "epochs": 1} if part.training else {})

    def few(split: Any) -> Any:
        return split.model_copy(update={"long": 10}) if getattr(split, "long", None) else split

    budgeted = [part for part in suite.compressors if part.build().takes_budget]
    methods = dict.fromkeys([*suite.compressors[:1], *budgeted[:1], suite.compressors[-1]])
    return replace(
        suite,
        datasets=suite.datasets[: 2 if len(suite.datasets) < 4 else 1],
        backbones=tuple(dict.fromkeys(map(less, suite.backbones))),
        compressors=tuple(methods),
        splits=tuple(
            each.model_copy(update={"long": 10}) if getattr(each, "long", 0) else each for each in suite.splits
        ),
        budgets=suite.budgets[-1:],
        seeds=suite.seeds[:1],
        training=replace(suite.training, epochs=1),
        measure=replace(suite.measure, history=LENGTH, users=2, seconds=0.001),
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache and one folder: what suites share is trained and run once."""
    folder = tmp_path_factory.mktemp("shipped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_BENCH_HOME", str(folder / "home"))
        patch.setattr(runner, "get_dataset", small)
        patch.setattr("gc.collect", lambda: 0)  # before each latency, which is not judged here
        yield folder / "run"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in SUITES]
)
def test_a_shipped_suite_runs(name: str, out: Path) -> None:
    suite = shrunk(load_suite(name))
    planned = run_suite(suite, out, dry_run=True)
    result = run_suite(suite, out, quiet=True)
    assert [each.id for each in result.plan] == [each.id for each in planned.plan]
    assert len({each.cell.backbone for each in result.plan}) == len(suite.backbones)
    failed = {row["reason"] for row in read_rows(out / "rows") if row["status"] == "failed"}
    assert not failed and result.ok + result.skipped + result.reused == len(result.plan)
    assert not result.skipped or name in ("full", "malloc")  # which cross everything with everything


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_of_methods_has_both_floors(name: str) -> None:
    suite = load_suite(name)
    methods = {part.name for part in suite.compressors}
    assert "none" in methods
    if suite.budgets and name not in RUN_BEFORE + NO_SLOTS:
        assert "fit_constant" in methods


@pytest.mark.parametrize("fast", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("amp", ["auto", "bf16", "fp32"])
def test_every_backbone_runs_on_both_kinds_of_machine(amp: str, fast: bool, out: Path, monkeypatch) -> None:
    """Forced, or as the machine has it: the same cells, whatever the machine."""
    monkeypatch.setattr(training, "fast_bfloat16", lambda device: fast)
    suite = Suite(
        name="machines",
        path=Path("machines"),
        datasets=("ml-100k",),
        tasks=(Retrieval(), Ranking()),
        splits=(LeaveOneOut(),),
        backbones=tuple(
            Part(name, {"layers": 1, "dim": 8, "max_length": LENGTH}, "backbones") for name in names("backbones")
        ),
        compressors=(Part("full"),),
        budgets=(),
        seeds=(0,),
        training=Training(epochs=1, amp=amp),
        measure=Measure(latency=False, flops=False),
    )
    result = run_suite(suite, out, quiet=True)
    assert result.failed == 0 and len(result.plan) == 2 * len(suite.backbones)
    wanted = amp if amp != "auto" else "bf16" if fast else "fp32"
    rows = {row["cell_id"]: row for row in read_rows(out / "rows")}
    assert {rows[each.id]["amp"] for each in result.plan} == {wanted}
