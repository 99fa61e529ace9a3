"""Data sets by name: a card says where the files are, what they may be used for and what must come out of them."""

from typing import TYPE_CHECKING, Any

from malloc_bench.data.dataset import Dataset
from malloc_bench.data.errors import DataError
from malloc_bench.data.load import get_dataset, verify
from malloc_bench.data.summary import stats

if TYPE_CHECKING:
    from malloc_bench.data.sources.cards import Card, list_datasets, load_card

__all__ = ["Card", "DataError", "Dataset", "get_dataset", "list_datasets", "load_card", "stats", "verify"]


def __getattr__(name: str) -> Any:
    if name in {"Card", "list_datasets", "load_card"}:  # they bring pydantic along: a training process needs none
        from malloc_bench.data.sources import cards

        return getattr(cards, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
