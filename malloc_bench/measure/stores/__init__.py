"""Where packed states lie between requests: bytes by key, behind one small interface."""

from __future__ import annotations

from malloc_bench.measure.stores.base import Store, StoreError
from malloc_bench.measure.stores.dictionary import Dictionary
from malloc_bench.measure.stores.lmdb import Lmdb
from malloc_bench.measure.stores.redis import Redis

STORES: dict[str, type[Store]] = {each.name: each for each in (Lmdb, Redis, Dictionary)}

__all__ = ["STORES", "Store", "StoreError"]
