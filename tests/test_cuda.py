"""Every method comes to the same on the GPU as on the CPU; skipped where there is no GPU."""

import copy
from dataclasses import replace

import pytest
import torch

from malloc_bench import run_suite
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.results import load_results
from malloc_bench.state import map_tensors
from malloc_bench.testing.worlds import LENGTHS, World, close, histories, worlds
from tests.compressors.test_contract import METHODS, label

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PLACES = {world.name: world for world in worlds()} if torch.cuda.is_available() else {}
CASES = [
    pytest.param(method, place, id=f"{label(method)}-{place}")
    for method in METHODS
    for place in ("tensors", "sasrec0", "hstu2", "gated_delta4")
    if place in PLACES  # without a GPU one skipped test, not hundreds
]


def on_cuda(x):
    return map_tensors(lambda tensor: tensor.to("cuda"), x)


@pytest.mark.parametrize(("method", "place"), CASES)
def test_a_method_makes_the_same_state(method, place):
    """As many bytes for every user; the same reads, but where a score of the GPU's rounding ordered slots otherwise."""
    name, params = method
    compressor, world = get_compressor(name, **params), PLACES[place]
    if world.backbone is None and (name in ("recompute", "truncate") or compressor.structural):
        pytest.skip("needs a backbone")
    if world.backbone is not None and (why := compressor.supports(world.backbone)):
        pytest.skip(why)
    if compressor.needs.projections or compressor.needs.probes or (world.backbone is None and compressor.needs.inputs):
        pytest.skip("asks what is bound to the backbone's own weights, here on the CPU")
    if compressor.structural:
        world = World(place, compressor.structural.adapted(world.backbone).eval())
    budget = Budget(0.5) if compressor.takes_budget else None
    with torch.no_grad():
        world = world.fit(compressor, budget)
        prefill = world.prefill(compressor.needs, LENGTHS)
        known = {field: list(x) for field, x in prefill._observed().items()}  # lazy ones hold functions
        prefill = replace(prefill, **known, memo={})
        want = compressor.compress(prefill, budget)
        got = compressor.compress(on_cuda(prefill), budget)
        assert {x.device.type for x in tensors(got)} == {"cuda"}
        assert got.nbytes().tolist() == want.nbytes().tolist()
        if world.backbone is None:
            return
        backbone = copy.deepcopy(world.backbone).to("cuda")
        _, tokens = histories(world.backbone, LENGTHS)
        here, there = world.read(want), backbone.read(on_cuda(tokens), got).cpu()
    if "svd" not in label(method):  # singular vectors of equal values turn freely
        close(there, here, label(method), 1e-2)


def test_a_suite_runs_on_cuda(tmp_path):
    result = run_suite("smoke", tmp_path / "run", device="cuda", quiet=True)
    assert result.exit_code == 0
    rows = load_results(tmp_path / "run")
    assert set(rows["device"].drop_nulls()) == {"cuda"} and set(rows["status"]) <= {"ok", "skipped"}


def tensors(state):
    found = []
    map_tensors(lambda x: found.append(x) or x, state)
    return found
