"""Structural compressors in a run: trained for themselves, judged against the full state of the backbone as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from malloc_bench import measure, registry
from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, Structural, get_compressor
from malloc_bench.data import get_dataset
from malloc_bench.data.tasks.splits import get_split
from malloc_bench.evaluation import evaluate as evaluation
from malloc_bench.evaluation.evaluate import REFERENCE, Job, evaluate
from malloc_bench.files import sealed
from malloc_bench.results import SCHEMA_VERSION, load_results, read_rows
from malloc_bench.run import session
from malloc_bench.run.folder import Chunks
from malloc_bench.run.runner import reproduce, run_suite
from malloc_bench.suite import cells
from malloc_bench.suite.cells import Cell, Part
from malloc_bench.suite.plan import checkpoint_folder

SUITE = """
name: heads
datasets: [synthetic]
tasks: [retrieval]
split: leave_one_out
backbones:
  - sasrec: {layers: 1, heads: 4, dim: 16, max_length: 30}
  - marm: {layers: 1, dim: 16, max_length: 30}
compressors:
  - full
  - recent
  - mqa
  - gqa: {n_kv_heads: 2}
  - mla: {latent: 6}
  - compose: [mqa, {kivi: {bits: 4}}]
  - compose: [{gqa: {n_kv_heads: 2}}, h2o, {kivi: {bits: 4}}]
budgets: [0.5, 0.1]
training: {epochs: 1, batch_size: 64}
measure: {latency: true, flops: true, history: 40, seconds: 0.01}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_BENCH_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "heads.yaml").write_text(SUITE)
    result = run_suite(folder / "heads.yaml", folder / "out", quiet=True)
    assert (result.ok, result.skipped, result.failed) == (12, 6, 0)  # sasrec's 9, marm's full and recent
    return folder


def rows_of(run: Path, backbone: str = "sasrec") -> dict[tuple[str, str | None], dict[str, Any]]:
    rows = [row for row in read_rows(run / "out" / "rows") if row["backbone"] == backbone]
    return {(Part(row["compressor"], row["compressor_params"]).label, row["budget"]): row for row in rows}


CHAIN = "gqa(n_kv_heads=2) + h2o + kivi(bits=4)"


def test_rows_are_held_against_the_backbone_as_it_is(run: Path) -> None:
    rows = rows_of(run)
    full = rows["full", None]
    vectors = full["bytes_mean"] - 8  # beside them: a length and a count
    assert rows["mqa", None]["bytes_mean"] - 8 == pytest.approx(vectors / 4)
    assert rows["gqa(n_kv_heads=2)", None]["bytes_mean"] - 8 == pytest.approx(vectors / 2)
    assert rows["mla(latent=6)", None]["bytes_mean"] - 8 == pytest.approx(vectors * 6 / 32)
    for (name, _), row in rows.items():
        structural = name not in ("full", "recent")
        assert row["structural"] == structural and row["bytes_full"] == full["bytes_mean"]
        assert row["ratio"] == pytest.approx(row["bytes_mean"] / full["bytes_mean"])
        assert row["delta_ndcg@10"] == pytest.approx(row["ndcg@10"] - full["ndcg@10"])
        assert (row["p_value"] is None) == (structural or name == "full")
        assert row["read_ms_p50"] > 0 and row["read_flops"] > 0 and row["peak_bytes"] > 0
        if structural:
            assert row["overlap@10"] < 1 and row["delta_ndcg@10_lo"] <= row["delta_ndcg@10_hi"]
    for budget in (0.5, 0.1):
        assert rows[CHAIN, str(budget)]["ratio"] <= budget + rows[CHAIN, str(budget)]["share_at_floor"]
    assert rows[CHAIN, "0.1"]["read_flops"] < rows[CHAIN, "0.5"]["read_flops"]


def test_each_structural_part_is_trained_once(run: Path, home: Path) -> None:
    rows = rows_of(run)
    keys = {label: row["hashes"]["checkpoint"] for (label, _), row in rows.items()}
    assert keys["full"] == keys["recent"] and keys["mqa"] == keys["mqa + kivi(bits=4)"]
    assert keys["gqa(n_kv_heads=2)"] == keys[CHAIN]
    assert len(set(keys.values())) == 4
    assert {path.name for path in (home / "checkpoints").glob("synthetic-sasrec-*")} == set(keys.values())
    fewer = [rows[name, None]["params"] for name in ("mqa", "gqa(n_kv_heads=2)", "full")]
    assert fewer == sorted(set(fewer))


def test_what_does_not_fit_is_skipped_with_a_reason(run: Path) -> None:
    skipped = [row for row in rows_of(run, "marm").values() if row["status"] == "skipped"]
    assert len(skipped) == 6 and all("marm has no such map" in row["reason"] for row in skipped)


def test_a_second_run_reuses_all_and_a_row_can_be_reproduced(run: Path) -> None:
    again = run_suite(run / "heads.yaml", run / "out", quiet=True)
    assert (again.ok, again.skipped, again.failed, again.reused) == (0, 0, 0, 18)
    assert reproduce(run / "out", rows_of(run)[CHAIN, "0.5"]["cell_id"]) == []
    (path,) = (run / "out" / "rows").glob(f"{rows_of(run)['mla(latent=6)', None]['cell_id']}.json")
    before = json.loads(path.read_text())
    path.unlink()
    assert run_suite(run / "heads.yaml", run / "out", quiet=True).ok == 1
    after = json.loads(path.read_text())
    same = [name for name in before if name.startswith(("hr", "ndcg", "overlap", "bytes"))]
    assert [before[name] for name in same] == [after[name] for name in same]
    weights = ("data", "checkpoint", "weights", "reference")
    assert [before["hashes"][name] for name in weights] == [after["hashes"][name] for name in weights]


def test_ranking(run: Path, home: Path, tmp_path: Path) -> None:
    text = SUITE.replace("tasks: [retrieval]", "tasks: [{ranking: {candidates: 8}}]").replace(
        "leave_one_out", "temporal"
    )
    (tmp_path / "ranking.yaml").write_text(text.replace("latency: true, flops: true", "latency: false, flops: false"))
    only = {"backbone": "sasrec", "compressor": "mqa"}
    assert run_suite(tmp_path / "ranking.yaml", tmp_path / "out", only=only, quiet=True).ok == 1
    (row,) = read_rows(tmp_path / "out" / "rows")
    assert row["structural"] and row["gauc"] and row["agreement"] < 1 and row["logit_error"] > 0
    assert row["p_value"] is None and row["p_auc"] is None and row["delta_gauc_lo"] is not None


def test_one_that_cannot_be_trained_fails_its_own_cells_only(home: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "heads.yaml").write_text(SUITE.replace("epochs: 1", "epochs: 2"))
    fit = session.fit

    def fails(backbone, *args, **kwargs):
        if backbone.fields == ("latent",):
            raise MemoryError("no room for the weights")
        return fit(backbone, *args, **kwargs)

    monkeypatch.setattr(session, "fit", fails)
    result = run_suite(tmp_path / "heads.yaml", tmp_path / "out", only={"backbone": "sasrec"}, quiet=True)
    assert (result.ok, result.failed) == (8, 1)
    (failed,) = [row for row in read_rows(tmp_path / "out" / "rows") if row["status"] == "failed"]
    assert failed["compressor"] == "mla" and "no room" in failed["reason"]


def test_trained_on_from_the_weights_of_the_plain_backbone(home: Path, tmp_path: Path, monkeypatch) -> None:
    """For its own number of epochs, under a key of its own; again where those weights are others now."""
    entries = "  - full\n  - mqa: {grid: {finetune: [0, 2]}}\n"
    head, tail = SUITE.split("  - full\n")[0], SUITE[SUITE.index("budgets") :]
    (tmp_path / "tuned.yaml").write_text(head + entries + tail.replace("latency: true, flops: true", "latency: false"))
    begun: list[dict[str, torch.Tensor]] = []
    begin = Structural.begin
    monkeypatch.setattr(Structural, "begin", lambda self, made, w: (begun.append(dict(w)), begin(self, made, w)))

    def rows() -> dict[str, Any]:
        run_suite(tmp_path / "tuned.yaml", tmp_path / "out", only={"backbone": "sasrec"}, quiet=True)
        return {Part(r["compressor"], r["compressor_params"]).label: r for r in read_rows(tmp_path / "out" / "rows")}

    first = rows()
    full, scratch, tuned = (first[name]["hashes"] for name in ("full", "mqa(finetune=0)", "mqa(finetune=2)"))
    assert len({x["checkpoint"] for x in (full, scratch, tuned)}) == 3
    assert tuned["start"] == full["weights"] and "start" not in scratch and len(begun) == 1
    fitted = json.loads((home / "checkpoints" / tuned["checkpoint"] / "fit.json").read_text())
    assert fitted["epochs"] == 2 and fitted["start"] == full["weights"]
    trained = load_file(home / "checkpoints" / full["checkpoint"] / "model.safetensors")
    assert begun[0].keys() == trained.keys() and all(torch.equal(begun[0][name], x) for name, x in trained.items())
    for folder in (home / "checkpoints", tmp_path / "out" / "checkpoints"):
        shutil.rmtree(folder / full["checkpoint"])
        about = json.loads((folder / tuned["checkpoint"] / "fit.json").read_text())
        (folder / tuned["checkpoint"] / "fit.json").write_text(sealed(about | {"start": "0" * 64}).decode())
    for path in (tmp_path / "out" / "rows").glob("*.json"):
        path.unlink()
    again = rows()["mqa(finetune=2)"]["hashes"]
    assert again["start"] == full["weights"] and again["weights"] == tuned["weights"]


# --- identity


@pytest.mark.parametrize("name", ["quick", "ml1m"])
def test_committed_rows_keep_their_ids_and_checkpoints(name: str) -> None:
    """Of cells without a structural part, as long as their parts keep their versions."""
    frame = load_results(Path(__file__).parents[2] / "results" / name)
    current = (pl.col("schema_version") == SCHEMA_VERSION) & pl.col("hashes").is_not_null()
    checked = 0
    for row in frame.filter(current).iter_rows(named=True):
        known = {key: json.loads(row[key]) for key in ("backbone_params", "compressor_params", "cell", "hashes")}
        cell = Cell.of_row(row | known)
        if any(cell.payload()[part] != known["cell"][part] for part in ("backbone", "compressor")):
            continue
        assert cell.id == row["cell_id"]
        assert checkpoint_folder(cell).name == known["hashes"]["checkpoint"]
        checked += 1
    if not checked:
        pytest.skip("the schema or every version is newer than those rows")


def test_a_structural_part_of_ones_own_is_trained_again_when_its_file_changes(run: Path, monkeypatch) -> None:
    cell = Cell.of_row(rows_of(run)["mqa", None])

    def folders() -> list[Path]:
        own = replace(cell, compressor=Part("own_heads"))
        return [checkpoint_folder(each) for each in (own, own.plain)]

    monkeypatch.setitem(registry._parts["compressors"], "own_heads", _Own)
    before = folders()
    monkeypatch.setattr(cells, "source_hash", lambda cls: "edited")
    after = folders()
    assert before[0] != after[0] and before[1] == after[1]


@dataclass(frozen=True)
class _Own(type(get_compressor("mqa"))):
    name = "own_heads"


# --- evaluation


@pytest.fixture(scope="module")
def split(home: Path):
    return get_split("leave_one_out", get_dataset("synthetic"))


@pytest.fixture(scope="module")
def pair(split):
    torch.manual_seed(0)
    plain = get_backbone("sasrec", split.dataset.n_items, heads=4, dim=16, max_length=40)
    return plain, get_compressor("mla", latent=6).adapted(plain)


def jobs_of(adapted):
    chain = get_compressor("compose", steps=({"mla": {"latent": 6}}, "recent"))
    return [
        Job("recent", get_compressor("recent"), Budget(0.25)),
        Job("mla", get_compressor("mla", latent=6), None, adapted),
        Job("half", chain, Budget(0.5), adapted),
        Job("tenth", chain, Budget(0.1), adapted),
    ]


def test_an_adapted_backbone_answers_for_itself_beside_the_other(pair, split) -> None:
    plain, adapted = pair
    both = evaluate(plain, split, jobs_of(adapted))
    alone = evaluate(adapted, split, [])
    assert not both.failed
    np.testing.assert_array_equal(both.values["mla"]["rank"], alone.values[REFERENCE]["rank"])
    np.testing.assert_array_equal(both.values["mla"]["bytes"], alone.bytes_full)
    np.testing.assert_array_equal(both.bytes_full, evaluate(plain, split, []).bytes_full)
    assert both.values["mla"]["overlap"].mean() < 0.9  # with the plain backbone's ten
    np.testing.assert_equal(both.values["half"], both.values["mla"])  # half of the whole is more than the latents take
    target = np.floor(0.1 * both.bytes_full)
    tenth = both.values["tenth"]
    assert (tenth["bytes"] <= target)[~tenth["at_floor"]].all() and not tenth["at_floor"].all()
    assert (tenth["bytes"] > np.floor(0.1 * alone.bytes_full)).any()  # not a tenth of the latents
    backwards = evaluate(plain, split, jobs_of(adapted)[::-1])
    np.testing.assert_equal(backwards.values, both.values)


def test_chunks_of_adapted_jobs_are_kept(pair, split, tmp_path: Path, monkeypatch) -> None:
    plain, adapted = pair
    monkeypatch.setattr(evaluation, "_USERS", 100)
    jobs = jobs_of(adapted)
    want = evaluate(plain, split, jobs)
    evaluate(plain, split, jobs[:2], store=Chunks(tmp_path))
    np.testing.assert_equal(evaluate(plain, split, jobs, store=Chunks(tmp_path)).values, want.values)
    calls: list[int] = []
    monkeypatch.setattr(type(plain), "prefill", lambda *args: calls.append(1))
    np.testing.assert_equal(evaluate(plain, split, jobs, store=Chunks(tmp_path)).values, want.values)
    assert not calls


def test_costs_are_those_of_the_adapted_backbone(pair) -> None:
    work = measure.Workload(users=2, history=39)
    jobs = jobs_of(None)
    part = get_compressor("mla", latent=6)
    plain = get_backbone("sasrec", 60, heads=4, dim=16, max_length=40).eval()
    models = {None: plain, part: part.adapted(plain)}
    whole, small = measure.prefilled(models, [job.compressor for job in jobs], work).values()
    assert small.full_bytes().tolist() == whole.state.nbytes().tolist() > small.state.nbytes().tolist()
    found = measure.latency(models, {job.id: (job.compressor, job.budget) for job in jobs}, work, seconds=0)
    assert found["mla"].prefill is found["tenth"].prefill is not found["recent"].prefill
    assert all(len(timing.full_read) and len(timing.append or ()) for timing in found.values())
