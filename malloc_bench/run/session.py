"""One session of a suite: group by group, train or load the backbone, evaluate its cells, measure them, write rows."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from malloc_bench import measure
from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Compressor, Structural
from malloc_bench.compressors.base import ours
from malloc_bench.data import Dataset
from malloc_bench.data.tasks.impressions import Impressions
from malloc_bench.data.tasks.splits import Split, Targets
from malloc_bench.data.tasks.trained import train_events, validating
from malloc_bench.data.worlds.ceilings import Ceilings
from malloc_bench.evaluation.drift import drift
from malloc_bench.evaluation.evaluate import Evaluation, Job, chunks, evaluate
from malloc_bench.evaluation.guard import failure, undisturbed
from malloc_bench.evaluation.popularity import popularity
from malloc_bench.evaluation.trial import Begin, nobody
from malloc_bench.files import ResultsError, atomic_write, remove_leftovers, sealed
from malloc_bench.paths import home
from malloc_bench.results import to_parquet, write_per_user, write_row
from malloc_bench.run.fits import Fits
from malloc_bench.run.folder import Chunks, LockedError, locked
from malloc_bench.run.manifest import add_session
from malloc_bench.run.models import fresh, made
from malloc_bench.run.progress import Watch
from malloc_bench.run.resources import resources
from malloc_bench.run.rows import about, accuracy, ceilings, per_user, unasked
from malloc_bench.state import Fitted
from malloc_bench.suite.cells import Cell, Part, asks_categories
from malloc_bench.suite.plan import Planned, RunResult, checkpoint_folder, group_key, groups, partial_name
from malloc_bench.suite.suite import Suite
from malloc_bench.testing import read_alone
from malloc_bench.training import ranks
from malloc_bench.training.checkpoints import Fit, copy_weights, finished
from malloc_bench.training.fit import Training, fit, tune_malloc

TRAINING, ALONE = "training", "read in a fresh process"  # at what a method works, beside chunks and drift


class Session:
    """One session of a suite in its folder. begin: told whose method works at what, see `evaluate`."""

    def __init__(
        self,
        suite: Suite,
        folder: Path,
        datasets: Mapping[str, Dataset],
        device: torch.device,
        watch: Watch,
        result: RunResult,
        begin: Begin = nobody,
    ) -> None:
        self.suite, self.folder, self.datasets, self.device = suite, folder, datasets, device
        self.watch, self.result, self.begin = watch, result, begin
        self.environment = measure.environment()
        self.fits: dict[str, Any] = {}
        self.ceilings: dict[str, Any] = {}
        self.files: dict[str, dict[str, str]] = {}  # cell id -> what was written of it beside its row, and the sha256
        self.alone: set[Part] = set()  # methods whose states a fresh process has read from their bytes
        self.cut: tuple[Any, Split | Impressions] | None = None
        tune_malloc()

    def all(self) -> None:
        for cell, group in groups(self.result.plan):
            self.watch.group(titled(group), self.result.costs.get(group_key(cell)))
            self.group(group)

    def group(self, members: Sequence[Planned], share: tuple[int, int] = (0, 1), later: bool = False) -> None:
        """Cells that share a trained backbone. later: chunks are left behind for who calls again, and only what fails

        or makes no sense has its row; share: (i, n), then, of every n-th chunk only.
        """
        if todo := self._todo(members):
            with self._failing(todo):
                self._group(todo[0].cell, todo, share, later)

    def fail(self, each: Planned, reason: str) -> None:
        self._write(each, {"status": "failed", "reason": reason})

    @contextlib.contextmanager
    def _failing(self, cells: Sequence[Planned]) -> Iterator[None]:
        """What fails inside, were it by sys.exit, is a failed row of each of the cells; all others go on."""
        try:
            yield
        except (ResultsError, LockedError, KeyboardInterrupt):
            raise
        except BaseException as error:
            self.begin("", "")
            for each in cells:
                self._write(each, {"status": "failed", **failure(error)._asdict()})

    def _todo(self, members: Sequence[Planned]) -> list[Planned]:
        bare: list[Backbone] = []  # untrained, made once for all methods of ours, which change nothing
        return [each for each in members if not self._skip(each, bare)]

    def _skip(self, each: Planned, bare: list[Backbone]) -> bool:
        """Whether its row is written already: skipped as it makes no sense, or failed as its parts cannot be made."""
        with self._failing([each]), undisturbed():
            self.begin("its making", each.id)
            why = each.cell.impossible
            if why is None:
                method = each.cell.compressor.build()
                backbone = bare[0] if bare and ours(method) else made(each.cell, self._split(each.cell).dataset)
                bare += [backbone] if ours(method) and not bare else []
                why = method.supports(backbone) or self._unknown(each.cell, method)
                why = why or unasked(each.cell, self._split(each.cell))
            if why is not None:
                self._write(each, {"status": "skipped", "reason": why})
            elif each.cell.compressor not in self.alone:
                self.begin(ALONE, each.id)
                read_alone(each.cell.compressor.build())
                self.alone.add(each.cell.compressor)
            self.begin("", "")
            return why is not None
        return True

    def _unknown(self, cell: Cell, compressor: Compressor) -> str | None:
        """What the data cannot tell of items that the method asks for; None: nothing."""
        data = self.datasets[cell.dataset]
        if not asks_categories(compressor) or data.categories is not None:
            return None
        return f"{compressor.name} reads categories of items, and the card of {data.name} has none"

    def _backbone(self, cell: Cell, **changes: Any) -> Backbone:
        """Fresh weights, the same for the same seed, and the categories of the items where they are used."""
        return fresh(cell, self._split(cell).dataset, **changes)

    def _split(self, cell: Cell) -> Split | Impressions:
        """The data of a cell, cut; the last one is kept: groups of one data set follow each other."""
        key = cell.dataset, cell.split, cell.task
        if self.cut is None or self.cut[0] != key:
            assert cell.split is not None, "settled when the run began"
            self.cut = key, cell.task.cut(self.datasets[cell.dataset], cell.split)
        return self.cut[1]

    def _group(self, cell: Cell, todo: list[Planned], share: tuple[int, int], later: bool) -> None:
        split = self._split(cell)
        data = self.datasets[cell.dataset]
        asked = split if cell.evaluate == "test" else validating(split)
        trained = self._all_trained(cell, split, todo)
        todo = [each for each in todo if _part(each) in trained]
        backbone, plain, _ = trained[None]
        # each is held against the plain backbone, whatever it reads itself
        learned = self._fits(trained, split, cell.seed, todo)
        todo = [each for each in todo if each.id in learned]
        fits = {each: fit for each, (fit, _) in learned.items()}
        read = {
            each.id: "+".join([str(plain.weights), str(trained[_part(each)][1].weights), *_digest(fits[each.id])])
            for each in todo
        }
        store = Chunks(self.folder / "partial" / partial_name(cell), {"": str(plain.weights), **read})
        jobs = [
            Job(each.id, each.cell.compressor.build(), each.cell.budget, trained[_part(each)][0], fits[each.id])
            for each in todo
        ]
        evaluation = evaluate(
            backbone, asked, jobs, seed=cell.seed, filter_seen=cell.filter_seen, loss=self.suite.measure.loss,
            store=store, report=self.watch.chunk, begin=self.begin, share=share,
        )  # fmt: skip
        if later:
            for each in (each for each in todo if each.id in evaluation.failed):
                self._write(each, {"status": "failed", **evaluation.failed[each.id]._asdict()})
            return
        columns = accuracy(evaluation, [each.id for each in todo])
        if isinstance(asked, Split):
            floor = popularity(asked, cell.filter_seen)
            columns = {each: own | floor for each, own in columns.items()}
        measured = [job for job in jobs if job.id in columns and self.suite.measure.covers(job.budget)]
        lost, broken = drift(
            backbone, asked, measured, self.suite.measure.drift, seed=cell.seed, filter_seen=cell.filter_seen,
            report=self.watch.drift, begin=self.begin,
        )  # fmt: skip
        evaluation.failed.update(broken)
        for job, drifts in lost.items():
            columns[job] |= drifts
        if isinstance(asked, Split) and self._knows_ceilings(cell, asked) and columns:
            known = self._ceilings(cell, backbone, asked)
            for job, best in ceilings(known, evaluation, list(columns)).items():
                columns[job] |= best
        costs = resources(
            self.suite.measure,
            measured,
            {part: model for part, (model, _, _) in trained.items()},
            lambda length: self._backbone(cell, max_length=length),
            evaluation.length,
            self._keep_samples,
            self.watch.measure,
            self.begin,
        )
        for each in todo:
            own, fitted, key = trained[_part(each)]
            outcome = self._outcome(each, evaluation, columns, split)
            shared = {
                "params": sum(p.numel() for p in own.parameters()),
                "params_embedding": sum(m.weight.numel() for m in own.modules() if isinstance(m, torch.nn.Embedding)),
                "train_events": train_events(split),
                "train_epochs": fitted.epochs,
                "train_seconds": fitted.seconds,
                "fit_seconds": learned[each.id][1],
                "device": str(self.device),
                "hashes": {
                    "data": data.hash,
                    "checkpoint": key,
                    "weights": fitted.weights,
                    "reference": plain.weights,  # of the full state that it is compared with
                    **({} if fitted.start is None else {"start": fitted.start}),
                    **dict(zip(["fit"], _digest(fit := fits[each.id]))),
                    "files": self.files.get(each.id, {}),
                },
            }
            fixed = {"bytes_fixed": float(fit.nbytes)} if fit is not None and "bytes_fixed" in outcome else {}
            self._write(each, {**outcome, **fixed, **shared, **costs.get(each.id, {})})
        store.drop()

    def _fits(
        self, trained: dict[Structural | None, tuple[Backbone, Fit, str]], split: Any, seed: int, todo: list[Planned]
    ) -> dict[str, tuple[Fitted | None, float | None]]:
        """What the method of each cell has learned of training users, and in how many seconds, by cell id."""
        plain, found = trained[None][0], {}
        for each in todo:
            with self._failing([each]):
                self.begin("learning", each.id)
                model, fitted, key = trained[_part(each)]
                fits = Fits(model, plain, split, home() / "checkpoints" / key / "fits", fitted.weights, seed)
                found[each.id] = fits.of(each.cell.compressor.build(), each.cell.budget)
        self.begin("", "")
        return found

    def _all_trained(
        self, cell: Cell, split: Split | Impressions, todo: list[Planned]
    ) -> dict[Structural | None, tuple[Backbone, Fit, str]]:
        """The backbone of a group as it is, under None, and as the structural methods of its cells adapt it."""
        trained: dict[Structural | None, Any] = {None: self._trained(cell.plain, split)}
        for part in dict.fromkeys(map(_part, todo)):
            if part is not None:
                own = [each for each in todo if _part(each) == part]
                with self._failing(own):
                    self.begin(TRAINING, own[0].id)
                    trained[part] = self._trained(own[0].cell, split)
        self.begin("", "")
        return trained

    def _knows_ceilings(self, cell: Cell, split: Split) -> bool:
        """On generated data as they are, the whole catalogue ranked by all that a user did."""
        data = self.datasets[cell.dataset]
        plain = split.dataset is data and split.known is None
        return data.card.parameters is not None and plain and not cell.filter_seen

    def _ceilings(self, cell: Cell, backbone: Backbone, split: Split) -> Ceilings:
        """The best possible on a generated data set, targets as the evaluation orders them; noted for the manifest."""
        order = np.concatenate(chunks(backbone, split))
        known = Ceilings(split.dataset, Targets(split.test.users[order], split.test.at[order]))
        if cell.dataset not in self.ceilings:
            self.ceilings[cell.dataset] = known.table()
        return known

    def _outcome(
        self, each: Planned, evaluation: Evaluation, columns: dict[str, dict[str, Any]], split: Split | Impressions
    ) -> dict[str, Any]:
        if each.id in evaluation.failed:
            return {"status": "failed", **evaluation.failed[each.id]._asdict()}
        path = f"per_user/{each.id}.parquet"
        values = per_user(evaluation, each.id, split.dataset.original_user(slice(None)))
        self.files.setdefault(each.id, {})[path] = write_per_user(self.folder / path, values)
        training_noise = ("p_value", "p_auc", "p_noninferior")  # one training tells no noise from effect
        noisy = dict.fromkeys(training_noise) if _part(each) else {}
        remark = self.suite.remarks.get(each.cell.compressor.name)
        return {"status": "ok", "reason": remark, "per_user": path, **columns[each.id], **noisy}

    def _trained(self, cell: Cell, split: Split | Impressions) -> tuple[Backbone, Fit, str]:
        """The backbone of a cell, adapted or not, trained now or before; the run folder has a copy of its weights."""
        folder = checkpoint_folder(cell)
        backbone, part = self._backbone(cell), cell.compressor.build().structural
        if part:
            part.adapt(backbone)
        settings, start = Training(**cell.training), None
        if part and part.finetune:
            plain, before, _ = self._trained(cell.plain, split)
            part.begin(backbone, plain.state_dict())
            settings, start = replace(settings, epochs=part.finetune), before.weights
        backbone, copy = backbone.to(self.device), self.folder / "checkpoints" / folder.name
        # two runs that need the same weights train them once
        with contextlib.nullcontext() if ranks.rank() else locked(folder, wait=True):
            place = ranks.first(lambda: _place(folder, copy, start))
            fitted = fit(backbone, split, settings, cell.seed, place, self.watch.fit, cell.filter_seen, start)
            ranks.first(lambda: copy_weights(place, copy))
        self.fits[folder.name] = asdict(fitted)
        return backbone, fitted, folder.name

    def train(self, cell: Cell) -> Fit:
        """Have the backbone of a settled cell trained, adapted or not."""
        return self._trained(cell, self._split(cell))[1]

    def _keep_samples(self, each: str, samples: Mapping[str, Any]) -> None:
        """A cell's raw times, sealed, and their hash for its row."""
        path, content = f"latency/{each}.json", sealed({"cell_id": each, **samples})
        atomic_write(self.folder / path, content)
        self.files.setdefault(each, {})[path] = hashlib.sha256(content).hexdigest()

    def _write(self, each: Planned, columns: Mapping[str, Any]) -> None:
        row = write_row(self.folder / "rows", {"cell_id": each.id, **about(each.cell, self.environment), **columns})
        if not all((self.folder / name).exists() for name in self.files.get(each.id, ())):
            row.unlink(missing_ok=True)  # the folder was moved away between its files and it
        self.result.add(each.id, str(columns["status"]))

    def finish(self) -> None:
        """The derived table and the manifest, also after an interrupt."""
        if any((self.folder / "rows").glob("*.json")):
            to_parquet(self.folder)
        known = {"ceilings": self.ceilings, "checkpoints": self.fits}
        add_session(self.folder, self.suite, self.datasets, self.result, self.environment, known)


def titled(group: Sequence[Planned]) -> str:
    """A group in a line."""
    cell = group[0].cell
    return f"{cell.dataset}, {cell.backbone.label}, seed {cell.seed}: {len(group)} cells"


def _place(folder: Path, copy: Path, start: str | None) -> Path:
    """Where weights are, or will be made: what a run's rows were made with goes before the cache."""
    remove_leftovers(folder)
    own = finished(copy)
    if own is None or own.start != start:
        return folder
    if finished(folder) is None:
        copy_weights(copy, folder)
    return copy


def _part(each: Planned) -> Structural | None:
    """The structural part of a cell's compressor."""
    return each.cell.compressor.build().structural


def _digest(fitted: Fitted | None) -> list[str]:
    """The fit's sha256, where there is one."""
    return [] if fitted is None else [fitted.digest]
