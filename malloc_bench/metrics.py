"""Pure functions on ranks: accuracy per user, intervals over users, Holm's correction, slices by history length.

A rank is the 0-based place of a user's one target among the catalogue; lower is better. U is the number of users.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CUTOFFS = (5, 10, 50)
_BLOCK = 1 << 19  # bootstrap weights held at once (4 MB)


def hit_rate(ranks: npt.ArrayLike, k: int) -> Floats:
    """1 for every user (U,) whose target is among the first k, else 0."""
    return (np.asarray(ranks) < k).astype(np.float64)


def ndcg(ranks: npt.ArrayLike, k: int) -> Floats:
    """1 / log2(rank + 2) for every user (U,) whose target is among the first k, else 0."""
    ranks = np.asarray(ranks)
    return np.where(ranks < k, 1.0 / np.log2(ranks + 2.0), 0.0)


def mrr(ranks: npt.ArrayLike) -> Floats:
    """1 / (rank + 1) for every user (U,); not cut off."""
    return 1.0 / (np.asarray(ranks) + 1.0)


def summary(ranks: npt.ArrayLike) -> dict[str, float | None]:
    """Means over users under the column names of a row; null where there is no user."""
    values = {f"hr@{k}": hit_rate(ranks, k) for k in CUTOFFS}
    values |= {f"ndcg@{k}": ndcg(ranks, k) for k in CUTOFFS}
    return {name: _mean(per_user) for name, per_user in (values | {"mrr": mrr(ranks)}).items()}


class Bootstrap(NamedTuple):
    """Difference of means, its 95 % percentile interval, two-sided unadjusted p. Each (C,), or a float."""

    delta: Floats
    lo: Floats
    hi: Floats
    p: Floats


def paired_bootstrap_many(cells: npt.ArrayLike, reference: npt.ArrayLike, n: int = 2000, seed: int = 0) -> Bootstrap:
    """Bootstrap mean(cell) - mean(reference) over users for all cells (C, U) against one reference (U,) at once.

    Every cell sees the same n resamples of users, so cells may be split over calls without a change of result.
    A user with several targets enters as the mean of them, which clusters by user.
    p is the normal tail at delta / (standard error of the resamples): a counted share could not go below 2 / n,
    and Holm over 60 cells would then call nothing significant. It is never below 2 ** (1 - U), the least that
    U users can show by agreeing in sign.
    Raises ValueError where shapes disagree or there is no user.
    """
    cells, reference = np.asarray(cells, np.float64), np.asarray(reference, np.float64)
    if cells.ndim != 2 or reference.shape != cells.shape[1:] or not reference.size:
        raise ValueError(f"expected cells (C, U) and reference (U,), U > 0; got {cells.shape} and {reference.shape}")
    users = reference.size
    differences = np.ascontiguousarray((cells - reference).T)  # (U, C)
    resampled = np.concatenate([weights @ differences for weights in _resamples(users, n, seed)]) / users  # (n, C)
    delta = differences.mean(axis=0)
    lo, hi = np.quantile(resampled, [0.025, 0.975], axis=0)
    p = [_two_sided(d, se, users) for d, se in zip(delta, resampled.std(axis=0))]
    return Bootstrap(delta, lo, hi, np.array(p))


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, n: int = 2000, seed: int = 0
) -> tuple[float, float, float, float]:
    """(delta, lo, hi, p) of mean(a) - mean(b), both (U,); see `paired_bootstrap_many`."""
    delta, lo, hi, p = (float(column[0]) for column in paired_bootstrap_many(np.asarray(a)[None], b, n, seed))
    return delta, lo, hi, p


def _resamples(users: int, n: int, seed: int) -> Iterable[Floats]:
    """How often each user is drawn in each of n resamples, as blocks (b, U)."""
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // users)
    for start in range(0, n, step):
        rows = min(step, n - start)
        drawn = rng.integers(0, users, (rows, users)) + np.arange(rows)[:, None] * users
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)


def _two_sided(delta: float, error: float, users: int) -> float:
    if delta == 0:
        return 1.0
    tail = math.erfc(abs(delta) / error / math.sqrt(2)) if error > 0 else 0.0
    return max(tail, 2.0 ** (1 - users))


def holm(p: Iterable[float | None]) -> Floats:
    """Holm's step-down adjusted p-values, in the order given; None and NaN stay NaN and do not count as tests."""
    values = np.array([math.nan if x is None else x for x in p], np.float64)
    tested = np.flatnonzero(~np.isnan(values))
    ascending = tested[np.argsort(values[tested], kind="stable")]
    scaled = values[ascending] * np.arange(len(ascending), 0, -1)
    adjusted = np.full_like(values, math.nan)
    adjusted[ascending] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted


def slices(lengths: npt.ArrayLike) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks (U,) by history length in events; each user is in exactly one."""
    lengths = np.asarray(lengths)
    return {
        "<50": lengths < 50,
        "50-199": (lengths >= 50) & (lengths < 200),
        "200-499": (lengths >= 200) & (lengths < 500),
        ">=500": lengths >= 500,
    }


def by_slice(values: Mapping[str, npt.ArrayLike], lengths: npt.ArrayLike) -> dict[str, dict[str, float | None]]:
    """Mean of each per-user array (U,) within each slice, and the slice's `n_users`: the row's `slices`."""
    arrays = {name: np.asarray(per_user) for name, per_user in values.items()}
    return {
        name: {"n_users": int(mask.sum())} | {key: _mean(array[mask]) for key, array in arrays.items()}
        for name, mask in slices(lengths).items()
    }


def _mean(values: npt.NDArray) -> float | None:
    return float(values.mean()) if values.size else None
