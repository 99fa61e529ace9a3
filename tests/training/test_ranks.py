"""Processes of torchrun train together: the weights of one process, written by the first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from malloc_bench.cli import main
from malloc_bench.results import read_rows
from malloc_bench.run.runner import run_suite

#: fits in float64: what is left between one process and two is rounding alone, which Adam cannot blow up
SCRIPT = """
import os, sys
from pathlib import Path
import torch
from malloc_bench.backbones import get_backbone
from malloc_bench.data import load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.tasks.splits import RULES, get_split
from malloc_bench.data.tasks.tasks import Ranking
from malloc_bench.data.worlds.synthetic import generate
from malloc_bench.training import checkpoints, ranks
from malloc_bench.training.fit import Training, fit

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
if os.environ.get("RANK", "0") != "0":
    def refuse(*what):
        raise AssertionError("only the first process writes")
    checkpoints.atomic_write = refuse
card = load_card("synthetic")
small = card.parameters.model_copy(update={"users": 53, "items": 60, "median": 12, "longest": 30, "shortest": 3})
data = group(card, generate(small), "test")
splits = {"retrieval": get_split(RULES["leave_one_out"](), data), "ranking": Ranking().cut(data, RULES["ratio"]())}
settings = Training(epochs=3, batch_size=4, lr=5e-3, amp="fp32", weight_decay=0.01)
cases = {
    "catalogue": ("sasrec", "retrieval", settings),
    "negatives": ("hstu", "retrieval", Training(epochs=3, batch_size=4, lr=5e-3, amp="fp32", negatives=7)),
    "sgd": ("sasrec", "retrieval", Training(epochs=8, batch_size=13, patience=1, optimizer="adam_then_sgd",
                                            lr=0.1, amp="fp32")),
    "ranking": ("sasrec", "ranking", settings),
}

def ended(progress):
    if progress.epoch == stop:
        raise KeyboardInterrupt

with ranks.met(torch.device("cpu")):
    for name, (backbone, task, training) in cases.items():
        torch.manual_seed(ranks.rank())  # the first one's weights count
        model = get_backbone(backbone, data.n_items, True, dim=16, max_length=20, dropout=0.0)
        model = model.for_ranking() if task == "ranking" else model
        try:
            fit(model, splits[task], training, 7, folder / name, ended)
        except KeyboardInterrupt:
            continue
        total = float(torch.stack([x.sum() for x in model.state_dict().values()]).sum())
        print(f"{name} {total}\\n", end="")  # at once: the other one prints too
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def called(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_leave_the_weights_of_one(tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(SCRIPT)
    called(sys.executable, script, tmp_path / "one", -1)
    said = called(*TORCHRUN, script, tmp_path / "two", -1).splitlines()
    assert len(said) == 8 and len(set(said)) == 4  # all processes have the same weights in the end
    called(sys.executable, script, tmp_path / "went_on", 1)  # ends in the second epoch
    assert not list(tmp_path.glob("went_on/*/fit.json"))
    called(*TORCHRUN, script, tmp_path / "went_on", -1)
    for name in ("catalogue", "negatives", "sgd", "ranking"):
        one = load_file(tmp_path / "one" / name / "model.safetensors")
        fit = json.loads((tmp_path / "one" / name / "fit.json").read_text())
        for other in ("two", "went_on"):
            two = load_file(tmp_path / other / name / "model.safetensors")
            assert one.keys() == two.keys()
            assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5, (name, other)
            theirs = json.loads((tmp_path / other / name / "fit.json").read_text())
            assert (theirs["epochs"], theirs["best_epoch"]) == (fit["epochs"], fit["best_epoch"])
    assert json.loads((tmp_path / "one" / "sgd" / "fit.json").read_text())["sgd_after"]


SUITE = """
name: together
datasets: [synthetic]
split: leave_one_out
backbones: [{sasrec: {layers: 1, dim: 16, heads: 4, max_length: 30}}]
compressors: [full, gqa, knorm]
budgets: [0.25]
training: {epochs: 2, batch_size: 64}
measure: {latency: false, flops: false}
"""


@pytest.mark.parametrize("how", [[sys.executable], pytest.param(TORCHRUN, marks=pytest.mark.slow)], ids=["one", "two"])
def test_what_is_trained_ahead_is_what_a_run_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    (suite := tmp_path / "together.yaml").write_text(SUITE)
    said = called(*how, "-m", "malloc_bench.cli", "train", suite, "--quiet").splitlines()
    assert len(said) == 2 and said[1].startswith(
        "synthetic, sasrec(layers=1, dim=16, heads=4, max_length=30), seed 0 for"
    )
    before = {path: path.read_bytes() for path in (tmp_path / "home").rglob("model.safetensors")}
    assert len(before) == 2 and run_suite(suite, tmp_path / "run", quiet=True).ok == 3
    assert before == {path: path.read_bytes() for path in (tmp_path / "home").rglob("model.safetensors")}
    weights = {row["compressor"]: row["hashes"]["weights"] for row in read_rows(tmp_path / "run" / "rows")}
    assert weights["full"] == weights["knorm"]
    assert [line.rsplit(" ", 1)[1] for line in said] == [weights["full"][:12], weights["gqa"][:12]]
    assert {path.name for path in (tmp_path / "home").iterdir()} <= {"checkpoints", "data", "prepared"}


def test_data_that_cannot_be_had_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("MALLOC_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MALLOC_BENCH_DATA", str(tmp_path / "nothing"))
    (suite := tmp_path / "together.yaml").write_text(SUITE.replace("[synthetic]", "[ml-1m]"))
    assert main(["train", str(suite), "--offline", "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("malloc-bench: ") and "ml-1m" in said and said.count("\n") == 1
    assert not list((tmp_path / "home").glob("checkpoints/*"))
