"""Data that cannot be had, or that do not fit, are skipped rows with the reason; the others go on. By the command."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from malloc_bench.cli import commands as cli
from malloc_bench.data import DataError
from malloc_bench.report.leaderboard import to_markdown
from malloc_bench.report.tables import render_table
from malloc_bench.results import load_results, read_rows
from malloc_bench.run import runner

SUITE = {
    "name": "two", "datasets": ["./gone.yaml", "synthetic"], "split": "leave_one_out",
    "backbones": [{"sasrec": {"layers": 1, "dim": 8, "max_length": 30}}, {"hstu": {"layers": 1, "dim": 8}}],
    "compressors": ["full", "none", "recent"], "budgets": [0.25], "training": {"epochs": 1, "batch_size": 64},
    "measure": {"latency": False, "flops": False},
}  # fmt: skip
CARD = {
    "format": "table", "local": "gone.csv",
    "table": {"user": "who", "item": "what", "time": "when", "unit": "s"},
}  # fmt: skip
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.getbasetemp() / "missing-home"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(CARD))
    return tmp_path


def write(folder: Path, **changes) -> None:
    (folder / "two.yaml").write_text(yaml.safe_dump({**SUITE, **changes}))


def rows(folder: Path) -> dict[tuple[str, str, str], str]:
    found = read_rows(folder / "runs" / "two" / "rows")
    return {(row["dataset"], row["backbone"], row["compressor"]): row["status"] for row in found}


def log(folder: Path) -> None:
    lines = [f"u{user},i{(user + step * step) % 17},{1000 * step + user}" for user in range(20) for step in range(8)]
    (folder / "gone.csv").write_text("\n".join(["who,what,when", *lines, ""]))


def test_a_missing_file_skips_its_cells_alone_and_later_they_run(folder: Path, capsys: Capture) -> None:
    assert cli.main(["run", "two.yaml", "--dry-run"]) == 0
    planned = capsys.readouterr()
    assert planned.out.count("skip  ") == 6 and planned.out.count("run   ") == 6
    assert "12 cells: 0 done, 6 skipped, 6 to run" in planned.out
    assert len(planned.err.splitlines()) == 1 and planned.err.startswith("6 cells are skipped: ")
    assert "gone.csv" in planned.err
    assert not (folder / "runs").exists()

    assert cli.main(["run", "two.yaml"]) == 0
    ran = capsys.readouterr()
    assert "6 ok, 6 skipped, 0 failed" in ran.out and ran.out.count("skipped: gone, 6 cells: ") == 1
    assert "gone.csv" in ran.err
    found = rows(folder)
    assert {key[0]: status for key, status in found.items()} == {"gone": "skipped", "synthetic": "ok"}
    frame = load_results(folder / "runs" / "two")
    for text in (to_markdown(frame), render_table(frame, "accuracy"), render_table(frame, "resources")):
        assert text.count("skipped: gone, 6 cells: ") == 1 and "synthetic" in text
    (reason,) = set(frame.filter(frame["dataset"] == "gone")["reason"])
    assert "gone.csv" in reason

    assert cli.main(["run", "two.yaml", "--quiet"]) == 0
    assert "0 ok, 6 skipped, 0 failed, 6 done before" in capsys.readouterr().out
    assert rows(folder) == found

    log(folder)
    assert cli.main(["run", "two.yaml"]) == 0
    again = capsys.readouterr()
    assert "6 ok, 0 skipped, 0 failed, 6 done before" in again.out and "skipped: gone" not in again.out
    assert not again.err.count("are skipped") and set(rows(folder).values()) == {"ok"}
    assert len(list((folder / "runs" / "two" / "rows").glob("*.json"))) == 12, "no row says that it was missing"


def test_no_network_skips_what_is_not_there_yet(folder: Path, capsys: Capture, monkeypatch) -> None:
    monkeypatch.delenv("MALLOC_BENCH_DATA", raising=False)
    write(folder, datasets=["ml-20m", "synthetic"], backbones=SUITE["backbones"][:1])
    assert cli.main(["run", "two.yaml", "--offline"]) == 0
    shown = capsys.readouterr()
    assert "3 ok, 3 skipped, 0 failed" in shown.out and shown.out.count("skipped: ml-20m, 3 cells: ") == 1
    assert cli.main(["run", "two.yaml", "--offline", "--only", "dataset=ml-20m", "--out", "other"]) == 0
    assert "0 ok, 3 skipped, 0 failed" in capsys.readouterr().out, "nothing but skipped rows is no failure"


def test_a_split_that_the_data_cannot_have_skips_its_cells(folder: Path, capsys: Capture) -> None:
    CARD_ORDER = {**CARD, "table": {"user": "who", "item": "what", "time": "when", "unit": "order"}}
    (folder / "gone.yaml").write_text(yaml.safe_dump(CARD_ORDER))
    log(folder)
    write(folder, datasets=["./gone.yaml"], split=["temporal", "leave_one_out"], backbones=SUITE["backbones"][:1])
    assert cli.main(["run", "two.yaml"]) == 0
    shown = capsys.readouterr()
    assert "3 ok, 3 skipped, 0 failed" in shown.out
    assert shown.out.count("skipped: gone, 3 cells: gone has no times") == 1


def test_one_that_is_gone_is_not_reproduced_but_named(folder: Path, capsys: Capture) -> None:
    log(folder)
    write(folder, datasets=["./gone.yaml"], backbones=SUITE["backbones"][:1], compressors=["full"])
    assert cli.main(["run", "two.yaml", "--quiet"]) == 0
    (row,) = read_rows(folder / "runs" / "two" / "rows")
    (folder / "gone.csv").unlink()
    capsys.readouterr()
    assert cli.main(["reproduce", "runs/two", row["cell_id"][:8]]) == 2
    assert "gone.csv" in capsys.readouterr().err.splitlines()[-1]


def test_what_a_source_refuses_is_a_reason(folder: Path, capsys: Capture, monkeypatch) -> None:
    plain = runner.get_dataset

    def refuse(name, **options):
        if name == "ml-1m":
            raise DataError("ml-1m: its licence must be accepted first: see https://example.org")
        return plain(name, **options)

    monkeypatch.setattr(runner, "get_dataset", refuse)
    write(folder, datasets=["ml-1m", "synthetic"], backbones=SUITE["backbones"][:1])
    assert cli.main(["run", "two.yaml", "--quiet"]) == 0
    assert capsys.readouterr().err == (
        "3 cells are skipped: ml-1m: its licence must be accepted first: see https://example.org\n"
    )
