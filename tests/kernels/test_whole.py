"""Products in whole numbers are as exact as float32, on vectors of either width and where a CPU has none."""

import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import told

from malloc_bench import kernels
from malloc_bench.state.quantized import quantize

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")
WIDTHS = st.sampled_from([4, 24, 136])  # less than a vector of bytes, and more than one


def near(found, asked, x, mine):
    """To float32's last digits beside the largest number that was summed up; codes of 8 bits of nothing are nothing."""
    exact = asked.double() @ x
    size = asked.abs().double() @ x.abs() + mine
    assert (((found.double() - exact).abs() - 255e-30) / (size + 1e-30)).max() < 2e-6


def check(slots, width, bits, along, group, scale, m, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, slots, width, generator=draw) + 3 * torch.randn(2, 2, 1, 1, generator=draw)
    x = quantize(x, torch.ones(2, 1, slots, dtype=torch.bool), bits, group, along)
    q = torch.randn(2, 2, m, width, generator=draw) * scale
    w = (torch.randn(2, 2, m, slots, generator=draw) * 6).exp() * scale
    whole, most = x.dense().double(), x.dense().abs().amax((2, 3), keepdim=True).double()
    near(x.dot(q), q, whole.mT, most * q.abs().sum(3, keepdim=True))
    near(x.mix(w), w, whole, most * w.sum(3, keepdim=True))


@settings(deadline=None, max_examples=7)  # nearly each compiles loops of its own
@given(
    st.integers(1, 600), WIDTHS, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(["slots", "width"]),
    st.sampled_from([8, 64]), st.sampled_from([1e-20, 1e-3, 1.0, 1e20]), st.sampled_from([1, 2, 5, 35]),
    st.integers(0, 9),
)  # fmt: skip
def test_as_exact_as_float32(slots, width, bits, along, group, scale, m, seed):
    check(slots, width, bits, along, group, scale, m, seed)


def test_many_small_weights_beside_a_large_one_are_not_lost():
    """Each is less than half of what can be told beside it: all of them are 1.7e-3."""
    x = torch.rand(1, 1, 60_000, 32) + 1
    x = quantize(x, torch.ones(1, 1, 60_000, dtype=torch.bool), 4, 32, "width")
    w = torch.full((1, 1, 1, 60_000), 2.9e-8)
    w[..., 5] = 1.0
    torch.testing.assert_close(x.mix(w).double(), w.double() @ x.dense().double(), rtol=2e-4, atol=0)


def test_an_outlier_costs_no_digits_in_groups_of_slots_that_it_is_not_in():
    x = torch.randn(1, 1, 100, 64, generator=torch.Generator().manual_seed(0))
    x[:, :, 0] *= 1e4
    x, q = quantize(x, torch.ones(1, 1, 100, dtype=torch.bool), 4, 32, "slots"), torch.ones(1, 1, 3, 64)
    others = x.dense()[:, :, 32:].mT
    near(x.dot(q)[..., 32:], q, others.double(), others.abs().max() * 64)


@pytest.mark.parametrize(("width", "group"), [(64, 32), (136, 8), (24, 8)])
def test_an_outlier_of_a_query_costs_no_digits_in_groups_of_channels_that_it_is_not_in(width, group):
    """What queries make little of is large in keys."""
    draw = torch.Generator().manual_seed(0)
    size = torch.ones(width)
    size[group : 2 * group] = 1e6
    x, q = torch.randn(1, 1, 100, width, generator=draw) * size, torch.randn(1, 1, 5, width, generator=draw) / size
    x = quantize(x, torch.ones(1, 1, 100, dtype=torch.bool), 4, group, "width")
    near(x.dot(q), q, x.dense().double().mT, 0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_seen_in_all_that_it_meets(wrong):
    x = quantize(torch.randn(1, 1, 40, 32), torch.ones(1, 1, 40, dtype=torch.bool), 4, 32, "width")
    q, w = torch.randn(1, 1, 2, 32), torch.rand(1, 1, 2, 40)
    q[0, 0, 1, 3] = w[0, 0, 1, 39] = wrong
    for found in (x.dot(q), x.mix(w)):
        assert found[0, 0, 0].isfinite().all() and not found[0, 0, 1].isfinite().any()


@pytest.mark.parametrize("widest", [0, 32])
def test_on_other_cpus(widest, tmp_path):
    """As on one without such products, and on one with vectors of half the width."""
    from malloc_bench.kernels import whole

    if widest and not whole.WIDEST:
        pytest.skip("this CPU has no such products")
    code = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from malloc_bench.kernels import whole
        whole.WIDEST = {widest} or whole.WIDEST
        import test_whole
        for slots, width, bits, along, group in (
            (203, 64, 4, "width", 32), (90, 48, 3, "slots", 32), (9, 136, 8, "width", 8),
        ):
            for m in (1, 7):
                test_whole.check(slots, width, bits, along, group, 1.0, m, 0)
        print(whole.WIDEST)
    """
    how = {} if widest else {"MALLOC_BENCH_KERNELS": "float"}
    assert int(told(tmp_path, textwrap.dedent(code), **how)) == widest
