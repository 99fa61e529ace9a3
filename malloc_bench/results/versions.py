"""Rows of one cell by several versions of a method or backbone: a table shows the newest."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

_KEY = "version"


def newest(rows: Sequence[dict[str, Any]], told: object = None) -> list[dict[str, Any]]:
    """Rows but for those of a cell that another row has by versions none of which is older, and some newer.

    told: of what the rows are, for a line on how many are left out.
    """
    alike: dict[str, list[tuple[list[int], dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        versions: list[int] = []
        alike[json.dumps(_without(row.get("cell") or row["cell_id"], versions))].append((versions, row))
    old = {id(row) for own in alike.values() for by, row in own if any(_newer(other, by) for other, _ in own)}
    if old and told is not None:
        log.warning("%s: %d rows by older versions are not shown: there are newer ones", told, len(old))
    return [row for row in rows if id(row) not in old]


def _newer(one: Sequence[int], other: Sequence[int]) -> bool:
    return one != other and len(one) == len(other) and all(a >= b for a, b in zip(one, other))


def _without(value: Any, versions: list[int]) -> Any:
    """A cell without the versions of its parts, which are put into `versions`, in an order that its names give."""
    if isinstance(value, Mapping):
        if isinstance(value.get(_KEY), int):
            versions.append(value[_KEY])
        return {key: _without(value[key], versions) for key in sorted(value) if key != _KEY}
    return [_without(each, versions) for each in value] if isinstance(value, list) else value
