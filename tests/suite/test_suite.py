"""Suites: every fault is one line that says where, grids become the right cells, ids depend on content alone."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from malloc_bench import registry
from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor
from malloc_bench.data import DataError, Dataset, load_card
from malloc_bench.data.tasks.splits import RULES
from malloc_bench.data.tasks.tasks import Ranking, Retrieval
from malloc_bench.paths import shipped
from malloc_bench.registry import register
from malloc_bench.results import budget_label, frame
from malloc_bench.suite.cells import Cell, Part
from malloc_bench.suite.file import MAX_BYTES, Limits, Measure, MeasureKeys, TrainingKeys
from malloc_bench.suite.suite import Suite, SuiteError, load_suite, only
from malloc_bench.training.fit import Training

BASE: dict[str, Any] = {
    "name": "toy",
    "datasets": ["synthetic"],
    "split": "leave_one_out",
    "backbones": [{"sasrec": {"layers": 1, "dim": 8}}, "hstu"],
    "compressors": ["full", "recent", {"snapkv": {"window": 8}}],
    "budgets": [0.5, 0.25],
}


def write(folder: Path, text: str | dict[str, Any]) -> Path:
    path = folder / "toy.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
    return path


def load(folder: Path, **changes: Any) -> Suite:
    """The suite BASE with keys changed; None takes a key away."""
    return load_suite(write(folder, {key: value for key, value in {**BASE, **changes}.items() if value is not None}))


def fault(path: Path) -> str:
    """What is wrong with a file, which the message names first."""
    with pytest.raises(SuiteError) as caught:
        load_suite(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# ---- faults

FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"budgts": [0.5]}, "budgts: unknown key. Did you mean 'budgets'?"),
    ({"training": {"epoch": 3}}, "training.epoch: unknown key. Did you mean 'epochs'?"),
    (
        {"backbones": [{"sasrec": {"training": {"epoch": 3}}}]},
        "backbones[0].sasrec.training.epoch: unknown key. Did you mean 'epochs'?",
    ),
    (
        {"backbones": [{"sasrec": {"training": {"lr": 0}}}]},
        "backbones[0].sasrec.training.lr: expected greater than 0, not 0",
    ),
    ({"backbones": [{"sasrec": {"training": 3}}]}, "backbones[0].sasrec.training: expected keys and values, not 3"),
    ({"measure": {"latencies": True}}, "measure.latencies: unknown key. Did you mean 'latency'?"),
    (
        {"measure": {"store": "lmbd"}},
        "measure.store: expected 'lmdb', 'redis' or 'dict', not 'lmbd'. Did you mean 'lmdb'?",
    ),
    ({"measure": {"stores": "lmdb"}}, "measure.stores: unknown key. Did you mean 'store'?"),
    (
        {"measure": {"candidates": [1, 5]}},
        "measure.candidates: several are for requests: name a store, such as store: lmdb",
    ),
    ({"measure": {"candidates": [5, 5], "store": "dict"}}, "measure.candidates[1]: 5 is there twice"),
    ({"measure": {"candidates": [5, 0]}}, "measure.candidates[1]: expected greater than or equal to 1, not 0"),
    ({"measure": {"candidates": "5"}}, "measure.candidates[0]: expected an integer, not '5'"),
    ({"measure": {"candidates": []}}, "measure.candidates: expected at least one value, not an empty list"),
    ({"name": None}, "name: missing"),
    ({"name": "../up"}, "name: expected letters, digits, '.', '_' and '-', a letter or digit first, not '../up'"),
    ({"tasks": ["ranking", {"ranking": {}}]}, "tasks[1]: {'ranking': {'candidates': 32, 'seed': 0}} is there twice"),
    (
        {"tasks": [{"ranking": {"negative": 1}}]},
        "tasks[0].ranking.negative: unknown setting. Did you mean 'negatives'?",
    ),
    (
        {"tasks": [{"ranking": {"negatives": 4, "candidates": 4}}]},
        "tasks[0].ranking: 4 candidates have no room for an event and 4 negatives",
    ),
    ({"split": []}, "split: expected at least one value, not an empty list"),
    ({"split": ["temporal", {"temporal": {}}]}, "split[1]: {'temporal': {'valid': 0.1, 'test': 0.1}} is there twice"),
    ({"split": ["ratio", "temporl"]}, "split[1]: no split is named 'temporl'. Did you mean 'temporal'?"),
    (
        {"split": {"leave_one_out": {"protocol": "publishd"}}},
        "split.leave_one_out.protocol: expected 'published', not 'publishd'. Did you mean 'published'?",
    ),
    ({"split": {"ratio": 3}}, "split: expected a name or {name: {setting: value}}, not {'ratio': 3}"),
    (
        {"split": {"ratio": {}, "temporal": {}}},
        "split: expected a name or {name: {setting: value}}, not {'ratio': {}, 'temporal': {}}",
    ),
    ({"split": {"temporl": {}}}, "split: no split is named 'temporl'. Did you mean 'temporal'?"),
    ({"split": {"temporal": {"valyd": 0.1}}}, "split.temporal.valyd: unknown setting. Did you mean 'valid'?"),
    ({"split": {"temporal": {"test": 1}}}, "split.temporal.test: expected less than 1, not 1"),
    ({"split": {"leave_one_out": {"long": 0}}}, "split.leave_one_out.long: expected greater than or equal to 1, not 0"),
    ({"split": {"leave_one_out": {"long": 2.5}}}, "split.leave_one_out.long: expected an integer, not 2.5"),
    (
        {"split": {"ratio": {"valid": 0.5, "test": 0.6}}},
        "split.ratio: valid + test must leave something to train on, not 0.5 + 0.6",
    ),
    ({"datasets": "synthetic"}, "datasets: expected a list, not 'synthetic'"),
    ({"datasets": []}, "datasets: expected at least one value, not an empty list"),
    ({"compressors": []}, "compressors: expected at least one value, not an empty list"),
    ({"budgets": []}, "budgets: expected at least one value, not an empty list"),
    ({"seeds": []}, "seeds: expected at least one value, not an empty list"),
    ({"datasets": ["sintetic"]}, "datasets[0]: no dataset is named 'sintetic'. Did you mean 'synthetic'?"),
    ({"datasets": ["synthetic", "synthetic"]}, "datasets[1]: 'synthetic' is there twice"),
    (
        {"tasks": [{"retrieval": {"delete": 0.1, "replace": 0.1}}]},
        "tasks[0].retrieval: delete and replace are two tasks: name each by itself",
    ),
    (
        {"tasks": [{"retrieval": {"delete": 1.5}}]},
        "tasks[0].retrieval.delete: expected less than 1, not 1.5",
    ),
    (
        {"tasks": ["retrieval", {"retrieval": {"steps": 10}}], "split": "leave_one_out"},
        "tasks[1]: retrieval(steps=10): the split leave_one_out holds out 1 of a user's events: name it "
        "{leave_one_out: {last: 10}}",
    ),
    (
        {"tasks": [{"retrieval": {"steps": 2}}], "split": "ratio", "evaluate": "validation"},
        "tasks[0]: retrieval(steps=2): steps go on into what is tested, so they cannot be asked of validation",
    ),
    ({"datasets": ["ml-100k+ml-100"]}, "datasets[0]: no dataset is named 'ml-100'. Did you mean 'ml-100k'?"),
    ({"datasets": ["ml-100k+ml-100k"]}, "datasets[0]: ml-100k+ml-100k: a data set is there twice; join different ones"),
    ({"tasks": ["retrival"]}, "tasks[0]: no task is named 'retrival'. Did you mean 'retrieval'?"),
    ({"split": "leave_1_out"}, "split: no split is named 'leave_1_out'. Did you mean 'leave_one_out'?"),
    ({"seeds": ["0"]}, "seeds[0]: expected an integer, not '0'"),
    ({"seeds": [0, -1]}, "seeds[1]: expected greater than or equal to 0, not -1"),
    ({"seeds": [0, 0]}, "seeds[1]: 0 is there twice"),
    ({"seeds": [True]}, "seeds[0]: expected an integer, not True"),
    ({"filter_seen": "yes"}, "filter_seen: expected a boolean, not 'yes'"),
    ({"training": 3}, "training: expected keys and values, not 3"),
    ({"training": {"epochs": 0}}, "training.epochs: expected greater than or equal to 1, not 0"),
    ({"training": {"lr": "fast"}}, "training.lr: expected a number, not 'fast'"),
    ({"training": {"lr": "2e-3"}}, "training.lr: expected a number, not '2e-3' (YAML reads 2e-3 as text: write 0.002)"),
    (
        {"training": {"amp": "bf17"}},
        "training.amp: expected 'auto', 'bf16' or 'fp32', not 'bf17'. Did you mean 'bf16'?",
    ),
    (
        {"training": {"optimizer": "adam_than_sgd"}},
        "training.optimizer: expected 'adam' or 'adam_then_sgd', not 'adam_than_sgd'. Did you mean 'adam_then_sgd'?",
    ),
    ({"training": {"sgd_lr": 0}}, "training.sgd_lr: expected greater than 0, not 0"),
    ({"limits": {"second": 1}}, "limits.second: unknown key. Did you mean 'seconds'?"),
    ({"limits": {"seconds": 0}}, "limits.seconds: expected greater than 0, not 0"),
    (
        {"limits": {"memory": "8 gigs"}},
        "limits.memory: '8 gigs' is no size: expected bytes above 0, such as 5KB, 300 or 1.5MiB",
    ),
    (
        {"limits": {"memory": "8MB"}},
        "limits.memory: expected at least 256MiB, which a process takes that does nothing, not '8MB'",
    ),
    ({"limits": {"memory": True}}, "limits.memory: expected bytes such as 8GB, not True"),
    ({"limits": {"memory": ["8GB"]}}, "limits.memory: expected bytes such as 8GB, not ['8GB']"),
    ({"limits": "8GB"}, "limits: expected keys and values, not '8GB'"),
    ({"training": {"sgd_rate": 0.1}}, "training.sgd_rate: unknown key. Did you mean 'sgd_lr'?"),
    ({"measure": {"seconds": float("inf")}}, "measure.seconds: expected a finite number, not inf"),
    ({"measure": {"seconds": 1e300}}, "measure.seconds: expected less than or equal to 86400, not 1e+300"),
    ({"budgets": [0.5, 0]}, "budgets[1]: a budget is a fraction above 0, {slots: N} or {bytes: N}, not 0"),
    ({"budgets": [float("nan")]}, "budgets[0]: a budget is a fraction above 0, {slots: N} or {bytes: N}, not nan"),
    ({"budgets": [float("inf")]}, "budgets[0]: a budget is a fraction above 0, {slots: N} or {bytes: N}, not inf"),
    (
        {"budgets": [{"slot": 3}]},
        "budgets[0]: a budget is a fraction above 0, {slots: N} or {bytes: N}, not {'slot': 3}",
    ),
    ({"budgets": [0.5, 0.50]}, "budgets[1]: 0.5 is there twice"),
    ({"budgets": None}, "budgets: missing: recent takes one, such as 0.25"),
    (
        {"backbones": ["sasreq"]},
        "backbones[0]: no backbone is named 'sasreq'. Did you mean 'sasrec'? One of yours: --use FILE.py:CLASS",
    ),
    ({"backbones": [{"sasrec": {"layrs": 2}}]}, "backbones[0].sasrec.layrs: unknown parameter. Did you mean 'layers'?"),
    ({"backbones": [{"sasrec": {"dim": "50"}}]}, "backbones[0].sasrec.dim: expected an integer, not '50'"),
    ({"backbones": [{"sasrec": {"dim": 5.0}}]}, "backbones[0].sasrec.dim: expected an integer, not 5.0"),
    (
        {"backbones": [{"sasrec": {"head": "cosin"}}]},
        "backbones[0].sasrec.head: expected 'cosine' or 'dot', not 'cosin'. Did you mean 'cosine'?",
    ),
    (
        {"backbones": [{"hstu": {"dim": 50, "heads": 3}}]},
        "backbones[0].hstu: dim must be a multiple of heads, not 50 with 3 heads",
    ),
    ({"backbones": [{"hstu": {"layers": 0}}]}, "backbones[0].hstu: layers must be at least 1, not 0"),
    (
        {"compressors": ["snapkw"]},
        "compressors[0]: no compressor is named 'snapkw'. Did you mean 'snapkv'? One of yours: --use FILE.py:CLASS",
    ),
    ({"compressors": ["full", "full"]}, "compressors[1]: 'full' is there twice"),
    ({"compressors": [None]}, "compressors[0]: expected a name or {name: {parameter: value}}, not None"),
    (
        {"compressors": [{"kivi": None, "int8": None}]},
        "compressors[0]: expected a name or {name: {parameter: value}}, not {'kivi': None, 'int8': None}",
    ),
    ({"compressors": [{"kivi": 4}]}, "compressors[0].kivi: expected {parameter: value}, not 4"),
    ({"compressors": [{"kivi": {"bit": 4}}]}, "compressors[0].kivi.bit: unknown parameter. Did you mean 'bits'?"),
    ({"compressors": [{"full": {"bits": 4}}]}, "compressors[0].full.bits: unknown parameter. It has none."),
    ({"compressors": [{"kivi": {"bits": "4"}}]}, "compressors[0].kivi.bits: expected an integer, not '4'"),
    (
        {"compressors": [{"kivi": {"bits": yaml.safe_load("2024-01-01")}}]},
        "compressors[0].kivi.bits: expected an integer, not '2024-01-01'",
    ),
    (
        {"compressors": [{"kivi": {"bits": float("nan")}}]},
        "compressors[0].kivi.bits: expected numbers, text, lists or mappings of them, not nan",
    ),
    (
        {"compressors": [{"snapkv": {"kernel": 4}}]},
        "compressors[0].snapkv: window >= 1 and an odd kernel >= 1 are needed, not 16 and 4",
    ),
    ({"compressors": [{"kivi": {"grid": 4}}]}, "compressors[0].kivi.grid: expected {parameter: [values]}, not 4"),
    (
        {"compressors": [{"kivi": {"grid": {"bits": []}}}]},
        "compressors[0].kivi.grid.bits: expected a list of values, not []",
    ),
    ({"compressors": [{"kivi": {"grid": {"bits": [8, 8]}}}]}, "compressors[0].kivi.grid.bits[1]: 8 is there twice"),
    (
        {"compressors": [{"kivi": {"grid": {"bits": [8, "4"]}}}]},
        "compressors[0].kivi.grid.bits[1]: expected an integer, not '4'",
    ),
    (
        {"compressors": [{"kivi": {"bits": 8, "grid": {"bits": [4]}}}]},
        "compressors[0].kivi.bits: fixed and in the grid: one of them is meant",
    ),
    (
        {"compressors": [{"kivi": {"grid": {"group": list(range(1, 200)), "tail": list(range(200))}}}]},
        "compressors[0].kivi.grid: a grid of 39,800 points, more than 10,000",
    ),
    ({"compressors": [{"compose": "recent"}]}, "compressors[0].compose: expected a list of compressors, not 'recent'"),
    (
        {"compressors": [{"compose": ["recent", {"kivi": {"bitz": 2}}]}]},
        "compressors[0].compose[1].kivi.bitz: unknown parameter. Did you mean 'bits'?",
    ),
    (
        {"compressors": [{"compose": ["recent", "kivvi"]}]},
        "compressors[0].compose[1]: no compressor is named 'kivvi'. Did you mean 'kivi'? "
        "One of yours: --use FILE.py:CLASS",
    ),
    (
        {"compressors": [{"compose": ["kivi", "recent"]}]},
        "compressors[0].compose: at most one structural method, then token methods that keep slots, "
        "then at most one encoder, two steps or more are needed",
    ),
    (
        {"compressors": ["svd"], "budgets": [{"slots": 4}, {"slots": 8}]},
        "compressors.svd: none of its cells can run: svd keeps every slot: give its budget as a fraction or in bytes",
    ),
    (
        {"backbones": [{"sasrec": {"layers": 1_000_000}}]},
        "backbones[0].sasrec: 1,000,000 layers in all, more than 512",
    ),
    (
        {"backbones": [{"climber": {"layers": 64, "blocks": 64}}]},
        "backbones[0].climber: 4,096 layers in all, more than 512",
    ),
    (
        {"backbones": [{"hstu": {"max_length": 2**40}}]},
        "backbones[0].hstu: max_length 1,099,511,627,776 is more than 1,000,000",
    ),
    (
        {"backbones": [{"hstu": {"dim": 1_000_000}}]},
        "backbones[0].hstu: 10,000,205,000,402 weights, more than 20,000,000,000",
    ),
    ({"budgets": [10**400]}, f"line 16: {'1' + '0' * 56}... is beyond 63 bits"),
    (
        {"backbones": [{"sasrec": {"grid": {"dim": list(range(8, 300))}}}]},
        "backbones[0]: 292 backbones, more than 200: split the suite",
    ),
    (
        {"seeds": list(range(20_000)), "compressors": [{"kivi": {"grid": {"tail": list(range(30))}}}]},
        "1,200,000 cells, more than 1,000,000: split the suite",
    ),
]


@pytest.mark.parametrize(("changes", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
def test_each_fault_is_one_line_that_says_where_and_what(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    assert fault(write(tmp_path, content)) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys and values, found nothing"),
        ("- a\n- b\n", "expected keys and values, found ['a', 'b']"),
        ("name: toy\ndatasets: [a\nseeds: [0]\n", "line 3: "),
        ("name: a\nsplit: b\nname: c\n", "line 3: the key 'name' is there twice"),
        ("name: a\ntraining:\n  lr: 1.0\n  lr: 2.0\n", "line 4: the key 'lr' is there twice"),
        ("name: &n [1]\nseeds: *n\n", "line 2: aliases (*n) are not allowed"),
        ("name: !!python/object/apply:os.system [ls]\n", "line 1: tags (tag:yaml.org,2002:python/"),
        ("\tname: a\n", "line 1: found character"),
        ("a: " + "[" * 20_000, "line 1: nested more than 32 levels deep"),
        ("# " + "x" * MAX_BYTES, f"over {MAX_BYTES >> 10} KB is no suite"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(text: str, message: str, tmp_path: Path) -> None:
    assert fault(write(tmp_path, text)).startswith(message)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "not UTF-8" in fault(path)


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(SuiteError, match=r"^quik: neither a file nor a shipped suite. Did you mean 'quick'\?$"):
        load_suite("quik")
    with pytest.raises(SuiteError, match="neither a file nor a shipped suite"):
        load_suite("/etc")  # a folder


# ---- a good suite


def test_defaults(tmp_path: Path) -> None:
    suite = load(tmp_path)
    assert (suite.tasks, suite.seeds, suite.filter_seen) == ((Retrieval(),), (0,), True)
    assert (suite.training, suite.measure) == (Training(), Measure())


def test_the_schema_knows_every_setting() -> None:
    assert TrainingKeys().model_dump() == asdict(Training())
    assert MeasureKeys().model_dump() == asdict(Measure())


def test_limits_are_in_no_id(tmp_path: Path) -> None:
    plain = load(tmp_path)
    limited = load(tmp_path, limits={"seconds": 600, "memory": "8GB"})
    assert (plain.limits, limited.limits) == (None, Limits(600.0, 8_000_000_000))
    assert [cell.id for cell in plain.cells()] == [cell.id for cell in limited.cells()]
    assert load(tmp_path, limits={}).limits is None
    assert load(tmp_path, limits={"memory": "1GiB"}).limits == Limits(None, 2**30)


def test_cells_stand_in_groups_that_share_a_backbone(tmp_path: Path) -> None:
    cells = load(tmp_path, seeds=[0, 1]).cells()
    groups = [(cell.backbone.name, cell.seed) for cell in cells]
    assert list(dict.fromkeys(groups)) == [("sasrec", 0), ("sasrec", 1), ("hstu", 0), ("hstu", 1)]
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index)
    first = [(cell.compressor.label, cell.budget_text) for cell in cells[:5]]
    window = "snapkv(window=8)"
    assert first == [("full", None), ("recent", "0.5"), ("recent", "0.25"), (window, "0.5"), (window, "0.25")]


def test_the_rate_of_sgd_only_counts_where_sgd_is_used(tmp_path: Path) -> None:
    def of(training: dict[str, Any]) -> list[str]:
        return ids(load(tmp_path, split="leave_one_out", training=training))

    assert of({"sgd_lr": 1.0}) == of({}) != of({"optimizer": "adam_then_sgd"})
    assert of({"optimizer": "adam_then_sgd"}) != of({"optimizer": "adam_then_sgd", "sgd_lr": 1.0})


def test_settings_of_training_that_are_not_used_change_no_cell(tmp_path: Path) -> None:
    def of(training: dict[str, Any]) -> list[str]:
        return ids(load(tmp_path, split="leave_one_out", training=training))

    for name, value in (("negatives", 128), ("stochastic_length", 1.6)):
        assert of({name: None}) == of({}) != of({name: value})
    drawn = {"negatives": 128}
    assert of(drawn | {"logq": False}) == of(drawn) != of(drawn | {"logq": True})


def test_what_corrects_for_negatives_needs_some(tmp_path: Path) -> None:
    own = {"sasrec": {"training": {"negatives": 8}}}
    assert len(load(tmp_path, backbones=[own], training={"logq": True}).backbones) == 1
    with pytest.raises(
        SuiteError, match=r"training.logq: hstu draws no negatives to correct: give `negatives: 256` too"
    ):
        load(tmp_path, backbones=[own, "hstu"], training={"logq": True})


def test_a_backbone_may_train_otherwise_than_the_others(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        backbones=["hstu", {"sasrec": {"layers": 1, "training": {"epochs": 7}}}],
        training={"epochs": 3, "lr": 0.1},
    )
    settings = {cell.backbone.name: (cell.training["epochs"], cell.training["lr"]) for cell in suite.cells()}
    assert settings == {"hstu": (3, 0.1), "sasrec": (7, 0.1)}
    assert suite.backbones[1].params == {"layers": 1}


def test_grids_are_expanded(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        backbones=[{"sasrec": {"dim": 8, "grid": {"layers": [1, 2]}}}],
        compressors=[
            {"kivi": {"group": 16, "grid": {"bits": [8, 4, 2], "tail": [0, 4]}}},
            {"compose": ["merge_adjacent", {"kivi": {"grid": {"bits": [4, 2]}}}]},
        ],
    )
    assert [part.label for part in suite.backbones] == ["sasrec(dim=8, layers=1)", "sasrec(dim=8, layers=2)"]
    labels = [part.label for part in suite.compressors]
    assert labels[:2] == ["kivi(group=16, bits=8, tail=0)", "kivi(group=16, bits=8, tail=4)"]
    assert labels[6:] == ["merge_adjacent + kivi(bits=4)", "merge_adjacent + kivi(bits=2)"]
    assert len(suite.cells()) == 2 * (6 + 2 * 2)


def test_the_same_cell_is_there_once(tmp_path: Path) -> None:
    parts = [{"kivi": {"bits": 4}}, "kivi", {"kivi": {"grid": {"bits": [8, 4]}}}, {"snapkv": {"window": 16}}, "snapkv"]
    cells = load(tmp_path, compressors=parts, backbones=["hstu", {"hstu": {"layers": 2, "dropout": 0.2}}]).cells()
    assert [cell.compressor.label for cell in cells] == [
        "kivi(bits=4)", "kivi(bits=8)", "snapkv(window=16)", "snapkv(window=16)",
    ]  # fmt: skip


def test_a_method_without_a_budget_is_one_cell_and_needs_none(tmp_path: Path) -> None:
    cells = load(tmp_path, compressors=["full", "int8", {"svd": {"rank": 3}}], budgets=None).cells()
    assert [cell.budget for cell in cells] == [None] * 6


def test_an_impossible_pair_is_a_cell_with_a_reason(tmp_path: Path) -> None:
    cells = load(tmp_path, compressors=["svd", "recent"], budgets=[0.5, {"slots": 4}]).cells()
    assert {cell.budget_text for cell in cells if cell.impossible} == {'{"slots":4}'}
    assert {cell.compressor.name for cell in cells if cell.impossible} == {"svd"}
    assert len(cells) == 8


def test_a_backbone_can_be_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recent = registry.find("compressors", "recent")
    monkeypatch.setattr(
        recent, "supports", lambda self, backbone: "no hstu" if backbone.name == "hstu" else None, raising=False
    )
    cells = load(tmp_path, compressors=["full", "recent"]).cells()
    refused = {(cell.backbone.name, cell.compressor.name, cell.impossible) for cell in cells if cell.impossible}
    assert refused == {("hstu", "recent", "no hstu")}
    assert fault(write(tmp_path, {**BASE, "backbones": ["hstu"]})) == (
        "compressors.recent: none of its cells can run: no hstu"
    )


def test_a_backbone_is_only_refused_if_it_is_with_any_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(self: Compressor, backbone: Backbone) -> str | None:
        return None if backbone.uses_times else "needs times"

    monkeypatch.setattr(registry.find("compressors", "recent"), "supports", timed, raising=False)
    cells = load(tmp_path, compressors=["full", "recent"]).cells()
    assert {cell.backbone.name for cell in cells if cell.impossible} == {"sasrec"}


# ---- identity


def ids(suite: Suite, data: str = "d") -> list[str]:
    return [replace(cell, data={"hash": data}).id for cell in suite.cells()]


def test_ids_know_neither_key_order_nor_the_suite_nor_omitted_defaults(tmp_path: Path) -> None:
    plain = load(tmp_path)
    turned = dict(reversed(BASE.items()))
    turned["backbones"] = [
        {"sasrec": {"dim": 8, "layers": 1, "heads": 1, "dropout": 0.2}},
        {"hstu": {"temperature": 0.05}},
    ]
    turned["compressors"] = ["full", "recent", {"snapkv": {"kernel": 5, "window": 8}}]
    other = load_suite(write(tmp_path, {**turned, "name": "other", "seeds": [0], "measure": {"latency": False}}))
    assert ids(plain) == ids(other)
    assert len(set(ids(plain))) == len(ids(plain))
    assert not set(ids(plain)) & set(ids(plain, "other data"))


def test_a_split_with_its_defaults_spelt_out_is_the_same_cell(tmp_path: Path) -> None:
    """And a plain leave_one_out goes by its name alone, as it did before it had settings."""
    for short, long in (
        ("temporal", {"temporal": {"valid": 0.1, "test": 0.1}}),
        ("leave_one_out", {"leave_one_out": {}}),
    ):
        assert ids(load(tmp_path, split=short)) == ids(load(tmp_path, split=long))
    assert load(tmp_path).cells()[0].payload()["split"] == "leave_one_out"


def test_several_splits_are_a_dimension_of_the_grid(tmp_path: Path) -> None:
    one, both = load(tmp_path), load(tmp_path, split=["leave_one_out", {"leave_one_out": {"protocol": "published"}}])
    cells = both.cells()
    assert len(cells) == 2 * len(one.cells())
    assert [replace(cell, data={"hash": "d"}).id for cell in cells if not cell.split.protocol] == ids(one)
    assert {str(cell.split) for cell in cells} == {"leave_one_out", "leave_one_out(protocol=published)"}
    published = only(cells, {"split": "leave_one_out(protocol=published)"})
    assert only(cells, {"split": "leave_one_out"}) + published == cells and len(published) == len(one.cells())


def test_a_split_that_is_not_named_is_the_data_s(tmp_path: Path) -> None:
    (cell, *_) = load(tmp_path, split=None).cells()
    for times, name in ((np.arange(4), "temporal"), (None, "leave_one_out")):
        data = Dataset("toy", None, "", *(np.zeros(1),) * 4, times, {}, "")
        assert cell.settled(data).split == RULES[name]()
    with pytest.raises(DataError, match=r"^toy has no times .*: name the split leave_one_out or ratio$"):
        load(tmp_path, split="temporal").cells()[0].settled(data)


@pytest.mark.parametrize(
    ("stars", "named", "settled"),
    [
        ([5, 1], {}, 0), ([5, 1], {"negatives": 2}, 2), ([5, 4], {}, 1), ([5, 4], {"negatives": 0}, 0),
        (None, {}, 1), (None, {"negatives": 3}, 3),
    ],
)  # fmt: skip
def test_the_data_say_whether_negatives_are_sampled(stars: Any, named: Any, settled: int) -> None:
    """Where the card has labels and both kinds are there, they are the labels."""
    feedback = {} if stars is None else {"rating": np.array(stars, np.float32)}
    data = Dataset("toy", load_card("ml-100k"), "test", *(np.zeros(1),) * 4, None, feedback, "")
    task = Ranking(**named).settled(data)
    assert task.negatives == settled and task == task.settled(data)
    assert str(task) == (f"ranking(negatives={settled})" if settled else "ranking")
    if stars is None:
        with pytest.raises(DataError, match=r"^toy has no labels .*: give ranking negatives, such as 1$"):
            Ranking(negatives=0).settled(data)


def test_a_whole_number_for_a_float_is_the_same_cell(tmp_path: Path) -> None:
    a, b = (load(tmp_path, backbones=[{"sasrec": {"dropout": zero}}]) for zero in (0, 0.0))
    assert ids(a) == ids(b)
    assert a.cells()[0].payload()["backbone"]["params"]["dropout"] == 0.0


@pytest.mark.parametrize(
    "changes",
    [
        {"datasets": ["ml-1m"]},
        {"seeds": [1]},
        *({"tasks": [task]} for task in ("ranking", {"ranking": {"negatives": 1}}, {"ranking": {"seed": 1}})),
        *({"tasks": [{"retrieval": task}]} for task in ({"history": 5}, {"delete": 0.1}, {"replace": 0.1})),
        *({"split": split} for split in ("temporal", {"temporal": {"valid": 0.2}}, "ratio", {"ratio": {"test": 0.1}})),
        *({"split": {"leave_one_out": {name: 7}}} for name in ("k_core", "min_history", "max_history", "long", "last")),
        {"filter_seen": False},
        *({"training": {name: value}} for name, value in {
            "epochs": 3, "batch_size": 8, "lr": 1.0, "patience": 1, "weight_decay": 0.5, "amp": "fp32",
            "optimizer": "adam_then_sgd",
        }.items()),
        *({"backbones": [{"sasrec": {"layers": 1, "dim": 8, **change}}, {"hstu": change}]} for change in (
            {"dim": 16}, {"max_length": 20}, {"dropout": 0.0}, {"head": "dot"}, {"temperature": 1.0}, {"layers": 3},
        )),
    ],
    ids=str,
)  # fmt: skip
def test_any_other_setting_is_another_cell(changes: dict[str, Any], tmp_path: Path) -> None:
    assert not set(ids(load(tmp_path))) & set(ids(load(tmp_path, **changes)))


@pytest.mark.parametrize(
    "other",
    [{"kivi": {"bits": 2}}, {"kivi": {"group": 16}}, {"kivi": {"tail": 1}}, "int8"],
    ids=str,
)
def test_any_other_parameter_is_another_cell(other: Any, tmp_path: Path) -> None:
    assert not set(ids(load(tmp_path, compressors=["kivi"]))) & set(ids(load(tmp_path, compressors=[other])))
    chains = [load(tmp_path, compressors=[{"compose": ["recent", step]}]) for step in ("kivi", other)]
    assert not set(ids(chains[0])) & set(ids(chains[1]))


@pytest.mark.parametrize("name", ["kivi", "merge_adjacent", "compose"])
def test_a_new_version_is_another_cell_in_chains_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = [{"compose": ["merge_adjacent", "kivi"]}]
    before = ids(load(tmp_path, compressors=chain))
    monkeypatch.setattr(registry.find("compressors", name), "version", 99)
    assert not set(before) & set(ids(load(tmp_path, compressors=chain)))


def test_a_users_file_is_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressor of a user's own: its file's hash counts, also where it is a step of a chain."""
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    text = (
        "from dataclasses import dataclass\n"
        "from malloc_bench.compressors.windowing.recent import Recent\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Recent):\n"
        "    pass\n"
    )
    seen = []
    for version in (text, text + "# edited\n"):
        (tmp_path / "mine.py").write_text(version)
        registry._parts["compressors"].pop("mine", None)
        name = registry.load_part(f"{tmp_path / 'mine.py'}:Mine")
        seen += [Part(name).content, Part("compose", {"steps": [name, "kivi"]}).content]
    assert len({str(content) for content in seen}) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", content["source"]) for content in seen[::2])
    assert "source" not in Part("recent").content


def test_a_class_without_a_file_is_never_taken_for_another_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_parts", copy.deepcopy(registry._parts))
    typed = type("Typed", (type(Part("recent").build()),), {"__module__": "__main__"})
    register("typed")(dataclass(frozen=True)(typed))
    monkeypatch.setattr("inspect.getfile", lambda cls: (_ for _ in ()).throw(TypeError("built-in")))
    assert Part("typed").content["source"].startswith("unsaved ")


def test_a_cell_comes_back_from_its_row(tmp_path: Path) -> None:
    suite = load(
        tmp_path,
        compressors=["full", {"compose": ["recent", {"kivi": {"bits": 2}}]}],
        budgets=[0.5, {"bytes": 900}],
        training={"epochs": 3},
        filter_seen=False,
        split={"temporal": {"test": 0.2, "long": 50}},
        tasks=["retrieval", {"ranking": {"negatives": 1}}],
    )
    for cell in suite.cells():
        row = {
            "suite": cell.suite, "dataset": cell.dataset, "task": str(cell.task), "split": str(cell.split),
            "seed": cell.seed, "backbone": cell.backbone.name, "backbone_params": cell.backbone.params,
            "budget": cell.budget_text,
            "compressor": cell.compressor.name, "compressor_params": cell.compressor.params, "cell": cell.payload(),
        }  # fmt: skip
        assert Cell.of_row(row) == cell
        assert Cell.of_row(row).id == cell.id
        assert frame([{**row, "cell_id": cell.id, "status": "ok"}])["budget"][0] == cell.budget_text
        assert budget_label(cell.budget_text) in ("", "50 %", "900 bytes")


# ---- a part of a suite


def test_only(tmp_path: Path) -> None:
    cells = load(tmp_path, budgets=[0.5, 0.25, {"slots": 4}], seeds=[0, 1]).cells()
    assert len(cells) == 28
    counts = {
        ("backbone", "hstu"): 14,
        ("backbone", "sasrec(layers=1, dim=8)"): 14,
        ("backbone", "sasrec(dim=8,layers=1)"): 14,  # as a leaderboard's heading and a shell's user write it
        ("compressor", "snapkv"): 12,
        ("compressor", "snapkv(window=8)"): 12,
        ("family", "windowing"): 12,
        ("budget", "0.25"): 8,
        ("budget", ".250"): 8,
        ("budget", "25%"): 8,
        ("budget", "1/4"): 8,
        ("budget", "none"): 4,
        ("budget", '{"slots":4}'): 8,
        ("seed", "1"): 14,
        ("dataset", "synthetic"): 28,
    }
    assert {each: len(only(cells, dict([each]))) for each in counts} == counts
    assert [
        str(cell) for cell in only(cells, {"backbone": "hstu", "compressor": "recent", "budget": "0.5", "seed": "0"})
    ] == ["synthetic, retrieval, leave_one_out, hstu, recent at 0.5, seed 0"]
    with pytest.raises(SuiteError, match=r"^--only bakbone=hstu: unknown key. Did you mean 'backbone'\?$"):
        only(cells, {"bakbone": "hstu"})
    with pytest.raises(SuiteError, match=r"^--only compressor=recnt: no cell .* Did you mean 'recent'\?$"):
        only(cells, {"compressor": "recnt"})
    with pytest.raises(SuiteError, match=r"^--only family=evicton: no cell .* Did you mean 'eviction'\?$"):
        only(cells, {"family": ["windowing", "evicton"]})
    either = only(cells, {"family": ["windowing", "eviction"], "seed": "1"})
    assert {cell.compressor.family for cell in either} == {"windowing", "eviction"} and len(either) == 12


# ---- what is shipped

SHIPPED = sorted(path.stem for path in shipped("suites").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # far from a checkout
    suite = load_suite(name)
    assert suite.name == name
    assert load_suite(f"suites/{name}.yaml") == suite == load_suite(f"{name}.yaml") == load_suite(suite.path)
    if name not in ("full", "malloc"):  # which cross everything with everything
        assert not [str(cell) for cell in suite.cells() if cell.impossible]
    first = suite.path.read_text().splitlines()[:3]
    assert all(line.startswith("# ") for line in first), "a header: what it is, the command, the cost"
    assert f"malloc-bench run {name}" in first[1]


METHODS = (
    "full", "none", "random", "recent", "sink_recent", "knorm", "h2o", "tova", "snapkv", "kivi", "int8", "svd",
    "recompute", "truncate", "merge_adjacent", "compose",
)  # fmt: skip


def test_shipped_suites_cover_every_family() -> None:
    assert {"quick", "smoke", "ml1m", "ranking", "longhistory"} <= set(SHIPPED)
    for name in ("quick", "ml1m"):
        assert set(METHODS) <= {part.name for part in load_suite(name).compressors}
    assert load_suite("smoke").datasets == ("synthetic",)  # nothing to download


def test_a_local_file_goes_before_a_shipped_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, BASE).rename(tmp_path / "quick.yaml")
    assert load_suite("quick.yaml").name == "toy"
    assert load_suite("quick").name == "quick"


def test_a_suite_can_be_changed_in_python(tmp_path: Path) -> None:
    suite = replace(load(tmp_path), compressors=(Part("full"), Part("recent")), budgets=(Budget(slots=3),))
    assert [cell.budget for cell in suite.cells()] == [None, Budget(slots=3)] * 2
    assert {f.name for f in fields(suite)} >= {"name", "path", "training", "measure"}


def test_a_step_of_a_chain_may_be_several(tmp_path: Path) -> None:
    steps = [["recent", {"snapkv": {"grid": {"window": [8, 16]}}}], ["int8", {"kivi": {"bits": 2}}]]
    labels = [part.label for part in load(tmp_path, compressors=[{"compose": steps}]).compressors]
    assert labels == [
        f"{token} + {encoder}"
        for token in ("recent", "snapkv(window=8)", "snapkv(window=16)")
        for encoder in ("int8", "kivi(bits=2)")
    ]


def test_only_takes_a_chain_by_its_bare_names_as_tables_print_them(tmp_path: Path) -> None:
    chain = {"compose": {"steps": ["recent", {"mxint": {"bits": 4}}]}}
    cells = load(tmp_path, compressors=["full", "recent", chain]).cells()
    for asked in ("recent + mxint", "recent + mxint(bits=4)", "recent+mxint"):
        assert {cell.compressor.label for cell in only(cells, {"compressor": asked})} == {"recent + mxint(bits=4)"}


def test_costs_may_be_measured_at_some_budgets_only(tmp_path: Path) -> None:
    suite = load(tmp_path, compressors=["full", "recent"], budgets=[0.5, {"slots": 4}], measure={"budgets": [0.5]})
    assert {cell.budget for cell in suite.cells() if not suite.measure.covers(cell.budget)} == {Budget(slots=4)}


def test_requests_are_measured_through_a_store_with_one_or_several_candidates(tmp_path: Path) -> None:
    assert load(tmp_path).measure.store is None and load(tmp_path).measure.candidates == (1,)
    assert load(tmp_path, measure={"candidates": 7}).measure.candidates == (7,)
    measure = load(tmp_path, measure={"store": "redis", "candidates": [1, 128]}).measure
    assert (measure.store, measure.candidates) == ("redis", (1, 128))


def test_reading_a_suite_imports_no_compiler() -> None:
    """It would take seconds of every command; in a process of its own, as others here import it."""
    code = "import sys; from malloc_bench.suite import load_suite; load_suite('quick'); "
    code += "print([name for name in ('torch._dynamo', 'matplotlib', 'scipy', 'pandas') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
