"""`malloc-bench plan` from end to end, on a small run."""

from __future__ import annotations

from pathlib import Path

import pytest

from malloc_bench.cli import main
from malloc_bench.cli.plan import _beyond
from malloc_bench.measure import fleet
from malloc_bench.results import load_results

SUITE = """
name: small
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 40}}]
compressors: [full, none, recent, recompute]
budgets: [0.25, {slots: 4}]
training: {epochs: 1, batch_size: 64}
measure: {users: 2, seconds: 0.01, store: dict, candidates: [1, 8]}
"""
ASKED = ["--users", "1e9", "--events", "5000", "--requests-per-second", "1e6", "--appends-per-second", "1e5"]
PRICES = Path(__file__).parents[2] / "examples" / "prices_made_up.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "small.yaml").write_text(SUITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_BENCH_HOME", str(folder / "home"))
        assert main(["run", str(folder / "small.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")


def test_a_plan_says_what_is_needed_and_what_was_assumed(run, tmp_path, capsys) -> None:
    assert main(["plan", str(run), *ASKED, "--prices", str(PRICES), "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for name in ("full", "none", "recent", "recompute", "25 %", "4 slots", "USD a month", "pays from"):
        assert name in text
    for said in (
        "EXTRAPOLATED to 5,000 events", "2 users a batch", "requests of 5 methods one user at a time through dict",
        "86.4 and 8.64 per user and day", "machines of 64 cores with 512 GB of RAM", "at work 50% of the time",
        f"Prices: {PRICES}", "constant: recent at 4 slots, none",
    ):  # fmt: skip
        assert said in text, text
    figures = sorted(path.suffix for path in tmp_path.glob("fleet-synthetic_retrieval_sasrec*"))
    assert figures == [".png", ".png", ".svg", ".svg"]


def test_a_length_is_called_extrapolated_beyond_five_percent_of_what_was_measured(run, tmp_path, capsys) -> None:
    n, most = load_results(run).select("measured_history", "measured_history_long").drop_nulls().row(0)
    for events, far in ((most * 1.04, False), (most * 1.06, True), (n * 0.96, False), (n * 0.94, True)):
        asked = [*ASKED[:2], "--events", str(events), *ASKED[4:]]
        assert main(["plan", str(run), *asked, "--only", "compressor=full", "--out", str(tmp_path)]) == 0
        text = capsys.readouterr().out
        assert text.count("EXTRAPOLATED") == 2 * far and ("(beyond 5% it is called so)" in text) == far


def test_a_length_that_one_method_was_not_measured_at_is_extrapolated() -> None:
    rows = [{"measured_history": n, "measured_history_long": long} for n, long in ((4000, 4000), (100, 200))]
    assert _beyond([*rows, {"compressor": "recompute"}], 4000) == "20 times the longest"
    assert _beyond(rows[:1], 4000) == "" and _beyond(rows[1:], 50) == "0.5 times the shorter"


def test_bytes_and_costs_are_those_of_the_rows(run, tmp_path, capsys) -> None:
    """At a length that was measured nothing is extrapolated: the sums are the rows' own."""
    (row,) = load_results(run).filter(compressor="full").to_dicts()
    asked = [*ASKED[:2], "--events", str(row["measured_history"]), *ASKED[4:]]
    assert main(["plan", str(run), *asked, "--only", "compressor=full", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "EXTRAPOLATED" not in text and "USD" not in text and "No prices were given" in text
    line = next(line for line in text.splitlines() if line.startswith("full"))
    assert f"{row['measured_bytes'] / 1e3:.2f}" in line  # KB a user, as many TB as thousands of it
    request = sum(row[f"request_{step}_ms_p50"] for step in ("load", "unpack", "read"))
    moved = request - row["request_read_ms_p50"] + sum(row[f"request_{s}_ms_p50"] for s in ("pack", "write", "append"))
    cores = (1e6 * request + 1e5 * moved) / 1000 / 0.5
    assert f"{cores:,.0f}" in line or f"{cores:,.1f}" in line


def test_other_candidates_are_taken_where_they_were_measured(run, tmp_path, capsys, monkeypatch) -> None:
    batches = []  # candidates of the reads whose growth with the history is known
    costs = fleet.costs
    monkeypatch.setattr(fleet, "costs", lambda row, *more: batches.append(row["batch_candidates"]) or costs(row, *more))
    assert main(["plan", str(run), *ASKED, "--candidates", "8", "--out", str(tmp_path)]) == 0
    assert "8 candidates a read" in capsys.readouterr().out and set(batches) == {1}
    assert main(["plan", str(run), *ASKED, "--candidates", "9"]) == 2
    assert capsys.readouterr().err == "malloc-bench: --candidates 9: measured were 1, 8\n"


def test_without_recompute_it_is_made_up_and_said_so(run, tmp_path, capsys) -> None:
    some = tmp_path / "some"
    (some / "rows").mkdir(parents=True)
    for row in load_results(run).filter(compressor="recompute").to_dicts():
        gone = row["cell_id"]
    for path in (run / "rows").iterdir():
        if path.stem != gone:
            (some / "rows" / path.name).write_bytes(path.read_bytes())
    assert main(["plan", str(some), *ASKED]) == 0
    text = capsys.readouterr().out
    assert "recompute (made up)" in text and "The run has no recompute: it is made up" in text
    assert list((some / "figures").glob("fleet-*.svg"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--users", "0"], "--users: expected a number above 0, not 0"),
        (["--users", "1e9x"], "'--users'"),
        (["--events", "nan"], "--events: expected a number above 0, not nan"),
        (["--appends-per-second", "-1"], "--appends-per-second: expected a number of at least 0, not -1"),
        (["--prices", "nowhere.yaml"], "nowhere.yaml: No such file or directory"),
        (["--only", "compressor=recnt"], "--only compressor=recnt: no row has it. Did you mean 'recent'?"),
    ],
)
def test_what_cannot_be_is_one_line(run, given, said, capsys) -> None:
    assert main(["plan", str(run), *ASKED, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("malloc-bench: ") and said in error and error.count("\n") == 1


def test_a_run_without_measured_costs_is_one_line(run, tmp_path, capsys) -> None:
    (tmp_path / "small.yaml").write_text(
        SUITE.replace("{users: 2, seconds: 0.01, store: dict, candidates: [1, 8]}", "{latency: false}")
    )
    assert main(["run", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert main(["plan", str(tmp_path / "run"), *ASKED]) == 2
    assert "has no measured costs: run its suite with measure: {latency: true}" in capsys.readouterr().err


def test_show_prints_what_a_budget_gets_of_what_was_learned(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    auto = (
        "{auto: {candidates: [[{fit_omp: {probes: 8, which: drawn}}, mxint], [recent, {mxint: {bits: 8}}]], tests: 4}}"
    )
    text = SUITE.replace("[full, none, recent, recompute]", f"[full, recent, {auto}]").replace("layers: 1", "layers: 2")
    text = text.replace("[0.25, {slots: 4}]", "[0.25, 0.125]").replace(
        "users: 2, seconds: 0.01, store: dict, candidates: [1, 8]", "latency: false, flops: false"
    )
    (tmp_path / "small.yaml").write_text(text)
    run = str(tmp_path / "run")
    assert main(["run", str(tmp_path / "small.yaml"), "--out", run, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["show", "auto", "--run", run, "--only", "budget=1/4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shares = [float(line.split("%")[0].rsplit(" ", 1)[1]) for line in lines if "of the bytes" in line]
    assert len(shares) == 2 and sum(shares) == pytest.approx(100, abs=0.2) and " at 0.25, seed 0" in " ".join(lines)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "mine")
    assert main(["show", "recent", "--run", "mine"]) == 2  # a name below runs/ too, as other commands take it
    assert "recent makes nothing of a budget by what it learned" in capsys.readouterr().err
    assert main(["show", "kmeans", "--run", "mine"]) == 2
    err = capsys.readouterr().err
    assert "runs/mine has no row of kmeans: name a run of a suite with kmeans in it (--run)" in err
    assert main(["show", "kmeans", "--run", "mine", "--only", "foo=bar"]) == 2
    assert "--only foo=bar: unknown key. Valid: backbone, budget, " in capsys.readouterr().err
