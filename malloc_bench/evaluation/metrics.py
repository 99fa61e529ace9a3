"""Pure functions on ranks and scores: accuracy per user, intervals over users, Holm's correction, slices by length.

A rank is the 0-based place of a target among the catalogue; lower is better. U is the number of users.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CUTOFFS = (5, 10, 50)
_BLOCK = 1 << 19  # bootstrap weights held at once (4 MB)
_KEPT = 1 << 24  # of one number of users, kept for the next comparison (32 MB)


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


def summary(ranks: npt.ArrayLike, users: npt.ArrayLike | None = None) -> dict[str, float | None]:
    """Means over users under the column names of a row; null where there is no user.

    users (N,): whose each target is, by default each another's.
    """
    users = np.arange(np.size(ranks)) if users is None else users
    values = {f"hr@{k}": hit_rate(ranks, k) for k in CUTOFFS} | {f"ndcg@{k}": ndcg(ranks, k) for k in CUTOFFS}
    return {name: _mean(by_user(each, users)) for name, each in (values | {"mrr": mrr(ranks)}).items()}


def by_user(values: npt.ArrayLike, users: npt.ArrayLike) -> Floats:
    """Means (U,) of values (N,) by user, in ascending order of users (N,): who was asked often counts once.

    A NaN, such as the agreement of a list of one, is no value; NaN for who has none.
    """
    _, rows = np.unique(users, return_inverse=True)
    values = np.asarray(values, np.float64)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.bincount(rows, np.where(known, values, 0.0)) / np.bincount(rows, known)


# ---- ranking: X candidates with a score and a label each; users [X] are whole numbers from 0 to U - 1


class Lists(NamedTuple):
    """Candidates ordered by user, best first. Arrays (X,) but size; a tie is a run of one user's equal scores."""

    order: npt.NDArray[np.int64]  # of the candidates as they were given
    users: npt.NDArray[np.int64]
    labels: Floats
    place: npt.NDArray[np.int64]  # in the user's list, from 0
    tie: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]  # of each tie


def lists(scores: npt.ArrayLike, labels: npt.ArrayLike, users: npt.ArrayLike) -> Lists:
    """The users' lists of candidates; raises ValueError for scores that are not finite."""
    scores, users = np.asarray(scores, np.float64), np.asarray(users)
    if not np.isfinite(scores).all():
        raise ValueError("scores are not finite")
    order = np.lexsort((-scores, users))
    users, scores = users[order], scores[order]
    starts = np.diff(users, prepend=-1) != 0
    fresh = starts | (np.diff(scores, prepend=np.nan) != 0)
    first = np.flatnonzero(starts)
    place = np.arange(len(users)) - np.repeat(first, np.diff(np.append(first, len(users))))
    tie = np.cumsum(fresh) - 1
    return Lists(order, users, np.asarray(labels)[order].astype(np.float64), place, tie, np.bincount(tie))


def auc_by_user(found: Lists) -> tuple[Floats, Floats]:
    """(AUC, candidates) of every user (U,): the share of pairs of a liked and another candidate in the right order, a

    tie counting half; NaN where a user has one class only.
    """
    users, labels, place, tie, size = found[1:]
    everything = np.bincount(users).astype(np.float64)
    liked = np.bincount(users, labels)
    start = place[np.cumsum(size) - size]  # place of each tie's first
    worse = everything[users] - 1 - (start + (size - 1) / 2)[tie]
    pairs = liked * (everything - liked)
    right = np.bincount(users, labels * worse) - liked * (liked - 1) / 2
    return np.divide(right, pairs, out=np.full(len(pairs), math.nan), where=pairs > 0), everything


def gauc(found: Lists) -> Floats:
    """A value for each user who has both classes, whose mean is the GAUC: the mean of users' AUC weighted by their

    candidates. Values are linearised (mean + users x influence), so that a bootstrap over users fits the ratio.
    """
    each, weight = auc_by_user(found)
    both = ~np.isnan(each)
    each, share = each[both], weight[both] / max(weight[both].sum(), 1)
    mean = (share * each).sum()
    return mean + len(each) * share * (each - mean)


def auc(found: Lists, users: npt.ArrayLike) -> Floats:
    """A value for each user (U,), whose mean is the AUC of all candidates in one list; empty where they have one class.

    found: `lists` with one user; users: whose each candidate is, as given to `lists`. Values are mean + users x
    influence, the influence by the structural components of DeLong et al. 1988, summed by user (Obuchowski 1997), so
    that a bootstrap over users counts the pairs across users too.
    """
    labels, tie = found.labels, found.tie
    liked, others = labels.sum(), (1 - labels).sum()
    if not liked or not others:
        return np.zeros(0)
    good, bad = np.bincount(tie, labels), np.bincount(tie, 1 - labels)
    worse = (others - np.cumsum(bad) + bad / 2)[tie] / others  # for a liked one: share of the others below it
    better = (np.cumsum(good) - good / 2)[tie] / liked
    mean = (labels * worse).sum() / liked
    influence = labels * (worse - mean) / liked + (1 - labels) * (better - mean) / others
    own = np.bincount(np.asarray(users)[found.order], influence)
    return mean + len(own) * own


def logloss(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float | None:
    """Mean binary cross-entropy of logits (X,); None without any."""
    z, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    return _mean(np.logaddexp(0.0, z) - y * z)


def list_ndcg(found: Lists, k: int) -> Floats:
    """NDCG@k (U,) of each user's list with gains 0 and 1, tied candidates in any order alike; NaN with none liked."""
    discount = np.where(found.place < k, 1.0 / np.log2(found.place + 2.0), 0.0)
    gained = np.bincount(found.users, _expected(found) * discount)
    ideal = np.concatenate(([0.0], np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))))
    liked = np.bincount(found.users, found.labels).astype(int)
    return np.divide(gained, ideal[np.minimum(liked, k)], out=np.full(len(liked), math.nan), where=liked > 0)


def list_recall(found: Lists, k: int) -> Floats:
    """Share (U,) of each user's liked candidates among the first k, tied ones in any order alike; NaN with none."""
    liked = np.bincount(found.users, found.labels)
    hits = np.bincount(found.users, _expected(found) * (found.place < k))
    return np.divide(hits, liked, out=np.full(len(liked), math.nan), where=liked > 0)


def _expected(found: Lists) -> Floats:
    """The mean label of each candidate's tie: what stands at its place on average."""
    return (np.bincount(found.tie, found.labels) / found.size)[found.tie]


# ---- intervals and slices


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
    p = [two_sided(d, se, users) for d, se in zip(delta, resampled.std(axis=0))]
    return Bootstrap(delta, lo, hi, np.array(p))


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, n: int = 2000, seed: int = 0
) -> tuple[float, float, float, float]:
    """(delta, lo, hi, p) of mean(a) - mean(b), both (U,); see `paired_bootstrap_many`."""
    delta, lo, hi, p = (float(column[0]) for column in paired_bootstrap_many(np.asarray(a)[None], b, n, seed))
    return delta, lo, hi, p


def _resamples(users: int, n: int, seed: int) -> Iterable[Floats]:
    """How often each user is drawn in each of n resamples, as blocks (b, U)."""
    blocks = _kept(users, n, seed) if users * n <= _KEPT else _drawn(users, n, seed)
    return (block.astype(np.float64) for block in blocks)


@lru_cache(4)  # a report compares hundreds of cells of the same users, and to draw takes most of the time
def _kept(users: int, n: int, seed: int) -> list[npt.NDArray[np.uint16]]:
    return list(_drawn(users, n, seed))


def _drawn(users: int, n: int, seed: int) -> Iterable[npt.NDArray[np.uint16]]:
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // users)
    for start in range(0, n, step):
        rows = min(step, n - start)
        drawn = rng.integers(0, users, (rows, users)) + np.arange(rows)[:, None] * users
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.uint16)


def two_sided(delta: float, error: float, users: int) -> float:
    """p of a mean difference with this standard error; never below the least that `users` can show."""
    if delta == 0:
        return 1.0
    tail = math.erfc(abs(delta) / error / math.sqrt(2)) if error > 0 else 0.0
    return max(tail, 2.0 ** (1 - users))


def noninferiority(cells: npt.ArrayLike, reference: npt.ArrayLike, kept: float = 0.99, chance: float = 0.0) -> Floats:
    """One-sided p (C,) of each cell (C, U) losing more than 1 - `kept` of what the reference (U,) lies above `chance`.

    Small: mean(cell) - chance > kept x (mean(reference) - chance). The normal tail at that contrast's mean over its
    bootstrap standard error, which for a mean over users is known without drawing: the standard deviation / sqrt(U).
    Paired; the reference's own noise counts, as it sets the margin. Never below 2 ** -U, which is what equal values
    get; 1 where the reference is not above chance: there is nothing to keep. Raises ValueError where shapes disagree
    or there is no user.
    """
    cells, reference = np.asarray(cells, np.float64), np.asarray(reference, np.float64)
    if cells.ndim != 2 or reference.shape != cells.shape[1:] or not reference.size:
        raise ValueError(f"expected cells (C, U) and reference (U,), U > 0; got {cells.shape} and {reference.shape}")
    if reference.mean() <= chance:
        return np.ones(len(cells))
    contrast = (cells - chance) - kept * (reference - chance)
    errors = contrast.std(axis=1) / math.sqrt(reference.size) * (cells != reference).any(axis=1)
    return np.array([max(upper_tail(m, se), 2.0**-reference.size) for m, se in zip(contrast.mean(axis=1), errors)])


def upper_tail(mean: float, error: float) -> float:
    """P(Z >= mean / error) of a standard normal Z; without any error 0 for a mean above 0, else 1."""
    if error <= 0:
        return 0.0 if mean > 0 else 1.0
    return math.erfc(mean / error / math.sqrt(2)) / 2


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


def target_slices(about: Mapping[str, npt.NDArray]) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks (N,) of targets by what is known of each (N,): the `quarter` of the training events that its item belongs

    to, 1: the most popular items, whether it is `tied` with the event before, and the data set (`domain`) it is of.
    """
    found = {f"popularity {q}/4": about["quarter"] == q for q in (1, 2, 3, 4) if "quarter" in about}
    if "tied" in about:
        found |= {"later than the event before": ~about["tied"], "tied with it": about["tied"]}
    return found | {f"of {name}": about["domain"] == name for name in np.unique(about.get("domain", np.zeros(0)))}


def by_slice(
    values: Mapping[str, npt.ArrayLike],
    masks: Mapping[str, npt.NDArray[np.bool_]],
    users: npt.ArrayLike | None = None,
) -> dict[str, dict[str, float | None]]:
    """Mean over users of each array (N,) within each mask (N,), without NaN, and its `n_users`: the row's `slices`.

    users (N,): as in `summary`; one whose history grows past an edge is in two slices.
    """
    arrays = {name: np.asarray(each) for name, each in values.items()}
    found: dict[str, dict[str, float | None]] = {}
    for name, mask in masks.items():
        owners = np.arange(len(mask)) if users is None else np.asarray(users)
        found[name] = {"n_users": len(np.unique(owners[mask]))}
        for key, array in arrays.items():
            some = mask & ~np.isnan(array)
            found[name][key] = _mean(by_user(array[some], owners[some]))
    return found


def _mean(values: npt.NDArray) -> float | None:
    return float(values.mean()) if values.size else None
