"""Where MARM keeps what its layers gave for each user's events."""

from __future__ import annotations

import torch
from torch import Tensor

from malloc_bench.backbones.items import Sizes
from malloc_bench.state import Events, UserState


class MemoryCache:
    """What each layer gave for each user's events, with the training step whose parameters made it.

    An entry belongs to a user and a place in the kept history, and is found where the item at that place is the one
    asked for, so an item met twice has two entries (the paper does not tell its key). Layer 0 is not cached: it is the
    item's embedding, which is always at hand.

    refresh: the stream writes an event again in every so many-th epoch; 0: never, entries stay as first written.
    vectors: [users, max_length, L - 1, d] float32; items, steps: [users, max_length] (item 0: no entry); now: steps
    trained so far, []; asked, found: events looked up and those that had an entry.
    """

    def __init__(self, users: int, config: Sizes, refresh: int = 1, device: torch.device | None = None) -> None:
        self.vectors = torch.zeros(users, config.max_length, config.layers - 1, config.dim, device=device)
        self.items = torch.zeros(users, config.max_length, dtype=torch.int32, device=device)
        self.steps = torch.zeros(users, config.max_length, dtype=torch.long, device=device)
        self.now = torch.zeros((), dtype=torch.long, device=device)
        self.refresh, self.asked, self.found = refresh, 0, 0

    def nbytes(self) -> Tensor:
        """Bytes of each user's entries, [users]: vectors, and the item that each is of; steps are for study alone."""
        each = self.vectors[0, 0].nbytes + self.items.element_size()
        return (self.items > 0).sum(1) * each

    @property
    def hit_rate(self) -> float:
        """Share of the events looked up so far that had an entry; nan before the first look-up."""
        return self.found / self.asked if self.asked else float("nan")

    def held(self, users: Tensor, events: Events) -> Tensor:
        """True where an event has an entry, [B, S]; raises ValueError for more events than a user has places."""
        width, places = events.items.shape[1], self.items.shape[1]
        if width > places:
            raise ValueError(f"this memory has max_length={places} places a user, the history has {width} events")
        return (self.items[users, :width] == events.items) & events.mask()

    def look_up(self, users: Tensor, events: Events) -> tuple[Tensor, Tensor]:
        """Entries [B, S, L - 1, d] of users [B], and where there is one, [B, S] bool."""
        held = self.held(users, events)
        self.asked, self.found = self.asked + int(events.count.sum()), self.found + int(held.sum())
        return self.vectors[users, : held.shape[1]], held

    def write(self, users: Tensor, events: Events, state: UserState, where: Tensor) -> None:
        """Write the outputs in a full state of the events down, where [B, S] is True, as of the step `now`."""
        row, place = (where & events.mask()).nonzero(as_tuple=True)
        at = users[row], place
        self.items[at], self.steps[at] = events.items[row, place], self.now
        for i, (segment,) in enumerate(state.layers[1:]):
            entries = segment.fields["hidden"].dense()[row, 0, place].detach()
            self.vectors[(*at, i)] = entries.to(self.vectors.dtype)  # under autocast they may be bfloat16
