"""Biases of distance and time are the plain ones to the last bit, for every gap that a clock can have."""

import pytest
import torch

from malloc_bench import kernels
from malloc_bench.backbones.block import Places
from malloc_bench.backbones.hstu import TIME_BUCKETS, HSTUBlock, _gaps

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")


def both(block, queries, slots):
    """The bias as a kernel makes it, which must be one, and as plain torch does."""
    places = ((x.positions, x.times) for x in (queries, slots))
    found = kernels.relative(block.position_bias, block.time_bias, _gaps, *places)
    assert found is not None and torch.equal(found, block.bias(queries, slots))
    with kernels.eager():
        return found, block.bias(queries, slots)


@torch.no_grad()
def test_every_gap_falls_where_its_logarithm_does():
    block, generator = HSTUBlock(4, 1, 0.0, 30, times=True), torch.Generator().manual_seed(0)
    edges = torch.from_numpy(_gaps().edge).double().clamp(max=2.0**62).long()
    some = (torch.rand(20000, generator=generator).double() * 43).exp().long()
    gaps = torch.cat([*(edges + k for k in (-2, -1, 0, 1, 2)), torch.arange(5000), some]).unique()
    gaps = torch.cat([gaps, -gaps, torch.tensor([2**63 - 1, -(2**63)])])[None, None]
    zero = torch.zeros(1, 1, 1, dtype=torch.long)
    found, plain = both(block, Places(zero, zero), Places(torch.zeros_like(gaps), gaps))
    assert torch.equal(found, plain)
    assert len(found.unique()) == TIME_BUCKETS  # of 129 numbers one is of gaps between 1 second and 2


@pytest.mark.parametrize("times", [True, False])
@pytest.mark.parametrize("m, users, heads", [(1, 3, 2), (4, 3, 2), (300, 1, 1), (2, 1, 2)])
@torch.no_grad()
def test_shapes_of_queries_and_slots(m, users, heads, times):
    block, generator = HSTUBlock(8, 2, 0.0, 50, times=times), torch.Generator().manual_seed(1)

    def places(b, h, s, kind):
        at = torch.randint(0, 10**9, (3, h if s == 290 else 1, s), generator=generator) if times else None
        return Places(torch.randint(0, 90, (b, h, s), generator=generator).to(kind), at)

    found, plain = both(block, places(3, 1, m, torch.long), places(users, heads, 290, torch.int32))
    assert found.shape == (3, heads, m, 290) and torch.equal(found, plain)


def test_where_no_kernel_knows_them():
    tables = torch.randn(9, requires_grad=True), None
    place = torch.tensor([[[3, 4]]]), None
    assert kernels.relative(*tables, _gaps, place, place) is None  # they are being learned
    with torch.no_grad():
        assert kernels.relative(*tables, _gaps, place, place) is not None
        assert kernels.relative(tables[0].double(), None, _gaps, place, place) is None
        assert kernels.relative(*tables, _gaps, place, (place[0][..., :0], None)) is None
        assert kernels.relative(tables[0].to("meta"), None, _gaps, place, place) is None
        with kernels.eager():
            assert kernels.relative(*tables, _gaps, place, place) is None
