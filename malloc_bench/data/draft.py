"""A first card of a log that nobody has described yet: which column is what, guessed from names and values."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from malloc_bench.data.errors import DataError
from malloc_bench.data.look import ISO, Look, is_number, look
from malloc_bench.data.sources.cards import card_files, load_card

#: what columns are called by, best first: letters and digits only
WORDS = {
    "user": ("userid", "user", "uid", "reviewerid", "customerid", "customer", "memberid", "member", "visitorid",
             "visitor", "accountid", "personid", "clientid", "client", "author", "username", "sessionid", "session"),
    "item": ("itemid", "item", "iid", "parentasin", "asin", "productid", "product", "movieid", "movie", "videoid",
             "video", "articleid", "article", "songid", "song", "trackid", "track", "bookid", "isbn", "businessid",
             "venueid", "newsid", "contentid", "goodsid", "sku", "poiid", "adid", "appid", "title"),
    "time": ("timestamp", "unixreviewtime", "time", "datetime", "timems", "eventtime", "createdat", "date", "ts",
             "utctime", "when"),
    "rating": ("rating", "stars", "score", "overall", "grade", "rate"),
}  # fmt: skip
VAGUE = {"title", "author", "session", "sessionid", "client", "rate", "when"}  # may well be something else
DID = re.compile(r"^is_|click|like|view|watch|play|purchas|bought|buy|cart|dwell|duration|share|follow", re.I)
NAMES_ONE = re.compile(r"(id|key|code|hash|number|no)$", re.I)  # a column so called is of ids, whatever its numbers
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
EPOCHS = 157_766_400, 4_102_444_800  # seconds of 1975 and 2100: outside of it a number is no time
_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def draft(path: Path, out: Path | None = None) -> tuple[Path, list[str]]:
    """Write a first card of the log `path`, beside it or as `out`; where it is, and what could not be told.

    Raises DataError where nothing can be made of the file, or the card is there already.
    """
    seen = look(path)
    out = path.with_name(f"{_stem(path)}.yaml") if out is None else out
    if out.exists():
        raise DataError(f"{out} is there already; name another with --out")
    try:
        text = _card(path.resolve(), seen, out.resolve().parent)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    try:
        load_card(out)
    except DataError as error:
        out.unlink()
        raise DataError(f"no card can be made of {path}: {str(error).removeprefix(f'{out}: ')}") from None
    return out, seen.doubts


def _stem(path: Path) -> str:
    stem = re.sub(r"[^\w.+-]+", "-", path.name.partition(".")[0]).strip("-_") or "log"
    return f"my-{stem}" if stem in card_files() else stem


def _card(path: Path, seen: Look, folder: Path) -> str:
    roles, unit = roles_of(seen)
    local = path.relative_to(folder) if path.is_relative_to(folder) else path
    lines = [
        f"# a first card of {_comment(path.name)}, from a look at its first {seen.rows:,} rows",
        *(f"# to be looked at: {_comment(doubt)}" for doubt in seen.doubts),
        "format: table",
        f"sources: [{{local: {_text(local.as_posix())}, member: {_text(seen.member)}}}]"
        if seen.member
        else f"local: {_text(local.as_posix())}",
        "table:",
    ]
    lines += [f"  {role}: {_text(roles[role])}" for role in ("user", "item", "time") if role in roles]
    if unit:
        lines.append(f"  unit: {unit}{_span(seen.columns[roles['time']], unit)}")
    if "rating" in roles:
        lines.append(f"  rating: {_text(roles['rating'])}")
    done = _feedback(seen, roles)
    if done:
        lines.append(f"  feedback: [{', '.join(map(_text, done))}]")
    if seen.kind == "csv":
        lines.append(f"  separator: {json.dumps(seen.separator)}")
        if not seen.header:
            lines.append(f"  columns: [{', '.join(map(_text, seen.columns))}]")
    if seen.encoding != "utf-8":
        lines.append(f"  encoding: {seen.encoding}")
    used = {*roles.values(), *done}
    if left := [_comment(name) for name in (*seen.columns, *seen.unclear) if name and name not in used]:
        lines.append(f"# not read: {', '.join(left[:30])}")
    return "\n".join([*lines, *_label(seen, roles, done), ""])


def roles_of(seen: Look) -> tuple[dict[str, str], str | None]:
    """user, item, time and rating -> a column, as far as can be told, and the unit of time; doubts are added to `seen`.

    Raises DataError where no two columns can be users and items, or one that is needed has its name twice.
    """
    roles, loose = _named([*seen.columns, *seen.unclear])
    for role, name in roles.items():
        if at := seen.unclear.get(name):
            raise DataError(f"row 1: '{name}', the {role}, names {_places(at)}: each needs a name of its own")
    if "time" in roles and _time(seen.columns[roles["time"]])[0] is None:
        seen.doubts.append(f"{roles.pop('time')} is called a time but holds none that is known here")
    if "time" not in roles:
        free = [name for name in seen.columns if name not in roles.values()]
        units = {name: _time(seen.columns[name])[0] for name in free}
        # ids grow to the size of seconds too
        times = [
            name for name, unit in units.items() if unit == "iso" or (unit in UNITS and not NAMES_ONE.search(name))
        ]
        if times:
            roles["time"] = times[0]
            seen.doubts.append(f"which column is the time is a guess: {times[0]}")
    if "time" in roles and (odd := _time(seen.columns[roles["time"]])[1]):
        name, values = roles["time"], seen.columns[roles["time"]]
        where = f"row {odd[0] + 1 + seen.header}: {name} is {values[odd[0]]!r}"
        seen.doubts.append(f"{where}, which is no time: mend the file, or say on_bad: {{bad_row: drop}}")
        seen.columns[name] = [value for i, value in enumerate(values) if i not in set(odd)]
    if "rating" in roles and not _numbers(seen.columns[roles["rating"]]):
        seen.doubts.append(f"{roles.pop('rating')} is called a rating but holds no numbers")
    if "rating" not in roles and not seen.header:
        free = [name for name in seen.columns if name not in roles.values()]
        graded = [name for name in free[2:] if _is_grade(seen.columns[name])]
        roles |= {"rating": graded[0]} if graded else {}
    for role in ("user", "item"):
        free = [name for name in seen.columns if name not in roles.values()]
        if role not in roles:
            if not free:
                nameless = f": name {_places(seen.unclear[''])} in row 1" if "" in seen.unclear else ""
                raise DataError(f"no column of {', '.join(seen.columns)} is left to be the {role}{nameless}")
            roles[role] = free[0]
            seen.doubts.append(f"which column is the {role} is a guess: {free[0]}")
    told = [(role, name) for role, name in roles.items() if name in loose]
    seen.doubts += [f"which column is the {role} is a guess, by its name: {name}" for role, name in told]
    unit = _unit(seen.columns[roles["time"]]) if "time" in roles else None
    if unit is None:
        seen.doubts.append("no time was found: the order of the rows is the order of events")
    elif unit == "order":
        seen.doubts.append(f"{roles['time']} orders the events but is no time since 1970")
    return roles, unit


def _places(at: list[int]) -> str:
    return f"column{'s' * (len(at) > 1)} {' and '.join(map(str, at))}"


def _named(names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Role -> column by name: an exact word first, then one that begins or ends so; each column for one thing.

    And which columns are so called by a part of their name only, or by a word that may well be something else.
    """
    plain = {name: re.sub(r"[^a-z0-9]", "", name.partition(":")[0].lower()) for name in names}
    roles: dict[str, str] = {}
    for fits in (lambda name, word: name == word, lambda name, word: name.startswith(word) or name.endswith(word)):
        for role, words in WORDS.items():
            found = [(words.index(word), name) for name in plain for word in words if fits(plain[name], word)]
            free = sorted(each for each in found if each[1] not in roles.values())
            if role not in roles and free:
                roles[role] = free[0][1]
    return roles, {name for role, name in roles.items() if plain[name] not in set(WORDS[role]) - VAGUE}


def _unit(values: list[Any]) -> str | None:
    """The unit of a column of times; order: numbers that rise but are none; None: no time."""
    found = [value for value in values if value not in (None, "")]
    if not found:
        return None
    if all(isinstance(value, datetime.date) for value in found):
        return "iso"
    if all(isinstance(value, str) and ISO.fullmatch(value.strip()) for value in found):
        return "iso"
    if not (numbers := _numbers(found)):
        return None
    fitting = [unit for unit, per in UNITS.items() if all(EPOCHS[0] <= n / per <= EPOCHS[1] for n in numbers)]
    return fitting[0] if fitting else "order"


def _time(values: list[Any]) -> tuple[str | None, list[int]]:
    """The unit of a column of times, and the places of what is none in it, a tenth of the values at most."""
    odd = [i for i, value in enumerate(values) if value not in (None, "") and _unit([value]) is None]
    if not 0 < len(odd) <= 0.1 * len(values):
        return _unit(values), []
    return _unit([value for i, value in enumerate(values) if i not in set(odd)]), odd


def _numbers(values: list[Any]) -> list[float]:
    """The values as finite numbers, but for missing ones; empty where any is none."""
    found = [value for value in values if value not in (None, "")]
    if not all(map(is_number, found)):
        return []
    numbers = [float(value) for value in found]
    return numbers if all(map(math.isfinite, numbers)) else []


def _is_grade(values: list[Any]) -> bool:
    numbers = _numbers(values)
    return bool(numbers) and min(numbers) >= 0 and max(numbers) <= 10 and len(set(numbers)) <= 11


def _feedback(seen: Look, roles: Mapping[str, str]) -> list[str]:
    """More columns of what users did: numbers, by their names."""
    free = [name for name in seen.columns if name not in roles.values() and name not in ("rating", "user", "item")]
    return [name for name in free if DID.search(name) and _numbers(seen.columns[name])]


def _label(seen: Look, roles: Mapping[str, str], done: list[str]) -> list[str]:
    """What counts as liked, for the ranking task."""
    if "rating" in roles and (numbers := _numbers(seen.columns[roles["rating"]])) and max(numbers) > min(numbers):
        at = next((n for n in sorted(set(numbers)) if n >= 0.8 * max(numbers)), max(numbers))
        return [f"label: {{column: rating, at_least: {at:g}}} # a guess: what counts as liked"]
    binary = [name for name in done if set(_numbers(seen.columns[name])) == {0.0, 1.0}]
    return [f"label: {{column: {_text(binary[0])}}} # a guess: what counts as liked"] if binary else []


def _span(values: list[Any], unit: str) -> str:
    """A comment with the times that the unit makes of the rows looked at: a wrong one is seen at once."""
    if unit not in UNITS:
        return ""
    days = [datetime.datetime.fromtimestamp(n / UNITS[unit], datetime.UTC).date() for n in _numbers(values)]
    return f" # {min(days)} to {max(days)} in the rows looked at"


def _text(value: str | None) -> str:
    """A text as YAML has it."""
    value = value or ""
    bare = _BARE.fullmatch(value) and value.lower() not in _YAML_WORDS
    return value if bare else json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
