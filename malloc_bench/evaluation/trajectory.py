"""Trajectories: a state goes on with its user for some steps, told the truth, or what the model itself would show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.data.tasks.splits import Split
from malloc_bench.evaluation.ranking import Question, best, compare, met, rank
from malloc_bench.evaluation.requests import NextItem, Values, some_of
from malloc_bench.state import Events, UserState, map_tensors


class Trajectory(NextItem):
    """Retrieval of T items one after the other. What answered is appended to the state, however that is compressed, and

    the next event reads it: the true one, or, apart, the model's own: of the items that the user has not met and that
    it has not shown yet, the first. Whatever has been fed cannot rank, the true item of a step always can. Of data sets
    that were joined, a step asks for items of its true one's own.
    """

    #: [B, T] each: ranks of the true items with the truth fed and with the model's own, -1 where there are no more; how
    #: much of the full state's own top 10 is kept, fed alike; and what the model shows
    columns: ClassVar[dict[str, Any]] = NextItem.columns | {
        **dict.fromkeys(("true_ranks", "own_ranks"), np.int32),
        **dict.fromkeys(("true_overlap", "own_overlap"), np.float32),
        "own_items": np.int32,
    }

    def __init__(
        self, backbone: Backbone, split: Split, rows: np.ndarray, filter_seen: bool, loss: bool = False
    ) -> None:
        super().__init__(backbone, split, rows, filter_seen, loss)
        data, users, at = split.dataset, split.test.users[rows], split.test.at[rows]
        device, last = self.question.target.device, data.offsets[users + 1]
        places = at[:, None] + np.arange(split.steps)
        self.real = torch.from_numpy(places < last[:, None]).to(device)
        places = np.minimum(places, last[:, None] - 1)
        self.targets = torch.from_numpy(data.items[places].astype(np.int64) - 1).to(device)
        self.fed = [self.tokens, *(_event(self.tokens, data, place) for place in places[:, :-1].T)]
        self.own: list[tuple[Tensor, ...]] = []  # ranks, top 10 and items of each that has walked, the full state first
        self.unmet = torch.zeros(len(users), data.n_items)
        if filter_seen:
            self.unmet[met(data, users, at)] = -torch.inf
        self.unmet = self.unmet.to(device)
        self.domains = None if data.domains is None else torch.from_numpy(data.domains).to(device)  # of each item

    def read(self, backbone: Backbone, state: UserState, rows: Tensor | None = None) -> Tensor:
        """Outputs [B, T, d] with the truth fed."""
        found = [super().read(backbone, state, rows)]
        tokens = [some_of(each, rows) for each in self.fed]
        for before, token in pairwise(tokens):
            state = _gone_on(backbone, state, before)
            found.append(backbone.read(token, state)[:, 0])
        return torch.stack(found, 1)

    def walk(self, backbone: Backbone, state: UserState, out: Tensor) -> None:
        table, banned, token, hidden = backbone.catalogue(), self.unmet.clone(), self.tokens, out[:, 0]
        ranks: list[Tensor] = []
        tops: list[Tensor] = []
        items: list[Tensor] = []
        for step, true in enumerate(self.fed):
            if step:
                state = _gone_on(backbone, state, token)
                token = replace(true, items=items[-1], kinds=self.tokens.kinds)  # nobody has answered to it
                hidden = backbone.read(token, state)[:, 0]
            asked = self._asked(step, banned)
            ranks.append(rank(hidden[None], table, asked)[0])
            tops.append(best(hidden, table, asked))
            first = torch.addmm(self._of_domain(step, banned), hidden, table.T).argmax(1, keepdim=True)
            items.append(first.to(token.items.dtype) + 1)
            banned.scatter_(1, first, -torch.inf)
        self.own.append((torch.stack(ranks, 1), torch.stack(tops, 1), torch.cat(items, 1)))

    def _asked(self, step: int, banned: Tensor) -> Question:
        target = self.targets[:, step]
        return Question(target, self._of_domain(step, banned.scatter(1, target[:, None], 0.0)))

    def _of_domain(self, step: int, penalty: Tensor) -> Tensor:
        """What cannot rank [B, n_items], and beside it what is of other data sets than a step's true item."""
        if self.domains is None:
            return penalty
        return penalty.masked_fill(self.domains[self.targets[:, step], None] != self.domains, -torch.inf)

    def judge(self, outputs: Sequence[tuple[Backbone, Tensor]]) -> list[Values]:
        judged = super().judge([(model, hidden[:, :, 0]) for model, hidden in outputs])
        (reference, full), *_ = outputs
        told: list[tuple[Tensor, Tensor]] = []
        banned = self.unmet.clone()
        for step in range(len(self.fed)):
            asked = self._asked(step, banned)
            top = best(full[0, :, step], reference.catalogue(), asked)
            found = [compare(hidden[:, :, step], model.catalogue(), asked, top) for model, hidden in outputs]
            told.append((torch.cat([each for each, _ in found]), torch.cat([each for _, each in found])))
            banned.scatter_(1, asked.target[:, None], -torch.inf)
        true = [torch.stack(each, 2) for each in zip(*told)]  # ranks and overlap, [C, B, T] each
        ranks, tops, items = (torch.stack(each) for each in zip(*self.own))
        kept = (tops[..., None] == tops[0][..., None, :]).any(-1).float().mean(-1)
        for c, values in enumerate(judged):
            values["own_items"] = items[c].cpu().numpy().astype(np.int32)
            for name, rank_of, overlap_of in (("true", true[0], true[1]), ("own", ranks, kept)):
                values[f"{name}_ranks"] = torch.where(self.real, rank_of[c], -1).cpu().numpy().astype(np.int32)
                values[f"{name}_overlap"] = torch.where(self.real, overlap_of[c], torch.nan).cpu().numpy()
        return judged


def _gone_on(backbone: Backbone, state: UserState, token: Events) -> UserState:
    """The state with the event that has read it; raw events simply go on."""
    if state.events is None:
        return backbone.append(state, token)
    return replace(state, events=state.events.then(token), length=state.length + token.count)


def _event(like: Events, data: Any, places: np.ndarray) -> Events:
    """The events at flat places [B] as tokens [B, 1]; each is answered when the next one of its user comes."""
    index = torch.from_numpy(places)[:, None]
    known = {"items": data.items, "times": data.times, "kinds": data.kinds}
    columns = {name: torch.from_numpy(column)[index] for name, column in known.items() if column is not None}
    if data.times is not None:
        users = np.searchsorted(data.offsets, places, side="right") - 1
        after = np.minimum(places + 1, data.offsets[users + 1] - 1)
        columns["next_times"] = torch.from_numpy(data.times[after])[:, None]
    return replace(like, **map_tensors(lambda x: x.to(like.items.device), columns))
