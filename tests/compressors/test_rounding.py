"""Values rounded in turns: against the definition in float64, and what it is good for behind real encoders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.compressors.fitted import rounding
from malloc_bench.compressors.fitted.rounding import TURNS, Rounding
from malloc_bench.compressors.fitted.solving import Rows, solve
from malloc_bench.registry import find, names
from malloc_bench.state import Dense, Prefill, Segment, Slots, UserState
from malloc_bench.suite.cells import content
from malloc_bench.testing.worlds import close

RIDGE = 1e-2


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def prefill():
    keys, values, probes = noise(3, 2, 20, 6), noise(3, 2, 20, 6, seed=1), noise(3, 2, 24, 6, seed=2)
    return Prefill.from_tensors([keys], [values], lengths=torch.tensor([20, 13, 3]), probes=[probes])


def kept(prefill, k, count):
    """The first slots, fitted."""
    fields = {name: Dense(x.dense()[:, :, :k]) for name, x in prefill.segment(0).fields.items()}
    slots = Slots(torch.tensor(count, dtype=torch.int32)[:, None], None, None, None)
    mass, values = solve(Rows.of(prefill.probes(0), Segment(fields, slots)), RIDGE)
    return Segment({**fields, "values": Dense(values)}, replace(slots, mass=mass))


def job_of(prefill, segment):
    rows = Rows.of(prefill.probes(0), replace(segment, slots=replace(segment.slots, mass=None)))
    return Rounding.of(rows, segment.slots, RIDGE)


@pytest.mark.parametrize("turn", range(TURNS - 1))
def test_later_slots_make_up_for_what_is_lost(prefill, turn):
    segment = kept(prefill, 8, [8, 8, 3])
    job, values = job_of(prefill, segment), segment.fields["values"].dense()
    bare = replace(segment, slots=replace(segment.slots, mass=None))
    written = (2 * values).round() / 2
    found = job.after(turn, values, written)
    for user, count in enumerate([8, 8, 3]):
        for head in range(2):
            mass = segment.slots.mass[user, head, :count].double()
            a = prefill.probes(0).columns(bare)[user, head, :, :count].double() * mass
            a = a / (a.sum(-1, keepdim=True) + prefill.probes(0).share[user, head].double())
            order = a.square().sum(0).argsort(descending=True).tolist()
            turns = {slot: place * TURNS // count for place, slot in enumerate(order)}
            now, later = ([s for s in range(count) if p(turns[s])] for p in (turn.__eq__, turn.__lt__))
            want = values[user, head].double()
            lost = a[:, now] @ (want - written[user, head].double())[now]
            b = a[:, later]
            gram = b.T @ b
            if later:
                damped = gram + RIDGE * a.square().sum(0).mean() * torch.eye(len(later)).double()
                want[later] += torch.linalg.solve(damped, b.T @ lost)
            close(found[user, head, :count], want[:count], f"{user}, {head}", 2e-4)


def written_by(name, **params):
    encoder = get_compressor(name, **params)
    return lambda state: encoder.encode(state)


@pytest.fixture
def coded(prefill):
    """What `gain_shape` writes, after it has learned of the users."""
    encoder = get_compressor("gain_shape", stages=2, bits=4)
    view = prefill.given(encoder.fit(prefill))
    return lambda state: encoder.write(view.over(state))


def two_layers(prefill, segment):
    """The second one is not rounded."""
    return UserState(((segment,), (segment,)), prefill.state.length)


def test_what_is_written_by_vector_is_written_once(prefill, coded):
    segment = kept(prefill, 8, [8, 8, 3])
    job, sizes = job_of(prefill, segment), []

    def write(state):
        state = UserState(state.layers[:1], state.length)  # codebooks of one layer
        sizes.append(state.layers[0][0].fields["values"].shape[2])
        made = coded(state)
        return UserState((made.layers[0], made.layers[0]), state.length)

    state = two_layers(prefill, segment)
    found, whole = (rounding.rounded(state, [job, None], write, by_vector) for by_vector in (True, False))
    assert sizes == [8, 1, 1, 2, 1, 1] + 6 * [8]
    assert found.layers[1][0].fields["values"].dense() is segment.fields["values"].dense()

    def wrong(state):
        return job.wrong(write(state).layers[0][0].fields["values"].dense())

    assert bool((wrong(found) <= wrong(state) * 1.001).all())
    assert float(wrong(found).sum()) < 0.99 * float(wrong(state).sum())
    assert float(wrong(found).sum()) <= 1.001 * float(wrong(whole).sum())  # there the first ones are coded again


@pytest.mark.parametrize(("name", "params"), [("int4_token", {}), ("mxint", {"bits": 2}), ("kivi", {"bits": 2})])
def test_no_head_answers_held_out_probes_worse(prefill, name, params):
    segment = kept(prefill, 8, [8, 8, 3])
    job, write = job_of(prefill, segment), written_by(name, **params)
    state = UserState(((segment,),), prefill.state.length)
    found = rounding.rounded(state, [job], write)

    def wrong(state):
        return job.wrong(write(state).layers[0][0].fields["values"].dense())

    assert bool((wrong(found) <= wrong(state) * 1.001).all())
    assert float(wrong(found).sum()) < 0.99 * float(wrong(state).sum())
    assert found.layers[0][0].slots is segment.slots


BY_VECTOR = [name for name in names("compressors") if getattr(find("compressors", name), "by_vector", False)]


def test_codebooks_write_by_vector():
    assert BY_VECTOR == ["gain_shape", "pq", "rvq"]


@pytest.mark.parametrize("name", BY_VECTOR)
def test_a_vector_is_written_alike_whatever_is_beside_it(prefill, name):
    encoder = get_compressor(name)
    view, state = prefill.given(encoder.fit(prefill)), kept(prefill, 8, [8, 8, 3])

    def values(index):
        x, count = state.fields["values"].dense()[:, :, index], torch.full((3, 1), len(index), dtype=torch.int32)
        some = UserState(((Segment({"values": Dense(x)}, Slots(count)),),), prefill.state.length)
        return encoder.write(view.over(some)).layers[0][0].fields["values"].dense()

    whole = values(list(range(3)))
    for some in ([0], [1, 2], [2, 0]):
        assert torch.equal(values(some), whole[:, :, some])


def test_rows_of_chains_that_are_settled_anew_are_new_rows():
    """Those that fit what codebooks write, or what writes fields together; all others stay what they were."""
    chains = [
        ["fit_omp", "gain_shape"],
        ["fit_omp", "gear"],
        ["fit_omp", "mxint"],
        ["recent", "pq"],
        ["fit_omp", "recent"],
    ]
    known = [content(get_compressor("compose", steps=steps)).get("version_settled") for steps in chains]
    assert known == [2, 2, None, None, None]


def test_more_slots_than_probes_are_left_alone(prefill):
    few = Prefill.from_tensors([prefill.keys(0)], [prefill.values(0)], probes=[noise(3, 2, 6, 6, seed=2)])
    segment = kept(few, 8, [8, 6, 3])
    state = UserState(((segment,),), few.state.length)
    found = rounding.rounded(state, [job_of(few, segment)], written_by("mxint", bits=2))
    same = (found.layers[0][0].fields["values"].dense() == segment.fields["values"].dense()).flatten(1).all(1)
    assert same.tolist()[:2] == [True, False]
    alone = kept(few, 8, [8, 7, 8])
    assert job_of(few, alone) is None and rounding.rounded(state, [None], None) is state
