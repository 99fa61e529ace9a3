"""What a chunk of users is asked in each task, and how the answers of several methods are judged."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.data.batches import split_newest, window
from malloc_bench.data.exposures import Exposures, ask
from malloc_bench.data.splits import Split
from malloc_bench.ranking import agreement, overlap, question, rank
from malloc_bench.state import Events, UserState, map_tensors

Values = dict[str, np.ndarray]


class Asked(Protocol):
    """B requests: what the states are made of, what reads them, and what the outputs of C methods are worth."""

    columns: ClassVar[dict[str, Any]]
    history: Events
    tokens: Events

    def read(self, state: UserState) -> Tensor:
        """Outputs, [B, ...]."""

    def judge(self, outputs: Tensor) -> list[Values]:
        """What is kept of C methods' outputs [C, B, ...], under `columns`; the first is the full state's."""


class NextItem:
    """Retrieval: the newest event reads the state of all before it, the target is ranked in the catalogue."""

    columns: ClassVar[dict[str, Any]] = {"rank": np.int32, "overlap": np.float32}

    def __init__(self, backbone: Backbone, split: Split, rows: np.ndarray, filter_seen: bool) -> None:
        self.backbone, self.table = backbone, backbone.catalogue()
        users, at = split.test.users[rows], split.test.at[rows]
        events = window(split.dataset, users, at, backbone.max_length)
        asked = split_newest(events), question(split.dataset, users, at, filter_seen)
        (self.history, self.tokens), self.question = map_tensors(lambda x: x.to(self.table.device), asked)

    def read(self, state: UserState) -> Tensor:
        return self.backbone.read(self.tokens, state)[:, 0]

    def judge(self, outputs: Tensor) -> list[Values]:
        ranks, top = rank(outputs, self.table, self.question, tops=True)
        assert top is not None
        shares = overlap(top, top[0])
        return [
            {"rank": r.cpu().numpy().astype(np.int32), "overlap": s.cpu().numpy().astype(np.float32)}
            for r, s in zip(ranks, shares)
        ]


class Candidates:
    """Ranking: all candidates of a request read the state of the whole history at once and are scored."""

    columns: ClassVar[dict[str, Any]] = {"logits": np.float32, "agreement": np.float32, "logit_error": np.float32}

    def __init__(self, backbone: Backbone, data: Exposures, rows: np.ndarray) -> None:
        self.backbone = backbone
        device = backbone.catalogue().device
        asked = ask(data, data.test.rows(rows), backbone.max_length)[:2]
        self.history, self.tokens = map_tensors(lambda x: x.to(device), asked)
        self.width = data.width

    def read(self, state: UserState) -> Tensor:
        return self.backbone.score(self.backbone.read(self.tokens, state), self.tokens)

    def judge(self, outputs: Tensor) -> list[Values]:
        real = self.tokens.mask()
        kept = torch.full((*outputs.shape[:2], self.width), torch.nan, device=outputs.device)
        kept[..., : outputs.shape[2]] = torch.where(real, outputs.float(), torch.nan)
        error = ((outputs - outputs[0]).abs() * real).sum(-1) / real.sum(-1)
        return [
            {
                "logits": logits.cpu().numpy(),
                "agreement": agreement(own, outputs[0], real).cpu().numpy(),
                "logit_error": gap.cpu().numpy().astype(np.float32),
            }
            for logits, own, gap in zip(kept, outputs, error)
        ]
