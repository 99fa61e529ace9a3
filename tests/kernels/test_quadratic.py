"""Quadratic forms of a kernel are those of their definition, for every width."""

import pytest
import torch

from malloc_bench import kernels

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")


def given(n, s, d, group, size=1.0):
    generator = torch.Generator().manual_seed(n + s + d)
    x, factor, mean = (torch.randn(n, *shape, generator=generator) for shape in ((s, d), (group, d, d), (group, d)))
    return x * size, factor @ factor.mT / d, mean


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize(
    "n, s, d, group", [(3, 103, 64, 1), (2, 4, 50, 2), (1, 1, 1, 3), (2, 7, 17, 1), (1, 9, 256, 1)]
)
def test_the_definition_in_float64(n, s, d, group, size):
    x, matrix, mean = given(n, s, d, group, size)
    found = kernels.quadratic(x, matrix, mean)
    wide, whole, own = x.double(), matrix.double(), mean.double()
    parts = torch.einsum("nsi,ngij,nsj->ngs", wide, whole, wide), torch.einsum("nsi,ngi->ngs", wide, own)
    most = torch.einsum("nsi,ngij,nsj->ngs", wide.abs(), whole.abs(), wide.abs())
    most += torch.einsum("nsi,ngi->ngs", wide.abs(), own.abs())
    assert found.shape == (n, group, s)
    assert bool(((found - sum(parts)).abs() <= 1e-6 * most).all())


def test_rows_in_any_layout_and_threads():
    x, matrix, mean = given(40, 200, 50, 1)
    whole, before = kernels.quadratic(x, matrix, mean), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(kernels.quadratic(x.mT.contiguous().mT, matrix, mean), whole)
    finally:
        torch.set_num_threads(before)


def test_where_there_is_no_kernel():
    x, matrix, mean = given(2, 5, 8, 1)
    assert kernels.quadratic(x.double(), matrix, mean) is None
    assert kernels.quadratic(x[:, :0], matrix, mean) is None
    assert kernels.quadratic(torch.randn(1, 2, 300), torch.eye(300)[None, None], torch.zeros(1, 1, 300)) is None
    with kernels.eager():
        assert kernels.quadratic(x, matrix, mean) is None
