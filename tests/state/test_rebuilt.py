"""Vectors that are rebuilt: the same whether a map is absorbed or not, in blocks or not, and stored once."""

import pytest
import torch

from malloc_bench.measure import count_flops
from malloc_bench.state import Dense, Map, Rebuilt, Segment, Slots, Summed, UserState, quantize, rebuilt
from malloc_bench.testing.worlds import close

B, H, S, N, D = 2, 3, 50, 8, 5


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("queries", [1, 200])
@pytest.mark.parametrize(("silu", "bias"), [(False, True), (False, False), (True, True)])
def test_reads_are_those_of_what_is_rebuilt(queries, silu, bias, monkeypatch):
    monkeypatch.setattr(rebuilt, "_ROWS", 7)
    base = noise(B, 1, S, N)
    vectors = Rebuilt(Dense(base), Map(noise(H, N, D, seed=1), noise(H, D, seed=2) if bias else None, silu))
    made = base.double() @ noise(H, N, D, seed=1).double()
    made = made + noise(H, D, seed=2).double().unsqueeze(1) if bias else made
    made = made * made.sigmoid() if silu else made
    q, w = noise(B, H, queries, D, seed=3), noise(B, H, queries, S, seed=4)
    assert vectors.shape == (B, H, S, D) and vectors._absorbs(queries) == (queries == 1 and not silu)
    close(vectors.dense().double(), made, "dense", 1e-5)
    close(vectors.dot(q).double(), q.double() @ made.mT, "dot", 1e-5)
    close(vectors.mix(w).double(), w.double() @ made, "mix", 1e-5)
    for read in (lambda: vectors.dot(q), lambda: vectors.mix(w)):
        assert count_flops(read) == B * vectors.flops(queries)


def test_what_several_are_made_of_is_stored_once():
    mask = torch.ones(B, 1, S, dtype=torch.bool)
    low, more = (quantize(noise(B, 1, S, N, seed=i), mask, 4, N, "width") for i in range(2))
    both = Summed(low, more)
    layers = [
        {name: Rebuilt(base, Map(noise(H, N, D, seed=i))) for i, name in enumerate(("keys", "values"))}
        for base in (low, both)
    ]
    slots = Slots(torch.full((B, 1), S, dtype=torch.int32))
    state = UserState(tuple((Segment(fields, slots),) for fields in layers), slots.count[:, 0])
    assert state.nbytes().tolist() == [8 + 2 * (1 + S * (N // 2 + 4))] * B
    back = state.take(torch.tensor([1])).unpack([state.pack(0), state.pack(1)])
    for one, other in zip(state.segments(), back.segments(), strict=True):
        for name, vectors in one.fields.items():
            assert torch.equal(other.fields[name].dense(), vectors.dense())
    sums = back.layers[1][0].fields
    assert sums["keys"].base is sums["values"].base and sums["keys"].base.first is back.layers[0][0].fields["keys"].base
