"""Shared by all tests: one thread, calm hypothesis, and small backbones trained once a session."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file

from malloc_bench.backbones import Backbone, get_backbone
from malloc_bench.compressors import get_compressor
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.batches import training_batches
from malloc_bench.data.tasks.splits import Split, get_split
from malloc_bench.registry import names
from malloc_bench.report import write_report
from malloc_bench.run import merge, runner

torch.set_num_threads(1)
settings.register_profile("quick", deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

#: Times fresh weights, steps, batch size: after them noise in the upper layer's keys moves outputs by more than 1 %.
#: From larger weights it takes a quarter of the steps (HSTU's fresh ones are small); some need the whole way. From very
#: large ones a few steps do, but queries ask for so little else that nothing can be fitted to them.
RECIPES = {
    "": (2.0, 150, 16),
    "hstu": (6.0, 100, 16),
    "fuxi": (1.0, 300, 32),
    "hstu-times-2-heads": (1.0, 600, 32),
    **dict.fromkeys(("climber-times-2-heads", "climber-stride"), (1.0, 250, 32)),
    "climber": (16.0, 15, 16),
    "rwkv": (6.0, 15, 16),
    **dict.fromkeys(("sasrec-longformer", "sasrec-linformer", "sasrec-reformer", "hstu-times-beacon"), (10.0, 30, 16)),
}
#: Weights of those that take longest, half a minute in all, made by `python tests/fixtures/make_trained.py`.
KEPT = Path(__file__).with_name("fixtures") / "trained.safetensors"

#: name -> (registered name, heads, times, and parameters beside the small sizes): what `trained` knows.
#: `adapt` is no parameter: a structural compressor, by name and parameters, that adapts the backbone before training.
BACKBONES: dict[str, tuple[Any, ...]] = {
    "sasrec": ("sasrec", 1, False),
    "sasrec-2-heads": ("sasrec", 2, False),
    "sasrec-paper-2-heads": ("sasrec", 2, False, {"block": "paper", "head": "dot"}),
    "hstu-times": ("hstu", 1, True),
    "hstu-times-2-heads": ("hstu", 2, True),
    "hstu": ("hstu", 1, False),
    "hstu-2-heads": ("hstu", 2, False),
    "climber": ("climber", 1, False),
    "climber-times-2-heads": (
        "climber",
        2,
        True,
        {"blocks": 2, "strategy": "part_of_day", "scenario": "weekend"},
    ),
    "climber-stride": ("climber", 1, False, {"blocks": 3, "strategy": "stride"}),
    "lsrm-2-heads": ("lsrm", 2, False),
    "fuxi": ("fuxi", 1, False),
    "fuxi-times-2-heads": ("fuxi", 2, True),
    "sasrec-gqa": ("sasrec", 4, False, {"adapt": ("gqa", {"n_kv_heads": 2})}),
    "sasrec-mla": ("sasrec", 2, False, {"adapt": ("mla", {"latent": 6})}),
    "hstu-times-gqa": ("hstu", 4, True, {"adapt": ("gqa", {"n_kv_heads": 2})}),
    "hstu-mla": ("hstu", 2, False, {"adapt": ("mla", {"latent": 6})}),
    "lsrm-mqa": ("lsrm", 2, False, {"adapt": ("mqa", {})}),
    "sasrec-longformer": ("sasrec", 2, False, {"adapt": ("longformer", {"window": 9})}),
    "sasrec-linformer": ("sasrec", 2, False, {"adapt": ("linformer", {"slots": 4})}),
    "sasrec-reformer": ("sasrec", 2, False, {"adapt": ("reformer", {"buckets": 4})}),
    "hstu-times-beacon": ("hstu", 2, True, {"adapt": ("beacon", {"chunk": 4})}),
    "marm": ("marm", 1, False),
    "marm-2-heads": ("marm", 2, False),
    "gated_delta": ("gated_delta", 1, False),
    "gated_delta-2-heads": ("gated_delta", 2, False),
    "rwkv-2-heads": ("rwkv", 2, False),
}


def pytest_collection_finish() -> None:
    for kind in ("backbones", "compressors"):
        names(kind)  # tests that copy the registry would have them in the copy alone
    gc.freeze()  # a million objects of torch and pytest, which each gc.collect before a measurement would visit


@pytest.fixture(scope="session", autouse=True)
def _no_reports() -> Iterator[None]:
    """Runs write no reports, three quarters of a small run's time, but in tests that ask for `reports`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (runner, merge):
            patch.setattr(module, "write_report", lambda folder: [])
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this test write their reports."""
    for module in (runner, merge):
        monkeypatch.setattr(module, "write_report", write_report)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """The synthetic data set, leave-one-out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.mktemp("home")))
        return get_split("leave_one_out", get_dataset("synthetic"))


@pytest.fixture(scope="session")
def trained(synthetic: Split, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Backbone]:
    """trained(name): a backbone of BACKBONES after some training, in eval mode; xdist workers share the weights."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    @cache
    def get(name: str) -> Backbone:
        backbone = fresh(name, synthetic)
        weights = folder / f"{name}.safetensors"
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not weights.exists():
                kept = {key: x for key, x in load_file(KEPT).items() if key.startswith(f"{name}/")}
                if not kept:
                    train(name, backbone, synthetic)
                save_file({key.partition("/")[2]: x for key, x in kept.items()} or backbone.state_dict(), weights)
        backbone.load_state_dict(load_file(weights))
        return backbone.eval().requires_grad_(False)

    return get


def fresh(name: str, split: Split) -> Backbone:
    """A backbone of BACKBONES with the weights that it starts from."""
    part, heads, times, *more = BACKBONES[name]
    params = dict(*more)
    adapt = params.pop("adapt", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"heads": heads, "dim": 16, "max_length": 64, "dropout": 0.0}
        backbone = get_backbone(part, split.dataset.n_items, times, **sizes, **params)
        if adapt:
            get_compressor(adapt[0], **adapt[1]).adapt(backbone)
    return backbone


def train(name: str, backbone: Backbone, split: Split) -> None:
    times, steps, batch_size = RECIPES.get(name) or RECIPES.get(BACKBONES[name][0]) or RECIPES[""]
    with torch.no_grad():
        for name, weights in backbone.named_parameters():
            if "blocks" in name and weights.dim() == 2:
                weights *= times
    optimizer = torch.optim.Adam(backbone.parameters(), 1e-2)
    epochs = (training_batches(split, backbone.max_length, batch_size, 0, epoch) for epoch in count())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in islice(chain.from_iterable(epochs), steps):
            optimizer.zero_grad()
            backbone.loss(batch).backward()
            optimizer.step()
