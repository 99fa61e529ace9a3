"""A log of one's own, from the file to the leaderboard, by the commands that the README names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from malloc_bench.cli import commands as cli
from malloc_bench.data import get_dataset
from malloc_bench.results import load_results
from malloc_bench.suite.suite import SuiteError, load_suite

SUITE = """
name: mine
datasets: [{card}]
tasks: [retrieval, ranking]
split: ratio
backbones:
  - sasrec: {{layers: 1, dim: 8, max_length: 20}}
compressors: [full, recent]
budgets: [0.5]
training: {{epochs: 1}}
measure: {{latency: false, flops: false}}
"""

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain csv in a folder of its own, which the commands are given from elsewhere."""
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MALLOC_BENCH_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = [
        f'"shopper {user:02d}",{item:04d},{rng.integers(1, 6)},{1_600_000_000 + 9 * step}'
        for user in range(30)
        for step, item in enumerate(rng.permutation(40)[:25])
    ]
    (tmp_path / "logs").mkdir()
    path = tmp_path / "logs" / "mylog.csv"
    path.write_text("\n".join(["user_id,item_id,rating,timestamp", *rows, ""]))
    return path


def test_from_a_csv_to_rows(log: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["data", "card", "logs/mylog.csv"]) == 0
    out = capsys.readouterr().out
    assert "malloc-bench data stats ./logs/mylog.yaml" in out and "datasets: [./logs/mylog.yaml]" in out
    assert cli.main(["data", "stats", "./logs/mylog.yaml"]) == 0
    assert "750" in capsys.readouterr().out
    assert cli.main(["data", "get", "logs/mylog.yaml"]) == 0
    assert capsys.readouterr().out.startswith("mylog: 30 users, 40 items, 750 events from local ")
    assert cli.main(["data", "verify", "./logs/mylog.yaml"]) == 0
    assert cli.main(["show", "./logs/mylog.yaml"]) == 0
    assert "mylog.csv" in capsys.readouterr().out
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "mine.yaml").write_text(SUITE.format(card="../logs/mylog.yaml"))
    assert cli.main(["run", "suites/mine.yaml", "--dry-run"]) == 0
    assert "mylog, retrieval" in capsys.readouterr().out
    assert cli.main(["run", "suites/mine.yaml", "--quiet", "--device", "cpu"]) == 0
    rows = load_results(tmp_path / "runs" / "mine")
    assert rows["status"].to_list() == ["ok"] * 4 and set(rows["dataset"]) == {"mylog"}
    users = pl.read_parquet(tmp_path / "runs" / "mine" / rows["per_user"][0])["user"]
    assert users.str.starts_with("shopper ").all()
    assert cli.main(["reproduce", "runs/mine", rows["cell_id"][0]]) == 0
    (tmp_path / "logs" / "mylog.csv").write_text(log.read_text() + '"shopper 00",0001,5,1700000000\n')
    assert cli.main(["run", "suites/mine.yaml", "--dry-run"]) == 0
    assert "4 cells: 0 done" in capsys.readouterr().out  # other content is other data


def test_what_a_suite_says_wrong_of_cards(log: Path, tmp_path: Path) -> None:
    cli.main(["data", "card", "logs/mylog.csv"])
    (tmp_path / "bad.yaml").write_text("format: tabel")
    (tmp_path / "ml-100k.yaml").write_text((tmp_path / "logs" / "mylog.yaml").read_text())
    suite = tmp_path / "mine.yaml"
    for card, message in {
        "./none.yaml": "none.yaml: no such card",
        "mylog": "datasets[0]: no dataset is named 'mylog'",
        "./bad.yaml": "bad.yaml: format: no format is named 'tabel'",
        "./ml-100k.yaml": "the name 'ml-100k' belongs to",
        "logs/mylog.yaml, ./logs/mylog.yaml": "datasets[1]: 'mylog' is there twice",
        "./logs": "logs: no such card",
    }.items():
        suite.write_text(SUITE.format(card=card))
        with pytest.raises(SuiteError) as caught:
            load_suite(suite)
        assert message in str(caught.value) and str(caught.value).startswith(f"{suite}: datasets[")
    suite.write_text(SUITE.format(card="logs/mylog.yaml"))
    made = load_suite(suite)
    assert made.datasets == ("mylog",) and get_dataset(made.cards["mylog"]).n_users == 30


def test_a_card_that_is_there_is_not_written_over(log: Path, tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["data", "card", str(log), "--out", "here.yaml"]) == 0
    before = (tmp_path / "here.yaml").read_text()
    assert cli.main(["data", "card", str(log), "--out", "here.yaml"]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "here.yaml").read_text() == before
    assert get_dataset(tmp_path / "here.yaml").n_events == 750
    assert cli.main(["data", "card", "none.csv"]) == 2
    assert capsys.readouterr().err == "malloc-bench: none.csv: No such file or directory\n"
