"""Products and sums for several queries are those of torch, with its matrix products and with loops of our own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malloc_bench import kernels
from malloc_bench.kernels import reading
from malloc_bench.state import Dense

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")
SIZES = {"b": st.integers(1, 3), "heads": st.integers(1, 2), "shared": st.integers(1, 2)} | {
    "m": st.integers(5, 70), "slots": st.integers(1, 70), "width": st.sampled_from([1, 20, 64, 136]),
}  # fmt: skip


@pytest.fixture(params=["loops", "torch"])
def several(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(reading, "_several", lambda: None)
        return None
    from malloc_bench.kernels import several

    monkeypatch.setattr(reading, "_several", lambda: several)  # also on a CPU on which they are not the faster ones
    return several


@given(st.fixed_dictionaries(SIZES), st.integers(0, 9))
@settings(deadline=None, max_examples=25)
def check(sizes, seed):
    draw = torch.Generator().manual_seed(seed)
    b, heads, shared, m, slots, width = sizes.values()
    x = Dense(torch.randn(b, heads, slots, width, generator=draw)).known()
    q = torch.randn(b, heads * shared, m, width, generator=draw)
    w = torch.rand(b, heads * shared, m, slots, generator=draw)
    whole = x.data.repeat_interleave(shared, 1).double()
    torch.testing.assert_close(kernels.dot(x, q).double(), q.double() @ whole.mT, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.mix(x, w).double(), w.double() @ whole, rtol=1e-5, atol=1e-5)


def test_products_and_sums(several):
    check()


def test_sums_of_very_wide_vectors_are_torchs(several, monkeypatch):
    if several is not None:
        monkeypatch.setattr(several, "sums", None)  # is not called
    x, w = Dense(torch.randn(1, 1, 3, 1025)).known(), torch.rand(1, 1, 5, 3)
    torch.testing.assert_close(kernels.mix(x, w), w @ x.data)


def test_on_two_threads(several, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = Dense(torch.randn(4, 2, 300, 64)).known()
    q, w = torch.randn(4, 2, 40, 64), torch.rand(4, 2, 40, 300)
    torch.testing.assert_close(kernels.dot(x, q), q @ x.data.mT, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernels.mix(x, w), w @ x.data, rtol=1e-4, atol=1e-4)
