"""Kernels give what plain torch gives, and nothing breaks where they cannot run."""

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malloc_bench import kernels
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.state import Prefill, grouped
from malloc_bench.state.codebook import Codebook, FromCodebook
from malloc_bench.state.microscaled import microscaled
from malloc_bench.state.quantized import pack_bits, quantize

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")


def vectors(b, h, s, d, bits, along, group, symmetric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, h, s, d, generator=generator)
    return quantize(x, torch.ones(b, 1, s, dtype=torch.bool), bits, group, along, symmetric), generator


def same(x, q, w):
    """All three calls, fused and plain."""
    found = x.dense(), x.dot(q), x.mix(w)
    with kernels.eager():
        plain = x.dense(), x.dot(q), x.mix(w)
    for name, one, other in zip(("dense", "dot", "mix"), found, plain):
        torch.testing.assert_close(
            one, other, rtol=1e-4, atol=1e-4 * (1 + float(other.abs().sum()) / max(1, other.numel())), msg=name
        )


@settings(deadline=None, max_examples=12)  # nearly each compiles loops of its own
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 9), st.sampled_from([5, 8, 35]),
    st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(["slots", "width"]), st.sampled_from([1, 4, 8, 64]),
    st.booleans(), st.integers(0, 12),
)  # fmt: skip
def test_codes_read_as_plain_torch_reads_them(b, h, s, d, bits, along, group, symmetric, m):
    symmetric = symmetric and bits > 1  # one bit has no level but 0
    x, generator = vectors(b, h, s, d, bits, along, group, symmetric)
    same(x, torch.randn(b, h, m, d, generator=generator), torch.rand(b, h, m, s, generator=generator))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("m", [1, 20])
def test_microscaled_codes_too(bits, m):
    generator = torch.Generator().manual_seed(1)
    x = microscaled(torch.randn(2, 3, 7, 20, generator=generator), torch.ones(2, 1, 7, dtype=torch.bool), bits)
    same(x, torch.randn(2, 3, m, 20, generator=generator), torch.rand(2, 3, m, 7, generator=generator))


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("slots", [1, 5])
def test_microscaled_numbers_by_themselves(width, slots):
    generator = torch.Generator().manual_seed(1)
    x = 40 * torch.randn(2, 3, slots, width, generator=generator)
    found = microscaled(x, torch.ones(2, 1, slots, dtype=torch.bool), 8)
    torch.testing.assert_close(found.dense(), x, rtol=0.02, atol=0.5)
    same(found, torch.randn(2, 3, 1, width, generator=generator), torch.rand(2, 3, 1, slots, generator=generator))


@pytest.mark.parametrize("m", [1, 4, 5, 16])
def test_queries_of_shared_heads_that_lie_by_token(m):
    x, generator = vectors(1, 2, 11, 20, 4, "slots", 4, False)
    q, w = (torch.randn(1, m, 4, size, generator=generator).transpose(1, 2) for size in (20, 11))
    assert not q.is_contiguous() or m == 1
    wide = x.dense().repeat_interleave(2, 1)
    torch.testing.assert_close(kernels.dot(x.written(), q), q @ wide.mT)
    torch.testing.assert_close(kernels.mix(x.written(), w), w @ wide)


@pytest.mark.parametrize("kind", ["codes", "entries"])
def test_what_does_not_fit_is_refused_as_by_plain_torch(kind):
    x, _ = vectors(2, 1, 5, 8, 4, "width", 8, False)
    if kind == "entries":
        x = FromCodebook(x.codes, Codebook(torch.randn(1, 4, 256, 2), 8, 8, False))
    for width in (4, 12):
        with pytest.raises(RuntimeError):
            x.dot(torch.ones(2, 1, 1, width))
        with pytest.raises(RuntimeError):
            x.mix(torch.ones(2, 1, 1, width))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("write", [
    lambda x, mask: quantize(x, mask, 4, 8, "width"),
    lambda x, mask: quantize(x, mask, 2, 4, "slots", True),
    lambda x, mask: microscaled(x, mask, 4),
    lambda x, mask: FromCodebook.of(x, mask, Codebook(torch.randn(1, 2, 16, 4), 4, 8, False)),
])  # fmt: skip
def test_what_is_no_number_has_no_code(write, wrong):
    x, mask = torch.randn(2, 1, 6, 8), torch.arange(6) < 5
    x[1, 0, 4, 3] = wrong
    for how in (contextlib.nullcontext(), kernels.eager()):
        with how, pytest.raises(ValueError, match=r"NaN or infinite: 1 of 96"):
            write(x, mask.expand(2, 1, 6))
    x[1, 0, 4, 3], x[1, 0, 5, 3] = 0, wrong  # padding
    write(x, mask.expand(2, 1, 6))
    write(x.nan_to_num(0, 3e38, -3e38), mask.expand(2, 1, 6))


@pytest.mark.parametrize("m", [1, 30])
def test_many_rows_on_many_threads(m):
    x, generator = vectors(6, 2, 700, 50, 4, "slots", 32, False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        same(x, torch.randn(6, 2, m, 50, generator=generator), torch.rand(6, 2, m, 700, generator=generator))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("m", [1, 2, 9])
def test_heads_that_share_vectors(m):
    x, generator = vectors(3, 1, 11, 20, 4, "slots", 4, False)
    same(x, torch.randn(3, 4, m, 20, generator=generator), torch.rand(3, 4, m, 11, generator=generator))


def test_a_loop_runs_and_not_only_its_substitute():
    x, generator = vectors(1, 1, 5, 8, 4, "slots", 32, False)
    q = torch.randn(1, 1, 1, 8, generator=generator)
    assert kernels.dot(x.written(), q) is not None
    with kernels.eager():
        assert kernels.dot(x.written(), q) is None
    assert kernels.dot(x.written(), q.double()) is None  # in float32 alone
    q.requires_grad_()
    assert kernels.dot(x.written(), q) is None  # loops have no gradient
    with torch.no_grad():
        assert kernels.dot(x.written(), q) is not None
    x.dot(q).sum().backward()
    assert q.grad is not None and q.grad.abs().sum() > 0
    x.scale.requires_grad_()  # after it was read, too: how it is written is kept
    with torch.no_grad():
        assert kernels.dot(x.known(), q) is not None
    assert kernels.dot(x.known(), q.detach()) is None


@pytest.mark.parametrize("bits", [3, 4])
def test_how_vectors_are_written_is_seen_once_and_copied_nowhere(bits):
    x, _ = vectors(2, 1, 5, 20, bits, "width", 20, False)
    q, plain = torch.ones(2, 1, 1, 20), pickle.dumps(x)
    x.dot(q)
    assert x.known() is x.known() and pickle.dumps(x) == plain
    kept = x.known().reader(1) is x.known().reader(1)
    assert kept == (bits == 4)  # 3 bits are padded to whole words: a copy that no state shall hold
    before = x.dot(q)
    x.codes.fill_(0)  # what is kept looks at the codes as they are
    with kernels.eager():
        plain = x.dot(q)
    torch.testing.assert_close(x.dot(q), plain)
    assert not torch.equal(before, plain)


def test_what_is_no_number_stays_none():
    x, _ = vectors(1, 1, 4, 8, 4, "width", 8, False)
    q = torch.full((1, 1, 1, 8), torch.nan)
    assert x.dot(q).isnan().all() and x.mix(torch.full((1, 1, 1, 4), torch.nan)).isnan().all()


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_low_rank_in_codes(share):
    generator = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(3, 2, 40, 8, generator=generator) for _ in range(2))
    lengths = torch.tensor([40, 7, 22])
    state = get_compressor("svd").compress(Prefill.from_tensors([keys], [values], lengths=lengths), Budget(share))
    for field in state.layers[0][0].fields.values():
        for m in (1, 12):
            weights = torch.rand(3, 2, m, field.shape[2], generator=generator)
            weights *= torch.arange(field.shape[2]) < lengths[:, None, None, None]
            same(field, torch.randn(3, 2, m, 8, generator=generator), weights)


SCRIPT = """
import torch
from malloc_bench import kernels
from malloc_bench.state.quantized import quantize
x = quantize(torch.randn(2, 1, 9, 8), torch.ones(2, 1, 9, dtype=torch.bool), 4, 8, "width")
q = torch.randn(2, 1, 1, 8)
print(kernels.compiled(), kernels.dot(x.written(), q) is not None, x.dot(q).shape)
"""


def told(folder: Path, script: str = SCRIPT, **environment: str) -> str:
    known = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder), **environment}
    done = subprocess.run([sys.executable, "-c", script], env=known, capture_output=True, text=True, cwd=folder)
    assert not done.returncode, done.stderr
    return done.stdout.strip()


def test_very_wide_vectors_are_unpacked():
    x, q = torch.randn(1, 1, 3, 1025), torch.randn(1, 1, 1, 1025)
    x = quantize(x, torch.ones(1, 1, 3, dtype=torch.bool), 8, 32, "slots")
    assert kernels.dot(x.written(), q) is None and torch.equal(x.dot(q), q @ x.dense().mT)


def test_without_a_compiler(tmp_path):
    hidden = "import importlib.util, sys\nfound = importlib.util.find_spec\n" + textwrap.dedent("""
        importlib.util.find_spec = lambda name, *rest: None if name == "numba" else found(name, *rest)
        sys.modules["numba"] = None
    """)
    assert told(tmp_path, hidden + SCRIPT) == "False False torch.Size([2, 1, 1, 9])"
    assert told(tmp_path, MALLOC_BENCH_KERNELS="eager") == "False False torch.Size([2, 1, 1, 9])"


def test_without_a_folder_to_keep_what_was_compiled(tmp_path):
    nowhere = tmp_path / "file"
    nowhere.touch()
    assert told(tmp_path, NUMBA_CACHE_DIR=str(nowhere / "below")) == "True True torch.Size([2, 1, 1, 9])"


def test_what_was_compiled_is_kept(tmp_path):
    told(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.nbc")}
    assert kept
    told(tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kept"))
    assert kept == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.nbc")}


SUMS = """
import os, numpy as np
from malloc_bench.kernels import several
width = int(os.environ["WIDTH"])
out = np.zeros((1, 5, width), np.float32)
several.sums(width)(np.ones((1, 5, 3), np.float32), np.ones((1, 3, width), np.float32), out, 0, 1)
print((out == 3).all())
"""


@pytest.mark.slow
def test_processes_that_compile_other_loops_at_once_leave_each_its_own(tmp_path):
    """Both had found no name taken: the code of one lay under the name by which the other's was known."""
    folders = [tmp_path / "8", tmp_path / "64"]
    for folder in folders:
        assert told(tmp_path, SUMS, NUMBA_CACHE_DIR=str(folder), WIDTH=folder.name) == "True"
    for path in folders[0].rglob("*.nbc"):
        shutil.copy(path, folders[1] / path.relative_to(folders[0]))
    assert told(tmp_path, SUMS, NUMBA_CACHE_DIR=str(folders[1]), WIDTH="64") == "True"


@pytest.mark.parametrize("kind", ["nbi", pytest.param("nbc", marks=pytest.mark.slow)])
def test_what_was_kept_in_part_is_compiled_again(tmp_path, kind):
    for _ in range(2):
        assert told(tmp_path, SUMS, NUMBA_CACHE_DIR=str(tmp_path / "kept"), WIDTH="8") == "True"
        broken = [*(tmp_path / "kept").rglob(f"*.{kind}")]
        assert broken
        for path in broken:
            os.truncate(path, 0)


def test_a_full_disk_keeps_nothing(tmp_path):
    full = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99))\n"
    assert told(tmp_path, full + SUMS, NUMBA_CACHE_DIR=str(tmp_path / "kept"), WIDTH="8") == "True"


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("m", [1, 3, 9])
@pytest.mark.parametrize("width, each", [(10, 3), (70, 18)])
def test_codebooks(added, bits, m, width, each):
    generator = torch.Generator().manual_seed(3)
    entries = 2**bits - 1  # one code that no entry has: padding may hold it
    tables = torch.randn(2, 4, entries, width if added else each, generator=generator)
    book = Codebook(tables, bits, width, added)
    codes = torch.randint(0, 2**bits, (3, 2, 300, 4), generator=generator, dtype=torch.uint8)
    x = FromCodebook(pack_bits(codes, bits), book)
    same(x, torch.randn(3, 2, m, width, generator=generator), torch.rand(3, 2, m, 300, generator=generator))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 20), st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from(["slots", "width"]), st.sampled_from([1, 2, 3, 8, 32]), st.booleans(),
    st.sampled_from([0, 1e-7, 1, 1e6]),
)  # fmt: skip
def test_codes_are_written_bit_for_bit_as_plain_torch_writes_them(b, h, s, d, bits, along, group, symmetric, size):
    symmetric = symmetric and bits > 1
    generator = torch.Generator().manual_seed(s * d)
    x = size * torch.randn(b, h, s, d, generator=generator)
    mask = torch.arange(s) < torch.randint(0, s + 1, (b, 1, 1), generator=generator)
    found = quantize(x, mask, bits, group, along, symmetric)
    with kernels.eager():
        plain = quantize(x, mask, bits, group, along, symmetric)
    for name in ("codes", "scale", "zero", "wide"):
        one, other = getattr(found, name), getattr(plain, name)
        assert one is other is None or torch.equal(one, other), name


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 3)]), st.integers(0, 9), st.integers(1, 5),
    st.integers(0, 4), st.booleans(), st.sampled_from([torch.float32, torch.float64, torch.float16]),
)  # fmt: skip
def test_sums_by_group_are_torchs_bit_for_bit(b, heads, s, d, size, weighed, dtype):
    generator = torch.Generator().manual_seed(s)
    x = torch.randn(b, heads[0], s, d, generator=generator).to(dtype)
    group = torch.randint(size + 1, (b, heads[1], s), generator=generator)  # `size`: left out, whatever it holds
    left = (group == size).expand(b, max(heads), s)[:, : heads[0]]
    x[left if heads[0] >= heads[1] else left[:, :1] & False] = torch.nan
    weight = torch.rand(b, heads[1], s, generator=generator) if weighed else None
    found = grouped(x, group, size, weight)
    with kernels.eager():
        plain = grouped(x, group, size, weight)
    assert found.dtype == plain.dtype and torch.equal(found, plain)
    one_hot = torch.nn.functional.one_hot(group, size + 1)[..., :size].mT.double()  # [B, H, size, S]
    whole = one_hot if weight is None else one_hot * weight.unsqueeze(2)
    torch.testing.assert_close(found.double(), whole @ x.nan_to_num().double(), rtol=1e-2, atol=1e-2)


def test_compiled_loops_are_kept_by_a_name_of_what_they_call(tmp_path, monkeypatch):
    """The compiler looks at a loop's own file alone, and would keep the code of lanes that have changed since."""
    from malloc_bench.kernels import loops

    names = []
    for called in (loops._CALLED, loops._CALLED ^ 1):
        monkeypatch.setattr(loops, "_CALLED", called)

        def one(x):
            x[0] = 1

        names.append(loops.jit(one)._cache._cache_file._index_name)
    assert names[0] != names[1] and f"{loops._CALLED ^ 1:08x}" in names[0]
