"""Chosen slots stand in order, as plain torch puts them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench import kernels
from malloc_bench.compressors.selection import filled

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")


@given(st.integers(0, 3), st.integers(1, 2), st.integers(0, 40), st.integers(0, 2**31), st.booleans())
def test_not_a_slot_is_other_than_torchs(b, h, s, seed, forcing):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(b, h, s, generator=generator).argsort(-1)
    k = torch.randint(0, s + 1, (b, 1), generator=generator)
    forced = order < torch.minimum(k.unsqueeze(-1) // 2, torch.tensor(3)) if forcing else None
    found = filled(order, forced, k)
    with kernels.eager():
        assert torch.equal(found, filled(order, forced, k))
    assert found.shape == (b, h, int(k.max()) if b else 0)
    for own, many in zip(found, k.flatten().tolist()):
        assert bool((own[:, 1:many] > own[:, : max(many - 1, 0)]).all())


def test_heads_that_share_an_order():
    order, k = torch.rand(5, 1, 30).argsort(-1), torch.randint(0, 31, (5, 3))
    found = filled(order, None, k)
    with kernels.eager():
        assert torch.equal(found, filled(order, None, k))
