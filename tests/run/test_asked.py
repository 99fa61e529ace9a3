"""LSRM's tasks in a run: weights are shared with the plain task, chunks and rows are not."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from malloc_bench.data.sources import cards
from malloc_bench.results import load_results
from malloc_bench.run.loaded import load_run
from malloc_bench.run.runner import reproduce, run_suite
from malloc_bench.suite.plan import checkpoint_folder, partial_name

ABOUT = dict.fromkeys(("title", "description", "licence", "citation", "homepage"), "-")
SUITE = {
    "name": "toy", "datasets": ["toy"], "split": {"leave_one_out": {"last": 3}},
    "tasks": ["retrieval", *({"retrieval": each} for each in ({"history": 4}, {"delete": 0.5}, {"steps": 3}))],
    "backbones": [{"sasrec": {"layers": 1, "dim": 8, "max_length": 12}}], "compressors": ["full", "none", "recent"],
    "budgets": [0.5], "training": {"epochs": 1, "amp": "fp32"},
    "measure": {"latency": False, "flops": False, "drift": [1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    draw, lines = np.random.default_rng(0), ["userId,movieId,rating,timestamp"]
    for user in range(1, 41):
        for place, item in enumerate(draw.permutation(30)[:16], 1):
            lines.append(f"{user},{item + 1},3,{1000 * user + 60 * place}")
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    (folder / "cards").mkdir()
    source = {"format": "movielens-csv", "sources": [{"local": "ratings.csv"}]}
    (folder / "cards" / "toy.yaml").write_text(yaml.safe_dump({**ABOUT, **source}))
    (folder / "toy.yaml").write_text(yaml.safe_dump(SUITE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_BENCH_DATA", str(folder))
        patch.setenv("MALLOC_BENCH_HOME", str(folder / "home"))
        patch.setattr(cards, "shipped", lambda kind: folder / "cards")
        yield run_suite(folder / "toy.yaml", folder / "run", quiet=True), folder / "run"


def test_one_training_serves_all_and_nothing_else_is_shared(run):
    result, folder = run
    assert (result.ok, result.failed, result.skipped) == (12, 0, 0)
    assert len(list((folder / "checkpoints").iterdir())) == 1
    cells = [each.cell for each in result.plan]
    assert len({checkpoint_folder(cell) for cell in cells}) == 1 and len({cell.id for cell in cells}) == 12
    assert len({partial_name(cell) for cell in cells}) == 4, "a killed run goes on with chunks of its own task"


def test_who_is_tested_is_nothing_to_the_weights(run):
    cell = run[0].plan[0].cell

    def asked(**options):
        return replace(cell, split=cell.split.model_copy(update=options))

    few, idle = asked(test_users=5), asked(valid_users=5)
    assert checkpoint_folder(few) == checkpoint_folder(cell) != checkpoint_folder(idle) and few.id != cell.id


def test_rows_have_the_task_its_lengths_and_its_steps(run):
    frame = load_results(run[1])
    full = {row["task"]: row for row in frame.filter(compressor="full").iter_rows(named=True)}
    assert set(full) == {"retrieval", "retrieval(history=4)", "retrieval(delete=0.5)", "retrieval(steps=3)"}
    assert {row["n_users"] for row in full.values()} == {40}
    whole = full["retrieval"]["bytes_full"]
    assert (
        full["retrieval(history=4)"]["bytes_full"] < 0.4 * whole < full["retrieval(delete=0.5)"]["bytes_full"] < whole
    )
    assert [name for name, row in full.items() if row["steps"]] == ["retrieval(steps=3)"]
    steps = json.loads(full["retrieval(steps=3)"]["steps"])
    assert [steps[each]["n_users"] for each in "123"] == [40] * 3
    quarters = json.loads(full["retrieval"]["slices"])
    assert sum(quarters[f"popularity {q}/4"]["n_users"] for q in (1, 2, 3, 4)) == 40
    assert frame.filter(task="retrieval(steps=3)")["drift@1"].is_not_null().all(), "drift is of one step"


def test_a_row_is_computed_again_and_its_states_are_of_what_is_known(run):
    for task in ("retrieval(delete=0.5)", "retrieval(steps=3)"):
        assert reproduce(run[1], {"task": [task], "compressor": ["recent"]}) == []
    states = load_run(run[1]).states({"task": "retrieval(history=4)", "compressor": "recent"}, users=8)
    assert states.full.length.tolist() == [3] * 8


def test_a_suite_that_asks_nobody_trains_nothing_and_says_why(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(run[1].parent))
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cards, "shipped", lambda kind: run[1].parent / "cards")
    asked = {**SUITE, "tasks": ["retrieval", "ranking"], "split": {"leave_one_out": {"long": 200}}}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(asked))
    result = run_suite(tmp_path / "long.yaml", tmp_path / "run", quiet=True)
    assert (result.ok, result.failed, result.skipped) == (0, 0, 6) and not (tmp_path / "run" / "checkpoints").exists()
    why = (
        r"with the split leave_one_out\(long=200\) nobody is tested: the longest of 40 histories has 16 (liked )?events"
    )
    assert load_results(tmp_path / "run")["reason"].str.contains(why).all()
    asked["split"] = {"leave_one_out": {"min_history": 5, "max_history": 2}}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(asked))
    with pytest.raises(ValueError, match=r"max_history must be min_history \(5\) or more, not 2"):
        run_suite(tmp_path / "long.yaml", tmp_path / "run", quiet=True)
