"""What a chunk of users is asked in each task, and how the answers of several methods are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.data.tasks.batches import split_newest, window
from malloc_bench.data.tasks.impressions import Impressions, ask
from malloc_bench.data.tasks.known import heard
from malloc_bench.data.tasks.splits import Split
from malloc_bench.evaluation.ranking import agreement, best, compare, losses, question
from malloc_bench.state import Events, UserState, map_tensors

Values = dict[str, np.ndarray]


class Asked(Protocol):
    """B requests: what the states are made of, what reads them, and what the outputs of C methods are worth."""

    columns: ClassVar[dict[str, Any]]
    history: Events
    tokens: Events

    def read(self, backbone: Backbone, state: UserState, rows: Tensor | None = None) -> Tensor:
        """Outputs, [B, ...]; rows [P]: the state is that of these requests only."""

    def walk(self, backbone: Backbone, state: UserState, out: Tensor) -> None:
        """Go on from what was read of a state, where the task does; once for each of the outputs, in their order."""

    def judge(self, outputs: Sequence[tuple[Backbone, Tensor]]) -> list[Values]:
        """What is kept of all outputs, [C, B, ...] of each backbone, under `columns`; the first is the full state's."""


class NextItem:
    """Retrieval: the newest event reads the state of all before it, the target is ranked in the catalogue."""

    columns: ClassVar[dict[str, Any]] = {"rank": np.int32, "overlap": np.float32}
    loss: ClassVar[dict[str, Any]] = {"loss": np.float32}  # a column more, where it is asked for

    def __init__(
        self, backbone: Backbone, split: Split, rows: np.ndarray, filter_seen: bool, loss: bool = False
    ) -> None:
        self.with_loss = loss
        device = next(backbone.parameters()).device
        users, at, times = split.test.users[rows], split.test.at[rows], split.dataset.times
        data, ends, most = heard(split, backbone.max_length)
        events = window(data, users, ends.at[rows], most, None if times is None else times[at])
        asked = split_newest(events), question(split.dataset, users, at, filter_seen)
        (self.history, self.tokens), self.question = map_tensors(lambda x: x.to(device), asked)
        self._reads = Reads(self.history, self.tokens)

    def read(self, backbone: Backbone, state: UserState, rows: Tensor | None = None) -> Tensor:
        return self._reads(backbone, state, rows)[:, 0]

    def walk(self, backbone: Backbone, state: UserState, out: Tensor) -> None:
        """A next item is one step."""

    def judge(self, outputs: Sequence[tuple[Backbone, Tensor]]) -> list[Values]:
        reference, full = outputs[0]
        top = best(full[0], reference.catalogue(), self.question)
        found = [compare(hidden, backbone.catalogue(), self.question, top) for backbone, hidden in outputs]
        judged = [
            {"rank": r.cpu().numpy(), "overlap": s.cpu().numpy()}
            for ranks, shares in found
            for r, s in zip(ranks, shares)
        ]
        if self.with_loss:
            lost = [losses(hidden, model.catalogue(), self.question, model.logit_scale) for model, hidden in outputs]
            for each, values in zip(judged, torch.cat(lost).cpu().numpy()):
                each["loss"] = values
        return judged


class Candidates:
    """Ranking: all candidates of a request read the state of the whole history at once and are scored."""

    columns: ClassVar[dict[str, Any]] = {"logits": np.float32, "agreement": np.float32, "logit_error": np.float32}

    def __init__(self, backbone: Backbone, data: Impressions, rows: np.ndarray) -> None:
        device = next(backbone.parameters()).device
        asked = ask(data, data.test.rows(rows), backbone.max_length)[:2]
        self.history, self.tokens = map_tensors(lambda x: x.to(device), asked)
        self._reads = Reads(self.history, self.tokens)
        self.width = data.width

    def read(self, backbone: Backbone, state: UserState, rows: Tensor | None = None) -> Tensor:
        return backbone.score(self._reads(backbone, state, rows), some_of(self.tokens, rows))

    def walk(self, backbone: Backbone, state: UserState, out: Tensor) -> None:
        """Candidates are asked once."""

    def judge(self, outputs: Sequence[tuple[Backbone, Tensor]]) -> list[Values]:
        scores, real = torch.cat([each for _, each in outputs]), self.tokens.mask()
        kept = torch.full((*scores.shape[:2], self.width), torch.nan, device=scores.device)
        kept[..., : scores.shape[2]] = torch.where(real, scores.float(), torch.nan)
        error = ((scores - scores[0]).abs() * real).sum(-1) / real.sum(-1)
        return [
            {
                "logits": logits.cpu().numpy(),
                "agreement": agreement(own, scores[0], real).cpu().numpy(),
                "logit_error": gap.cpu().numpy().astype(np.float32),
            }
            for logits, own, gap in zip(kept, scores, error)
        ]


class Reads:
    """Reads of one chunk's tokens over many states, [B, M, d]; what no state changes is made once a backbone."""

    def __init__(self, history: Events, tokens: Events) -> None:
        self.length, self.tokens = history.count, tokens
        self.of: dict[Backbone, Callable[[UserState], Tensor]] = {}

    def __call__(self, backbone: Backbone, state: UserState, rows: Tensor | None) -> Tensor:
        if rows is not None:
            return backbone.read(some_of(self.tokens, rows), state)
        if backbone not in self.of:
            self.of[backbone] = backbone.reads(self.tokens, self.length)
        return self.of[backbone](state)


def some_of(tokens: Events, rows: Tensor | None) -> Events:
    """Those of rows [P]; None: all."""
    return tokens if rows is None else map_tensors(lambda x: x.index_select(0, rows.to(x.device)), tokens)
