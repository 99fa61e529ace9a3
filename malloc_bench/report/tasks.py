"""LSRM's tasks side by side: rare targets, damaged histories, trajectories, transfer. Knows results only."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import polars as pl

from malloc_bench.report.board import GROUP, aggregate, newest
from malloc_bench.report.evidence import LABELS
from malloc_bench.report.render import Block, Table, number
from malloc_bench.results import COLUMNS, budget_labels, complete

METHOD = ("family", "method", "compressor", "budget")
QUARTERS = tuple(f"popularity {q}/4" for q in (1, 2, 3, 4))
TIES = ("later than the event before", "tied with it")
OF = "of "  # a slice of joined data: targets of one of them
VALUES = ("ndcg@10", "hr@10", "overlap@10")
WAYS = ("true", "own")  # what a trajectory is fed
ALONE, MIXED = "alone", "with others"
_ORDER, _SORT = ("", "history", "delete", "replace"), ("order", "size")
_TASK = re.compile(r"retrieval(?:\((history|delete|replace)=([\d.]+)\))?")


def unfolded(frame: pl.DataFrame, column: str, values: Sequence[str], where: Callable[[str], bool]) -> pl.DataFrame:
    """The board of the rows that have some of a nested column's keys, one row a key, in their order: `key`, and each of

    the values in place of the row's own, averaged as metrics are.
    """
    rows = newest(complete(frame))
    found = [json.loads(text or "{}") for text in rows[column]]
    parts = []
    keys = dict.fromkeys(key for each in found for key in each if where(key))
    for key in sorted(keys, key=lambda key: int(key) if key.isdecimal() else 0):  # JSON has 10 before 2
        own = [each.get(key) or {} for each in found]
        numbers = {name: pl.Series(name, [each.get(name) for each in own], pl.Float64) for name in values}
        users = pl.Series("n_users", [each.get("n_users") or 0 for each in own], pl.Int64)
        parts.append(_board(rows.with_columns(users, **numbers).filter(pl.col("n_users") > 0), values, key))
    nothing = rows.clear().with_columns(pl.lit(None, pl.Float64).alias(name) for name in values)
    return pl.concat(parts) if parts else _board(nothing, values, "")


def _board(rows: pl.DataFrame, values: Sequence[str], key: str | None = None) -> pl.DataFrame:
    """As `aggregate`, but one row for each budget: what is one state under some is several under others."""
    board = aggregate(rows, also=[name for name in values if name not in COLUMNS])
    each = pl.col("budget").map_elements(budget_labels, pl.List(pl.String))
    return board.with_columns(each).explode("budget").with_columns(pl.lit(key).alias("key"))


def sliced(frame: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Accuracy and what is kept in some of the `slices`: by how popular the target is, by quarters of the training

    events, or by whether it is of the time of the event before, so in no known order.
    """
    found = unfolded(frame, "slices", VALUES, keys.__contains__)
    return found.select(*GROUP, *METHOD, "key", "n_users", *VALUES)


popularity: Callable[[pl.DataFrame], pl.DataFrame] = partial(sliced, keys=QUARTERS)
ties: Callable[[pl.DataFrame], pl.DataFrame] = partial(sliced, keys=TIES)


def robustness(frame: pl.DataFrame) -> pl.DataFrame:
    """Of tasks that let less be known of users, or something else: accuracy, its change (`kept`, a share of the same

    method's with all known), and overlap with the full state's that knows as little. `key`: what was done.
    """
    board = _board(frame, ())
    asked = [_TASK.fullmatch(task) for task in board["task"]]
    keys = [None if m is None else (m[1] or "", float(m[2] or 0)) for m in asked]
    names = [None if key is None else _said(*key) for key in keys]
    sizes = [
        None if key is None else (_ORDER.index(key[0]), -key[1] if key[0] == "history" else key[1]) for key in keys
    ]
    board = board.with_columns(
        pl.Series("key", names, pl.String),
        *(pl.Series(name, [None if s is None else s[i] for s in sizes], pl.Float64) for i, name in enumerate(_SORT)),
    ).filter(pl.col("key").is_not_null())
    same = [name for name in (*GROUP, *METHOD) if name != "task"]
    plain = board.filter(pl.col("key") == "all").select(*same, pl.col("ndcg@10").alias("plain"))
    board = board.join(plain, same, "left", nulls_equal=True, maintain_order="left")
    many = pl.col("key").n_unique().over([name for name in GROUP if name != "task"]) > 1
    board = board.filter(many).sort(*_SORT, maintain_order=True)
    kept = (pl.col("ndcg@10") / pl.col("plain") - 1).alias("kept")
    return board.select(*GROUP, *METHOD, "key", "n_users", "ndcg@10", kept, "overlap@10", "bytes_mean")


def _said(what: str, size: float) -> str:
    if what == "history":
        return f"newest {size:.0f}"
    return f"{100 * size:g} % {what}d" if what else "all"


def trajectory(frame: pl.DataFrame) -> pl.DataFrame:
    """Accuracy at each step (`key`) of the users who have as many items left, told the truth and fed the model's own,

    and overlap with the full state's list that was fed alike.
    """
    values = [f"{way}_{name}@10" for name in ("hr", "ndcg", "overlap") for way in WAYS]
    return unfolded(frame, "steps", values, str.isdecimal).select(*GROUP, *METHOD, "key", "n_users", *values)


def transfer(frame: pl.DataFrame) -> pl.DataFrame:
    """Of each data set that was trained alone and joined to others: accuracy on its targets, among its own items, both

    ways (`key`), and overlap with the full state of the same weights. `dataset` is the targets'.
    """
    mixed = unfolded(frame, "slices", VALUES, lambda key: key.startswith(OF))
    mixed = mixed.with_columns(pl.col("key").str.strip_prefix(OF).alias("dataset"), pl.lit(MIXED).alias("key"))
    alone = _board(frame, (), ALONE).filter(pl.col("dataset").is_in(mixed["dataset"].unique().to_list()))
    shown = [*GROUP, *METHOD, "key", "n_users", *VALUES]
    whole = pl.concat([alone.select(shown), mixed.select(shown)])
    return whole.filter((pl.col("key") == MIXED).any().over(GROUP))


def wide(
    data: pl.DataFrame, value: str, group: Sequence[str] = GROUP
) -> Iterator[tuple[tuple[str, ...], dict[str, int], pl.DataFrame]]:
    """(group, users of each `key`, one row a method and budget with a column a `key`) of each that has the value."""
    for key, rows in data.filter(pl.col(value).is_not_null()).group_by(*group, maintain_order=True):
        users = dict(rows.group_by("key", maintain_order=True).agg(pl.col("n_users").max()).iter_rows())
        table = rows.pivot("key", index=METHOD, values=value, aggregate_function="first", maintain_order=True)
        yield tuple(map(str, key)), users, table


def _head(key: str, users: dict[str, int]) -> str:
    """With how many users it has, where they are not the same throughout."""
    return key if len(set(users.values())) < 2 else f"{key} ({users[key]:,} users)"


def _blocks(
    shown: Sequence[tuple[str, str, str, float]], group: Sequence[str], data: pl.DataFrame, notes: Sequence[str] = ()
) -> Iterator[Block]:
    """For each of (column, what it is, format, scale) a table a group."""
    for value, said, spec, scale in shown:
        for key, users, rows in wide(data, value, group):
            columns = [number(k, _head(k, users), spec, scale=scale) for k in rows.columns if k not in METHOD]
            yield Block(f"{' · '.join(key)}: {said}", rows, (*LABELS, *columns), notes=notes)


def _table(
    make: Callable[[pl.DataFrame], pl.DataFrame],
    *shown: tuple[str, str, str, float],
    group: Sequence[str] = GROUP,
    notes: Sequence[str] = (),
) -> Table:
    return Table(make, blocks=partial(_blocks, shown, group, notes=notes))


KNOWING = tuple(name for name in GROUP if name != "task")
_KEPT = ("overlap@10", "overlap@10 with the full state", ".3f", 1.0)
_SLICED = (("ndcg@10", "NDCG@10", ".4f", 1.0), ("hr@10", "HR@10", ".4f", 1.0), _KEPT)
TABLES = {
    "popularity": _table(
        popularity,
        *_SLICED,
        notes=["Targets whose items have the first, second, third and last quarter of the training events, the most "
               "popular items first."],
    ),
    "ties": _table(
        ties,
        *_SLICED,
        notes=["Which of two events of one time came first nobody knows: of a target that ties with the event before, "
               "either could have been asked for. Published figures often keep the order of a file there."],
    ),
    "robustness": _table(
        robustness,
        ("ndcg@10", "NDCG@10", ".4f", 1.0),
        ("kept", "NDCG@10 against all known (%)", "+.1f", 100.0),
        ("overlap@10", "overlap@10 with the full state that knows as little", ".3f", 1.0),
        group=KNOWING,
    ),
    "trajectory": _table(
        trajectory,
        ("true_hr@10", "HR@10 of the next items, told the truth", ".4f", 1.0),
        ("own_hr@10", "HR@10 of the next items, fed what the model ranks first", ".4f", 1.0),
        ("true_overlap@10", "overlap@10 with the full state, told the truth", ".3f", 1.0),
        ("own_overlap@10", "overlap@10 with the full state, each fed its own", ".3f", 1.0),
    ),
    "transfer": _table(
        transfer,
        ("ndcg@10", "NDCG@10 by how the backbone was trained", ".4f", 1.0),
        ("hr@10", "HR@10", ".4f", 1.0),
        _KEPT,
    ),
}  # fmt: skip
