"""From per-user values to the row of a cell."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.worlds.ceilings import Ceilings
from malloc_bench.evaluation import metrics
from malloc_bench.evaluation.evaluate import REFERENCE, Evaluation
from malloc_bench.evaluation.requests import Values
from malloc_bench.results import Row, canonical_json, write_row
from malloc_bench.suite.cells import Cell

if TYPE_CHECKING:
    import polars as pl


def about(cell: Cell, environment: Mapping[str, Any]) -> Row:
    """What a row says of its cell, and of the machine and time that it is written on and at."""
    return {
        "suite": cell.suite,
        "dataset": cell.dataset,
        "task": cell.task.label,
        "split": cell.split_text,
        "backbone": cell.backbone.name,
        "backbone_params": cell.backbone.params,
        "family": cell.compressor.family,
        "compressor": cell.compressor.name,
        "compressor_params": cell.compressor.params,
        "tuned": cell.tuned,
        "structural": cell.compressor.structural is not None,
        "budget": cell.budget_text,
        "budget_unit": _unit(cell),
        "seed": cell.seed,
        "amp": cell.training["amp"],
        "git_commit": environment.get("git_commit"),
        "created_at": _now(),
        "cell": cell.payload(),
        "versions": {name: environment.get(name) for name in ("malloc_bench", "python", "torch", "numpy")},
        "hardware": {name: environment.get(name) for name in ("cpu", "cores", "memory_bytes", "gpu")},
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def ask_again(folder: Path, rows: Sequence[Row], asked: Collection[str]) -> None:
    """Date anew, of the rows of a folder, those asked for (ids) of which another version is as new or newer.

    Tables show the newest of a name: without this they would show an edit of a method that was taken back.
    """

    from malloc_bench.report.board import GROUP, METHOD

    def name(row: Row) -> str:
        return canonical_json([row[key] for key in (*GROUP, "backbone_params", *METHOD, "seed")])

    last: dict[str, str] = {}
    for row in rows:
        if row["cell_id"] not in asked:
            last[name(row)] = max(row["created_at"] or "", last.get(name(row), ""))
    for row in rows:
        if row["cell_id"] in asked and last.get(name(row), "") >= (row["created_at"] or "~"):
            write_row(folder, {**{key: value for key, value in row.items() if key != "digest"}, "created_at": _now()})


def _unit(cell: Cell) -> str | None:
    """What its budget counts; None without one, and where the method cannot tell."""
    try:
        unit = None if cell.budget is None else cell.compressor.build().budget_unit(cell.budget)
    except (Exception, SystemExit):  # which is no reason to lose its row
        return None
    return unit if isinstance(unit, str) else None


def accuracy(evaluation: Evaluation, ids: list[str]) -> dict[str, dict[str, Any]]:
    """Accuracy, fidelity and bytes of each job in `ids` that has values: row columns by job id.

    Differences are paired over users, all jobs against the full state with the same resamples; a user with several
    targets counts once, by their mean.
    """
    ids = [each for each in ids if each in evaluation.values]
    if not ids:
        return {}
    found = (_retrieval if evaluation.labels is None else _ranking)(evaluation, ids)
    shared = {
        "n_users": len(np.unique(evaluation.users)),
        "n_targets": len(evaluation.users),
        "state_between": "rebuilt",  # for each target or request from all events before it
    }
    rows = {}
    for each in ids:
        values = evaluation.values[each]
        rows[each] = {**shared, **found[each], **_sizes(each, evaluation), "values_digest": digest(values)}
    return rows


def _retrieval(evaluation: Evaluation, ids: list[str]) -> dict[str, dict[str, Any]]:
    users, ranks = evaluation.users, {each: evaluation.values[each]["rank"] for each in (REFERENCE, *ids)}
    gains = {each: metrics.ndcg(ranks[each], 10) for each in ranks}
    means = {each: metrics.by_user(gains[each], users) for each in ranks}
    deltas, kept = _differences("ndcg@10", means, ids), _noninferior(means, ids)
    masks = metrics.slices(evaluation.length) | metrics.target_slices(evaluation.about)
    rows = {}
    for each, delta in zip(ids, deltas):
        p = delta.pop("p_ndcg@10")
        shares = evaluation.values[each]["overlap"]
        slices = {"ndcg@10": gains[each], "hr@10": metrics.hit_rate(ranks[each], 10), "overlap@10": shares}
        rows[each] = {
            **metrics.summary(ranks[each], users),
            **_loss(evaluation, each),
            "overlap@10": _mean(metrics.by_user(shares, users)),
            **delta,
            "p_value": None if np.array_equal(ranks[each], ranks[REFERENCE]) else p,  # nothing to test
            "p_noninferior": kept.get(each),
            "slices": metrics.by_slice(slices, masks, users),
            **_steps(evaluation, each),
        }
    return rows


def _steps(evaluation: Evaluation, each: str) -> dict[str, dict[str, dict[str, float | None]]]:
    """Of a trajectory, step by step from 1: who has so many items left, and accuracy and overlap of both ways on."""
    values = evaluation.values[each]
    if "true_ranks" not in values:
        return {}
    found = {}
    for step in range(values["true_ranks"].shape[1]):
        some = values["true_ranks"][:, step] >= 0
        own: dict[str, np.ndarray] = {}
        for way in ("true", "own"):
            ranks = values[f"{way}_ranks"][some, step]
            own |= {f"{way}_hr@10": metrics.hit_rate(ranks, 10), f"{way}_ndcg@10": metrics.ndcg(ranks, 10)}
            own[f"{way}_overlap@10"] = values[f"{way}_overlap"][some, step]
        everyone = {"all": np.ones(some.sum(), dtype=bool)}
        found[str(step + 1)] = metrics.by_slice(own, everyone, evaluation.users[some])["all"]
    return {"steps": found}


def _loss(evaluation: Evaluation, each: str) -> dict[str, float | None]:
    values = evaluation.values[each]
    return {"loss": _mean(metrics.by_user(values["loss"], evaluation.users))} if "loss" in values else {}


def _ranking(evaluation: Evaluation, ids: list[str]) -> dict[str, dict[str, Any]]:
    assert evaluation.items is not None and evaluation.labels is not None
    real = evaluation.items > 0
    labels = evaluation.labels[real]
    _, user = np.unique(evaluation.users, return_inverse=True)
    users = np.broadcast_to(user[:, None], real.shape)[real]
    scores = {each: evaluation.values[each]["logits"][real] for each in (REFERENCE, *ids)}
    found = {each: metrics.lists(scores[each], labels, users) for each in scores}
    together = {each: metrics.lists(scores[each], labels, np.zeros_like(users)) for each in scores}
    auc = {each: metrics.auc(together[each], users) for each in scores}
    gauc = {each: metrics.gauc(found[each]) for each in scores}
    deltas = zip(_differences("auc", auc, ids), _differences("gauc", gauc, ids))
    kept = _noninferior(gauc, ids, chance=0.5)
    rows = {}
    for each, (across, within) in zip(ids, deltas):
        same = np.array_equal(scores[each], scores[REFERENCE])
        p = within.pop("p_gauc", None)
        own = metrics.auc_by_user(found[each])[0]
        values, lengths = evaluation.values[each], evaluation.length
        rows[each] = {
            "auc": _mean(auc[each]),
            "gauc": _mean(gauc[each]),
            "users_one_class": int(np.isnan(own).sum()),
            "logloss": metrics.logloss(scores[each], labels),
            **{f"ndcg@{k}": _mean(metrics.list_ndcg(found[each], k)) for k in metrics.CUTOFFS},
            **{f"recall@{k}": _mean(metrics.list_recall(found[each], k)) for k in metrics.CUTOFFS},
            **{name: _mean(metrics.by_user(values[name], evaluation.users)) for name in ("agreement", "logit_error")},
            **across,
            "p_auc": None if same else across.get("p_auc"),
            **within,
            "p_value": None if same else p,
            "p_noninferior": kept.get(each),
            "slices": metrics.by_slice(
                {name: values[name] for name in ("agreement", "logit_error")},
                metrics.slices(lengths),
                evaluation.users,
            ),
        }
    return rows


def _differences(name: str, values: Mapping[str, np.ndarray], ids: list[str]) -> list[dict[str, float]]:
    """delta, its interval and p of each job against the full state, from values by user; empty where there are none."""
    if not len(values[REFERENCE]):
        return [{} for _ in ids]
    boot = metrics.paired_bootstrap_many(np.stack([values[each] for each in ids]), values[REFERENCE])
    columns = (f"delta_{name}", f"delta_{name}_lo", f"delta_{name}_hi", f"p_{name}")
    return [dict(zip(columns, map(float, one))) for one in zip(*boot)]


def _noninferior(values: Mapping[str, np.ndarray], ids: list[str], chance: float = 0.0) -> dict[str, float]:
    """One-sided p by job id: that it loses 1 % or more of what the full state gains; none where nobody was judged."""
    if not len(values[REFERENCE]):
        return {}
    p = metrics.noninferiority(np.stack([values[each] for each in ids]), values[REFERENCE], chance=chance)
    return dict(zip(ids, map(float, p)))


def digest(values: Values) -> str:
    """sha256 of all per-user values of a job: equal for methods whose states are equal, whatever their budgets."""
    found = hashlib.sha256()
    for name in sorted(values.keys() - {"at_floor"}):  # of the budget, not of the state
        found.update(f"{name} {values[name].dtype} {values[name].shape} ".encode() + values[name].tobytes())
    return found.hexdigest()


def ceilings(known: Ceilings, evaluation: Evaluation, ids: list[str]) -> dict[str, dict[str, Any]]:
    """The best possible on the evaluation's targets, row columns by job id: with no event, with the whole history, and

    with the newest events that, uncompressed, fit into the bytes the job uses of each user. `known` must have been made
    from the evaluation's targets in their order.
    """
    users = evaluation.users[known.rows]
    same = _ceiling("none", known.floor(), users) | _ceiling("full", known.full(), users)
    length, full = evaluation.length[known.rows], evaluation.bytes_full[known.rows]
    windows: dict[bytes, dict[str, float | None]] = {}  # methods that cut to the same size share theirs
    rows = {}
    for each in (each for each in ids if each in evaluation.values):
        size = evaluation.values[each]["bytes"][known.rows]
        count = 1 + size.clip(max=full) * length // full.clip(1)  # the newest event is the token that reads
        if count.tobytes() not in windows:
            windows[count.tobytes()] = _ceiling("window", known.window(count), users)
        rows[each] = same | windows[count.tobytes()]
    return rows


def _ceiling(name: str, values: Values, users: np.ndarray) -> dict[str, float | None]:
    return {f"ceiling_{name}_{metric}": _mean(metrics.by_user(each, users)) for metric, each in values.items()}


def per_user(evaluation: Evaluation, each: str, user_ids: np.ndarray | pl.Series) -> Mapping[str, Any]:
    """Columns of a job's per-user file, a row for each target or request; `user` is the id in the source.

    In retrieval also what is known of the target; in ranking the candidates as the data set numbers them,
    sampled ones too, with labels and logits.
    """
    shown = {"items": evaluation.items, "labels": evaluation.labels, **evaluation.about}
    return {
        "user": user_ids[evaluation.users],
        "length": evaluation.length,
        "bytes_full": evaluation.bytes_full,
        **{name: array for name, array in shown.items() if array is not None},
        **evaluation.values[each],
    }


def _sizes(job: str, evaluation: Evaluation) -> dict[str, Any]:
    """Bytes of each user's mean state, over the users who have a history to keep."""
    some = evaluation.length > 0
    if not some.any():
        return {}

    def by_user(values: np.ndarray) -> np.ndarray:
        return metrics.by_user(values[some].astype(np.float64), evaluation.users[some])

    values = evaluation.values[job]
    size, full, floor = map(by_user, (values["bytes"], evaluation.bytes_full, values["at_floor"]))
    parts = {name: _mean(by_user(each)) for name, each in evaluation.parts.get(job, {}).items()}
    return {
        "bytes_full": _mean(full),
        "bytes_mean": _mean(size),
        "bytes_p50": float(np.percentile(size, 50)),
        "bytes_p99": float(np.percentile(size, 99)),
        "bytes_fixed": 0.0,
        "bytes_by_part": {name: mean for name, mean in parts.items() if mean} or None,
        "ratio": float(size.sum() / full.sum()),
        "share_at_floor": _mean(floor),
    }


def unasked(cell: Cell, split: Split | Impressions) -> str | None:
    """Why a cut asks nobody what the cell is to be judged by; None: it asks someone."""
    if len(split.valid if cell.evaluate == "validation" else split.test):
        return None
    if cell.evaluate == "validation":
        return f"with the split {cell.split} nothing validates"
    data, of = split.dataset, "events" if isinstance(split, Split) else "liked events"
    longest = f"the longest of {data.n_users:,} histories has {int(np.diff(data.offsets).max(initial=0)):,} {of}"
    return f"with the split {cell.split} nobody is tested: {longest}"


def _mean(values: np.ndarray) -> float | None:
    """Without NaN: who has no value is not counted."""
    some = values[~np.isnan(values)]
    return float(some.mean()) if len(some) else None
