import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench.evaluation import metrics

RANKS = st.lists(st.integers(0, 200), min_size=1, max_size=30)
P_VALUES = st.lists(st.none() | st.floats(0, 1), max_size=20)


@given(RANKS, st.sampled_from([1, 5, 10, 50]))
def test_metrics_equal_their_definitions(ranks, k):
    for rank, hit, gain, reciprocal in zip(
        ranks, metrics.hit_rate(ranks, k), metrics.ndcg(ranks, k), metrics.mrr(ranks)
    ):
        relevant = [1 if place == rank else 0 for place in range(k)]
        assert hit == sum(relevant)
        assert gain == pytest.approx(sum(r / math.log2(place + 2) for place, r in enumerate(relevant)))
        assert reciprocal == pytest.approx(1 / (rank + 1))


def test_closed_forms():
    assert metrics.ndcg([0, 2, 10], 10).tolist() == [1.0, 0.5, 0.0]
    values = metrics.summary([0, 2, 7, 60])
    assert values["hr@5"] == 0.5 and values["hr@10"] == 0.75 and values["hr@50"] == 0.75
    assert values["ndcg@5"] == 0.375
    assert values["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 8 + 1 / 61) / 4)
    assert set(values) == {"hr@5", "hr@10", "hr@50", "ndcg@5", "ndcg@10", "ndcg@50", "mrr"}


def test_summary_without_users_is_null_not_zero():
    assert set(metrics.summary(np.zeros(0, int)).values()) == {None}


def test_a_request_without_a_value_leaves_its_user_the_others():
    np.testing.assert_array_equal(metrics.by_user([1, np.nan, 3, 4, np.nan], [5, 5, 2, 2, 1]), [np.nan, 3.5, 1])


@given(RANKS)
def test_deeper_cut_offs_never_score_less(ranks):
    values = metrics.summary(ranks)
    assert 0 <= values["ndcg@5"] <= values["ndcg@10"] <= values["ndcg@50"] <= values["hr@50"] <= 1
    assert values["hr@5"] <= values["hr@10"] <= values["hr@50"]


def test_interval_and_p_agree_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    b = rng.random(4000)
    a = b + rng.normal(0.004, 0.1, 4000)
    delta, lo, hi, p = metrics.paired_bootstrap(a, b)
    error = (a - b).std() / math.sqrt(4000)
    assert delta == pytest.approx((a - b).mean())
    assert lo == pytest.approx(delta - 1.96 * error, abs=0.15 * error)
    assert hi == pytest.approx(delta + 1.96 * error, abs=0.15 * error)
    assert p == pytest.approx(math.erfc(abs(delta) / error / math.sqrt(2)), rel=0.2)


def test_interval_covers_the_truth_in_95_of_100_samples():
    rng = np.random.default_rng(1)
    samples = rng.exponential(1.0, (400, 300)) - 0.9  # true mean 0.1, skewed
    found = metrics.paired_bootstrap_many(samples, np.zeros(300), n=500)
    covered = np.mean((found.lo <= 0.1) & (found.hi >= 0.1))
    assert 0.92 <= covered <= 0.975


def test_p_is_uniform_where_nothing_differs():
    samples = np.random.default_rng(2).normal(0, 1, (400, 200))
    p = metrics.paired_bootstrap_many(samples, np.zeros(200), n=500).p
    assert 0.02 <= np.mean(p < 0.05) <= 0.085
    assert 0.42 <= np.mean(p < 0.5) <= 0.58


def test_cells_do_not_depend_on_their_company():
    rng = np.random.default_rng(3)
    cells, reference = rng.random((5, 700)), rng.random(700)
    together = metrics.paired_bootstrap_many(cells, reference, n=300, seed=7)
    for i, cell in enumerate(cells):
        np.testing.assert_allclose(metrics.paired_bootstrap(cell, reference, n=300, seed=7), [x[i] for x in together])


def test_resamples_draw_every_user_count_with_replacement():
    weights = np.concatenate(list(metrics._resamples(50, 20_000, seed=0)))
    assert weights.shape == (20_000, 50) and (weights.sum(axis=1) == 50).all()
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.04)
    np.testing.assert_allclose(weights.var(axis=0), 1 - 1 / 50, atol=0.06)


def test_blocks_are_seamless(monkeypatch):
    rng = np.random.default_rng(4)
    a, b = rng.random(1000), rng.random(1000)
    whole = metrics.paired_bootstrap(a, b, n=200)
    monkeypatch.setattr(metrics, "_BLOCK", 7000)
    np.testing.assert_allclose(metrics.paired_bootstrap(a, b, n=200), whole)


def test_equal_values_have_no_difference():
    assert metrics.paired_bootstrap([0.3, 0.1], [0.3, 0.1]) == (0, 0, 0, 1)


def test_few_users_cannot_be_significant():
    assert metrics.paired_bootstrap([1.0], [0.0])[3] == 1
    assert metrics.paired_bootstrap([1.0] * 3, [0.0] * 3)[3] == 0.25


@pytest.mark.parametrize(("cells", "reference"), [([[1.0]], [1.0, 2.0]), ([1.0], [1.0]), (np.zeros((2, 0)), [])])
def test_shapes_that_disagree_are_an_error(cells, reference):
    with pytest.raises(ValueError, match="expected cells"):
        metrics.paired_bootstrap_many(cells, reference)


def test_bootstrap_of_ml_1m_is_quick():
    rng = np.random.default_rng(5)
    cells, reference = rng.random((48, 6040)), rng.random(6040)
    seconds = []
    for _ in range(3):
        start = time.process_time()  # other workers share the cores
        metrics.paired_bootstrap_many(cells, reference)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 1.0  # measured 0.18


def brute_force(cell, reference, kept, chance, n=20_000):
    """One-sided p by drawing users again and again."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(cell), (n, len(cell)))
    contrast = cell[drawn].mean(1) - chance - kept * (reference[drawn].mean(1) - chance)
    return metrics.upper_tail(cell.mean() - chance - kept * (reference.mean() - chance), contrast.std())


@pytest.mark.parametrize(("kept", "chance"), [(0.99, 0.0), (0.9, 0.5), (0.99, 0.5)])
def test_noninferiority_is_the_bootstraps_without_drawing(kept, chance):
    rng = np.random.default_rng(7)
    reference = 0.55 + 0.3 * rng.random(300)
    cells = reference + rng.normal([[-0.02], [-0.006], [0.0], [0.004]], 0.03, (4, 300))
    found = metrics.noninferiority(cells, reference, kept, chance)
    for p, cell in zip(found, cells):
        assert math.log(p) == pytest.approx(math.log(brute_force(cell, reference, kept, chance)), rel=0.05, abs=0.03)
    assert (np.diff(found) < 0).all()


def test_noninferiority_errs_in_one_of_twenty_at_the_margin():
    rng = np.random.default_rng(8)
    reference = rng.exponential(1.0, (500, 200))
    cells = 0.99 * reference + rng.normal(0, 0.1, reference.shape)  # exactly 1 % worse
    p = np.array([metrics.noninferiority(c[None], r)[0] for c, r in zip(cells, reference)])
    assert 0.02 <= np.mean(p < 0.05) <= 0.08 and 0.43 <= np.mean(p < 0.5) <= 0.57


def test_noninferiority_where_there_is_little_to_test():
    same = np.array([0.2, 0.4, 0.0])
    assert metrics.noninferiority([same], same).tolist() == [0.125]  # nothing lost; three users cannot show more
    assert metrics.noninferiority([[1.0, 1.0]], [1.0, 1.0]).tolist() == [0.25]
    assert metrics.noninferiority([[0.4, 0.5]], [0.4, 0.5], chance=0.5).tolist() == [1.0]  # nothing to keep
    with pytest.raises(ValueError, match="expected cells"):
        metrics.noninferiority([[1.0]], [1.0, 2.0])


def test_holm_by_hand():
    np.testing.assert_allclose(metrics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_holm_passes_over_what_was_not_tested():
    np.testing.assert_allclose(metrics.holm([0.02, None, 0.01, math.nan]), [0.02, math.nan, 0.02, math.nan])
    assert metrics.holm([]).shape == (0,)


@given(P_VALUES)
def test_holm_lies_between_raw_and_bonferroni_and_keeps_the_order(p):
    adjusted = metrics.holm(p)
    tested = [(raw, adjusted[i]) for i, raw in enumerate(p) if raw is not None]
    assert all(math.isnan(adjusted[i]) for i, raw in enumerate(p) if raw is None)
    assert all(raw <= new <= min(1, raw * len(tested)) + 1e-12 for raw, new in tested)
    assert [new for _, new in sorted(tested)] == sorted(new for _, new in tested)


@given(st.lists(st.integers(0, 3000), max_size=50))
def test_slices_part_the_users(lengths):
    masks = metrics.slices(lengths)
    assert list(masks) == ["<50", "50-199", "200-499", ">=500"]
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()


def test_slice_edges_and_means():
    lengths = [49, 50, 199, 200, 499]
    assert [mask.tolist().count(True) for mask in metrics.slices(lengths).values()] == [1, 2, 2, 0]
    means = metrics.by_slice({"ndcg@10": [1.0, 0.0, 0.5, 0.2, 0.4]}, metrics.slices(lengths))
    assert means["50-199"] == {"n_users": 2, "ndcg@10": 0.25}
    assert means[">=500"] == {"n_users": 0, "ndcg@10": None}
