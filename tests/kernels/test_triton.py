"""Triton's reads: the same numbers in its interpreter, and code that GPUs can hold, made without one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from malloc_bench.kernels import gpu

HERE = Path(__file__).parent
triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install '.[cuda]'")


def alone(*command: str | Path, **environment: str) -> str:
    """In a process of its own: the interpreter is for the whole of one."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "PYTEST_"))}
    known = {**known, "PYTHONPATH": str(HERE.parents[1]), **environment}
    done = subprocess.run([sys.executable, *map(str, command)], env=known, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


@triton
def test_in_the_interpreter():
    told = alone(
        "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", HERE / "interpreted.py", TRITON_INTERPRET="1"
    )
    assert " passed" in told and " skipped" not in told


COMPILING = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from malloc_bench import kernels
from malloc_bench.kernels import tiles
from malloc_bench.state.quantized import quantize

class Told:  # a GPU that is not here
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

made = []
driver.set_active(Told())
JITFunction.__getitem__ = lambda kernel, grid: lambda *x, **how: made.append(kernel.warmup(*x, grid=grid, **how))
for m, d in ((1, 64), (128, 64), (128, 128)):
    q, real, one = torch.ones(1, 2, m, d), torch.ones(1, 1, 70, dtype=torch.bool), torch.ones(1, 1, 70, d)
    own, codes = {"keys": q, "values": q}, torch.zeros(1, 1, 70, 2, dtype=torch.uint8)
    keys = quantize(one, real, 4, 32, "slots").written(), kernels.Entries(codes, one.view(1, 2, 35, d), d, True)
    values = quantize(one, real, 3, d, "width", True).written(), kernels.Plain(one)
    rest = torch.tensor([[70]]), torch.ones(1, 1, 70), (torch.ones(1, 1, m, 70), torch.ones(1, 1, m))
    for each, other, normaliser in zip(keys, values, (None, 3.0)):
        tiles.attend(q, own, each, other, *rest, normaliser)
    tiles.dot(keys[0], q)
    tiles.mix(values[0], torch.ones(1, 2, m, 70))
print(json.dumps([[x.metadata.name, x.metadata.shared, len(x.asm["cubin"])] for x in made]))
"""


@triton
@pytest.mark.parametrize("capability", ["90", pytest.param("75", marks=pytest.mark.slow)])
def test_compiled_for_gpus_that_are_not_here(capability, tmp_path):
    made = json.loads(alone("-c", COMPILING, capability, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(made) == 12 and {name for name, *_ in made} == {"attend_tile", "dot_tile", "mix_tile"}
    assert all(size for *_, size in made)
    assert max(shared for _, shared, _ in made) <= 48 << 10  # bytes that every GPU has for a program


def test_not_chosen_for_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu._triton.cache_clear()
    try:
        assert gpu._triton() == (None if find_spec("triton") is None else "cuda")
        assert gpu.on_gpu(torch.ones(1)) is None
        gpu._triton.cache_clear()
        monkeypatch.setattr(gpu, "find_spec", lambda name: None)
        assert gpu._triton() is None
        gpu._triton.cache_clear()
        monkeypatch.undo()
        monkeypatch.setenv("MALLOC_BENCH_KERNELS", "eager")
        assert gpu._triton() is None
    finally:
        gpu._triton.cache_clear()
