"""Dropped channels by their definition, and that they are not stored."""

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close

COUNTS = (0, 1, 3, 9, 14)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(torch.arange(1, shape[-1] + 1))


@pytest.fixture
def prefill():
    """Two stored heads, each of two query heads."""
    keys, values = noise(5, 2, 14, 8, seed=0), noise(5, 2, 14, 6, seed=1)
    return Prefill.from_tensors([keys], [values], [noise(5, 4, 14, 8, seed=2).flip(-1)], lengths=torch.tensor(COUNTS))


@pytest.mark.parametrize(("keep", "window", "values"), [(0.5, 4, False), (0.25, 32, True), (0.9, 1, True)])
def test_think_keeps_the_channels_that_matter_to_the_newest_queries(keep, window, values, prefill):
    state = get_compressor("think", keep=keep, window=window, values=values).compress(prefill)
    asked = noise(5, 4, 14, 8, seed=2).flip(-1).double()
    fields = state.layers[0][0].fields
    for user, n in enumerate(COUNTS):
        for head in range(2):
            q = asked[user, 2 * head : 2 * head + 2, max(0, n - window) : n].flatten(0, 1)
            k, v = (x(0)[user, head, :n].double() for x in (prefill.keys, prefill.values))
            for x, score, name in (
                (k, q.square().mean(0) * k.square().mean(0), "keys"),
                (v, v.square().mean(0), "values"),
            ):
                kept = set(range(x.shape[1]))
                if n and (name == "keys" or values):
                    order = sorted(range(x.shape[1]), key=lambda j: -float(score[j]))
                    kept = set(order[: round(keep * x.shape[1])])
                want = torch.stack([x[:, j] if j in kept else 0 * x[:, j] for j in range(x.shape[1])], 1)
                close(fields[name].dense()[user, head, :n].double(), want, name, 1e-6)
    q, w = noise(5, 2, 3, 8, seed=5), noise(5, 2, 3, 14, seed=6)
    close(fields["keys"].dot(q), q @ fields["keys"].dense().mT, "dot", 1e-5)
    close(fields["values"].mix(w), w @ fields["values"].dense(), "mix", 1e-5)


def test_think_bytes(prefill):
    """A length, a count; of each head a byte for every kept channel, and what is kept of every slot."""
    state = get_compressor("think", keep=0.5).compress(prefill)
    assert state.nbytes().tolist() == [8 + 2 * (4 + 4 * 4 * n) + 2 * 4 * 6 * n for n in COUNTS]
    state = get_compressor("think", keep=0.5, values=True).compress(prefill)
    assert state.nbytes().tolist() == [8 + 2 * (4 + 4 * 4 * n) + 2 * (3 + 4 * 3 * n) for n in COUNTS]
