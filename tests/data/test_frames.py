"""A frame in memory as a data set: the same rules as for files."""

from __future__ import annotations

import polars as pl
import pyarrow as pa
import pytest

from malloc_bench.data import DataError, get_dataset
from malloc_bench.data.tasks.splits import get_split

FRAME = pl.DataFrame(
    {
        "who": ["b", "a", "a", "a", "b", "b"],
        "what": [7, 7, 8, 9, 8, 9],
        "when": [1_600_000_300, 1_600_000_100, 1_600_000_000, 1_600_000_200, 1_600_000_100, 1_600_000_200],
        "stars": [5, 4, 3, 2, 1, 5],
        "click": [True, False, True, True, False, True],
    }
)
NAMES = {"user": "who", "item": "what", "time": "when", "rating": "stars", "feedback": ["click"]}


class Pandas:
    """As pandas hands its columns out."""

    def __init__(self, frame):
        self.frame = frame

    def __getitem__(self, name):
        return self.frame[name]

    def to_dict(self):
        raise AssertionError("slow, and not needed")


class Arrow:
    """As a newer pandas does it."""

    def __init__(self, frame):
        self.frame, self.iloc = frame, None

    def __getitem__(self, names):
        return Arrow(self.frame.select(names))

    def __arrow_c_stream__(self, requested_schema=None):
        return self.frame.to_arrow().__arrow_c_stream__(requested_schema)


def test_a_frame_is_a_data_set():
    data = get_dataset(FRAME, **NAMES, label={"column": "rating", "at_least": 4})
    assert (data.name, data.n_users, data.n_items, data.n_events) == ("frame", 2, 3, 6)
    assert data.original_user(slice(None)).to_list() == ["a", "b"]
    assert data.item_names is None and data.item_ids.tolist() == [7, 8, 9]
    assert data.items.tolist() == [2, 1, 3, 2, 3, 1]
    assert data.times.tolist() == [1_600_000_000 + t for t in (0, 100, 200, 100, 200, 300)]
    assert data.feedback["rating"].tolist() == [3, 4, 2, 1, 5, 5]
    assert data.feedback["click"].tolist() == [1, 0, 1, 0, 1, 1]
    assert data.labels().tolist() == [False, True, False, False, True, True]
    split = get_split("leave_one_out", data)
    assert len(split.test.users) == 2


@pytest.mark.parametrize(
    "frame",
    [
        FRAME.lazy(), Pandas(FRAME), Arrow(FRAME), FRAME.to_arrow(), FRAME.with_columns(when=pl.from_epoch("when")),
        FRAME.with_columns(when=pl.from_epoch("when").dt.to_string("%Y-%m-%dT%H:%M:%SZ")),
        FRAME.with_columns(who=pl.col("who").cast(pl.Categorical)),
    ],
    ids=["lazy", "pandas", "pandas-arrow", "arrow", "dates", "text-dates", "categories"],
)  # fmt: skip
def test_other_frames_with_the_same_content_are_the_same_data(frame):
    assert get_dataset(frame, **NAMES).hash == get_dataset(FRAME, **NAMES).hash


def test_a_frame_may_have_a_name_and_nothing_but_ids():
    data = get_dataset(FRAME, user="who", item="what", name="shop")
    assert data.name == "shop" and not data.has_time and not data.feedback
    assert data.items.tolist() == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("frame", "keys", "message"),
    [
        (FRAME, {"user": "whom"}, "whom"),
        (FRAME, {"item": "who"}, "named for two things"),
        (FRAME, {"time": "when", "unit": "ms"}, "the unit must be s"),
        (FRAME, {"unit": "parsec"}, "unit"),
        (FRAME, {"name": "a/b"}, "is named by letters"),
        (FRAME, {"label": {"column": "ratin"}}, "label: no feedback is called 'ratin'. Did you mean 'rating'?"),
        (FRAME.head(0), {}, ""),
        (FRAME, {"user": ["who"]}, "told as text, not ['who']"),
        (FRAME, {"name": 5}, "told as text, not 5"),
        (pl.scan_csv("none.csv"), {}, "none.csv"),
        (FRAME.with_columns(when=pl.Series([2**62] * 6).cast(pl.Datetime("ms"))), {}, "not a time between 1970 and"),
        *[
            (
                FRAME.with_columns(pl.Series(column, [object()] * 6, dtype=pl.Object)),
                {},
                f"{column} holds Python objects",
            )
            for column in ("who", "what", "when", "stars", "click")
        ],
        (FRAME.with_columns(pl.lit(7).cast(pl.Int128).alias("what")), {}, "frame: what holds Int128"),
        ([1, 2], {}, "expected a frame of polars or pandas, not list"),
        (None, {}, "not NoneType"),
    ],
)
def test_what_a_frame_has_wrong_is_one_line(frame, keys, message):
    with pytest.raises(DataError) as caught:
        get_dataset(frame, **{**NAMES, **keys})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [OverflowError, pa.ArrowNotImplementedError, IndexError])
def test_a_column_that_pandas_cannot_hand_out_is_named(error):
    class Odd(Arrow):
        def __getitem__(self, names):
            if names == ["what"]:
                raise error("Python int too large")
            return super().__getitem__(names)

    with pytest.raises(DataError, match=r"column 'what' of the frame cannot be read: .*too large"):
        get_dataset(Odd(FRAME), **NAMES)


def test_feedback_may_come_one_by_one_and_dates_as_categories():
    dates = pl.Series(["2020-01-01"] * 6, dtype=pl.Categorical)
    found = get_dataset(FRAME.with_columns(when=dates), **{**NAMES, "feedback": (each for each in ["click"])})
    assert set(found.feedback) == {"rating", "click"} and set(found.times) == {1_577_836_800}


def test_bad_rows_of_a_frame_meet_a_policy():
    frame = FRAME.with_columns(when=pl.Series([None, *FRAME["when"][1:]]))
    with pytest.raises(DataError, match=r"row 1: when is missing .on_bad: {bad_row: drop}"):
        get_dataset(frame, **NAMES)
    assert get_dataset(frame, **NAMES, on_bad={"bad_row": "drop"}).n_events == 5


def test_a_named_data_set_takes_no_columns():
    with pytest.raises(TypeError, match="only a frame"):
        get_dataset("synthetic", user="who")
