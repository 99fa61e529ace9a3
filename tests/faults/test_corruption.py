"""Whatever rots, is cut, zeroed, swapped or doubled on the disk: no number made of it is ever used silently.

`python tests/faults/test_corruption.py 200` prints what was tried and what became of it.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from malloc_bench.data import Dataset, get_dataset
from malloc_bench.evaluation import evaluate as evaluation
from malloc_bench.files import ResultsError, file_digest
from malloc_bench.results import load_results
from malloc_bench.run import folder as run_folder
from malloc_bench.run import runner
from malloc_bench.training import checkpoints

SUITE = """
name: tiny
datasets: [synthetic]
backbones: [{sasrec: {layers: 1, dim: 8, max_length: 12}}]
split: leave_one_out
compressors: [full, recent, int8]
budgets: [0.25]
seeds: [0, 1]
training: {epochs: 2, batch_size: 128}
measure: {latency: true, flops: false, history: 12, users: 2, seconds: 0.001}
"""


class Killed(KeyboardInterrupt):
    """Nothing that fails takes this for a failure of its own."""


@cache
def dataset(name: str, **options: Any) -> Dataset:
    return get_dataset(name)


@contextmanager
def world(home: Path) -> Iterator[pytest.MonkeyPatch]:
    """A cache of its own, and chunks of 150 users.

    The data are generated once, and no garbage is collected before latency: it is not judged here.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_BENCH_HOME", str(home))
        patch.setattr(evaluation, "_USERS", 150)
        patch.setattr(runner, "get_dataset", dataset)
        patch.setattr(gc, "collect", lambda: 0)
        yield patch


def rerun(folder: Path) -> None:
    with world(folder / "home"):
        runner.run_suite(folder / "tiny.yaml", folder / "run", quiet=True)


def killed_at(folder: Path, module: Any, name: str, dies: Callable[[Any], bool]) -> None:
    """A run that ends, as by kill -9, right before the first call of a function for which `dies`."""
    inner = getattr(module, name)

    def call(*args: Any) -> Any:
        if dies(args):
            raise Killed
        return inner(*args)

    with world(folder / "home") as patch, pytest.raises(Killed):
        patch.setattr(module, name, call)
        runner.run_suite(folder / "tiny.yaml", folder / "run", quiet=True)


def build(base: Path) -> None:
    """Snapshots: a finished run without one of its rows; killed in training; killed among chunks; a parquet alone."""
    for name in ("finished", "training", "chunks"):
        (base / name).mkdir()
        (base / name / "tiny.yaml").write_text(SUITE)
    killed_at(base / "training", checkpoints, "save_weights", lambda args: True)
    shutil.rmtree(base / "training" / "run", ignore_errors=True)
    shutil.copytree(base / "training" / "home", base / "chunks" / "home")
    saved: list[int] = []
    killed_at(base / "chunks", run_folder.Chunks, "save", lambda args: saved.append(1) or len(saved) > 1)
    shutil.copytree(base / "chunks" / "home", base / "finished" / "home")
    rerun(base / "finished")
    shutil.copytree(base / "finished", base / "reference")
    (base / "parquet" / "run").mkdir(parents=True)
    shutil.copy(base / "finished" / "run" / "results.parquet", base / "parquet" / "run")
    for path in sorted((base / "finished" / "run" / "rows").glob("*.json"))[::3]:  # some cells are still to be run
        path.unlink()


def kind(path: Path) -> str:
    """Files of one kind could be taken for one another."""
    if path.suffix == ".safetensors" or path.name in ("fit.json", "resume.json"):
        return f"{'cache' if 'home' in path.parts else 'copy'} {path.name.split('-')[0]}"
    return {".npz": "chunk"}.get(path.suffix) or (path.name if path.parent.name == "run" else path.parent.name)


WAYS = ("flip", "cut", "zero", "empty", "swap", "double")


def corrupt(path: Path, files: list[Path], draw: random.Random) -> str:
    """Spoil a file in one of WAYS; which one."""
    way, whole = draw.choice(WAYS), bytearray(path.read_bytes())
    alike = [other for other in files if other != path and kind(other) == kind(path)]
    if way in ("swap", "double") and not alike:
        way = "flip"
    if way == "flip":
        whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del whole[draw.randrange(len(whole)) :]
    elif way == "zero":
        start = draw.randrange(len(whole))
        stop = min(len(whole), start + draw.randint(1, 512))
        whole[start:stop] = bytes(stop - start)
    elif way == "empty":
        whole.clear()
    elif way == "swap":
        other = draw.choice(alike)
        mine, whole = bytes(whole), bytearray(other.read_bytes())
        other.write_bytes(mine)
    else:
        whole = bytearray(draw.choice(alike).read_bytes())
    path.write_bytes(whole)
    return way


TIMES = ("git_commit", "_ms_", "read_ratio", "timing", "created_at", "digest", "train_seconds", "load", "hashes")


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says, but for times."""
    hashes = {key: value for key, value in (row["hashes"] or {}).items() if key != "files"}
    return {k: v for k, v in row.items() if not any(word in k for word in TIMES)} | {"hashes": hashes}


def same(one: Any, other: Any) -> bool:
    """Numbers to rounding: sums over users depend on how many cells were summed beside them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-12)
    return one == other


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in (folder / "run" / "rows").glob("*.json")}


def used_silently(folder: Path, reference: Path, said: list[str]) -> str | None:
    """What of a run that went on from a spoilt file is neither as it was nor reported; None: nothing is."""
    want, found = rows(reference), rows(folder)
    for name, row in want.items():
        if name not in found or not same(numbers(found[name]), numbers(row)):
            return f"row {name}"
        if found[name] != row and not said and name in rows_before(folder):
            return f"row {name}, made anew and nothing said"
        for path, known in found[name]["hashes"]["files"].items():
            if file_digest(folder / "run" / path) != known:
                return path
        if file_digest(folder / "run" / row["per_user"]) != row["hashes"]["files"][row["per_user"]]:
            return row["per_user"]
    used = {row["hashes"]["checkpoint"] for name, row in found.items() if name not in rows_before(folder)}
    for path in reference.glob("run/checkpoints/*/model.safetensors"):  # a copy that no new row needs stays as it is
        own = folder / path.relative_to(reference)
        if own.exists() and own.parent.name in used and file_digest(own) != file_digest(path):
            return str(own)
    manifests = [json.loads((each / "run" / "manifest.json").read_text()) for each in (folder, reference)]
    if not said and any(manifests[0][key] != manifests[1][key] for key in ("datasets", "suite")):
        return "manifest"
    return None


def rows_before(folder: Path) -> set[str]:
    return set(json.loads((folder / "before.json").read_text()))


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


WORLDS = ("finished", "training", "chunks", "parquet")


def counts(path: Path) -> bool:
    return path.is_file() and path.name not in ("lock", "tiny.yaml")


def campaign(base: Path, count: int, seed: int) -> Counter[str]:
    """So many corruptions of files of all kinds, each followed by a run or a read. Raises AssertionError."""
    draw, tally = random.Random(seed), Counter[str]()
    places = {
        name: sorted(p.relative_to(base / name) for p in (base / name).rglob("*") if counts(p)) for name in WORLDS
    }
    kinds = sorted({(name, kind(path)) for name, paths in places.items() for path in paths})
    for number in range(count):
        name, wanted = kinds[number % len(kinds)]
        folder = base / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base / name, folder)
        victim = draw.choice([path for path in places[name] if kind(path) == wanted])
        if name == "finished" and victim.parts[0] == "home":
            shutil.rmtree(folder / "run" / "checkpoints")  # or the copies would be used
        before = [path.name for path in (folder / "run" / "rows").glob("*.json")]
        (folder / "before.json").write_text(json.dumps(before))
        whole = (folder / victim).read_bytes()
        way = corrupt(folder / victim, [folder / path for path in places[name]], draw)
        if (folder / victim).read_bytes() == whole:
            continue
        said = Said()
        logging.getLogger("malloc_bench").addHandler(said)
        try:
            what = f"{number}: {way} of {name}/{victim}"
            if name == "parquet":
                try:
                    read = load_results(folder / "run").equals(load_results(base / "parquet" / "run"))
                except ResultsError as error:
                    said.lines.append(str(error))
                    read = True
                assert read, what
            else:
                rerun(folder)
                bad = used_silently(folder, base / "reference", said.lines)
                assert bad is None, f"{what}: {bad} was used"
        finally:
            logging.getLogger("malloc_bench").removeHandler(said)
        tally[f"{wanted}: {'reported' if said.lines else 'no number changed'}"] += 1
    return tally


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corruption")
    build(folder)
    return folder


def test_a_run_that_was_not_touched_passes(base: Path) -> None:
    """Else the test below could not tell anything."""
    for name in ("finished", "training", "chunks"):
        folder = base / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base / name, folder)
        (folder / "before.json").write_text("[]")
        rerun(folder)
        assert used_silently(folder, base / "reference", []) is None
    path = sorted((folder / "run" / "rows").glob("*.json"))[0]
    path.write_text(path.read_text().replace('"n_users": 300', '"n_users": 299'))
    assert used_silently(folder, base / "reference", ["said"]) == f"row {path.name}"


def test_no_corruption_is_used_silently(base: Path) -> None:
    assert sum(campaign(base, 26, seed=0).values()) >= 20


@pytest.mark.slow
def test_no_corruption_of_many_is_used_silently(base: Path) -> None:
    assert sum(campaign(base, 200, seed=1).values()) >= 190


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as where:
        build(Path(where))
        tally = campaign(Path(where), int(sys.argv[1]), seed=1)
    for what, times in sorted(tally.items()):
        print(f"{times:4d}  {what}")
    print(f"{sum(tally.values())} corruptions, 0 used silently")
