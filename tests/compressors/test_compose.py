"""Chains: positions, mass and bytes stay right from link to link."""

from dataclasses import replace

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.base import as_compressor
from malloc_bench.compressors.quantization.int8 import Int8
from malloc_bench.state import Prefill, Stats
from malloc_bench.testing import World
from malloc_bench.testing.worlds import LENGTHS, close

CHAINS = [
    ("recent", "merge_adjacent"), ("merge_adjacent", "knorm"), ("merge_adjacent", "recent"), ("recent", "knorm"),
    ("h2o", "recent"), ("h2o", "merge_adjacent"), ("tova", "merge_adjacent", "knorm"), ("recent", "int8"),
    ("merge_adjacent", {"kivi": {"bits": 2}}), ("h2o", {"kivi": {"bits": 4, "tail": 8}}), ("h2o", {"svd": {"rank": 4}}),
    ("snapkv", "sink_recent", {"kivi": {"bits": 8, "tail": 3}}), ("merge_adjacent", "merge_adjacent"),
    ("h2o_stream", {"kivi": {"bits": 8, "tail": 3}}), ("h2o_stream", "by_age"),
]  # fmt: skip


@pytest.mark.parametrize("case", ["sasrec-2-heads", "hstu-times-2-heads", "hstu-2-heads", "hstu-times"])
@pytest.mark.parametrize("steps", CHAINS, ids=str)
def test_cost_is_exact(steps, case, trained):
    """What the search believes n slots take is what they take, for every n (where scales fit float16)."""
    chain = get_compressor("compose", steps=steps)
    prefill = World(case, trained(case)).prefill(chain.needs)
    length, layout = prefill.state.length.long(), chain.layout(prefill)
    for n in (1, 2, 7, 8, 9, 22, 39, 40):
        k = length.clamp(max=n)
        state = chain.keep(prefill, k)
        wide = torch.zeros_like(length)
        for vectors in {id(v): v for s in state.segments() for v in s.fields.values()}.values():
            if hasattr(vectors, "wide"):
                wide += vectors.wide[..., 0, 0].sum(1)
        exact, believed = state.nbytes(), chain.cost(layout, k, length)
        assert exact[wide == 0].tolist() == believed[wide == 0].tolist(), n
        assert bool((exact >= believed).all())


def test_wide_scales_do_not_break_the_budget():
    x = torch.randn(3, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    x[:2, :, 30] *= 1e7
    prefill = Prefill.from_tensors([x, x], [x, x])
    for steps in (("recent", "int8"), ("recent", {"kivi": {"bits": 4, "group": 4}}), ("knorm", {"kivi": {"group": 4}})):
        chain = get_compressor("compose", steps=steps)
        for budget in map(Budget, (0.5, 0.2, 0.1)):
            state = chain.compress(prefill, budget)
            assert bool((state.nbytes() <= budget.target(prefill.state.nbytes())).all())
            assert int(state.layers[0][0].slots.count[2]) == int(chain.slots(prefill, budget)[2])  # nobody else pays


def positions(state, layer=0):
    (segment,) = state.layers[layer]
    return segment.slots.places(segment.width, state.length[:, None])


@pytest.mark.parametrize("first", ["recent", "sink_recent", "knorm", "merge_adjacent"])
@pytest.mark.parametrize("then", ["recent", "sink_recent", "knorm", "random", "merge_adjacent"])
def test_vectors_keep_their_positions(first, then):
    """Each slot's value says where its events stood; its position must say the same, in every layer and head."""
    place = torch.arange(30.0).view(1, 1, 30, 1).expand(2, 2, 30, 1)
    keys = [torch.rand(2, 2, 30, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    prefill = Prefill.from_tensors(keys, [place, place], lengths=torch.tensor([30, 21]), positions=True)
    state = get_compressor("compose", steps=(first, then)).compress(prefill, Budget(slots=6))
    for layer in range(2):
        values = state.layers[layer][0].fields["values"].dense()[..., 0]
        rounding = 1.01 if "merge_adjacent" in (first, then) else 0  # two links round once each
        assert float((values - positions(state, layer)).abs().max()) <= rounding


@pytest.mark.parametrize("steps", [("recent", "merge_adjacent"), ("merge_adjacent", "merge_adjacent")], ids=str)
def test_mass_is_conserved(steps):
    x = [torch.rand(1, 1, 32, 2, generator=torch.Generator().manual_seed(0))]
    state = get_compressor("compose", steps=steps).compress(Prefill.from_tensors(x, x), Budget(slots=8))
    (segment,) = state.layers[0]
    first = 32 if steps[0] == "merge_adjacent" else 16  # halfway from 32 to 8 by the same factor
    assert float(segment.slots.mass.sum()) == first
    mean = (segment.fields["values"].dense() * segment.slots.mass.unsqueeze(-1)).sum(2) / first
    close(mean, x[0][:, :, 32 - first :].mean(2), "mean of all", 1e-6)


@pytest.mark.parametrize(
    "steps",
    [(), ("recent",), ("int8", "recent"), ("recent", "int8", "int8"), ("recent", "svd"), ("recent", "h2o"),
     ("recent", ("recent", "int8")), ("full", "int8"), ("recent", "truncate"), ("mqa",), ("mqa", "mla"),
     ("recent", "mqa"), ("int8", "mqa"), ("mqa", "int8", "recent"), ("mqa", "svd")],
    ids=str,
)  # fmt: skip
def test_senseless_chains_are_refused(steps):
    with pytest.raises(ValueError, match="compose"):
        get_compressor("compose", steps=steps)


def test_chains_do_not_nest():
    inner = get_compressor("compose", steps=("recent", "int8"))
    with pytest.raises(ValueError, match="compose"):
        get_compressor("compose", steps=("recent", inner))


def test_needs_are_those_of_all_links():
    assert get_compressor("compose", steps=("snapkv", "int8")).needs == Stats(window=16)


def test_a_chain_of_one_method_and_an_encoder_is_both_in_turn(trained):
    world = World("hstu-times", trained("hstu-times"))
    prefill = world.prefill(Stats())
    recent = get_compressor("recent").compress(prefill, Budget(slots=9))
    want = get_compressor("int8").encode(recent)
    got = get_compressor("compose", steps=("recent", "int8")).compress(prefill, Budget(slots=9))
    assert [got.pack(u) for u in range(len(LENGTHS))] == [want.pack(u) for u in range(len(LENGTHS))]


def test_behind_a_structural_step_only_token_methods_take_a_budget():
    bare, cut = (get_compressor("compose", steps=steps) for steps in (("mqa", "int8"), ("mqa", "recent", "int8")))
    assert (bare.takes_budget, cut.takes_budget) == (False, True)
    assert bare.structural == cut.structural == get_compressor("mqa")
    assert get_compressor("compose", steps=("recent", "int8")).structural is None
    x = [torch.rand(2, 1, 30, 8, generator=torch.Generator().manual_seed(0))]
    prefill = Prefill.from_tensors(x, x)
    want = get_compressor("int8").encode(prefill.state)
    assert [bare.compress(prefill).pack(u) for u in range(2)] == [want.pack(u) for u in range(2)]
    whole = replace(prefill, whole=4 * prefill.state.nbytes())
    assert (cut.compress(whole, Budget(0.1)).nbytes() <= 0.1 * whole.whole).all()
    assert int(cut.compress(whole, Budget(0.05)).nbytes()[0]) > 0.15 * int(prefill.state.nbytes()[0])


def test_a_cost_that_says_too_little_costs_a_few_slots(monkeypatch):
    x = torch.randn(3, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    prefill = Prefill.from_tensors([x, x], [x, x])
    chain = get_compressor("compose", steps=("recent", "int8"))
    whole = prefill.state.nbytes()
    for factor in (2, 5, 100):
        with monkeypatch.context() as patch:
            own = Int8.cost
            patch.setattr(Int8, "cost", lambda self, *given, own=own, by=factor: own(self, *given) // by)
            size = chain.compress(prefill, Budget(0.2)).nbytes()
        assert bool((size <= 0.2 * whole).all()) and bool((size > 0.15 * whole).all()), factor


def test_what_is_no_parameters_of_a_step_is_said():
    for step in ({"svd": [1]}, {"compose": ["recent", "int8"]}, {"svd": 3}):
        with pytest.raises(ValueError, match=r"is NAME or \{NAME: \{parameter: value\}\}, not"):
            as_compressor(step)
