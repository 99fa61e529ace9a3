"""A network that makes slots: what it reads by definition, and that training is worth it on users it has not seen."""

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import get_compressor
from malloc_bench.state import Fitted, Stats
from malloc_bench.testing.worlds import World

LENGTHS = (12, 9, 4)


@pytest.fixture(scope="module")
def method():
    return get_compressor("still", bank=6, rounds=60, rate=0.02, probes=16)


@pytest.fixture(scope="module")
def world():
    return World("tensors")


@pytest.fixture(scope="module")
def fitted(world, method):
    return method.fit(world.prefill(method.fit_needs, (14, 11, 9, 8), draw=1))


def wrong(method, prefill, fitted, slots):
    """Of what probes get, relative, the mean over layers."""
    state, found = method.compress(prefill, {"slots": slots}, fitted), []
    for layer in prefill.layers:
        probes = prefill.probes(layer)
        weights, _ = probes.weigh(state.layers[layer][0])
        off = probes.mix(weights, state.layers[layer][0]) - probes.target
        found.append(float(off.square().sum() / probes.target.square().sum()))
    return sum(found) / len(found)


def test_slots_are_what_learned_queries_read(world, method, fitted):
    prefill = world.prefill(Stats(), LENGTHS)
    state = method.compress(prefill, {"slots": 3}, fitted)
    for layer in prefill.layers:
        own = {name: x.double() for name, x in fitted.part(str(layer)).items()}
        (segment,) = state.layers[layer]
        for user, n in enumerate(LENGTHS):
            for head in range(2):
                k, v = (x[user, head, :n].double() for x in (prefill.keys(layer), prefill.values(layer)))
                age = torch.arange(n, 0, -1).double().log()
                a = (own["seek"][head, :3] @ k.T + own["age"][head, :3] * age).softmax(-1)
                keys = a @ k * own["gain"][head, :3] + own["key"][head, :3]
                values = a @ v * own["worth"][head, :3] + own["value"][head, :3]
                mass = n * own["mass"][head, :3, 0].softmax(0)
                order = (a @ torch.arange(n).double()).argsort()
                got = [segment.fields[name].dense()[user, head, :3].double() for name in ("keys", "values")]
                assert torch.allclose(got[0], keys[order], atol=1e-5)
                assert torch.allclose(got[1], values[order], atol=1e-5)
                assert torch.allclose(segment.slots.mass[user, head, :3].double(), mass[order], rtol=1e-4)


def test_few_events_are_kept_as_they_are_and_the_bank_is_all_there_is(world, method, fitted):
    prefill = world.prefill(Stats(), (12, 4))
    state = method.compress(prefill, {"slots": 10}, fitted)
    for layer in prefill.layers:
        (segment,) = state.layers[layer]
        assert segment.slots.count[:, 0].tolist() == [6, 4]
        assert torch.equal(segment.fields["keys"].dense()[1, :, :4], prefill.keys(layer)[1, :, :4])
        assert torch.equal(segment.slots.mass[1, :, :4], torch.ones(2, 4))


def test_it_learns_from_others_what_probes_will_ask():
    torch.manual_seed(0)
    backbone = get_backbone("hstu", 60, False, layers=2, heads=2, dim=16, max_length=64).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3)
    world, others = World("hstu", backbone), tuple(range(6, 30))
    found = []
    for rounds, rate in ((1, 1e-9), (300, 0.05)):
        method = get_compressor("still", bank=6, rounds=rounds, rate=rate, probes=16)
        with torch.no_grad():
            fitted = method.fit(world.prefill(method.fit_needs, others, draw=1))
            prefill = world.prefill(method.fit_needs, (13, 20, 25, 28), draw=2)
            found.append([wrong(method, prefill, fitted, slots) for slots in (1, 3, 6)])
    assert all(after < 0.9 * before for before, after in zip(*found)), found


def test_it_asks_nothing_of_a_user_and_the_same_sample_makes_the_same_fit(world, method, fitted):
    assert method.needs == Stats() and method.fit_needs.asks
    again = method.fit(world.prefill(method.fit_needs, (14, 11, 9, 8), draw=1))
    assert isinstance(fitted, Fitted) and again.digest == fitted.digest
    with pytest.raises(ValueError, match="bank and rounds >= 1"):
        get_compressor("still", bank=0)
