"""Rows as a run would write them, without a run."""

import numpy as np
import polars as pl
import pytest

from malloc_bench.results import budget_text, cell_id, frame, write_per_user

FULL_BYTES = 133_000.0
SLICES = ("<50", "50-199", "200-499", ">=500")
BASE = {"suite": "fake", "dataset": "ml-1m", "task": "retrieval", "split": "leave_one_out", "backbone": "sasrec"}

#: family, name, parameters, what is lost at a budget of 1/16, milliseconds of a read over a whole state
METHODS = [
    ("eviction", "random", {}, 0.035, 1.0),
    ("windowing", "recent", {}, 0.018, 1.0),
    ("windowing", "sink_recent", {"sinks": 4}, 0.030, 1.0),
    ("eviction", "knorm", {}, 0.045, 1.0),
    ("eviction", "h2o", {}, 0.015, 1.0),
    ("eviction", "tova", {}, 0.012, 1.0),
    ("eviction", "snapkv", {"window": 16}, 0.010, 1.0),
    ("merging", "merge_adjacent", {}, 0.005, 1.1),
    ("low-rank", "svd", {}, 0.022, 1.6),
    ("merging", "compose", {"chain": ["merge_adjacent", {"kivi": {"bits": 2}}]}, 0.003, 1.5),
]
FIXED = [
    ("quantization", "kivi", {"bits": 8}, 0.0, 0.27, 1.5),
    ("quantization", "kivi", {"bits": 4}, 0.0004, 0.145, 1.55),
    ("quantization", "kivi", {"bits": 2}, 0.002, 0.085, 1.6),
    ("quantization", "int8", {}, 0.0001, 0.26, 1.4),
    ("recompute", "recompute", {}, 0.0, 0.006, 14.0),
]


def fake_row(**values):
    """One ok row with an id; give the columns that matter."""
    row = BASE | {"backbone_params": {"layers": 2}, "compressor_params": {}, "structural": False, "seed": 0}
    row |= {"status": "ok", "n_users": 6040, "created_at": "2026-11-22T12:00:00+00:00"} | values
    row["budget"] = budget_text(row.get("budget"))
    return {
        "cell_id": cell_id({key: row[key] for key in (*BASE, "compressor", "compressor_params", "budget", "seed")})
    } | row


def _measured(family, name, params, budget, ratio, loss, full, ms, rng):
    loss = loss + rng.normal(0, 0.0006) if loss else 0.0
    error = 0.0004 + abs(loss) * 0.12
    overlap = float(np.exp(-22 * max(loss, 0)))
    values = {f"ndcg@{k}": (full - loss) * scale for k, scale in ((5, 0.8), (10, 1.0), (50, 1.5))}
    values |= {f"hr@{k}": (full - loss) * scale for k, scale in ((5, 1.2), (10, 1.8), (50, 3.4))}
    part = {"n_users": 1510, "ndcg@10": full - loss, "hr@10": 1.8 * (full - loss), "overlap@10": overlap}
    values |= {"overlap@10": overlap, "delta_ndcg@10": -loss}
    values |= {"delta_ndcg@10_lo": -loss - error, "delta_ndcg@10_hi": error - loss}
    size = FULL_BYTES * ratio
    return fake_row(
        family=family, compressor=name, compressor_params=params, budget=budget, **values, mrr=0.9 * (full - loss),
        p_value=float(np.exp(-abs(loss) / 0.0008)), bytes_full=FULL_BYTES, bytes_mean=size, bytes_p50=size * 0.7,
        bytes_p99=size * 2, bytes_fixed=0, ratio=ratio, share_at_floor=0.0, read_ms_p50=ms,
        compress_ms_p50=0.4 if budget else None, read_flops=4e6 * ratio + 1e5,
        append_ms_p50=0.05 if budget else None, bytes_by_part=_parts(size),
        slices={name: {**part, "overlap@10": overlap**at} for at, name in enumerate(SLICES, 1)},
    )  # fmt: skip


def _parts(size):
    """Add up to size."""
    rest = {"keys": 0.4, "keys scales": 0.1, "values": 0.35, "values scales": 0.05, "positions": 0.1}
    return {name: share * size for name, share in rest.items()} if size else {"length": 4.0}


def suite_rows(backbones=(("sasrec", 0.145), ("hstu", 0.159)), budgets=(0.5, 0.25, 0.125, 0.0625), seed=0):
    """Two backbones, the methods above at four budgets, floors and the full state."""
    rng, rows = np.random.default_rng(seed), []
    for backbone, full in backbones:
        cells = [("baseline", "full", {}, None, 1.0, 0.0, 0.31), ("baseline", "none", {}, None, 0.0, 0.07, 0.02)]
        for family, name, params, loss, ms in METHODS:
            scale = [(budget, budget * 0.98, loss * (0.0625 / budget) ** 0.6) for budget in budgets]
            cells += [(family, name, params, b, r, at, 0.02 + 0.3 * ms * r) for b, r, at in scale]
        cells += [
            (family, name, params, None, ratio, loss, 0.3 * ms) for family, name, params, loss, ratio, ms in FIXED
        ]
        for family, name, params, budget, ratio, loss, ms in cells:
            rows.append(_measured(family, name, params, budget, ratio, loss, full, ms, rng) | {"backbone": backbone})
    return rows


@pytest.fixture
def row():
    return fake_row


@pytest.fixture
def board_of():
    """Rows -> the results frame that `load_results` would give."""
    return lambda *rows: frame([one for item in rows for one in (item if isinstance(item, list) else [item])])


@pytest.fixture
def with_users(tmp_path):
    """A row with its file of values by user below `tmp_path`: overlaps and ranks (U,), one request a user."""

    def put(row, overlap, rank=0, length=10):
        path = f"per_user/{row['cell_id']}.parquet"
        users = np.arange(len(overlap))
        columns = {"user": users, "length": np.broadcast_to(length, users.shape), "overlap": np.asarray(overlap, "f4")}
        columns["rank"] = np.broadcast_to(np.asarray(rank, "i4"), users.shape)
        known = write_per_user(tmp_path / path, columns)
        mean = float(np.mean(columns["overlap"], dtype=np.float64))
        return row | {"per_user": path, "hashes": {"files": {path: known}}, "overlap@10": mean}

    return put


@pytest.fixture(scope="session")
def suite() -> pl.DataFrame:
    return frame(suite_rows())
