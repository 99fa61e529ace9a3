"""What is done with bad input: every case by name, what it may be answered with, and what is counted of it.

A card chooses with `on_bad: {duplicates: drop}`; the first answer of each line below is the default. `reject` refuses
the file with its name, row and value; `drop` and `keep` are counted in `Dataset.notes`, which a run's manifest holds.
"""

from __future__ import annotations

from collections.abc import Mapping

from malloc_bench.data.errors import DataError

POLICIES: dict[str, tuple[str, ...]] = {
    "empty_file": ("reject",),
    "cut_file": ("reject",),  # an archive that ends in the middle
    "encoding": ("reject",),  # bytes that are no text of the format's encoding
    "missing_column": ("reject",),
    "bad_row": ("reject", "drop"),  # text or nothing where a number belongs, too few or too many columns
    "huge_id": ("reject", "drop"),  # beyond 63 bits; every smaller id is kept as it is, also beyond 2^31
    "bad_time": ("reject", "drop", "keep"),  # before 1970 or after 2099, or 0 where others are of today
    # events of a user at one time: in an order that says nothing, in the file's, or by item, one order for all users
    "ties": ("shuffle", "keep", "by_item"),
    "duplicates": ("keep", "drop", "reject"),  # the same user, item and time or order once more; the first one stays
    "single_event_users": ("keep", "drop", "reject"),  # by the rows of the file, duplicates too
}


class Judge:
    """The policies of one card, and the count of what they met."""

    def __init__(self, on_bad: Mapping[str, str]) -> None:
        self.on_bad = on_bad
        self.notes: dict[str, int] = {}

    def answer(self, case: str) -> str:
        return self.on_bad.get(case, POLICIES[case][0])

    def meet(self, case: str, count: int, message: str) -> str:
        """Count `count` of a case and give the answer; raises DataError with `message` where that is to reject."""
        answer = self.answer(case)
        if answer == "reject":
            choices = " or ".join(other for other in POLICIES[case] if other != "reject")
            raise DataError(message + (f" (on_bad: {{{case}: {choices}}} in a card would go on)" if choices else ""))
        key = f"{case} ({'dropped' if answer == 'drop' else 'kept'})"
        self.notes[key] = self.notes.get(key, 0) + count
        return answer


def dropped(notes: Mapping[str, int]) -> int:
    """How many rows the policies have dropped."""
    return sum(count for key, count in notes.items() if key.endswith("(dropped)"))
