"""From per-user values to the row of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from malloc_bench import metrics
from malloc_bench.evaluation import REFERENCE, Evaluation, Values


def accuracy(evaluation: Evaluation, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Accuracy, fidelity and bytes of each job in `ids` that has values: row columns by job id.

    Differences are paired over users, all jobs against the full state with the same resamples.
    """
    ids = [each for each in ids if each in evaluation.values]
    if not ids:
        return {}
    gains = {each: metrics.ndcg(evaluation.values[each]["rank"], 10) for each in (REFERENCE, *ids)}
    boot = metrics.paired_bootstrap_many(np.stack([gains[each] for each in ids]), gains[REFERENCE])
    rows = {}
    for i, each in enumerate(ids):
        values = evaluation.values[each]
        same = bool((values["rank"] == evaluation.values[REFERENCE]["rank"]).all())
        rows[each] = {
            "n_users": len(evaluation.users),
            **metrics.summary(values["rank"]),
            "overlap@10": _mean(values["overlap"]),
            "delta_ndcg@10": float(boot.delta[i]),
            "delta_ndcg@10_lo": float(boot.lo[i]),
            "delta_ndcg@10_hi": float(boot.hi[i]),
            "p_value": None if same else float(boot.p[i]),  # nothing differs: nothing to test
            **_sizes(values, evaluation),
            "slices": metrics.by_slice(
                {
                    "ndcg@10": gains[each],
                    "hr@10": metrics.hit_rate(values["rank"], 10),
                    "overlap@10": values["overlap"],
                },
                evaluation.length,
            ),
        }
    return rows


def per_user(evaluation: Evaluation, each: str, user_ids: np.ndarray) -> Mapping[str, np.ndarray]:
    """Columns of a job's per-user file; `user` is the id in the source."""
    return {
        "user": user_ids[evaluation.users],
        "length": evaluation.length,
        "bytes_full": evaluation.bytes_full,
        **evaluation.values[each],
    }


def _sizes(values: Values, evaluation: Evaluation) -> dict[str, float | None]:
    """Bytes over the users who have a history to keep."""
    some = evaluation.length > 0
    size, full = values["bytes"][some], evaluation.bytes_full[some]
    if not len(size):
        return {}
    return {
        "bytes_full": _mean(full),
        "bytes_mean": _mean(size),
        "bytes_p50": float(np.percentile(size, 50)),
        "bytes_p99": float(np.percentile(size, 99)),
        "bytes_fixed": 0.0,
        "ratio": float(size.sum() / full.sum()),
        "share_at_floor": _mean(values["at_floor"][some]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
