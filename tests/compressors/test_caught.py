"""What a user may write wrongly, and how the checks tell it."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from malloc_bench.compressors import Encoder, get_compressor
from malloc_bench.compressors.base import map_vectors
from malloc_bench.compressors.eviction.knorm import KNorm
from malloc_bench.registry import find
from malloc_bench.state import Dense, Prefill, UserState, quantize
from malloc_bench.testing import broken_promises
from malloc_bench.testing.worlds import LENGTHS, worlds

KMEANS = find("compressors", "kmeans")


def told(of, **methods):
    """What is broken of a part as it is with these methods, on plain tensors, by promise."""
    lines = broken_promises(type("Broken", (of,), methods)(), backbones=[])
    return {line.split(":")[0].removeprefix("tensors-"): line for line in lines if "pickle" not in line}


class Plain(Encoder):
    """Four bits a number, a scale a vector."""

    name = "plain"

    def encode(self, state):
        def vectors(name, segment):
            x = segment.fields[name].dense()
            return quantize(x, segment.real(x), 4, x.shape[3], "width")

        return map_vectors(state, vectors)

    def cost(self, layout, n, length):
        slot = sum(heads * (-(-4 * width // 8) + 4) for _, heads, width in layout.vectors)
        return layout.beside(n, length) + sum(heads for _, heads, _ in layout.vectors) + n * slot


def shared_scales(self, state):
    def vectors(name, segment):
        x = segment.fields[name].dense()
        most = torch.where(segment.real(x).unsqueeze(-1), x.abs(), 0.0).amax(2, keepdim=True).clamp(min=1e-6)
        return Dense((x / most * 3).round() / 3 * most)

    return map_vectors(state, vectors)


def dense_cost(self, layout, n, length):
    return layout.dense(n, length)


def clipped(self, state):
    return map_vectors(state, lambda name, s: Dense(0.9 * s.fields[name].dense()))


def joint(self, state):
    layers = [[replace(s, fields={n: Dense(v.dense() * s.fields["keys"].dense()[..., :1]) for n, v in s.fields.items()})
               for s in layer] for layer in state.layers]  # fmt: skip
    return UserState(tuple(map(tuple, layers)), state.length)


def dropped(self, state):
    fewer = [[replace(s, slots=replace(s.slots, count=(s.slots.count - 1).clamp(min=0))) for s in layer] for layer in state.layers]  # fmt: skip  # noqa: E501
    return UserState(tuple(map(tuple, fewer)), state.length)


def test_a_sound_encoder_passes():
    assert not told(Plain) and not told(Plain, by_vector=False, by_field=True)


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ({"encode": shared_scales, "cost": dense_cost, "by_vector": True}, "some vectors alone .* by_vector is False"),
        ({"encode": clipped, "cost": dense_cost, "by_vector": True}, "otherwise when it is written again"),
        ({"encode": joint, "cost": dense_cost}, r"values alone cannot be written \(KeyError: 'keys'\): say by_field"),
        ({"encode": dropped, "cost": dense_cost}, r"layer 0 has \[0, 0, 1, 2, 22, 39\] slots of \[0, 1, 2, 3, 23, 4"),
    ],
)  # fmt: skip
def test_encoders_that_are_not_what_they_say(methods, said):
    assert re.search(said, told(Plain, **methods)["writes_every_slot"])


def test_a_cost_that_is_right_for_all_slots_alone():
    def cost(self, layout, n, length):
        return Plain.cost(self, layout, length, length)

    assert "times the bytes that `cost` says of [0, 0, 1, 1, 11, 20] slots" in told(Plain, cost=cost)["costs_what_it_says"]  # fmt: skip  # noqa: E501


def test_more_forced_slots_than_are_kept():
    lines = told(KNorm, forced=lambda self, k: (4, 16))
    assert "forced(k) names more slots than the k that a head keeps" in lines["keeps_the_budget"]


def test_whole_numbers_are_not_rounded():
    first = Prefill.from_tensors([torch.ones(1, 1, 40, 2)], [torch.ones(1, 1, 40, 2)])
    oldest = type("Oldest", (KNorm,), {"scores": lambda self, prefill, layer: (1_700_000_000 - torch.arange(40)).view(1, 1, 40)})  # fmt: skip  # noqa: E501
    assert oldest().index(first, 0, torch.tensor([4])).tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("what", ["dtype", "folder"])
def test_a_method_that_changes_the_process_alone_is_told(what, tmp_path):
    def scores(self, prefill, layer):
        if what == "dtype":
            torch.set_default_dtype(torch.float64)
        else:
            __import__("os").chdir(tmp_path)
        return KNorm.scores(self, prefill, layer)

    try:
        lines = told(KNorm, scores=scores)
    except ValueError as error:  # before anything was tried
        assert "ProcessChanged: the method changed" in str(error)
    else:
        assert all("ProcessChanged: the method changed" in line for line in lines.values()) and len(lines) > 5
    assert torch.get_default_dtype() is torch.float32


def fitting(fit):
    class Learns(find("compressors", "pq")):
        def fit(self, sample, budget=None):
            return fit(super().fit(sample, budget), budget)

    return Learns()


@pytest.mark.parametrize(
    ("fit", "said"),
    [
        (lambda fit, budget: fit["keyz"], "its fit fails (KeyError: 'keyz')"),
        (lambda fit, budget: dict(fit), "fit must return a Fitted of named tensors, not dict"),
        (lambda fit, budget: [budget.fraction, fit][1], "'NoneType' object has no attribute 'fraction'"),
    ],
)
def test_a_fit_that_fails_is_said_once(fit, said):
    lines = broken_promises(fitting(fit), backbones=[])
    assert len(lines) == 1 and said in lines[0] and lines[0].startswith("tensors-learns:")


@pytest.mark.parametrize(
    ("owners", "said"),
    [
        (lambda good: good.float(), r"owners must be whole numbers \[B, H or 1, S\]"),
        (lambda good: good[:, 0], r"owners must be whole numbers \[B, H or 1, S\]"),
        (lambda good: good - 1, "owners names clusters outside 0 ... k - 1"),
        (lambda good: good.clamp(max=0), "of the clusters without a slot"),
    ],
)
def test_clusters_that_are_none(owners, said):
    lines = told(KMEANS, owners=lambda self, *given: owners(KMEANS.owners(self, *given)))
    assert any(re.search(said, line) for line in lines.values()), lines


@pytest.mark.parametrize("step", [{"intactkv": {"score": "knorm"}}, {"svd": {"rank": 4}}, "gear"])
def test_settling_for_what_writes_fields_together_never_does_harm(step, monkeypatch):
    """These read keys to write values, or write both as one: values alone could not be given, and were."""
    chain = get_compressor("compose", steps=[{"fit_omp": {"probes": 64}}, step])
    settled, plain = type(chain.steps[0]).settled, lambda self, prefill, state, *rest: state
    for place in worlds():
        if place.name not in ("tensors", "sasrec1", "hstu2"):
            continue
        world = place.fit(chain)
        lost = []
        for each in (settled, plain):
            monkeypatch.setattr(type(chain.steps[0]), "settled", each)
            prefill = world.prefill(chain.needs)
            full, got = world.read(prefill.state), world.read(chain.compress(prefill, 0.25))
            longer = torch.tensor(LENGTHS) > 20
            lost.append(float((got - full)[longer].detach().norm() / full[longer].detach().norm()))
        assert lost[0] <= 1.1 * lost[1] + 1e-3, (place.name, lost)


def test_a_list_as_a_parameter_is_told_at_once():
    @dataclass(frozen=True)
    class Listed(KNorm):
        windows: Any = field(default_factory=list)

    with pytest.raises(ValueError, match=r"^knorm has no hash \(unhashable type: 'list'\): make its parameters tuples"):
        broken_promises(Listed(), backbones=[])


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (
            {"positions": None},
            r"head 0: the key of the event at position \d+ is said to be at \d+: keep",
        ),
        (
            {"timestamps": 0},
            r"head 0: the key of the event at timestamp \d+ is said to be at 0: keep",
        ),
    ],
)
def test_slots_that_forget_where_they_stood(lost, said):
    """HSTU reads both: a method that drops them lost accuracy, and nothing said why."""

    def keep(self, prefill, k):
        state = KNorm.keep(self, prefill, k)

        def forgetful(segment):
            slots = segment.slots
            given = {name: x if x is None else torch.full_like(getattr(slots, name), x) for name, x in lost.items()}
            return replace(segment, slots=replace(slots, **given))

        return replace(state, layers=tuple(tuple(map(forgetful, layer)) for layer in state.layers))

    (hstu,) = [world.backbone for world in worlds() if world.name == "hstu2"]
    broken = broken_promises(type("Broken", (KNorm,), {"keep": keep})(), backbones=[hstu])
    found = [line for line in broken if "keeps_places" in line]
    assert len(found) == 1 and re.search(said, found[0]), broken
