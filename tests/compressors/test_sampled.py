"""Sampled slots: chances by definition, as many as asked for, and sums that are right on average."""

import pytest
import torch

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill

USERS, S, D = 1500, 12, 3


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def crowd(attention=None, seed=0):
    """One history, of many users who draw differently; two heads."""
    keys, values = (noise(1, 2, S, D, seed=i).expand(USERS, -1, -1, -1) for i in (0, 1))
    queries = noise(1, 2, S, D, seed=2).expand(USERS, -1, -1, -1) * 3
    attention = None if attention is None else [attention(queries @ keys.mT).tril()]
    return Prefill.from_tensors([keys], [values], [queries], attention, positions=True, seed=seed)


def chances(scores, k):
    """min(1, c s) with the c that makes them k, by bisection in float64."""
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if float((c * scores).clamp(max=1).sum()) < k else (low, c)
    return (high * scores).clamp(max=1)


@pytest.mark.parametrize("k", [1, 3, 7, 11, 12])
@pytest.mark.parametrize("inner", ["h2o", "tova"])
def test_chances_are_in_proportion_to_scores_and_never_above_one(inner, k):
    prefill = crowd().take(torch.arange(1))
    sampled = get_compressor("sampled", inner=inner)
    got = sampled.chances(prefill, 0, torch.tensor([[k]]))[0]
    for head, scores in enumerate(get_compressor(inner).scores(prefill, 0)[0].double()):
        want = chances(scores.maximum(0.01 * scores.mean()), k)
        assert torch.allclose(got[head], want, atol=1e-9) and abs(float(got[head].sum()) - k) < 1e-9


@pytest.mark.parametrize("silu", [False, True], ids=["softmax", "silu"])
@pytest.mark.parametrize("inner", ["h2o", "tova", "snapkv", "vatp"])
def test_sums_over_slots_are_right_on_average(inner, silu):
    prefill = crowd(torch.nn.functional.silu if silu else None)
    (segment,) = get_compressor("sampled", inner=inner).compress(prefill, {"slots": 5}).layers[0]
    assert segment.slots.count.unique().tolist() == [5]
    places, mass = (x.expand(-1, 2, -1) for x in (segment.slots.positions.long(), segment.slots.mass.double()))
    assert bool((places.diff(dim=-1) > 0).all()), "in time order, none twice"
    each = torch.zeros(USERS, 2, S, dtype=torch.float64).scatter(2, places, mass)  # what each event counts
    error = each.std(0) / USERS**0.5
    assert bool(((each.mean(0) - 1).abs() <= 5 * error + 1e-6).all()), each.mean(0)

    values = segment.fields["values"].dense().double()
    got, full = (mass.unsqueeze(-1) * values).sum(2), prefill.values(0)[0].double().sum(1)
    assert bool(
        ((got.mean(0) - full).abs() <= 5 * got.std(0) / USERS**0.5 + 1e-6).all()
    )  # a query that weighs all alike


def test_lots_differ_between_users_and_seeds_and_stay_otherwise():
    def places(seed, users):
        prefill = crowd(seed=seed).take(torch.tensor(users))
        (segment,) = get_compressor("sampled", inner="h2o").compress(prefill, {"slots": 5}).layers[0]
        return segment.slots.positions

    assert torch.equal(places(0, [3, 7]), places(0, [7, 3]).flip(0))
    assert not torch.equal(places(0, list(range(20))), places(1, list(range(20))))
    assert len({tuple(x.flatten().tolist()) for x in places(0, list(range(20)))}) > 5


def test_what_cannot_be_a_chance_is_refused():
    with pytest.raises(ValueError, match="knorm scores below 0"):
        get_compressor("sampled", inner="knorm").compress(crowd(), 0.5)
    with pytest.raises(ValueError, match="inner method that scores"):
        get_compressor("sampled", inner="recent")


@pytest.mark.parametrize("recent, newest", [(0.5, 3), (0.25, 1), (0.0, 0)])
def test_h2o_keeps_so_many_of_the_newest(recent, newest):
    k = torch.tensor([7, 1, 0])
    assert get_compressor("h2o", recent=recent).forced(k)[1].tolist() == [newest, 0, 0]


def test_h2o_refuses_more_than_half():
    with pytest.raises(ValueError, match="recent must be"):
        get_compressor("h2o", recent=0.6)
