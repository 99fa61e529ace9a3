"""Data sets by name: a card says where the files are, what they may be used for and what must come out of them."""

from typing import TYPE_CHECKING, Any

from .dataset import Dataset
from .errors import DataError
from .load import get_dataset, verify
from .summary import stats

if TYPE_CHECKING:
    from .cards import Card, list_datasets, load_card

__all__ = ["Card", "DataError", "Dataset", "get_dataset", "list_datasets", "load_card", "stats", "verify"]


def __getattr__(name: str) -> Any:
    if name in {"Card", "list_datasets", "load_card"}:  # they bring pydantic along: a training process needs none
        from . import cards

        return getattr(cards, name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
