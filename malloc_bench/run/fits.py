"""What methods learn of training users: made once, kept beside the weights that it was made with."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Split
from malloc_bench.data.tasks.trained import facts, histories, sampled
from malloc_bench.evaluation.guard import undisturbed, unwritten
from malloc_bench.files import Damaged, atomic_write, digest, read_sealed, sealed
from malloc_bench.run.folder import locked
from malloc_bench.state import Fitted, Prefill, Sample, Stats, map_tensors
from malloc_bench.suite.cells import content
from malloc_bench.training.checkpoints import read_tensors, write_tensors

log = logging.getLogger(__name__)

USERS = 512  # in the sample that methods are fitted to


@dataclass(frozen=True)
class Fits:
    """The fits of one trained backbone.

    folder: where they are kept. weights: sha256 of the backbone's. plain: the backbone that it was adapted from, whose
    bytes budgets are shares of.
    """

    backbone: Backbone
    plain: Backbone
    split: Split | Impressions
    folder: Path
    weights: str | None
    seed: int
    users: int = USERS

    def of(self, compressor: Compressor, budget: Budget | None) -> tuple[Fitted | None, float | None]:
        """What a method has learned, of all its parts, and the seconds that it took when it was made.

        None where it learns nothing; no seconds where a fit of an older version was kept without.
        """
        parts = compressor.fit_parts()
        found = {name: self._part(part, budget if part.fit_uses_budget else None) for name, part in parts.items()}
        if not found:
            return None, None
        fits, times = {name: fit for name, (fit, _) in found.items()}, [seconds for _, seconds in found.values()]
        seconds = None if None in times else sum(each for each in times if each is not None)
        return fits[""] if "" in fits else Fitted.joined(fits), seconds

    def _part(self, compressor: Compressor, budget: Budget | None) -> tuple[Fitted, float | None]:
        key = self._key(compressor, budget)
        place = self.folder / f"{compressor.name}-{digest(key)[:16]}"
        with locked(place, wait=True):  # two runs that need the same fit make it once
            return _load(place, key) or self._make(compressor, budget, place, key)

    def _key(self, compressor: Compressor, budget: Budget | None) -> dict[str, Any]:
        """All that a fit depends on; events, split and structural part are in the backbone's folder, weights here."""
        about = content(compressor, self.backbone.uses_positions)
        if compressor.fit_fields is not None:
            about["params"] = {name: about["params"][name] for name in compressor.fit_fields}
        asked = None if budget is None else budget.value()
        items = facts(self.split, Stats(categories=compressor.fit_needs.categories))
        known = {} if items is None else {"items": items.digest}
        key = {"weights": self.weights, "method": about, "budget": asked, "users": self.users, "seed": self.seed}
        return key | known

    def _make(
        self, compressor: Compressor, budget: Budget | None, place: Path, key: dict[str, Any]
    ) -> tuple[Fitted, float]:
        self.backbone.eval()
        started = time.perf_counter()
        with undisturbed(), unwritten(self.backbone, self.plain):
            torch.manual_seed(self.seed)
            fitted = compressor.fit(Sample(lambda: self._prefills(compressor.fit_needs, budget)), budget)
        seconds = time.perf_counter() - started
        if type(fitted) is not Fitted or not all(bool(x.isfinite().all()) for x in fitted.values()):
            raise TypeError(f"{compressor.name}: fit gave no Fitted of finite tensors but {type(fitted).__name__}")
        fitted = Fitted({name: x.cpu() for name, x in fitted.items()})
        hashed = write_tensors(place / "fit.safetensors", fitted)
        about = {"key": key, "tensors": hashed, "fit": fitted.digest, "seconds": seconds}
        atomic_write(place / "fit.json", sealed(about))
        return fitted, seconds

    def _prefills(self, needs: Stats, budget: Budget | None) -> Iterator[Prefill]:
        device, items = next(self.backbone.parameters()).device, facts(self.split, needs)
        users = sampled(self.split, self.users)
        for ids, history in histories(self.split, users, self.backbone.max_length):
            with torch.no_grad():
                history = map_tensors(lambda x: x.to(device), history)
                prefill = self.backbone.prepare(history, ids, needs, self.seed, items)
                whole = None if budget is None else self.plain.prefill(history, ids).full_bytes()
            yield replace(prefill, whole=whole)


def _load(place: Path, key: dict[str, Any]) -> tuple[Fitted, float | None] | None:
    """The fit that lies in `place`; None where there is none, with a warning where it is not what was written."""
    try:
        about = read_sealed(place / "fit.json")
        if digest(about["key"]) != digest(key):
            raise Damaged("it is another method's")
        fitted = Fitted(read_tensors(place / "fit.safetensors", about["tensors"]))
        if fitted.digest != about["fit"]:
            raise Damaged("its content does not match")
    except FileNotFoundError:
        return None
    except (Damaged, KeyError, OSError) as error:
        log.warning("the fit in %s is not what was written (%s) and is made again", place, error)
        return None
    return fitted, about.get("seconds")
