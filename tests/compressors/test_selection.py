"""Each method against its definition, spelled out in float64 on small inputs."""

from itertools import pairwise

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.selection import chosen, ranked
from malloc_bench.state import MissingStatistic, Prefill, Stats
from malloc_bench.testing import histories
from malloc_bench.testing.worlds import LENGTHS, close

COUNTS = (1, 3, 9, 14)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefill_of(silu=False, counts=COUNTS, heads=2, seed=0, users=None):
    """Plain tensors of two layers, with softmax attention or with SiLU weights, which can be negative."""
    shape = (len(counts), heads, max(counts), 4)
    keys, values, queries = ([noise(*shape, seed=9 * seed + 3 * i + j) for j in range(2)] for i in range(3))
    attention = None
    if silu:
        attention = [torch.nn.functional.silu(q @ k.transpose(-1, -2)).tril() / 64 for q, k in zip(queries, keys)]
        assert all(bool((a < 0).any()) for a in attention)
    lengths = torch.tensor(counts)
    return Prefill.from_tensors(keys, values, queries, attention, lengths, users, positions=True, seed=seed)


def whole(prefill, layer, queries_silu):
    """The float64 attention matrices that `prefill_of` stands for, [B, H, S, S], zeros outside each user's events."""
    b, h, s, _ = prefill.keys(layer).shape
    q, k = noise(b, h, s, 4, seed=6 + layer).double(), prefill.keys(layer).double()
    out = torch.zeros(b, h, s, s, dtype=torch.float64)
    for user, n in enumerate(COUNTS):
        for head in range(h):
            for row in range(n):
                logits = torch.stack([q[user, head, row] @ k[user, head, col] for col in range(row + 1)])
                if queries_silu:
                    out[user, head, row, : row + 1] = logits / (1 + (-logits).exp()) / 64
                else:
                    out[user, head, row, : row + 1] = (logits / 2).exp() / (logits / 2).exp().sum()
    return out


def kept(state, layer=0):
    """Positions that each user keeps, [user][head] lists."""
    slots = state.layers[layer][0].slots
    return [[row[: int(n)].tolist() for row in user] for user, n in zip(slots.positions, slots.count[:, 0])]


def best(scores, k, forced=()):
    """Indices of the k best in time order: forced ones, then by score, the newer first where scores tie."""
    order = sorted(range(len(scores)), key=lambda i: (i not in forced, -float(scores[i]), -i))
    return sorted(order[:k])


def check_selection(method, prefill, scores, forced=lambda n, k: ()):
    """Kept slots are the best by `scores` [B, H or 1, S] in float64, at many sizes."""
    for k in (1, 2, 3, 5, 8, 13, 20):
        for layer in prefill.layers:
            got = kept(method.compress(prefill, Budget(slots=k)), layer)
            for user, n in enumerate(COUNTS):
                size = min(k, n)
                want = [best(row[:n], size, forced(n, size)) for row in scores(layer)[user]]
                assert got[user] == want, f"user {user}, k {k}, layer {layer}"


def test_knorm():
    prefill = prefill_of()
    check_selection(get_compressor("knorm"), prefill, lambda i: -prefill.keys(i).double().square().sum(-1).sqrt())


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("silu", [False, True])
def test_h2o(silu, normalise):
    prefill = prefill_of(silu)
    close(prefill.attention_received(1).double(), whole(prefill, 1, silu).abs().sum(2), "scores", 1e-5)

    def scores(layer):
        sums = whole(prefill, layer, silu).abs().sum(2)
        if normalise:
            for user, n in enumerate(COUNTS):
                sums[user, :, :n] /= torch.arange(n, 0, -1)
        return sums

    check_selection(get_compressor("h2o", normalise=normalise), prefill, scores, lambda n, k: range(n - k // 2, n))


@pytest.mark.parametrize("silu", [False, True])
def test_tova(silu):
    prefill = prefill_of(silu)

    def scores(layer):
        maps = whole(prefill, layer, silu).abs()
        return torch.stack([maps[user, :, n - 1].mean(0, keepdim=True) for user, n in enumerate(COUNTS)])

    check_selection(get_compressor("tova"), prefill, scores, lambda n, k: range(n - min(k // 2, 1), n))


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("window", [2, 4, 30])
def test_snapkv(window, silu):
    prefill = prefill_of(silu)

    def scores(layer):
        maps = whole(prefill, layer, silu).abs()
        out = torch.zeros(maps.shape[:3], dtype=torch.float64)
        for user, n in enumerate(COUNTS):
            rows = min(window, n)
            mean = maps[user, :, n - rows : n].mean(1)  # [H, S]
            for slot in range(n):
                near = range(max(slot - 2, 0), min(slot + 3, n))
                if slot < n - window:  # the window does not leak into what stands before it
                    near = [i for i in near if i < n - window]
                out[user, :, slot] = sum(mean[:, i] for i in near) / 5
        return out

    forced = lambda n, k: range(n - min(k // 2, window), n)  # noqa: E731
    check_selection(get_compressor("snapkv", window=window), prefill, scores, forced)


def test_signed_sums_would_choose_otherwise():
    """SiLU weights are negative too: the absolute value is what makes them comparable, and it matters."""
    prefill = prefill_of(silu=True)
    signed = whole(prefill, 0, True).sum(2)
    absolute = whole(prefill, 0, True).abs().sum(2)
    assert any(best(signed[3, h], 5) != best(absolute[3, h], 5) for h in range(2))


def test_random_is_uniform_and_depends_on_everything_it_should():
    users = 2000
    keys = [torch.zeros(users, 1, 8, 1)] * 2
    method = get_compressor("random")

    def positions(seed, ids):
        prefill = Prefill.from_tensors(keys, keys, users=ids, positions=True, seed=seed)
        state = method.compress(prefill, Budget(slots=2))
        return torch.stack([layer[0].slots.positions[:, 0] for layer in state.layers])

    ids = torch.arange(users)
    first = positions(0, ids)
    pairs = torch.bincount((first[0, :, 0] * 8 + first[0, :, 1]).long(), minlength=64)
    seen = pairs[pairs > 0].double()
    assert len(seen) == 28  # 8 choose 2
    chi2 = float(((seen - users / 28).square() / (users / 28)).sum())
    assert chi2 < 55  # 27 degrees of freedom: the 99.9 % quantile
    for other in (positions(1, ids)[0], positions(0, ids + 10**6)[0], first[1]):  # seed, user, layer
        agree = float((other == first[0]).all(-1).double().mean())
        assert agree < 0.08  # 1 in 28 by chance
    assert torch.equal(positions(0, ids.flip(0)).flip(1), first)


def test_windows():
    prefill = prefill_of()
    for k in (1, 2, 5, 9, 30):
        recent = get_compressor("recent").compress(prefill, Budget(slots=k))
        sinks = kept(get_compressor("sink_recent", sinks=3).compress(prefill, Budget(slots=k)))
        for user, n in enumerate(COUNTS):
            size = min(k, n)
            (segment,) = recent.layers[1]
            assert torch.equal(segment.fields["keys"].dense()[user, :, :size], prefill.keys(1)[user, :, n - size : n])
            assert segment.slots.positions is None
            old = min(size // 2, 3)
            assert sinks[user] == [[*range(old), *range(n - size + old, n)]]


@pytest.mark.parametrize("name", ["knorm", "random"])
def test_selections_are_nested(name):
    prefill = prefill_of()
    states = [kept(get_compressor(name).compress(prefill, Budget(slots=k))) for k in range(1, 15)]
    for fewer, more in pairwise(states):
        assert all(set(a) <= set(b) for u, v in zip(fewer, more) for a, b in zip(u, v))


def test_ties_go_to_the_newer():
    order = ranked(torch.zeros(2, 1, 5), torch.tensor([[5], [3]]))
    assert order[0, 0].tolist() == [4, 3, 2, 1, 0] and order[1, 0, :3].tolist() == [2, 1, 0]
    ones = [torch.ones(1, 1, 6, 2)]
    state = get_compressor("knorm").compress(Prefill.from_tensors(ones, ones, positions=True), Budget(slots=2))
    assert kept(state) == [[[4, 5]]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_numbers_are_refused_on_real_slots_only(value):
    scores = torch.tensor([[[1.0, 2.0, 3.0, value, 5.0]]])
    with pytest.raises(ValueError, match=r"^scores of real slots are NaN or infinite: 1 of 4$"):
        ranked(scores, torch.tensor([[4]]))
    assert ranked(scores, torch.tensor([[3]]))[0, 0, :3].tolist() == [2, 1, 0]


def test_forced_slots_come_before_any_score():
    order = ranked(torch.arange(6.0).flip(0).view(1, 1, 6), torch.tensor([[6]]))
    assert chosen(order, torch.tensor([[6]]), torch.tensor([3]), 0, torch.tensor([1])).tolist() == [[[0, 1, 5]]]
    assert chosen(order, torch.tensor([[6]]), torch.tensor([4]), torch.tensor([1]), torch.tensor([2])).tolist() == [
        [[0, 1, 4, 5]]
    ]


def test_missing_statistics_are_named():
    prefill = Prefill.from_tensors([noise(1, 1, 9, 2)], [noise(1, 1, 9, 2)])
    for name in ("h2o", "snapkv", "tova"):
        with pytest.raises(MissingStatistic, match="needs"):
            get_compressor(name).compress(prefill, Budget(0.5))


def test_too_few_observed_queries_are_refused(trained):
    backbone = trained("sasrec")
    history, _ = histories(backbone, LENGTHS)
    with pytest.raises(MissingStatistic, match="only 4"):
        get_compressor("snapkv", window=16).compress(backbone.prefill(history, stats=Stats(window=4)), Budget(0.5))
