"""From per-user values to the row of a cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from malloc_bench import metrics
from malloc_bench.data.ceilings import Ceilings
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


def ceilings(known: Ceilings, evaluation: Evaluation, ids: list[str]) -> dict[str, dict[str, Any]]:
    """The best possible on the evaluation's targets, row columns by job id: with no event, with the whole history, and

    with the newest events that, uncompressed, fit into the bytes the job uses of each user. `known` must have been made
    from the evaluation's targets in their order.
    """
    same = _ceiling("none", known.floor()) | _ceiling("full", known.full())
    length, full = evaluation.length[known.rows], evaluation.bytes_full[known.rows]
    windows: dict[bytes, dict[str, float]] = {}  # methods that cut to the same size share theirs
    rows = {}
    for each in (each for each in ids if each in evaluation.values):
        size = evaluation.values[each]["bytes"][known.rows]
        count = 1 + size.clip(max=full) * length // full.clip(1)  # the newest event is the token that reads
        if count.tobytes() not in windows:
            windows[count.tobytes()] = _ceiling("window", known.window(count))
        rows[each] = same | windows[count.tobytes()]
    return rows


def _ceiling(name: str, values: Values) -> dict[str, float]:
    return {f"ceiling_{name}_{metric}": float(per_target.mean()) for metric, per_target in values.items()}


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
