"""The files of publishers: one layout each, as they document it. How a layout is read is in `parse.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

VERSION = 7  # part of the prepared cache's key: raise it when a layout's result changes

# order: comparable numbers, but no times
Unit = Literal["s", "ms", "us", "ns", "s.fraction", "minutes", "date", "iso", "order"]


@dataclass(frozen=True)
class Layout:
    """Where a file has the user, the item, the time and the feedback of an event.

    `lines`: delimited text, JSON objects, a user's whole history, or (arrays) one numpy or parquet table.
    Ids are whole numbers unless named in `text`; 007 and 7 are two of them (`ids.py`).
    """

    lines: Literal["table", "json", "history", "npy", "parquet", "arrow", "auto"] = "table"
    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    unit: Unit = "s"
    feedback: Mapping[str, str] = field(default_factory=dict)  # column -> the name it gets
    optional: bool = False  # feedback that the header of the first file has not is not read
    codes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # feedback that is words -> its numbers
    text: tuple[str, ...] = ()  # id columns that are no numbers
    columns: tuple[str, ...] | None = None  # None: the first line names them
    separator: str = ","  # one or two characters, or auto: what gives the first line all columns
    date: str = ""  # strptime's, for unit date
    encoding: str = "utf-8"
    history: str = ""  # a column with the items before `item`, joined by ^; only rows with `label` 1 are read
    label: str = ""
    category: str = ""  # of a file about items, not events: their categories
    many: str = ""  # what stands between several categories
    times_in: bool = False  # the second file has the times of the first's items, line by line

    @property
    def has_time(self) -> bool:
        return self.unit != "order" and (self.time is not None or self.times_in)

    @property
    def ranked(self) -> bool:
        """A column gives the order of events, but no times."""
        return self.unit == "order" and self.time is not None

    @property
    def clocked(self) -> bool:
        """The files themselves say in what order events are, or which are of one time."""
        return self.has_time or self.ranked

    @property
    def per_second(self) -> int:
        """What events are ordered by is finer than the seconds that are kept."""
        return {"ms": 1000, "s.fraction": 10**6, "us": 10**6, "iso": 10**6, "ns": 10**9}.get(self.unit, 1)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


RATING = _same("rating")
RATED = ("user_id", "item_id", "rating", "timestamp")
KUAIRAND = _same(
    "is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view", "play_time_ms",
    "duration_ms", "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab",
)  # fmt: skip

LAYOUTS: dict[str, Layout] = {
    # grouplens.org: u.data, ratings.dat and ratings.csv
    "movielens-udata": Layout(columns=RATED, separator="\t", feedback=RATING),
    "movielens-dat": Layout(columns=RATED, separator="::", feedback=RATING),
    "movielens-csv": Layout(user="userId", item="movieId", feedback=RATING),
    # recbole.io: fields are `name:type`, ids any tokens, times floats
    "recbole-inter": Layout(
        separator="auto", unit="s.fraction", feedback=RATING, optional=True, text=("user_id", "item_id")
    ),
    # McAuley lab: reviews as JSON lines (5-core), and ratings only, where 2018 has the item first
    "amazon-json": Layout(
        "json", "reviewerID", "asin", "unixReviewTime", feedback={"overall": "rating"}, text=("reviewerID", "asin")
    ),
    "amazon-2014-ratings": Layout(columns=RATED, feedback=RATING, text=("user_id", "item_id")),
    "amazon-2018-ratings": Layout(
        columns=("item_id", "user_id", "rating", "timestamp"), feedback=RATING, text=("user_id", "item_id")
    ),
    "amazon-2023-ratings": Layout(item="parent_asin", unit="ms", feedback=RATING, text=("user_id", "parent_asin")),
    "amazon-2023-json": Layout(
        "json", item="parent_asin", unit="ms", feedback=RATING, text=("user_id", "parent_asin")
    ),
    # SASRec, and ICLRec and TiCoSeRec: `user item` or `user item item ...` a line, in time order
    "user-item": Layout(columns=("user_id", "item_id"), separator=" ", time=None),
    "user-items": Layout("history", separator=" ", time=None),
    "user-items-times": Layout("history", separator=" ", times_in=True),
    # kuairand.com, kuairec.com
    "kuairand-log": Layout(item="video_id", time="time_ms", unit="ms", feedback=KUAIRAND),
    "kuairand-likehate": Layout(
        item="video_id", time="time_ms", unit="ms", separator="\t",
        feedback=_same("is_click", "is_follow", "is_comment", "is_forward", "long_view", "play_time_ms", "duration_ms",
                       "comment_stay_time", "is_profile_enter") | {"label": "is_like"},
    ),
    "kuairec-matrix": Layout(
        item="video_id", unit="s.fraction", feedback=_same("play_duration", "video_duration", "watch_ratio")
    ),
    # github.com/reczoo/Datasets: exposures with a click label whose order is known, and DIN's samples
    "reczoo-kuaivideo": Layout(unit="order", feedback=_same("is_click", "is_like", "is_follow")),
    "reczoo-microvideo": Layout(unit="order", feedback=_same("is_click")),
    "reczoo-din": Layout(time=None, history="item_history", label="label"),
    # tianchi.aliyun.com/dataset/649
    "taobao-userbehavior": Layout(
        columns=("user_id", "item_id", "category_id", "behavior", "timestamp"), feedback=_same("behavior"),
        codes={"behavior": {"pv": 1, "fav": 2, "cart": 3, "buy": 4}},
    ),
    # Dingqi Yang's TSMC 2014 check-ins, and the filtered array that STAN publishes: user, place, minute
    "foursquare-tsmc": Layout(
        columns=("user_id", "venue_id", "category_id", "category", "latitude", "longitude", "offset", "utc_time"),
        item="venue_id", time="utc_time", unit="date", date="%a %b %d %H:%M:%S %z %Y", text=("venue_id",),
        separator="\t", encoding="latin-1",
    ),
    "foursquare-npy": Layout("npy", columns=("user_id", "item_id", "minute"), time="minute", unit="minutes"),
    # about items: films' genres, videos' tags
    "movielens-movies-csv": Layout(item="movieId", category="genres", many="|"),
    "movielens-movies-dat": Layout(
        columns=("item_id", "title", "genres"), separator="::", encoding="latin-1", category="genres", many="|"
    ),
    "recbole-item": Layout(separator="auto", category="class", many=" ", text=("item_id",)),
    "kuairand-videos": Layout(item="video_id", category="tag", many=","),
    # our own hand-over format: the order is known, the times are not
    "parquet-ordered": Layout("parquet", time="position", unit="order"),
}  # fmt: skip
