"""Moments of what is not kept, from their definitions, and what a memory answers where that is exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.state import Prefill, Stats, joined
from malloc_bench.testing.worlds import World

COUNTS = (9, 7, 3)


@pytest.fixture
def prefill():
    rng = np.random.default_rng(0)
    arrays = [torch.tensor(rng.normal(size=(3, 2, 9, 6)), dtype=torch.float32) for _ in range(2)]
    queries = torch.tensor(rng.normal(size=(3, 2, 4, 6)), dtype=torch.float32)
    return Prefill.from_tensors([arrays[0]], [arrays[1]], lengths=torch.tensor(COUNTS), probes=[queries])


def known(state, layer=0):
    return {name: x.dense().double() for name, x in state.layers[layer][-1].fields.items()}


@pytest.mark.parametrize("about", ["query", "zero"])
def test_the_moments_of_what_is_dropped(prefill, about):
    state = get_compressor("moments", inner="recent", rank=6, about=about, probes=4).compress(prefill, {"slots": 2})
    memory, probes = known(state), prefill.probes(0)
    for user, n in enumerate(COUNTS):
        for head in range(2):
            k, v = (x[user, head, : n - 2].double() for x in (prefill.keys(0), prefill.values(0)))
            q0 = probes.asking()[user, head].double().mean(0) if about == "query" else torch.zeros(6).double()
            share = (k @ q0).softmax(0)
            mu_k, mu_v = share @ k, share @ v
            slope = (share[:, None] * (v - mu_v)).T @ (k - mu_k)
            own = {name: x[user, head] for name, x in memory.items()}
            close = {"rtol": 0.05, "atol": 0.05}
            assert torch.allclose(own["key"][0], mu_k, **close)
            assert torch.allclose(own["answers"].T @ own["asks"], slope, **close)
            assert torch.allclose(own["constant"][0] + own["answers"].T @ (own["asks"] @ q0), mu_v, **close)
            assert torch.allclose(own["weight"][0, 0] + own["key"][0] @ q0, (k @ q0).logsumexp(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("about", ["query", "zero"])
def test_one_event_that_is_dropped_is_all_there_and_kept_ones_leave_nothing(about):
    torch.manual_seed(0)
    backbone = get_backbone("sasrec", 60, False, layers=2, heads=2, dim=16, max_length=64).eval()
    method = get_compressor("moments", inner="recent", rank=0, about=about, probes=4)
    world = World("sasrec", backbone)
    prefill = world.prefill(method.needs, (6, 4))
    full = world.read(prefill.state, lengths=(6, 4)).detach()
    for slots, wrong in ((3, 0.2), (5, 0.02), (6, 1e-5)):
        read = world.read(method.compress(prefill, {"slots": slots}), lengths=(6, 4)).detach()
        assert float((read - full)[:1].abs().max() / full.abs().max()) < wrong
        assert float((read - full)[1:].abs().max() / full.abs().max()) < (1e-5 if slots > 3 else 0.02)


def test_a_memory_goes_on_counting_what_is_dropped(prefill):
    """Of means about zero the moments of two times dropped are those of all that was."""
    method = get_compressor("moments", inner="recent", rank=6, about="zero", probes=4)
    first = replace(prefill, state=method.compress(prefill, {"slots": 3}), memo={})
    state = method.update(first, Budget(slots=1))
    memory = known(state)
    for user, n in enumerate(COUNTS):
        k, v = (x[user, :, : n - 1].double() for x in (prefill.keys(0), prefill.values(0)))
        assert torch.allclose(memory["weight"][user, :, 0, 0].exp(), torch.tensor(n - 1.0).double(), rtol=1e-3)
        assert torch.allclose(memory["key"][user, :, 0], k.mean(1), atol=0.05)
        slope = (v - v.mean(1, keepdim=True)).mT @ (k - k.mean(1, keepdim=True)) / (n - 1)
        assert torch.allclose(memory["answers"][user].mT @ memory["asks"][user], slope, atol=0.1)


def test_behind_a_backbone_it_goes_on_too():
    torch.manual_seed(0)
    for name in ("sasrec", "hstu"):
        backbone = get_backbone(name, 60, False, layers=2, heads=2, dim=16, max_length=64).eval()
        method = get_compressor("moments", inner="recent", rank=2, probes=4)
        world = World(name, backbone)
        prefill = world.prefill(method.needs, (12, 9))
        state = method.compress(prefill, {"slots": 4})
        again = joined(state)
        assert [len(layer) for layer in again.layers] == [2, 2]
        assert torch.allclose(world.read(again, lengths=(12, 9)), world.read(state, lengths=(12, 9)), atol=1e-5)


def test_a_rank_beyond_the_width_is_the_width(prefill):
    method = get_compressor("moments", inner="recent", rank=9, probes=4)
    state = method.compress(prefill, {"slots": 2})
    assert state.layers[0][-1].fields["asks"].shape[2] == 6
    sizes = method.sizes(prefill)(torch.full((3,), 2))
    assert sizes.tolist() == state.nbytes().tolist() == [len(blob) for blob in state.packed([0, 1, 2])]


def test_what_it_refuses():
    for params in ({"inner": "kmeans"}, {"inner": "pyramid"}, {"rank": -1}, {"about": "mean"}, {"inner": "int8"}):
        with pytest.raises(ValueError, match="moments: an inner method that keeps slots as they are"):
            get_compressor("moments", **params)
    with pytest.raises(ValueError, match="moments leaves a memory beside its slots: no token method comes after it"):
        get_compressor("compose", steps=("moments", "recent"))
    assert Stats() != get_compressor("moments").needs
