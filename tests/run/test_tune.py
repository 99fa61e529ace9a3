"""Parameters chosen on validation targets, never the test's, each method over as many settings; and used by a run."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
import pytest
import yaml

from malloc_bench import registry
from malloc_bench.cli import commands as cli
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.splits import get_split
from malloc_bench.files import file_digest
from malloc_bench.registry import find, names
from malloc_bench.results import read_rows
from malloc_bench.run import session
from malloc_bench.run.runner import reproduce, run_suite
from malloc_bench.run.tune import tune
from malloc_bench.suite import tuning
from malloc_bench.suite.cells import Part
from malloc_bench.suite.suite import SuiteError, load_suite
from malloc_bench.suite.tuning import TRIALS, Tuned, derived, trials

SUITE = {
    "name": "t", "datasets": ["synthetic"], "split": "leave_one_out",
    "backbones": [{"sasrec": {"layers": 1, "dim": 8, "max_length": 30}}],
    "compressors": ["full", "recent", "ends", {"snapkv": {"window": 4}}, {"kivi": {"bits": 2}}], "budgets": [0.5, 0.1],
    "training": {"epochs": 1, "batch_size": 64}, "measure": {"latency": False, "flops": False},
}  # fmt: skip
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.getbasetemp() / "tune-home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


def write(folder: Path, **changes) -> None:
    (folder / "t.yaml").write_text(yaml.safe_dump({**SUITE, **changes}))


@pytest.mark.parametrize("name", names("compressors"))
def test_no_method_has_more_trials_than_others(name: str) -> None:
    cls = find("compressors", name)
    assert not cls.grid or 2 <= prod(map(len, cls.grid.values())) <= TRIALS
    found = trials(Part(name)) if name != "compose" else []
    assert len({str(each.content) for each in found}) == len(found), "each setting once"
    if cls.grid:
        assert len(found) == prod(map(len, cls.grid.values())), "all can be made, the default is one of them"
        assert found[0].content == Part(name).content, "it comes first"


def test_what_the_suite_fixes_stays_and_a_chain_has_no_more_trials_than_a_method() -> None:
    assert [each.params for each in trials(Part("snapkv", {"window": 4}))] == [
        {"window": 4, "kernel": 5}, {"window": 4, "kernel": 1},
    ]  # fmt: skip
    chain = trials(Part("compose", {"steps": ["ends", {"kivi": {"bits": 4}}]}))
    assert len(chain) == 4 and {str(each.params["steps"][1]) for each in chain} == {
        "{'kivi': {'bits': 4, 'group': None}}"
    }
    assert len(trials(Part("compose", {"steps": ["recent", {"kivi": {"bits": 4}}]}))) == 4
    assert len(trials(Part("recent"))) == 1


def test_the_best_on_validation_is_chosen_by_brute_force_and_a_run_takes_it(folder: Path) -> None:
    found = tune("t.yaml", quiet=True)
    assert found.result.failed == 0 and found.path == Path("runs/t-tune/tuned.yaml")
    rows = read_rows(Path("runs/t-tune/rows"))
    assert {row["split"] for row in rows} == {"leave_one_out, validation"}
    assert Counter(row["compressor"] for row in rows) == {"full": 1, "none": 1, "ends": 8, "snapkv": 4, "kivi": 4}
    means = {}
    for row in rows:
        means.setdefault((row["compressor"], str(row["compressor_params"])), []).append(row)
    for choice in found.chosen:
        ((name, params),) = choice.use.items()
        own = {key: np.mean([r["overlap@10"] for r in each]) for key, each in means.items() if key[0] == name}
        if name == "kivi":
            size = {key: each[0]["bytes_mean"] for key, each in means.items() if key[0] == name}
            most = next(size[key] for key in size if "None" in key[1])
            own = {key: value for key, value in own.items() if size[key] <= most}
        assert choice.score == pytest.approx(max(own.values()), abs=1e-6) and choice.score >= choice.default
        assert own[name, str(dict(sorted(params.items())))] == pytest.approx(choice.score, abs=1e-6)
    assert [choice.compressor for choice in found.chosen] == ["ends", "snapkv(window=4)", "kivi(bits=2)"]

    result = run_suite("t.yaml", tuned=found.path, quiet=True)
    assert result.folder == Path("runs/t-tuned") and result.failed == 0
    ran = read_rows(result.folder / "rows")
    digest = file_digest(found.path)
    uses = {name: params for choice in found.chosen for name, params in choice.use.items()}
    for row in ran:
        tuned = row["compressor"] in uses
        assert row["tuned"] == (digest if tuned else None) and row["split"] == "leave_one_out"
        assert row["compressor_params"] == uses.get(row["compressor"], {})
    assert tune("t.yaml", quiet=True).result.reused == 18, "it goes on where it was"
    write(folder, tuned="runs/t-tune/tuned.yaml")
    assert run_suite("t.yaml", quiet=True).reused == len(ran), "a suite may name the file"
    assert reproduce("runs/t-tune", rows[0]["cell_id"]) == []


def test_only_validation_targets_are_asked_and_the_weights_are_those_of_the_run(folder: Path, monkeypatch) -> None:
    write(folder, compressors=["full", "ends"], budgets=[0.5])
    plain, asked = session.evaluate, []
    monkeypatch.setattr(session, "evaluate", lambda b, s, *a, **k: asked.append(s.test) or plain(b, s, *a, **k))
    tune("t.yaml", quiet=True)
    run_suite("t.yaml", quiet=True)
    split = get_split("leave_one_out", get_dataset("synthetic"))
    assert np.array_equal(asked[0].at, split.valid.at) and np.array_equal(asked[1].at, split.test.at)
    weights = {row["hashes"]["weights"] for run in ("t", "t-tune") for row in read_rows(Path(f"runs/{run}/rows"))}
    assert len(weights) == 1


def test_each_budget_may_have_its_own(folder: Path, monkeypatch) -> None:
    write(folder, compressors=["full", "ends"])
    found = tune("t.yaml", per_budget=True, quiet=True)
    assert [choice.budget for choice in found.chosen] == ["0.5", "0.1"]
    use = Tuned(found.path)
    cells = {each.cell.budget_text: each.cell for each in run_suite("t.yaml", tuned=found.path, dry_run=True).plan}
    for choice in found.chosen:
        assert cells[choice.budget].compressor.params == choice.use["ends"] and len(use.use) == 2


def test_ranking_is_tuned_by_agreement_or_what_is_named(folder: Path) -> None:
    write(folder, compressors=["ends"], budgets=[0.5], tasks=[{"ranking": {"negatives": 3}}])
    best = {metric: tune("t.yaml", metric=metric, quiet=True).chosen[0].score for metric in (None, "gauc")}
    rows = [row for row in read_rows(Path("runs/t-tune/rows")) if row["compressor"] == "ends"]
    assert best[None] == pytest.approx(max(row["agreement"] for row in rows), abs=1e-6)
    assert best["gauc"] == pytest.approx(max(row["gauc"] for row in rows), abs=1e-6)


def test_where_no_trial_has_a_result_nothing_is_tuned_and_what_was_chosen_stays(folder: Path, capsys: Capture) -> None:
    write(folder, compressors=["full", "ends"], split={"leave_one_out": {"protocol": "published"}})
    chosen = Path("runs/t-tune/tuned.yaml")
    chosen.parent.mkdir(parents=True)
    chosen.write_text("of before")
    assert cli.main(["tune", "t.yaml", "--quiet"]) == 2
    why = "with the split leave_one_out(protocol=published) nothing validates"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"malloc-bench: t.yaml: nothing is tuned, for no trial has a result: {why}"
    assert {row["reason"] for row in read_rows(Path("runs/t-tune/rows"))} == {why} and chosen.read_text() == "of before"


def test_the_command_plans_names_and_refuses(folder: Path, capsys: Capture) -> None:
    assert cli.main(["tune", "t.yaml", "--dry-run", "--only", "compressor=ends"]) == 0
    assert "8 cells: 0 done, 8 to run" in capsys.readouterr().out and not Path("runs").exists()
    assert cli.main(["tune", "t.yaml", "--metric", "overlap"]) == 2
    assert "nothing is tuned by it. Did you mean 'overlap@10'?" in capsys.readouterr().err
    write(folder, compressors=["full", "recent"])
    assert cli.main(["tune", "t.yaml"]) == 2
    assert "no compressor of the suite has anything to tune" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"use": {"ends": {"odest": 0.5}}}, "ends.odest: unknown parameter. Did you mean 'oldest'?"),
        ({"use": {"end": {}}}, "no compressor is named 'end'. Did you mean 'ends'?"),
        ({"scor": 1.0}, "chosen.0.scor: unknown key. Did you mean 'score'?"),
        ({"trials": 0}, "chosen.0.trials: expected greater than or equal to 1, not 0"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(folder: Path, capsys: Capture, harm, message: str) -> None:
    choice = {
        "dataset": "synthetic", "task": "retrieval", "split": "leave_one_out", "backbone": "sasrec",
        "compressor": "ends", "use": {"ends": {"oldest": 0.5}}, "score": 0.5, "default": 0.4, "trials": 4,
    }  # fmt: skip
    (folder / "tuned.yaml").write_text(
        yaml.safe_dump({"suite": "t", "metric": "overlap@10", "chosen": [choice | harm]})
    )
    assert cli.main(["run", "t.yaml", "--tuned", "tuned.yaml", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("malloc-bench: tuned.yaml: ") and message in line


def test_a_file_that_is_not_what_was_written_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "tuned.yaml"
    about = {"dataset": "synthetic", "task": "retrieval", "split": "leave_one_out", "backbone": "sasrec"}
    choice = tuning.Choice(**about, compressor="ends", use={"ends": {"oldest": 0.5}}, score=0.5, default=0.4, trials=4)
    tuning.write(path, "t", "overlap@10", [choice])
    Tuned(path)
    assert not caplog.records
    for was, now in (("oldest: 0.5", "oldest: 0.7"), ("backbone: sasrec", "backbone: sasrek"), ("\n- {", "\n- { ")):
        content = path.read_text()
        assert was in content
        path.write_text(content.replace(was, now))
        Tuned(path)
        (record,) = caplog.records
        assert "tuned.yaml is not what `malloc-bench tune` wrote" in record.message
        caplog.clear()
        path.write_text(content)


def test_a_file_for_other_cells_says_so(folder: Path, capsys: Capture) -> None:
    tuning.write(folder / "tuned.yaml", "t", "overlap@10", [])
    assert cli.main(["run", "t.yaml", "--tuned", "tuned.yaml", "--dry-run"]) == 0
    assert capsys.readouterr().err == "tuned.yaml has nothing for any cell that was asked for\n"
    with pytest.raises(SuiteError, match=r"there\.yaml: No such file"):
        run_suite("t.yaml", tuned="there.yaml", dry_run=True)


def test_the_derived_suite_measures_nothing_and_asks_validation(folder: Path) -> None:
    suite = derived(load_suite("t.yaml"))
    assert suite.evaluate == "validation" and not suite.measure.latency and suite.name == "t-tune"
    assert {cell.payload()["evaluation"]["on"] for cell in suite.cells()} == {"validation"}
    assert all("on" not in cell.payload()["evaluation"] for cell in load_suite("t.yaml").cells())
    assert registry.find("compressors", "ends").grid
