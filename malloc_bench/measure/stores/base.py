"""What a store is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Self


class StoreError(RuntimeError):
    """A store that is not there, has ended, or does not have a key: one line that names it, and what to do."""


class Store(ABC):
    """Bytes by key. A context manager: leaving it ends what was started and removes what was written.

    Every call raises StoreError where the store does not answer.
    """

    name: ClassVar[str]

    @classmethod
    def check(cls) -> None:
        """Raises StoreError where what the store needs is not installed."""
        return

    @abstractmethod
    def get(self, key: bytes) -> bytes:
        """What was put last; raises StoreError for a key that is not there."""

    @abstractmethod
    def put(self, key: bytes, value: bytes) -> None:
        """Replaces what is there; when it returns, every client gets the new value."""

    def put_many(self, values: Mapping[bytes, bytes]) -> None:
        """All at once, where that is faster than one after the other."""
        for key, value in values.items():
            self.put(key, value)

    @abstractmethod
    def at_rest(self) -> int:
        """Bytes that the store takes, its own included."""

    def client(self) -> Store:
        """The same data for a process that was forked from this one: a connection of its own."""
        return self

    @abstractmethod
    def close(self) -> None:
        """May be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
