"""Row columns against definitions, user by user."""

import math
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from malloc_bench.evaluation.evaluate import REFERENCE, Evaluation
from malloc_bench.run.rows import accuracy, ceilings, per_user

LENGTHS = np.array([0, 10, 49, 50, 120, 199, 200, 499, 500, 900, 30, 60])


def values(rank, size, overlap=None):
    n = len(rank)
    return {
        "rank": np.array(rank, np.int32),
        "overlap": np.array(overlap if overlap is not None else [1.0] * n, np.float32),
        "bytes": np.array(size, np.int64),
        "at_floor": np.arange(n) % 3 == 0,
    }


@pytest.fixture
def evaluation():
    rng = np.random.default_rng(0)
    n = len(LENGTHS)
    full = 4 + 100 * LENGTHS
    reference = values(rng.integers(0, 30, n), full)
    other = values(rng.integers(0, 80, n), 4 + full // 5, rng.random(n))
    jobs = {REFERENCE: reference, "full": reference, "small": other}
    return Evaluation(np.arange(n)[::-1].copy(), LENGTHS, full, jobs, {"bad": "Traceback ..."})


class Known:
    """Ceilings of every second user; a window of w events is worth w."""

    rows = np.arange(0, len(LENGTHS), 2)
    asked: list[list[int]]

    def __init__(self):
        self.asked = []

    def floor(self):
        return {"hr@10": np.zeros(len(self.rows))}

    def full(self):
        return {"hr@10": np.full(len(self.rows), 1000.0)}

    def window(self, count):
        self.asked.append(count.tolist())
        return {"hr@10": count.astype(float)}


def gain(rank, k):
    return 1 / math.log2(rank + 2) if rank < k else 0.0


def test_accuracy_is_the_mean_over_all_users(evaluation):
    row = accuracy(evaluation, ["small"])["small"]
    ranks = evaluation.values["small"]["rank"].tolist()
    n = len(ranks)
    assert row["n_users"] == n
    for k in (5, 10, 50):
        assert row[f"hr@{k}"] == pytest.approx(sum(r < k for r in ranks) / n)
        assert row[f"ndcg@{k}"] == pytest.approx(sum(gain(r, k) for r in ranks) / n)
    assert row["mrr"] == pytest.approx(sum(1 / (r + 1) for r in ranks) / n)
    assert row["overlap@10"] == pytest.approx(evaluation.values["small"]["overlap"].mean())


def test_differences_are_paired_with_the_full_state(evaluation):
    row = accuracy(evaluation, ["small"])["small"]
    ours, full = (evaluation.values[name]["rank"].tolist() for name in ("small", REFERENCE))
    want = np.mean([gain(a, 10) - gain(b, 10) for a, b in zip(ours, full)])
    assert row["delta_ndcg@10"] == pytest.approx(want)
    assert row["delta_ndcg@10_lo"] < want < row["delta_ndcg@10_hi"] and 0 < row["p_value"] <= 1


def test_noninferiority_is_of_one_percent_of_the_full_states_ndcg(evaluation):
    rows = accuracy(evaluation, ["small", "full"])
    gains = {
        name: np.array([gain(r, 10) for r in evaluation.values[name]["rank"].tolist()]) for name in ("small", REFERENCE)
    }
    contrast = gains["small"] - 0.99 * gains[REFERENCE]
    z = contrast.mean() / (contrast.std() / math.sqrt(len(contrast)))
    assert rows["small"]["p_noninferior"] == pytest.approx(max(math.erfc(z / math.sqrt(2)) / 2, 2.0 ** -len(contrast)))
    assert rows["full"]["p_noninferior"] < rows["small"]["p_noninferior"]


def test_equal_values_have_equal_digests(evaluation):
    jobs = evaluation.values
    jobs["again"] = {**jobs["small"], "at_floor": ~jobs["small"]["at_floor"]}  # another budget, the same state
    jobs["other"] = {**jobs["small"], "bytes": jobs["small"]["bytes"] + 1}
    rows = accuracy(evaluation, ["small", "again", "other", "full"])
    digests = [rows[name]["values_digest"] for name in ("small", "again", "other", "full")]
    assert digests[0] == digests[1] and len(set(digests)) == 3


def test_what_equals_the_full_state_has_no_p(evaluation):
    row = accuracy(evaluation, ["full"])["full"]
    assert row["p_value"] is None
    assert row["delta_ndcg@10"] == row["delta_ndcg@10_lo"] == row["delta_ndcg@10_hi"] == 0


def test_bytes_are_those_of_users_with_a_history(evaluation):
    row = accuracy(evaluation, ["small"])["small"]
    some = [i for i, length in enumerate(LENGTHS) if length > 0]
    size, full = evaluation.values["small"]["bytes"][some], evaluation.bytes_full[some]
    assert len(some) == len(LENGTHS) - 1
    assert row["bytes_mean"] == pytest.approx(sum(size) / len(some))
    assert row["bytes_full"] == pytest.approx(sum(full) / len(some))
    assert row["ratio"] == pytest.approx(sum(size) / sum(full))
    assert row["bytes_p50"] == np.median(size) and row["bytes_p99"] <= size.max() and row["bytes_fixed"] == 0
    assert row["share_at_floor"] == pytest.approx(sum(i % 3 == 0 for i in some) / len(some))
    assert accuracy(evaluation, ["full"])["full"]["ratio"] == 1


def test_bytes_by_part_add_up_to_the_mean(evaluation):
    size = evaluation.values["small"]["bytes"]
    parts = {"keys": size // 3, "length": 0 * size + 4, "masses": 0 * size}
    parts["values"] = size - parts["keys"] - parts["length"]
    row = accuracy(replace(evaluation, parts={"small": parts}), ["small", "full"])
    found, some = row["small"]["bytes_by_part"], LENGTHS > 0
    assert found == {name: pytest.approx(parts[name][some].mean()) for name in ("keys", "length", "values")}
    assert sum(found.values()) == pytest.approx(row["small"]["bytes_mean"])
    assert row["full"]["bytes_by_part"] is None  # not known


def test_slices_by_length(evaluation):
    row = accuracy(evaluation, ["small"])["small"]["slices"]
    edges = {"<50": (0, 50), "50-199": (50, 200), "200-499": (200, 500), ">=500": (500, 10**9)}
    assert row.keys() == edges.keys()
    for name, (low, high) in edges.items():
        some = [i for i, length in enumerate(LENGTHS) if low <= length < high]
        ranks = [int(evaluation.values["small"]["rank"][i]) for i in some]
        assert row[name]["n_users"] == len(some)
        assert row[name]["ndcg@10"] == pytest.approx(np.mean([gain(r, 10) for r in ranks]))
        assert row[name]["hr@10"] == pytest.approx(np.mean([r < 10 for r in ranks]))
        assert row[name]["overlap@10"] == pytest.approx(evaluation.values["small"]["overlap"][some].mean())


def test_a_row_does_not_depend_on_its_company(evaluation):
    alone, both = accuracy(evaluation, ["small"])["small"], accuracy(evaluation, ["full", "small"])["small"]
    assert alone.keys() == both.keys()
    assert all(alone[name] == pytest.approx(both[name]) for name in alone if name != "slices")


def test_failed_and_unknown_jobs_have_no_columns(evaluation):
    assert accuracy(evaluation, ["bad", "never"]) == {} == accuracy(evaluation, [])
    assert accuracy(evaluation, ["bad", "full"]).keys() == {"full"}


def test_without_any_history_bytes_are_null_not_zero(evaluation):
    evaluation.length = np.zeros_like(LENGTHS)
    row = accuracy(evaluation, ["small"])["small"]
    assert row["ndcg@10"] is not None and not {"ratio", "bytes_mean", "bytes_full", "share_at_floor"} & row.keys()


def test_nobody_was_tested():
    empty = np.zeros(0, np.int64)
    assert accuracy(Evaluation(empty, empty, empty, {}), ["full"]) == {}


def test_per_user_columns_carry_the_ids_of_the_source(evaluation):
    ids = np.arange(len(LENGTHS)) + 1000
    columns = per_user(evaluation, "small", ids)
    assert list(columns) == ["user", "length", "bytes_full", "rank", "overlap", "bytes", "at_floor"]
    assert columns["user"].tolist() == (evaluation.users + 1000).tolist()
    names = pl.Series([f"u{i:03d}" for i in ids])  # text, where the source has that
    assert per_user(evaluation, "small", names)["user"].to_list() == [names[int(i)] for i in evaluation.users]
    np.testing.assert_array_equal(columns["rank"], evaluation.values["small"]["rank"])
    assert {len(column) for column in columns.values()} == {len(LENGTHS)}


def test_a_row_has_the_ceiling_of_the_window_that_fits_into_its_bytes(evaluation):
    known = Known()
    full = 100 * LENGTHS  # 100 bytes an event
    sizes = {
        "full": full,
        "none": 0 * full,
        "five": 100 * LENGTHS.clip(max=5),
        "almost six": 100 * LENGTHS.clip(max=5) + 99,
    }
    sizes["larger"] = full + 1000
    same = evaluation.values[REFERENCE]
    jobs = {name: {**same, "bytes": size.astype(np.int64)} for name, size in sizes.items()}
    judged = replace(evaluation, bytes_full=full, values={REFERENCE: same, **jobs})
    columns = ceilings(known, judged, [*sizes, "bad"])
    assert columns.keys() == sizes.keys()
    some = LENGTHS[::2]
    want = {"full": some + 1, "none": 1 + 0 * some, "five": some.clip(max=5) + 1, "larger": some + 1}
    want["almost six"] = np.where(some > 5, 6, some + 1)
    for name, windows in want.items():  # and the newest event, which reads
        assert columns[name]["ceiling_window_hr@10"] == pytest.approx(windows.mean()), name
        assert (columns[name]["ceiling_none_hr@10"], columns[name]["ceiling_full_hr@10"]) == (0, 1000)
    assert len(known.asked) == 3  # what fits the same window shares the work
