"""AUC, GAUC, LogLoss, NDCG and Recall of candidates against scikit-learn and brute force, ties included."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from malloc_bench.evaluation import metrics

SEEDS = st.integers(0, 10**6)


def candidates(seed, users=12, most=15, levels=4):
    """Shuffled (scores, labels, users): few score levels, so that ties are many; some users have one class."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.repeat(np.arange(users), rng.integers(1, most + 1, users)))
    scores = rng.integers(0, levels, len(owner)) / 2 - 1
    return scores, rng.random(len(owner)) < rng.choice([0, 0.3, 0.5, 1], users)[owner], owner


def one_list(scores, labels):
    return metrics.lists(scores, labels, np.zeros(len(labels), int))


def pairs(scores, labels):
    good, bad = scores[labels], scores[~labels]
    return np.mean([[(g > b) + (g == b) / 2 for b in bad] for g in good]) if len(good) and len(bad) else math.nan


@given(SEEDS, st.sampled_from([2, 4, 10**6]))
def test_auc_by_user_is_scikit_learn_s_and_the_share_of_pairs(seed, levels):
    scores, labels, users = candidates(seed, levels=levels)
    each, count = metrics.auc_by_user(metrics.lists(scores, labels, users))
    for user in range(12):
        own = users == user
        assert each[user] == pytest.approx(pairs(scores[own], labels[own]), nan_ok=True) and count[user] == own.sum()
        if 0 < labels[own].sum() < own.sum():
            assert each[user] == pytest.approx(sk.roc_auc_score(labels[own], scores[own]))


@given(SEEDS)
def test_auc_and_gauc_are_means_of_users_values(seed):
    scores, labels, users = candidates(seed)
    found = metrics.lists(scores, labels, users)
    each, count = metrics.auc_by_user(found)
    both = ~np.isnan(each)
    assert len(metrics.gauc(found)) == both.sum()
    if both.any():
        assert metrics.gauc(found).mean() == pytest.approx(np.average(each[both], weights=count[both]))
    values = metrics.auc(one_list(scores, labels), users)
    if 0 < labels.sum() < len(labels):
        assert values.mean() == pytest.approx(sk.roc_auc_score(labels, scores)) and len(values) == 12
    else:
        assert len(values) == 0


@given(SEEDS, st.sampled_from([1, 3, 10]))
def test_ndcg_is_scikit_learn_s_and_recall_the_mean_over_orders_of_ties(seed, k):
    scores, labels, users = candidates(seed)
    found = metrics.lists(scores, labels, users)
    ndcg, recall = metrics.list_ndcg(found, k), metrics.list_recall(found, k)
    rng = np.random.default_rng(seed)
    for user in range(12):
        own, liked = scores[users == user], labels[users == user]
        if not liked.any():
            assert math.isnan(ndcg[user]) and math.isnan(recall[user])
            continue
        if len(own) > 1:  # scikit-learn refuses a list of one
            assert ndcg[user] == pytest.approx(sk.ndcg_score([liked], [own], k=k))
        orders = [np.lexsort((rng.random(len(own)), -own))[:k] for _ in range(400)]
        assert recall[user] == pytest.approx(np.mean([liked[o].sum() for o in orders]) / liked.sum(), abs=0.15)


@given(SEEDS)
def test_logloss_is_scikit_learn_s(seed):
    scores, labels, _ = candidates(seed)
    want = sk.log_loss(labels, 1 / (1 + np.exp(-3 * scores)), labels=[False, True])
    assert metrics.logloss(3 * scores, labels) == pytest.approx(want)
    assert metrics.logloss([800.0, -800.0], [1, 0]) == 0 and metrics.logloss([-800.0], [1]) == 800
    assert metrics.logloss([], []) is None


def test_by_hand():
    """Two tied with the liked one, one below: half, half and one of three pairs."""
    found = metrics.lists([0.0, 0.0, 0.0, -1.0], [True, False, False, False], np.zeros(4, int))
    assert metrics.auc_by_user(found)[0] == pytest.approx(2 / 3)
    assert metrics.list_recall(found, 1) == pytest.approx(1 / 3) and metrics.list_recall(found, 3) == 1
    assert metrics.list_ndcg(found, 2) == pytest.approx((1 + 1 / math.log2(3)) / 3)


def test_nobody_and_what_is_not_finite():
    none = metrics.lists([], [], np.zeros(0, int))
    assert len(metrics.gauc(none)) == len(metrics.auc(none, np.zeros(0, int))) == len(metrics.list_ndcg(none, 5)) == 0
    with pytest.raises(ValueError, match="scores are not finite"):
        metrics.lists([math.nan], [1], [0])


@pytest.mark.parametrize("kind", ["auc", "gauc"])
def test_intervals_are_those_of_drawing_users_again(kind):
    """Against the real thing: resample users with all their candidates, compute both metrics anew, subtract."""
    rng = np.random.default_rng(0)
    scores, labels, users = candidates(1, users=150, levels=10**6)
    taste = rng.normal(0, 1, 150)[users]  # users differ: the interval must be by user
    full = scores / 5e5 + labels + taste
    small = full + rng.normal(0, 1, len(full)) + rng.normal(0, 1, 150)[users] * labels

    def values(x):
        return (
            metrics.auc(one_list(x, labels), users) if kind == "auc" else metrics.gauc(metrics.lists(x, labels, users))
        )

    delta, lo, hi, p = metrics.paired_bootstrap(values(small), values(full))
    members = [np.flatnonzero(users == user) for user in range(150)]
    drawn = []
    for _ in range(400):
        picked = rng.integers(0, 150, 150)
        rows = np.concatenate([members[user] for user in picked])
        owner = np.repeat(np.arange(150), [len(members[user]) for user in picked])
        two = []
        for x in (small, full):
            each, count = metrics.auc_by_user(metrics.lists(x[rows], labels[rows], owner))
            both = ~np.isnan(each)
            within = np.average(each[both], weights=count[both])
            two.append(sk.roc_auc_score(labels[rows], x[rows]) if kind == "auc" else within)
        drawn.append(two[0] - two[1])
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert lo == pytest.approx(low, abs=0.15 * (high - low)) and hi == pytest.approx(high, abs=0.15 * (high - low))
    assert lo < delta < hi < 0 and p < 0.05


def test_means_by_user_count_each_user_once():
    users = [7, 3, 7, 7]
    assert metrics.by_user([1.0, 5.0, 2.0, 6.0], users).tolist() == [5.0, 3.0]
    summary = metrics.summary([0, 99, 99, 99], users)
    assert summary["hr@10"] == pytest.approx((0 + 1 / 3) / 2)
    slices = metrics.by_slice({"hr": [1.0, math.nan, 0.0, 1.0]}, metrics.slices([10, 10, 10, 60]), users)
    assert slices["<50"] == {"n_users": 2, "hr": 0.5} and slices["50-199"] == {"n_users": 1, "hr": 1.0}


def test_300_000_candidates_of_10_000_users_take_a_moment():
    rng = np.random.default_rng(0)
    users = np.sort(rng.integers(0, 10_000, 300_000))
    scores, labels = rng.normal(size=300_000), rng.random(300_000) < 0.3
    start = time.process_time()
    found = metrics.lists(scores, labels, users)
    metrics.gauc(found), metrics.list_ndcg(found, 10), metrics.auc(one_list(scores, labels), users)
    assert time.process_time() - start < 2.0  # measured 0.2
