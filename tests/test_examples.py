"""Examples run as a user types them, and show what they say they show."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.testing.worlds import World

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_fitted():
    done = subprocess.run([sys.executable, EXAMPLES / "fitted.py"], capture_output=True, text=True, check=True)
    rows = [line.rsplit(maxsplit=3) for line in done.stdout.splitlines()[1:]]
    wrong = {(name, budget): float(error.rstrip("%")) for name, budget, _, error in rows}
    assert all(float(size.rstrip("%")) <= float(budget.rstrip("%")) for _, budget, size, _ in rows)
    for budget in ("12.5%", "3.1%"):
        least = min(error for (_, at), error in wrong.items() if at == budget)
        assert wrong["fit_omp + mxint", budget] == least < 20 < wrong["recent", budget]


@pytest.fixture
def why():
    spec = importlib.util.spec_from_file_location("why", EXAMPLES / "why.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_why_says_how_much_depends_on_who_reads(why):
    """Where queries are nothing a constant is all; where they are large it is not, and slots and lines explain more."""
    found = {}
    for size in (0.0, 1.0):
        torch.manual_seed(0)
        backbone = get_backbone("sasrec", 200, False, layers=2, heads=2, dim=16, max_length=64).eval()
        with torch.no_grad():
            for name, parameter in backbone.named_parameters():
                parameter.normal_(std=0.4)
                if name.endswith("qkv.weight") or name.endswith("qkv.bias"):
                    parameter[:16] *= size
            prefill = World("sasrec", backbone).prefill(why.NEEDS, (20, 30))
            found[size] = dict(zip(why.COLUMNS, why.layer(prefill, 0).mean(0).tolist()))
    assert found[0.0]["constant"] == pytest.approx(1, abs=1e-6) and found[0.0]["own"] == pytest.approx(1 / 26, rel=0.05)
    assert found[1.0]["constant"] < found[1.0]["rank 1"] < found[1.0]["rank 4"] < 1
    assert found[1.0]["4 slots"] < found[1.0]["8 slots"] < 1 < 1.5 < found[1.0]["rank of A"]


def test_why_asks_for_what_is_not_trained(why, monkeypatch, tmp_path):
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["why.py", "smoke"])
    with pytest.raises(SystemExit, match="is not trained yet: malloc-bench run smoke --only seed=0"):
        why.main()


def test_the_page_on_fitted_states_is_what_the_rows_say():
    subprocess.run([sys.executable, EXAMPLES.parent / "docs" / "fitted.py", "--check"], check=True)
