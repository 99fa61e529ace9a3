"""A Python dictionary: what a request costs where the store costs nothing."""

from __future__ import annotations

import sys
from itertools import chain

from malloc_bench.measure.stores.base import Store, StoreError


class Dictionary(Store):
    """In this process's memory. A forked process has a copy: what it puts nobody else gets."""

    name = "dict"

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes:
        try:
            return self.values[key]
        except KeyError:
            raise StoreError(f"dict: no key {key!r}") from None

    def put(self, key: bytes, value: bytes) -> None:
        self.values[key] = value

    def at_rest(self) -> int:
        """Sizes of Python's objects, without what malloc rounds up."""
        objects = chain(self.values, self.values.values())
        return sys.getsizeof(self.values) + sum(map(sys.getsizeof, objects))

    def close(self) -> None:
        self.values.clear()
