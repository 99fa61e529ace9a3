"""Examples run as a user types them, and show what they say they show."""

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_fitted():
    done = subprocess.run([sys.executable, EXAMPLES / "fitted.py"], capture_output=True, text=True, check=True)
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[1:]]
    wrong = {(name, budget): float(error.rstrip("%")) for name, budget, _, error in rows}
    assert all(float(size.rstrip("%")) <= float(budget.rstrip("%")) for _, budget, size, _ in rows)
    for budget in ("12.5%", "3.1%"):
        least = min(error for (_, at), error in wrong.items() if at == budget)
        assert wrong["fit_omp + mxint", budget] == least < 20 < wrong["recent", budget]
