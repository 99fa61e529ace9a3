"""Slots that are fitted to probes against their definitions, head by head in float64, and what they are good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.fitted import descent, fit_omp, solving
from malloc_bench.compressors.fitted.descent import Asked, descended
from malloc_bench.compressors.fitted.solving import Rows, evened, held_out, masses, solve
from malloc_bench.state import Dense, Prefill, Segment, Slots, Stats, take
from malloc_bench.testing import World
from malloc_bench.testing.worlds import close

COUNTS = (1, 4, 12, 30)
HELD = 3  # the one of six probes that is held out
FITTED = ("fit_recent", "fit_top", "fit_omp")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def prefill():
    """Two stored heads, each of two query heads, six probes."""
    keys, values = (noise(len(COUNTS), 2, max(COUNTS), 4, seed=i) for i in range(2))
    probes = noise(len(COUNTS), 4, 6, 4, seed=2)
    return Prefill.from_tensors([keys], [values], lengths=torch.tensor(COUNTS), positions=True, probes=[probes])


def weights(prefill, user, head):
    """A [group x M, n] of a stored head, float64."""
    n = COUNTS[user]
    keys, queries = prefill.keys(0)[user, head, :n].double(), prefill.probes(0).queries[user].double()
    return torch.cat([(queries[h] @ keys.T).softmax(-1) for h in (2 * head, 2 * head + 1)])


def pursued(pairs, k):
    """Slots that leave the least of all targets, of (weights, target) each, each the best beside those before."""

    def left(chosen):
        solved = ((a[:, chosen], target) for a, target in pairs)
        return sum((target - a @ torch.linalg.lstsq(a, target).solution).square().sum() for a, target in solved)

    chosen, slots = [], range(pairs[0][0].shape[1])
    while len(chosen) < k:
        chosen.append(min((j for j in slots if j not in chosen), key=lambda j: left([*chosen, j])))
    return sorted(chosen)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("name", FITTED)
def test_slots_masses_and_values(prefill, name, k):
    method = get_compressor(name, probes=6)
    (segment,) = method.compress(prefill, Budget(slots=k)).layers[0]
    for user, n in enumerate(COUNTS):
        for head in range(2):
            a, v = weights(prefill, user, head), prefill.values(0)[user, head, :n].double()
            target = a @ v
            with_mass = torch.cat([target, torch.ones(len(a), 1) * target.square().mean().sqrt()], 1)
            slots = {
                "fit_recent": lambda: list(range(n - min(k, n), n)),  # noqa: B023
                "fit_top": lambda: sorted(a.square().mean(0).argsort(descending=True)[:k].tolist()),  # noqa: B023
                "fit_omp": lambda: pursued([(a, with_mass)], min(k, n)),  # noqa: B023
            }[name]()
            kept = int(segment.slots.count[user, 0])
            places = segment.slots.positions
            if places is not None:
                assert places[user, min(head, places.shape[1] - 1), :kept].tolist() == slots
            mass = segment.slots.mass[user, head, :kept].double()
            got = segment.fields["values"].dense()[user, head, :kept].double()
            rows = [i % 6 != HELD for i in range(len(a))]
            if n <= k or not better(a[:, slots], v[slots], target, rows):
                assert mass.tolist() == [1.0] * kept and torch.equal(got, v[slots])
                continue
            close(got, refitted(a[:, slots], v[slots], target, mass), f"values of user {user}", 1e-3)


@pytest.mark.parametrize("name", ["fit_omp", "fit_keys"])
def test_heads_that_keep_the_same_slots_lose_least_in_all(prefill, name):
    method = get_compressor(name, probes=6, across=True)
    state = method.compress(prefill, Budget(slots=3))
    ((segment,),) = state.layers
    assert segment.slots.positions.shape == (4, 1, 3) and segment.slots.mass.shape == (4, 2, 3)
    for user, n in enumerate(COUNTS):
        pairs = []
        for head in range(2):
            a = weights(prefill, user, head)
            target = a @ prefill.values(0)[user, head, :n].double()
            pairs.append((a, torch.cat([target, torch.ones(len(a), 1) * target.square().mean().sqrt()], 1)))
        kept = min(3, n)
        assert segment.slots.positions[user, 0, :kept].tolist() == pursued(pairs, kept)
    own = get_compressor(name, probes=6).compress(prefill, Budget(slots=3))
    assert (own.nbytes() - state.nbytes()).tolist() == [0] + [4 * 3] * 3  # where they stand, once


def refitted(a, v, target, mass):
    """Ridge regression of the target on re-normalised weights."""
    b = a * mass
    b = b / b.sum(1, keepdim=True)
    gram = b.T @ b
    damped = gram + (1e-3 + 1e-6) * gram.diagonal().mean() * torch.eye(len(mass)).double()
    return v + torch.linalg.solve(damped, b.T @ (target - b @ v))


def better(a, v, target, rows):
    """Whether slots fitted to some rows give the others less wrongly than slots as they are."""
    some = torch.tensor(rows)
    mass = masses(a[some][None, None], torch.ones(int(some.sum()), 1).double())[0, 0]
    values = refitted(a[some], v, target[some], mass)

    def error(m, x):
        b = (a * m)[~some]
        return float((b / b.sum(1, keepdim=True) @ x - target[~some]).square().sum())

    return error(mass, values) <= error(torch.ones_like(mass), v)


def test_masses_are_non_negative_least_squares():
    """Against all subsets of columns that may be at zero."""
    a, total = noise(3, 2, 9, 4, seed=4).exp(), torch.ones(3, 2, 9, 1)
    found = masses(a, total)
    assert bool((found > 0).all())
    for user in range(3):
        for head in range(2):
            x, best = a[user, head].double(), torch.inf
            for subset in range(1, 16):
                some = [i for i in range(4) if subset >> i & 1]
                m = torch.linalg.lstsq(x[:, some], torch.ones(9, 1).double()).solution
                if bool((m >= 0).all()):
                    best = min(best, float((x[:, some] @ m - 1).square().sum()))
            got = float((x @ found[user, head].double()[:, None] - 1).square().sum())
            assert got <= best * 1.05 + 1e-3


def test_masses_of_weights_whose_squares_overflow():
    a = noise(1, 2, 9, 4, seed=4).exp()
    total = a.sum(-1, keepdim=True)
    torch.testing.assert_close(masses(a * 1e30, total * 1e30), masses(a, total), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["sasrec-2-heads", "hstu-times-2-heads", "marm-2-heads", "sasrec-mla", "climber-times-2-heads"]
)
@pytest.mark.parametrize("name", FITTED)
def test_fitted_slots_give_what_the_history_gives(name, case, trained):
    """More than the same slots as they are, layer by layer, to probes that they were not fitted to."""
    method = get_compressor(name, probes=24)
    prefill = World(case, trained(case)).prefill(Stats(probes=40))
    state = method.compress(prefill, Budget(slots=3))
    errors = torch.zeros(2)
    for layer in prefill.layers:
        probes, (segment,), slots = prefill.probes(layer), state.layers[layer], prefill.slots(layer)
        index = method.index(prefill, layer, slots.count[:, 0].long().clamp(max=3))
        fields = prefill.segment(layer).fields
        plain = {
            n: Dense(take(fields[n if n in fields else next(iter(fields))].dense(), index)) for n in segment.fields
        }
        for way, kept in enumerate((segment, Segment(plain, replace(segment.slots, mass=None)))):
            weights, share = probes.weigh(kept)
            got = probes.mix(weights, kept) + share * probes.own_values()
            off = (got - probes.target - probes.share * probes.own_values()).float()
            errors[way] += off[4:, :, 24:].square().sum()
    assert errors[0] < 0.8 * errors[1]


def other_worlds(slots=3, probes=24, seed=5):
    """Slots whose probes held out ask for something else than the others: what is fitted to these is wrong there."""
    keys, values = noise(1, 1, 12, 4, seed=seed), noise(1, 1, 12, 4, seed=seed + 1)
    held = held_out(probes, keys.device)
    queries = 3 * noise(1, 1, probes, 4, seed=seed + 2)
    queries[:, :, held] = 4 * keys[:, :, -1:] + 0.1 * queries[:, :, held]  # the newest slot, which is kept
    queries[:, :, ~held] = -2 * keys[:, :, -1:] + queries[:, :, ~held]
    return Prefill.from_tensors([keys], [values], probes=[queries])


def test_a_fit_that_loses_on_probes_held_out_is_not_taken():
    prefill = other_worlds()
    (segment,) = get_compressor("fit_recent", probes=24).compress(prefill, Budget(slots=3)).layers[0]
    assert segment.slots.mass.tolist() == [[[1.0] * 3]]
    assert torch.equal(segment.fields["values"].dense(), prefill.values(0)[:, :, -3:])


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("seed", range(3))
def test_no_worse_than_the_same_slots_as_they_are(name, seed):
    """On the probes held out, whatever keys and probes are."""
    keys, values, probes = (noise(5, 2, 14, 4, seed=7 * seed + i) for i in range(3))
    keys[1] = 1.0  # constant
    keys[2, :, 1::2] = keys[2, :, ::2]  # pairs
    values[3] *= 1e4
    probes = probes[:, :, [0, 3] * 10] * 3.0 ** torch.arange(-1, 4)[:, None, None, None]
    prefill = Prefill.from_tensors([keys], [values], lengths=torch.tensor([14, 14, 14, 14, 9]), probes=[probes])
    (segment,) = get_compressor(name, probes=20, ridge=1e-6).compress(prefill, Budget(slots=6)).layers[0]
    index = get_compressor(name, probes=20).index(prefill, 0, torch.full((5,), 6))
    asked, held = prefill.probes(0), held_out(20, keys.device)
    plain = Segment(
        {n: Dense(take(prefill.segment(0).fields[n].dense(), index)) for n in ("keys", "values")},
        replace(segment.slots, mass=None),
    )
    for users in (slice(0, 3), slice(3, 5)):
        errors = [
            (asked.mix(asked.weigh(x)[0], x) - asked.target)[users, :, held].double().square().sum((2, 3))
            for x in (segment, plain)
        ]
        assert bool((errors[0] <= 1.001 * errors[1] + 1e-6).all()), errors
    for x in (segment.slots.mass, segment.fields["values"].dense()):
        assert bool(x.isfinite().all()) and x.dtype is torch.float32


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 16, 64, 256])
def test_one_of_five_probes_is_held_out(number):
    held = held_out(number, torch.device("cpu"))
    assert int(held.sum()) in range(number // 5 - 1, number // 5 + 2) and not bool(held[:3].any())
    for horizon in (2, 3, 5):  # of each position some
        if number >= 64:
            assert all(bool(held[i::horizon].any()) for i in range(horizon))


def test_masked_slots_do_not_matter():
    keys, values, probes = (noise(2, 1, 9, 4, seed=i) for i in range(3))
    prefill = Prefill.from_tensors([keys], [values], lengths=torch.tensor([9, 4]), probes=[probes])
    segment = prefill.segment(0)
    clean = solve(Rows.of(prefill.probes(0), segment), 1e-3)
    for vectors in segment.fields.values():
        vectors.dense()[1, :, 4:] = 1e4
    spoilt = solve(Rows.of(prefill.probes(0), segment), 1e-3)
    for one, other in zip(clean, spoilt):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1, :, :4], other[1, :, :4])


@pytest.mark.parametrize(
    "case", ["sasrec-2-heads", "hstu-2-heads", "marm-2-heads", "sasrec-gqa", "climber-times-2-heads"]
)
def test_a_constant_is_the_best_one(case, trained):
    """No other vector, and with softmax no other logit, gives the probes less wrongly what they got."""
    backbone = trained(case)
    prefill = World(case, backbone).prefill(Stats(probes=12))
    state = get_compressor("fit_constant", probes=12).compress(prefill)
    for view, layers in ((prefill, state.layers),):
        for layer in view.layers:
            probes, (memory,) = view.probes(layer), layers[layer]
            fields = {name: x.dense().double() for name, x in memory.fields.items()}
            target, share, own = (x.double() for x in (probes.target, probes.share, probes.own_values()))
            even = evened(probes).double()

            def error(value, logit):
                value = probes.block.each(value)  # noqa: B023
                if logit is None:
                    off = value - target  # noqa: B023
                else:
                    w = torch.sigmoid(probes.block.each(logit) - probes.itself)  # noqa: B023
                    off = w * value + (1 - w) * own - target - share * own  # noqa: B023
                return (off * even).square().sum((1, 2, 3))  # noqa: B023

            best = error(fields["constant"], fields.get("weight"))
            for seed in range(4):
                other = fields["constant"] + 0.05 * noise(*fields["constant"].shape, seed=seed)
                assert bool((best <= error(other, fields.get("weight")) + 1e-6)[1:].all())


def test_a_constant_depends_on_no_query(trained):
    """Beside the token itself, layer by layer."""
    for case in ("sasrec-2-heads", "hstu-times-2-heads"):
        backbone = trained(case)
        prefill = World(case, backbone).prefill(Stats(probes=12))
        state = get_compressor("fit_constant", probes=12).compress(prefill)
        numbers = 2 * (backbone.config.dim // 2 + case.startswith("sasrec"))  # a vector a head, and its logit
        assert state.nbytes().tolist() == [4 + 4 * len(state.layers) * numbers] * len(state)
        probes = backbone.probe(state, prefill.events, Stats(probes=9), prefill.items)
        for layer in probes:
            (seen,) = layer.values()
            beside = (seen.target if seen.total is None else seen.target / (1 - seen.share))[state.length > 0]
            close(beside, beside[:, :, :1].expand_as(beside), "what is read", 1e-3)


@pytest.mark.parametrize(
    "case", ["tensors", "sasrec-2-heads", "hstu-times-2-heads", "climber-times-2-heads", "sasrec-gqa"]
)
def test_slots_move_down_the_gradient(case, trained):
    """The first step of Adam is the sign of the slope: against differences of the error, in every key and value."""
    place = World(case, None if case == "tensors" else trained(case))
    prefill = place.prefill(Stats(probes=7), (9, 5))
    probes, segment = prefill.probes(0), prefill.segment(0)
    old = segment.slots
    times = None if old.timestamps is None else old.timestamps[..., :3]
    slots = Slots(old.count.clamp(max=3), torch.arange(3, dtype=torch.int32).expand(2, 1, 3), times)
    chosen = Segment({n: Dense(v.dense()[:, :, :3]) for n, v in segment.fields.items()}, slots)
    heads = chosen.fields["values"].shape[1]
    mass = torch.full((2, heads, 3), 1.3) if probes.normalised else None
    begin = chosen.fields["keys"].dense(), mass, chosen.fields["values"].dense()
    every = torch.arange(2 * heads)
    asked, asking = Asked.of(probes, chosen, heads).some(every, 3), Rows.of(probes, chosen).some(every, 3)
    flat = [None if x is None else x.flatten(0, 1) for x in begin]
    stepped = descended(asked, asking, flat, 1, 1e-3, True)
    moved = [None if x is None else x.view(2, heads, *x.shape[1:]) for x in stepped]

    def error(keys, mass, values):
        rows = Rows.of(probes, Segment({"keys": Dense(keys), "values": Dense(values)}, chosen.slots))
        weights, target = rows.read(mass)
        return float(((target - weights @ values) * rows.even).square().sum())

    start = error(*begin)
    assert error(*moved) < start
    for part in (0, 2):
        alone = [*begin]
        alone[part] = moved[part]
        assert error(*alone) < start
        alone[part] = 2 * begin[part] - moved[part]
        assert error(*alone) > start


def test_heads_that_are_hardly_wrong_keep_their_keys(monkeypatch):
    """A value that all slots share is what every probe gets, whatever the keys; and blocks of heads change nothing."""
    keys, values, probes = noise(3, 2, 20, 4), noise(3, 2, 20, 4, seed=1), noise(3, 2, 40, 4, seed=2)
    values[0] = values[0, :1, :1]
    prefill, method = Prefill.from_tensors([keys], [values], probes=[probes]), get_compressor("fit_keys", probes=40)
    (got,) = method.compress(prefill, Budget(slots=4)).layers[0]
    index = method.index(prefill, 0, torch.full((3,), 4))
    stay = (got.fields["keys"].dense() == take(keys, index)).all((2, 3))
    assert bool(stay[0].all()) and not bool(stay[1:].all())
    for module, name in ((descent, "_CACHE"), (solving, "_NEAR"), (fit_omp, "_CACHE")):
        monkeypatch.setattr(module, name, 1)
    (alone,) = method.compress(replace(prefill, memo={}), Budget(slots=4)).layers[0]
    pairs = [(got.slots.mass, alone.slots.mass)]
    pairs += [[x.fields[name].dense() for x in (got, alone)] for name in ("keys", "values")]
    for one, other in pairs:
        close(one, other, "one head at a time", 1e-3)


def test_a_head_that_is_spent_takes_by_weight():
    """Two columns say all there is of the target: the others come as they weigh, whatever number is asked for."""
    rows = noise(1, 16, 2, seed=3).abs()
    columns = torch.cat([rows, rows @ torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.3, 0.4]])], -1)
    even, free = torch.ones(1, 16, 1), torch.ones(1, 5, dtype=torch.bool)
    target, share = columns @ noise(1, 5, 3, seed=4), torch.zeros(1, 16, 1)
    order = fit_omp.pursued(False, 5, 1, columns, target, share, even, free)
    rest = [j for j in columns[0].norm(dim=0).argsort(descending=True).tolist() if j not in order[0, :2].tolist()]
    assert order[0, 2:].tolist() == rest
    assert torch.equal(fit_omp.pursued(False, 3, 1, columns, target, share, even, free), order[:, :3])


@pytest.mark.parametrize("case", ["tensors", "sasrec-2-heads", "hstu-times-2-heads"])
def test_the_more_is_fitted_the_less_is_wrong(case, trained):
    """On the probes of the fit, and by the guard no head is worse on those held out."""
    prefill = World(case, None if case == "tensors" else trained(case)).prefill(Stats(probes=40))
    errors = []
    for name, params in (("fit_omp", {}), ("fit_keys", {}), ("cartridge", {"rounds": 40})):
        state = get_compressor(name, probes=40, **params).compress(prefill, Budget(slots=2))
        total = 0.0
        for layer in prefill.layers:
            probes, (segment,) = prefill.probes(layer), state.layers[layer]
            weights, share = probes.weigh(segment)
            off = probes.mix(weights, segment) + share * probes.own_values()
            off = off - probes.target - probes.share * probes.own_values()
            total += float((off * evened(probes)).square().sum())
        errors.append(total)
    assert max(errors[1:]) < errors[0] and min(errors[1:]) < 0.98 * errors[0], errors


def test_bad_parameters():
    assert get_compressor("fit_recent", horizon=3).ask == get_compressor("fit_recent", horizon=[0, 1, 2]).ask
    for params in (
        {"probes": 0},
        {"ridge": 0.0},
        {"horizon": ()},
        {"horizon": 0},
        {"horizon": (-1,)},
        {"which": "rare"},
    ):
        with pytest.raises(ValueError):
            get_compressor("fit_recent", **params)


def test_numbers_of_twice_the_width_are_fitted_as_well():
    """`from_tensors` takes any floating point dtype; budgets are shares of the bytes in it."""
    torch.manual_seed(0)
    keys, values, probes = (torch.randn(3, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    prefill = Prefill.from_tensors([keys], [values], probes=[probes])
    for name in ("fit_keys", "fit_constant"):
        method = get_compressor(name, probes=8)
        state = method.compress(prefill, 0.25 if method.takes_budget else None)
        assert all(x.dense().dtype == torch.float64 for segment in state.segments() for x in segment.fields.values())
