"""Ranks, top tens and overlap against definitions in float64, and the promises at the edges."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from malloc_bench import kernels
from malloc_bench.data import Dataset
from malloc_bench.evaluation.ranking import TOP, Question, best, compare, losses, question, rank


@pytest.fixture(params=["kernels", "eager"], autouse=True, scope="module")
def ways(request):
    """By the compiled loop and by plain torch."""
    with kernels.eager() if request.param == "eager" else nullcontext():
        yield


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


def shares(hidden, table, asked, top):
    """Overlap [C, B] by definition, in float64: items of top whom at most 10 reach, or that cannot rank."""
    scores = hidden.double() @ table.double().T + asked.penalty
    found = np.zeros(hidden.shape[:2])
    for cell, own in enumerate(scores.tolist()):
        for user, (row, items) in enumerate(zip(own, top.tolist())):
            kept = [row[i] == -np.inf or sum(x >= row[i] for x in row) <= TOP for i in items]
            found[cell, user] = sum(kept) / len(kept)
    return found


@pytest.mark.parametrize("items", [1, 3, 9, 10, 11, 16, 320, 1000, 5000])  # 4,096 are counted at a time
@pytest.mark.parametrize(("cells", "users"), [(1, 1), (3, 63), (2, 64), (1, 130)])
def test_ranks_and_overlap_equal_their_definitions(items, cells, users):
    hidden, table = grid(cells, users, 5, seed=1), grid(items, 5, seed=2)
    asked = asked_of(users, items, min(items // 3, 40))
    top = best(hidden[0], table, asked)
    ranks, kept = compare(hidden, table, asked, top)
    assert ranks.dtype == torch.int32 and ranks.shape == (cells, users) and top.shape == (users, min(TOP, items))
    np.testing.assert_array_equal(ranks.numpy(), by_definition(hidden, table, asked))
    np.testing.assert_allclose(kept.numpy(), shares(hidden, table, asked, top), rtol=1e-6)


@pytest.mark.parametrize("items", [40, 320, 3706])
def test_overlap_is_what_two_sets_of_10_have_in_common(items):
    hidden, table = torch.randn(3, 70, 8), torch.randn(items, 8)
    asked = asked_of(70, items, 12)
    sets = [[set(row) for row in best(h, table, asked).tolist()] for h in hidden]
    _, kept = compare(hidden, table, asked, best(hidden[0], table, asked))
    want = [[len(a & b) / TOP for a, b in zip(own, sets[0])] for own in sets]
    np.testing.assert_allclose(kept.numpy(), want, rtol=1e-6)
    assert (kept[0] == 1).all()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(1, 70), st.integers(0, 399), st.integers(0, 10**6), st.sampled_from([1, 2, 8]))
def test_any_shape_any_ties(items, users, seen, seed, step):
    hidden, table = grid(2, users, 3, seed=seed, step=step), grid(items, 3, seed=seed + 1, step=step)
    asked = asked_of(users, items, min(seen, items), seed)
    top = best(hidden[0], table, asked)
    ranks, kept = compare(hidden, table, asked, top)
    scores = hidden.double() @ table.double().T + asked.penalty
    own = scores.gather(2, asked.target[None, :, None].expand(2, -1, 1))
    assert torch.equal(ranks.long(), (scores >= own).sum(-1) - 1)
    np.testing.assert_allclose(kept.numpy(), shares(hidden, table, asked, top), rtol=1e-6)


def test_ranks_do_not_depend_on_a_top_nor_on_company():
    hidden, table, asked = torch.randn(3, 100, 6), torch.randn(500, 6), asked_of(100, 500, 30)
    together = rank(hidden, table, asked)
    assert torch.equal(together, compare(hidden, table, asked, best(hidden[0], table, asked))[0])
    for cell in range(3):
        assert torch.equal(together[cell : cell + 1], rank(hidden[cell : cell + 1], table, asked))


def test_outputs_that_cannot_tell_items_apart_rank_last():
    asked = asked_of(5, 50, 10)
    table = torch.randn(50, 4)
    ranks, kept = compare(torch.zeros(1, 5, 4), table, asked, best(torch.randn(5, 4), table, asked))
    assert not kept.any()
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
    hidden, table = torch.randn(2, 6, 4), torch.randn(400, 4)
    assert (compare(hidden, table, asked, best(hidden[0], table, asked))[1] == 1).all()


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


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_losses_are_the_cross_entropy_among_what_may_rank(scale):
    hidden, table, asked = grid(2, 70, 4), grid(30, 4, seed=1), asked_of(70, 30, 5)
    found = losses(hidden, table, asked, scale)
    logits = scale * hidden.double() @ table.double().T + asked.penalty
    for cell in range(2):
        want = torch.nn.functional.cross_entropy(logits[cell], asked.target, reduction="none")
        torch.testing.assert_close(found[cell].double(), want, rtol=1e-5, atol=1e-5)
