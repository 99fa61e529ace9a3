"""The columns of a run's page: those of the leaderboard, fidelity first, and all else that was measured of a row."""

from __future__ import annotations

from typing import NamedTuple

from malloc_bench.report.leaderboard import COLUMNS_SHOWN
from malloc_bench.report.render import Column, number, significant
from malloc_bench.results import STEPS


class Shown(NamedTuple):
    """A column and the field of a row of `aggregate` that it is sorted by; part: where it stands, table or a detail."""

    column: Column
    field: str
    part: str = "table"


_BY_HEADER = {column.header: column for column in COLUMNS_SHOWN}

#: header of the leaderboard -> field, in the page's order
_TABLE = {
    "compressor": "compressor",
    "budget": "size",
    "fidelity": "fidelity",
    "overlap@10": "overlap@10",
    "agreement": "agreement",
    "ΔNDCG@10 [95 % interval]": "delta_ndcg@10",
    "ΔGAUC [95 % interval]": "delta_gauc",
    "lossless": "lossless",
    "state (KB/user)": "bytes_mean",
    "× smaller": "smaller_x",
    "read (× full)": "read_ratio",
    "read (ms, p50)": "read_ms_p50",
    "family": "family",
    "NDCG@10": "ndcg@10",
    "HR@10": "hr@10",
    "GAUC": "gauc",
    "AUC": "auc",
    "LogLoss": "logloss",
    "p (Holm)": "p_holm",
    "HR@10 of its ceiling (%)": "of_full_ceiling",
    "above a constant": "above_constant",
    "timing": "timing",
    "compress (ms, p50)": "compress_ms_p50",
    "read (MFLOPs)": "read_flops",
    "at floor (% users)": "share_at_floor",
    "budget of": "budget_unit",
    "seeds ok": "seeds",
}


def _interval() -> Column:
    def text(row):
        low, high = row["read_ratio_lo"], row["read_ratio_hi"]
        return "" if low is None or high is None else f"{low:.2f} to {high:.2f}"

    return Column("read (× full), interval", text)


_DETAILS: dict[str, tuple[tuple[Column, str], ...]] = {
    "accuracy": (
        *((number(f"hr@{k}", f"HR@{k}", ".4f"), f"hr@{k}") for k in (5, 50)),
        *((number(f"ndcg@{k}", f"NDCG@{k}", ".4f"), f"ndcg@{k}") for k in (5, 50)),
        *((number(f"recall@{k}", f"recall@{k}", ".4f"), f"recall@{k}") for k in (5, 10, 50)),
        (number("mrr", "MRR", ".4f"), "mrr"),
        (number("logit_error", "logit error", ".4f"), "logit_error"),
        (number("n_users", "users", ",.0f"), "n_users"),
        (number("n_targets", "targets", ",.0f"), "n_targets"),
    ),
    "bytes": (
        (significant("bytes_full", "full state (KB/user)", scale=1e-3), "bytes_full"),
        (significant("bytes_p50", "state, median user (KB)", scale=1e-3), "bytes_p50"),
        (significant("bytes_p99", "state, 99th percentile (KB)", scale=1e-3), "bytes_p99"),
        (significant("bytes_fixed", "shared by all users (KB)", scale=1e-3), "bytes_fixed"),
        (number("smaller_f16_x", "× smaller than float16", ".1f"), "smaller_f16_x"),
    ),
    "costs": (
        *((significant(f"{s}_ms_p{p}", f"{s} p{p} (ms)"), f"{s}_ms_p{p}") for s in STEPS for p in (50, 95, 99)),
        (_interval(), "read_ratio_lo"),
        *((significant(f"{s}_flops", f"{s} (MFLOPs)", scale=1e-6), f"{s}_flops") for s in STEPS),
        (significant("peak_bytes", "peak memory (MB)", scale=1e-6), "peak_bytes"),
        (number("measured_history", "measured at (events)", ",.0f"), "measured_history"),
        (significant("train_seconds", "training of the backbone (s)"), "train_seconds"),
        (significant("fit_seconds", "fit (s, once)"), "fit_seconds"),
    ),
}

COLUMNS = (
    *(Shown(_BY_HEADER[header], field) for header, field in _TABLE.items()),
    *(Shown(*pair, part) for part, pairs in _DETAILS.items() for pair in pairs),
)
