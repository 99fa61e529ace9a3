"""Ranks, top tens and overlap against definitions in float64, and the promises at the edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malloc_bench.data import Dataset
from malloc_bench.evaluation.ranking import TOP, Question, losses, overlap, question, rank


def grid(*shape, seed=0, step=8):
    """Small multiples of 1/step: products and sums are exact in float32, so ties are real."""
    return torch.randint(-2 * step, 2 * step + 1, shape, generator=torch.Generator().manual_seed(seed)) / step


def asked_of(users, items, seen, seed=0):
    """Targets and `seen` items a user that may not rank; the target may be among them and stays."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(items, (users,), generator=generator)
    penalty = torch.zeros(users, items)
    for user in range(users):
        penalty[user, torch.randperm(items, generator=generator)[:seen]] = -torch.inf
    penalty[torch.arange(users), target] = 0.0
    return Question(target, penalty)


def by_definition(hidden, table, asked):
    """Ranks [C, B]: how many other items that may rank score at least as much as the target, one by one in float64."""
    ranks = np.zeros(hidden.shape[:2], int)
    for cell, outputs in enumerate(hidden.double().numpy()):
        for user, output in enumerate(outputs):
            scores = (table.double().numpy() @ output).tolist()
            target, free = int(asked.target[user]), (asked.penalty[user] == 0).tolist()
            ranks[cell, user] = sum(free[i] and i != target and x >= scores[target] for i, x in enumerate(scores))
    return ranks


def assert_best(top, scores):
    """Distinct items, -1 where too few may rank, with the highest scores; which of tied items is open."""
    for row, own in zip(top.flatten(0, 1).tolist(), scores.flatten(0, 1).tolist()):
        ranked = sorted((x for x in own if x > -np.inf), reverse=True)[:TOP]
        found = [item for item in row if item >= 0]
        assert len(row) == TOP and len(set(found)) == len(found)
        assert sorted((own[item] for item in found), reverse=True) == ranked


@pytest.mark.parametrize("items", [1, 3, 9, 16, 319, 320, 321, 1000])  # the top 10 is found in two ways
@pytest.mark.parametrize(("cells", "users"), [(1, 1), (3, 63), (2, 64), (1, 130)])
def test_ranks_and_top_10_equal_their_definitions(items, cells, users):
    hidden, table = grid(cells, users, 5, seed=1), grid(items, 5, seed=2)
    asked = asked_of(users, items, min(items // 3, 40))
    ranks, top = rank(hidden, table, asked, tops=True)
    assert ranks.dtype == torch.int32 and ranks.shape == (cells, users) and top.shape == (cells, users, TOP)
    np.testing.assert_array_equal(ranks.numpy(), by_definition(hidden, table, asked))
    assert_best(top, hidden @ table.T + asked.penalty)


@pytest.mark.parametrize("items", [40, 320, 777, 3706])
def test_top_10_is_the_set_that_topk_finds(items):
    hidden, table = torch.randn(2, 70, 8), torch.randn(items, 8)
    asked = asked_of(70, items, 12)
    _, top = rank(hidden, table, asked, tops=True)
    want = torch.stack([torch.addmm(asked.penalty, h, table.T).topk(TOP, 1).indices for h in hidden])
    assert torch.equal(top.sort(-1).values, want.sort(-1).values)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 70), st.integers(0, 399), st.integers(0, 10**6), st.sampled_from([1, 2, 8]))
def test_any_shape_any_ties(items, users, seen, seed, step):
    hidden, table = grid(2, users, 3, seed=seed, step=step), grid(items, 3, seed=seed + 1, step=step)
    asked = asked_of(users, items, min(seen, items), seed)
    ranks, top = rank(hidden, table, asked, tops=True)
    scores = hidden.double() @ table.double().T + asked.penalty
    own = scores.gather(2, asked.target[None, :, None].expand(2, -1, 1))
    assert torch.equal(ranks.long(), (scores >= own).sum(-1) - 1)
    assert_best(top, scores)


def test_ranks_do_not_depend_on_tops_nor_on_company():
    hidden, table, asked = torch.randn(3, 100, 6), torch.randn(500, 6), asked_of(100, 500, 30)
    together, _ = rank(hidden, table, asked)
    assert torch.equal(together, rank(hidden, table, asked, tops=True)[0])
    for cell in range(3):
        assert torch.equal(together[cell : cell + 1], rank(hidden[cell : cell + 1], table, asked)[0])


def test_outputs_that_cannot_tell_items_apart_rank_last():
    asked = asked_of(5, 50, 10)
    ranks, _ = rank(torch.zeros(1, 5, 4), torch.randn(50, 4), asked)
    rivals = (asked.penalty == 0).sum(1) - 1
    assert torch.equal(ranks[0].long(), rivals)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_raises(bad):
    hidden, table, asked = torch.randn(2, 70, 4), torch.randn(30, 4), asked_of(70, 30, 3)
    for broken in (hidden, table):
        keep = broken.flatten()[-3].clone()
        broken.view(-1)[-3] = bad
        with pytest.raises(ValueError, match="not finite"):
            rank(hidden, table, asked)
        broken.view(-1)[-3] = keep
    rank(hidden, table, asked)


def test_users_for_whom_fewer_than_10_items_may_rank_agree():
    asked = asked_of(6, 400, 394)  # 6 or 7 items are left
    _, top = rank(torch.randn(2, 6, 4), torch.randn(400, 4), asked, tops=True)
    assert (overlap(top[1], top[0]) == 1).all()


def test_scores_that_overflow_raise_where_they_hide_the_target():
    hidden, table = torch.full((1, 2, 2), 1e38), torch.tensor([[1.0, 1.0], [1e38, -1e38], [0.5, 0.5]])
    asked = Question(torch.tensor([1, 1]), torch.zeros(2, 3))  # inf - inf: NaN is not even as good as itself
    with pytest.raises(ValueError, match="not finite"):
        rank(hidden, table, asked)


def toy(items, lengths, n_items, times=None):
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Dataset(
        "toy",
        None,
        "test",
        np.arange(len(lengths)),
        np.arange(n_items),
        offsets,
        np.array(items, np.int32),
        times,
        {},
        "",
    )


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_seen_items_are_off_and_the_target_never(data):
    n_items = data.draw(st.integers(1, 12))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    items = data.draw(st.lists(st.integers(1, n_items), min_size=sum(lengths), max_size=sum(lengths)))
    dataset = toy(items, lengths, n_items)
    users = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8)))
    at = np.array([dataset.offsets[u] + data.draw(st.integers(0, lengths[u] - 1)) for u in users])
    for filter_seen in (True, False):
        asked = question(dataset, users, at, filter_seen)
        assert asked.penalty.shape == (len(users), n_items) and asked.penalty.dtype == torch.float32
        for row, (user, place) in enumerate(zip(users, at)):
            target = items[place] - 1
            assert int(asked.target[row]) == target
            off = {i - 1 for i in items[dataset.offsets[user] : place]} - {target} if filter_seen else set()
            assert {i for i in range(n_items) if asked.penalty[row, i] == -torch.inf} == off
            assert all(asked.penalty[row, i] == 0 for i in range(n_items) if i not in off)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 10**6))
def test_overlap_counts_common_items(cells, users, seed):
    rng = np.random.default_rng(seed)
    a = np.stack([[rng.permutation(25)[:TOP] for _ in range(users)] for _ in range(cells)])
    b = np.stack([rng.permutation(25)[:TOP] for _ in range(users)])
    got = overlap(torch.from_numpy(a), torch.from_numpy(b))
    assert got.dtype == torch.float32 and got.shape == (cells, users)
    want = [[len(set(x) & set(y)) / TOP for x, y in zip(cell, b)] for cell in a]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_losses_are_the_cross_entropy_among_what_may_rank(scale):
    hidden, table, asked = grid(2, 70, 4), grid(30, 4, seed=1), asked_of(70, 30, 5)
    found = losses(hidden, table, asked, scale)
    logits = scale * hidden.double() @ table.double().T + asked.penalty
    for cell in range(2):
        want = torch.nn.functional.cross_entropy(logits[cell], asked.target, reduction="none")
        torch.testing.assert_close(found[cell].double(), want, rtol=1e-5, atol=1e-5)
