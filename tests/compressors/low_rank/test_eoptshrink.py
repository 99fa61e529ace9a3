"""Shrunk singular values by their definition, on a matrix whose rank and noise are known."""

import math

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.compressors.low_rank.shrinkage import medians, shrunk
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close


def planted(n, d, rank, noise, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v, e = (torch.randn(*shape, generator=generator) for shape in ((n, rank), (rank, d), (n, d)))
    return u @ v, u @ v + noise * e


@pytest.mark.parametrize(("n", "d"), [(300, 20), (20, 30), (40, 40)])
def test_shrinkage_is_gavish_and_donohos(n, d):
    _, x = planted(n, d, 3, 0.3)
    got = shrunk(x[None, None], torch.ones(1, 1, n, dtype=torch.bool))
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    b = min(n, d) / max(n, d)
    t2 = float(s[min(n, d) // 2].square()) / float(medians()[round(b * 200)])
    new = [
        math.sqrt((float(y) ** 2 - (b + 1) * t2) ** 2 - 4 * b * t2**2) / float(y) if y > (1 + b**0.5) * t2**0.5 else 0.0
        for y in s
    ]
    close(got.dense()[0, 0].double(), (u * torch.tensor(new).double()) @ v, "low-rank part", 2e-3)
    assert int(got.left.rank) == sum(y > 0 for y in new) == 3


def test_it_comes_nearer_to_what_lies_under_the_noise():
    clean, x = planted(200, 30, 3, 1.0)
    part = shrunk(x[None, None], torch.ones(1, 1, 200, dtype=torch.bool)).dense()[0, 0]
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    cut = (u[:, :3] * s[:3]) @ v[:3]
    assert float((part - clean).norm()) < float((cut - clean).norm()) < float((x - clean).norm())


def test_medians_of_marchenko_and_pastur():
    """For b = 1 singular values follow the quarter circle: y, not y^2, of density sqrt(4 - y^2) / pi on 0 to 2."""
    y = math.sqrt(float(medians()[-1]))
    assert abs((y * math.sqrt(4 - y * y) / 2 + 2 * math.asin(y / 2)) / math.pi - 0.5) < 1e-3
    assert abs(float(medians()[1]) - 1) < 0.02


def test_the_residual_takes_few_bits():
    _, x = planted(100, 16, 2, 0.5)
    full = Prefill.from_tensors([x[None, None]], [x[None, None]])
    for bits in (1, 2, 4):
        state = get_compressor("eoptshrink", bits=bits).compress(full)
        (segment,) = state.layers[0]
        rank = int(segment.fields["keys"].first.left.rank)
        size = 4 + 4 + 2 * rank * (100 + 16) + 100 * (2 * bits + 2)
        assert state.nbytes().tolist() == [8 + 2 * size]
