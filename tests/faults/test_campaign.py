"""The short form of the fault campaign, and that a fault of the product's would be found."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import checking
import pytest
from hurting import FAULTS
from trial import Ended

COMMAND = Path(__file__).with_name("campaign.py")
ALL = r"\| \*\*all\*\* \| \| \*\*\d+\*\* \| \*\*(\d+)\*\* \| \*\*(\d+)\*\* \|"

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="shim.c needs a C compiler")


def campaign(*words: str, command: Path = COMMAND) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(command), "--short", *words], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_lost_changed_or_left() -> None:
    code, said = campaign("--trials", "6", "--minutes", "1")
    ((hurt, wrong),) = re.findall(ALL, said)
    assert code == 0 and wrong == "0" and int(hurt) > 0, said


@pytest.mark.slow
def test_a_run_that_forgets_its_rows_is_found(tmp_path: Path) -> None:
    script = tmp_path / "forgets.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(COMMAND.parent)!r})\n"
        "import campaign\nfrom malloc_bench.run import runner\n"
        "runner.read_rows = lambda folder, **options: []\nsys.exit(campaign.main())\n"
    )
    code, said = campaign("--trials", "5", command=script)
    assert code == 1 and ": lost: " in said, said


def as_left(base: Path) -> SimpleNamespace:
    """A trial whose folder is as a run that nobody hurt has left it."""
    for name in ("trial", "whole"):
        (base / name / "run" / "rows").mkdir(parents=True)
        (base / name / "run" / "results.parquet").write_bytes(b"all")
    return SimpleNamespace(folder=base / "trial", whole=base / "whole")


def kinds(trial: SimpleNamespace, ended: Ended) -> list[str]:
    return [kind for kind, _ in checking.after_the_next(FAULTS[0], trial, ended, {}, {}, [])]


def test_a_file_that_is_gone_after_the_next_run_is_found(tmp_path: Path) -> None:
    trial = as_left(tmp_path)
    assert kinds(trial, Ended(0, "")) == []
    (trial.folder / "run" / "results.parquet").unlink()
    assert kinds(trial, Ended(0, "")) == ["lost"]


def test_what_python_tries_a_folder_by_is_no_leftover(tmp_path: Path) -> None:
    trial = as_left(tmp_path)
    (trial.folder / "tmp").mkdir()
    for name, data, found in (
        ("ye31xhqr", b"blat", []),
        ("h7a5cxcw", b"bl", []),
        ("ye31xhqr", b"more than that", ["leftovers"]),
    ):
        (trial.folder / "tmp" / name).write_bytes(data)
        assert kinds(trial, Ended(0, "")) == found


def test_a_next_run_that_hangs_is_called_so(tmp_path: Path) -> None:
    assert kinds(as_left(tmp_path), Ended(None, "Timeout (0:01:55)!")) == ["hung"]


def test_rows_computed_again_are_excused_by_a_word_about_the_spoilt_file_alone(tmp_path: Path, monkeypatch) -> None:
    trial, row = as_left(tmp_path), {"status": "ok", "request_timing": None, "hashes": None}
    for folder, text in ((trial.folder, json.dumps(row)), (trial.whole, "")):
        (folder / "run" / "rows" / "a.json").write_text(text)
    monkeypatch.setattr(checking, "rows", lambda run: {"a.json": row})
    (rot,) = (each for each in FAULTS if each.name == "a file that it reads is spoilt")

    def found(said: str) -> list[str]:
        given = {"a.json": json.dumps({**row, "seconds": 1}).encode()}, {"a.json": row}, ["fit.json"]
        return [kind for kind, _ in checking.after_the_next(rot, trial, Ended(0, said), *given)]

    assert found("a warning of something else") == ["lost"] and found("fit.json is spoilt: made anew") == []


def test_a_refusal_without_a_word_is_found(tmp_path: Path) -> None:
    found = checking.after_the_hurt(FAULTS[0], as_left(tmp_path), Ended(2, ""), {})
    assert [kind for kind, _ in found] == ["not one line"]


def test_only_percentiles_of_times_are_left_out_of_what_a_row_says() -> None:
    row = {"hashes": None, "bytes_p99": 1.0, "read_ms_p95": 1.0}
    assert checking.judged(row, ()).keys() == {"hashes", "bytes_p99"}
