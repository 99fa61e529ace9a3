"""The short form of the fault campaign, and that a fault of the product's would be found."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).with_name("campaign.py")
ALL = r"\| \*\*all\*\* \| \| \*\*\d+\*\* \| \*\*(\d+)\*\* \| \*\*(\d+)\*\* \|"

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="shim.c needs a C compiler")


def campaign(*words: str, command: Path = COMMAND) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(command), "--short", *words], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_nothing_is_lost_changed_or_left() -> None:
    code, said = campaign("--trials", "32", "--minutes", "1")
    ((hurt, wrong),) = re.findall(ALL, said)
    assert code == 0 and wrong == "0" and int(hurt) > 3, said


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
