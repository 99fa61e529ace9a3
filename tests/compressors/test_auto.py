"""Bytes over layers: against all ways to divide them, and that what is planned is what is stored."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.fitted.allocation import Curves
from malloc_bench.compressors.fitted.auto import GRID
from malloc_bench.state import Fitted, Sample, UserState
from malloc_bench.testing.worlds import LENGTHS, World, check_packs

CHAINS = tuple(({"fit_omp": {"probes": 8}}, {"mxint": {"bits": bits}}) for bits in (2, 5))


def auto(candidates=CHAINS):
    return get_compressor("auto", candidates=candidates, tests=4)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    backbone = get_backbone("hstu", 60, True, layers=2, heads=2, dim=16, max_length=64).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.normal_(std=0.3)
    return World("hstu", backbone)


@pytest.fixture(scope="module")
def fitted(world):
    with torch.no_grad():
        return auto().fit(world.sample(auto()))


def falls(spent, lost, at):
    """The largest fall between neighbours on the lower convex hull from the last one at or before `at` on."""
    hull = [
        j
        for j in range(len(spent))
        if all(
            lost[j] * (spent[k] - spent[i]) <= lost[i] * (spent[k] - spent[j]) + lost[k] * (spent[j] - spent[i])
            for i, k in product(range(j), range(j + 1, len(spent)))
        )
    ]
    first = max(n for n, j in enumerate(hull) if j <= at)
    return max(0.0, *-np.diff(lost[hull[first:]]), 0.0)


@pytest.mark.parametrize("seed", range(5))
def test_no_way_to_divide_is_better_by_more_than_a_step_of_the_hulls(seed):
    rng = np.random.default_rng(seed)
    spent = np.arange(1, 13) / 40
    lost = np.stack([(a / spent) ** p for a, p in zip(rng.uniform(0.1, 2, 3), rng.uniform(0.5, 2, 3))])
    lost += rng.uniform(0, 0.2, lost.shape)
    curves = Curves(lost, np.zeros(lost.shape, int), spent, np.ones(lost.shape, bool))
    for budget in (0.1, 0.3, 0.6):
        shares = [share for _, share in curves.divided(budget)]
        assert sum(shares) == pytest.approx(1)
        at = [int(np.flatnonzero(spent <= share * budget + 1e-9).max()) for share in shares]  # what is left is no loss
        got = sum(lost[i, : j + 1].min() for i, j in enumerate(at))
        ways = [p for p in product(range(12), repeat=3) if spent[list(p)].sum() <= budget + 1e-9]
        best = min(sum(lost[i, j] for i, j in enumerate(way)) for way in ways)
        step = max(falls(spent, lost[i], j) for i, j in enumerate(at))
        assert best <= got <= best + step + 1e-9


def test_curves_are_of_the_best_candidate_and_fall():
    spent = torch.tensor([[[0.1, 0.2, 0.4], [0.2, 0.2, 0.4]]])  # the second has its floor at 0.2
    lost = torch.tensor([[[8.0, 4.0, 5.0], [3.0, 3.0, 1.0]]])
    curves = Curves.of(lost, spent)
    assert {0.1, 0.2, 0.4} <= set(curves.spent.round(7))
    for place, size in enumerate(curves.spent):
        first = np.interp(np.log(size), np.log([0.1, 0.2]), np.log([8, 4]))
        second = np.interp(np.log(size), np.log([0.2, 0.4]), np.log([3, 1])) if size > 0.2 * (1 - 1e-7) else np.inf
        assert curves.lost[0, place] == pytest.approx(np.exp(min(first, second)))
        assert curves.choice[0, place] == int(second < first)


def test_what_fits_is_taken_where_the_next_step_of_the_hull_does_not():
    nothing = float("nan")
    lost = torch.tensor([[[9.0, 9.0, 9.0], [nothing, 4.6, 0.8]]], dtype=torch.float64)
    curves = Curves.of(lost, torch.tensor([[[0.03, 0.03, 0.03], [0.05, 0.055, 0.07]]], dtype=torch.float64))
    assert [curves.divided(budget)[0][0] for budget in (0.03, 0.0549, 0.06, 0.07)] == [0, 0, 1, 1]


def test_a_candidate_that_gives_no_numbers_is_not_taken():
    nothing = float("nan")
    lost = torch.tensor([[[nothing, nothing], [0.5, 0.6]], [[0.1, nothing], [0.2, 0.3]]], dtype=torch.float64)
    curves = Curves.of(lost, torch.tensor([[[0.2, 0.1]] * 2] * 2, dtype=torch.float64))
    assert np.isfinite(curves.lost).all() and [choice for choice, _ in curves.divided(0.2)] == [1, 1]


def test_what_holds_every_event_promises_little_before_it_does():
    """Of 8 parts lost none is left with twice the bytes: half way there about half is, and no geometric mean."""
    curves = Curves.of(torch.tensor([[[8.0, 2.0, 1e-9]]]), torch.tensor([[[0.1, 0.2, 0.4]]]))
    for size, lost in zip(curves.spent, curves.lost[0]):
        expected = 2 * (0.4 - size) / 0.2 if size >= 0.2 else 8 * (0.1 / size) ** 2
        assert lost == pytest.approx(expected, abs=1e-6)


def test_a_layer_that_counts_for_more_gets_more_and_the_budget_is_used(world, fitted):
    method, prefill = auto(), world.prefill(auto().needs)
    first, more = (
        Fitted({**fitted, "lost": fitted["lost"] * torch.tensor(counts)[:, None, None]})
        for counts in ([1e4, 1], [1, 1e4])
    )
    plain, tilted = (dict(enumerate(method.planned(fit, 0.05))) for fit in (first, more))
    assert tilted[1][1] > plain[1][1] and sum(share for _, share in tilted.values()) == pytest.approx(1)
    slot = 2 * (10 + 4 + 2)  # the largest of one head, twice: one for each layer may be too much
    for budget in (Budget(0.1), Budget(bytes=500)):
        state, target = method.compress(prefill, budget, more), budget.target(prefill.full_bytes())
        sizes = check_packs(state, world.read).nbytes()
        assert bool((sizes <= target.maximum(method.floor(prefill))).all())
        long = torch.tensor(LENGTHS) > 20
        assert bool((sizes >= target - 4 * slot)[long].all())


def test_what_is_measured_is_the_length_of_the_gap_of_the_output(world, fitted):
    method = auto()
    with torch.no_grad():
        prefill = world.sample(method)
        probes = prefill.probes(0, method._ask).last(4)
        want, layers = probes.outputs(prefill.state).double(), prefill.state.layers
        alone = replace(prefill.only(range(1, 2)), whole=prefill.full_bytes())
        state = method.candidates[1].compress(alone, GRID[0] / 2)
        got = probes.outputs(UserState((layers[0], *state.layers), prefill.state.length)).double()
    share = (got - want).norm(dim=-1).mean(1) / want.norm(dim=-1).mean(1)
    assert float(fitted["lost"][1, 1, 0]) == pytest.approx(float(share.mean()) ** 2, rel=1e-4)
    assert float(fitted["spent"][1, 1, 0]) == pytest.approx(
        float((state.nbytes() - 4).sum() / prefill.full_bytes().sum())
    )
    assert float(fitted["full"]) == pytest.approx(float(prefill.full_bytes().double().mean()))


def test_what_candidates_learn_they_learn_of_each_layer(world):
    """With one candidate and even shares there is nothing to decide: it is that chain, whose codebooks are the same."""
    chain = ({"fit_omp": {"probes": 8}}, {"gain_shape": {"stages": 2, "bits": 4, "beam": 2}})
    method, alone = auto((CHAINS[0], chain)), get_compressor("compose", steps=chain)
    with torch.no_grad():
        fitted, own = method.fit(world.sample(method)), alone.fit(world.sample(alone))
        prefill = world.prefill(method.needs)
        lost = fitted["lost"].clone()
        lost[:, 0] = 1e9
        state = method.compress(prefill, Budget(0.2), Fitted({**fitted, "lost": lost}))
    assert sorted(fitted) == [
        "1.0/1/0.keys",
        "1.0/1/0.values",
        "1.1/1/0.keys",
        "1.1/1/0.values",
        "full",
        "lost",
        "spent",
    ]
    for layer, field in product(range(2), ("keys", "values")):
        assert torch.equal(fitted[f"1.{layer}/1/0.{field}"], own[f"1/{layer}.{field}"])
    sizes, target = check_packs(state, world.read).nbytes(), Budget(0.2).target(prefill.full_bytes())
    assert bool((sizes <= target.maximum(method.floor(prefill.given(fitted)))).all())
    for (segment,), layer in zip(state.layers, range(2)):
        assert torch.equal(segment.fields["keys"].shape_of.book.tables, own[f"1/{layer}.keys"])


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="candidates that take a budget"):
        get_compressor("auto", candidates=("int8",))
    assert "bytes" in auto().accepts(Budget(slots=3))


def test_curves_are_of_users_of_all_lengths(world):
    """A sample comes in chunks of like length, the shortest first: a plan for them is none for the others."""
    method = auto()
    with torch.no_grad():
        parts = [world.prefill(method.needs, lengths=(n,) * 20) for n in (12, 60)]
        both, *each = (method.fit(Sample.of(some)) for some in (parts, *([part] for part in parts)))
    for name, root in (("lost", 0.5), ("full", 1.0)):
        assert torch.allclose(both[name] ** root, (each[0][name] ** root + each[1][name] ** root) / 2)
    assert not torch.allclose(each[0]["lost"], each[1]["lost"])


def test_one_user_far_off_does_not_choose_for_all(world, monkeypatch):
    """A candidate that is better for all but one user is taken: a mean of squares would be that of the one."""
    method = auto()
    with torch.no_grad():
        prefill = world.prefill(method.needs)
        probes, want = prefill.probes(0, method._ask).last(4), prefill.probes(0, method._ask).last(4).outputs
        base = want(prefill.state)
        near, far = base * 1.02, base * 1.01
        far[0] = base[0] * 1.06
    turns = [base] + [near] * len(GRID) + [far] * len(GRID)
    monkeypatch.setattr(type(probes), "outputs", lambda self, state: turns.pop(0))
    with torch.no_grad():
        lost, _ = method._measured(prefill, 0)
    assert bool((lost[1] < lost[0]).all()) and float((far - base).square().mean()) > float(
        (near - base).square().mean()
    )


def test_a_fit_keeps_no_graph_of_what_it_measured(world):
    """A run fits with gradients on, for methods that train: what is measured holds no stack that it went through."""
    assert all(parameter.requires_grad for parameter in world.backbone.parameters())
    with torch.no_grad():
        prefill = world.prefill(auto().needs)
    lost, spent = auto()._measured(prefill, 0)
    assert not lost.requires_grad and not spent.requires_grad


def test_what_one_budget_has_remembered_changes_no_other(world):
    method = auto(CHAINS[:1])
    with torch.no_grad():
        fitted = method.fit(world.sample(method))
        prefill = world.prefill(method.needs).given(fitted)
        for budget in (0.1, 0.3, 0.2):
            again = method.compress(world.prefill(method.needs).given(fitted), Budget(budget), fitted)
            check_same(method.compress(prefill, Budget(budget), fitted), again)


@pytest.mark.parametrize("name", ["auto", "eigen", "pq", "lu"])
def test_a_fit_goes_where_the_state_lies(world, name):
    """A run leaves the ids of its users on the CPU, whatever device the state is on; here `meta` stands for that."""
    method = auto() if name == "auto" else get_compressor(name)
    budget = Budget(0.1) if method.takes_budget else None
    with torch.no_grad():
        fitted = method.fit(world.sample(method))
        prefill = world.prefill(method.needs)
        elsewhere = replace(prefill, users=prefill.users.to("meta"), memo={})
        check_same(method.compress(elsewhere, budget, fitted), method.compress(prefill, budget, fitted))
        assert torch.equal(method.floor(elsewhere.given(fitted)), method.floor(prefill.given(fitted)))


def check_same(one, other):
    assert torch.equal(one.nbytes(), other.nbytes())
    for mine, theirs in zip(one.segments(), other.segments()):
        for name, field in mine.fields.items():
            assert torch.equal(field.dense(), theirs.fields[name].dense())
