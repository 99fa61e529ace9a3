"""Sums of entries as the loop finds them, against the same search in plain torch."""

import pytest
import torch

from malloc_bench import kernels
from malloc_bench.state import Codebook

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="no compiler for CPUs here")


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 5, 8])
@pytest.mark.parametrize("beam", [2, 4, 9])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_loop_holds_what_torch_holds(heads, bits, beam, threads):
    torch.manual_seed(bits)
    falls = torch.linspace(1, 0.2, 5).view(1, 5, 1, 1)
    book = Codebook(torch.randn(heads, 5, 2**bits, 7) * falls, bits, 7, added=True)
    x, before = torch.randn(4, heads, 33, 7), torch.get_num_threads()
    x[0, 0, :3] = 0.0
    try:
        torch.set_num_threads(threads)
        found = book.nearest(x, beam)
    finally:
        torch.set_num_threads(before)
    with kernels.eager():
        expected = book.nearest(x, beam)
    assert found.dtype == expected.dtype
    off = (found != expected).any(-1)  # a tie by rounding may go the other way
    lost = [(book.look_up(codes) - x).square().sum(-1) for codes in (found, expected)]
    assert float(off.float().mean()) < 0.01 and torch.allclose(lost[0], lost[1], atol=1e-4)


def test_what_it_takes_and_what_it_leaves_to_torch():
    tables = torch.randn(2, 3, 16, 4)
    assert kernels.nearest_sums(torch.zeros(2, 0, 4), tables, 4, 2) is None
    assert kernels.nearest_sums(torch.randn(2, 5, 4, requires_grad=True), tables, 4, 2) is None
    assert kernels.nearest_sums(torch.randn(2, 5, 4).double(), tables.double(), 4, 2) is None
    codes = kernels.nearest_sums(torch.randn(4, 5, 8)[::2, :, ::2], tables.mT.contiguous().mT, 4, 2)
    assert codes is not None and codes.shape == (2, 5, 3)
