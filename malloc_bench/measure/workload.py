"""What is measured: a batch of made-up histories of one length, the tokens that read them, the events that follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from malloc_bench.backbones import Backbone
from malloc_bench.state import Events, Named, Prefill, Stats


@dataclass(frozen=True)
class Workload:
    """What is timed: `users` histories of `history` events at once, `candidates` tokens that read each of them, and
    `appended` new events for each. Ids, times (about 6 hours apart) and kinds are drawn from the seed."""

    users: int = 8
    history: int = 1000
    candidates: int = 1
    appended: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.users < 1 or self.history < 0 or self.candidates < 1 or self.appended < 1:
            raise ValueError(f"a workload has users, candidates and appended >= 1 and history >= 0, not {self}")

    @property
    def max_length(self) -> int:
        """What a backbone must keep: the history and what is appended."""
        return self.history + self.appended

    def events(self, n_items: int, device: str | torch.device = "cpu") -> tuple[Events, Events, Events]:
        """The histories, the tokens that read (all asked for at one time), and the new events to append."""
        rng = np.random.default_rng(self.seed)
        total = self.history + max(self.candidates, self.appended)
        items = torch.from_numpy(rng.integers(1, n_items + 1, (self.users, total), np.int32)).to(device)
        gaps = rng.exponential(21_600, (self.users, total + 1)).astype(np.int64) + 1
        times = torch.from_numpy(1_700_000_000 + gaps.cumsum(1)).to(device)
        kinds = torch.from_numpy(rng.integers(0, 256, (self.users, total), np.uint8)).to(device)

        def part(start: int, size: int) -> Events:
            count = torch.full((self.users,), size, dtype=torch.int32, device=device)
            rows, following = slice(start, start + size), slice(start + 1, start + size + 1)
            return Events(items[:, rows], count, times[:, rows], times[:, following], kinds[:, rows])

        now = times[:, self.history : self.history + 1].expand(-1, self.candidates)
        tokens = replace(part(self.history, self.candidates), times=now, next_times=now)
        return part(0, self.history), tokens, part(self.history, self.appended)

    def prefill(self, backbone: Backbone, stats: Stats = Stats()) -> Prefill:
        """The workload's histories in a backbone of at least `max_length`."""
        device = next(backbone.parameters()).device
        items = some_facts(backbone.n_items) if stats.of_items else None
        history, tokens, _ = self.events(backbone.n_items, device)
        return backbone.prepare(history, stats=stats, items=items, tokens=tokens)


def some_facts(n_items: int) -> Named:
    """Made-up facts about items, as `Prefill.items` has them: 18 categories, a few items that are popular, probes."""
    rng = np.random.default_rng(0)
    categories, popularity = rng.integers(0, 18, n_items), rng.zipf(1.5, n_items).clip(max=10**6)
    popular = torch.from_numpy(np.argsort(-popularity, kind="stable") + 1)
    drawn, gaps = (torch.from_numpy(x) for x in (rng.permutation(n_items) + 1, rng.integers(1, 86_400, n_items)))
    known = {"categories": torch.from_numpy(categories), "popularity": torch.from_numpy(popularity)}
    return Named({**known, "popular": popular, "probes": drawn, "even": drawn.flip(0), "gaps": gaps})
