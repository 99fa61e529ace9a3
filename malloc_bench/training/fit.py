"""Fit a backbone: validated every epoch, the best epoch kept, resumable after a kill."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from malloc_bench.backbones import Backbone
from malloc_bench.data.tasks.batches import by_length, training_batches, window
from malloc_bench.data.tasks.impressions import Impressions, ask, ranking_batches
from malloc_bench.data.tasks.splits import Split, Targets
from malloc_bench.evaluation.metrics import auc_by_user, lists
from malloc_bench.evaluation.ranking import question, rank
from malloc_bench.state import Batch, Events, map_tensors
from malloc_bench.training import checkpoints, ranks
from malloc_bench.training.checkpoints import Fit

_BIG_BATCH = 256  # users a batch where nothing is trained


@dataclass(frozen=True)
class Training:
    """Settings of a fit.

    epochs: at most so many; the learning rate falls from lr to 0 over them on a cosine, after one epoch of warm-up.
    patience: stop after so many epochs without a better validation score. amp: bfloat16 autocast, "auto" = where
    the device multiplies it fast. optimizer: with adam_then_sgd patience is granted twice: when Adam's is at an end,
    SGD goes on from the best epoch so far with a learning rate that falls from sgd_lr on the same cosine (LSRM).
    negatives: retrieval's softmax runs over the target and so many items drawn at random for each user of a batch;
    None: over the whole catalogue. logq: drawn items count for all others (Bengio and Senecal, 2008: their logits less
    the logarithm of how often an item is expected to be drawn). window: the "newest" max_length events of a longer
    history train in every epoch (HSTU's authors); None: another window each epoch. stochastic_length: alpha in (1, 2]
    of `training_batches`.
    """

    epochs: int = 20
    batch_size: int = 32
    lr: float = 2e-3
    patience: int = 10
    weight_decay: float = 0.0
    amp: str = "auto"
    optimizer: Literal["adam", "adam_then_sgd"] = "adam"
    sgd_lr: float = 0.1
    negatives: int | None = None
    window: Literal["newest"] | None = None
    stochastic_length: float | None = None
    logq: bool = False

    def content(self) -> dict[str, Any]:
        """What weights depend on: without SGD, nothing of it; nothing of what is None or off."""
        settings = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        if self.optimizer == "adam":
            del settings["optimizer"], settings["sgd_lr"]
        return settings


@dataclass(frozen=True)
class Progress:
    """One step of a fit, for a progress bar."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    best: float | None
    metric: str = "NDCG@10"


def tune_malloc() -> None:
    """Keep freed memory in the process (glibc): large temporaries are else mapped and faulted in at every step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_mmap_max, m_trim_threshold, m_top_pad = -4, -1, -2
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, -1), (m_top_pad, 256 << 20)):
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        pass  # not glibc: slower, not wrong


def fit(
    backbone: Backbone,
    split: Split | Impressions,
    settings: Training,
    seed: int,
    folder: Path,
    report: Callable[[Progress], None] = lambda progress: None,
    filter_seen: bool = True,
    start: str | None = None,
) -> Fit:
    """Train `backbone` in place to its best validation epoch and leave `folder` with model.safetensors and fit.json.

    Where nothing validates (the published protocol) all epochs are run and the last one's weights are kept.
    A folder with a finished fit is only loaded; one with the state of an interrupted fit goes on from its last whole
    epoch; what is not what was written is made again, with a warning.
    Epochs draw from their own seeds, so an interrupted fit ends as an uninterrupted one does. filter_seen: the best
    epoch is chosen as the test will ask. start: sha256 of the trained weights that `backbone`
    comes with, None: they are fresh; a fit that began from others is made again. Processes of torchrun fit it together
    (`ranks`), each with its own call of this.
    """
    device = next(backbone.parameters()).device

    def to_device(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    if done := checkpoints.load_weights(backbone, folder, start):
        return done
    if settings.optimizer == "adam_then_sgd" and not len(split.valid):
        raise ValueError("adam_then_sgd goes over to SGD when validation stalls, and with this split nothing validates")
    ranking = isinstance(split, Impressions)
    carried = backbone.carried(len(split.dataset.offsets) - 1)
    if carried and (ranking or ranks.together() or settings.window != "newest" or settings.stochastic_length):
        raise ValueError(
            f"{backbone.name} trains on what it keeps of each event at its place in the history: that needs the "
            "retrieval task, one process, `training: {window: newest}` and no stochastic_length"
        )
    where, optimizer = _start(backbone, settings, folder, start, carried)
    epoch, best_epoch, best, seconds = (where[key] for key in ("epoch", "best_epoch", "best", "seconds"))
    sgd_after: int | None = where["sgd_after"]
    amp = arithmetic(settings.amp, device) == "bf16"
    metric = "AUC" if ranking else "NDCG@10"

    def once(number: int) -> Iterator[Any]:
        drawn = backbone.max_length, settings.batch_size, seed, number
        if isinstance(split, Impressions):
            return ranking_batches(split, *drawn)
        newest = settings.window == "newest"
        return training_batches(split, *drawn, settings.negatives, settings.stochastic_length, newest, settings.logq)

    def batches(epoch: int) -> Iterator[Any]:
        return chain.from_iterable(once(epoch * split.repeats + i) for i in range(split.repeats))

    steps = split.repeats * sum(1 for _ in once(0))
    ranks.alike(backbone)
    while epoch < settings.epochs:
        if epoch - max(best_epoch, sgd_after or 0) >= max(settings.patience, 1):
            if settings.optimizer == "adam" or sgd_after is not None:
                break
            checkpoints.load_best(backbone, folder, where)
            sgd_after, optimizer = epoch, _optimizer(backbone, settings, sgd=True)
        top = settings.lr if sgd_after is None else settings.sgd_lr
        started = time.perf_counter()
        torch.manual_seed(1_000_003 * seed + epoch + (ranks.rank() << 40))
        backbone.train()
        total = 0.0
        for step, batch in enumerate(batches(epoch)):
            rate = top * _schedule(epoch + step / max(steps, 1), settings.epochs)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            own = ranks.share(batch)
            if part := _targets(own) / max(_targets(batch), 1):
                with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                    own = map_tensors(to_device, own)
                    loss = backbone.ranking_loss(*own) if ranking else backbone.loss(own)
                (loss * part).backward()
                total += float(loss.detach())
            ranks.add_up(backbone)
            optimizer.step()
            so_far = best if best >= 0 else None
            report(Progress(epoch, settings.epochs, step + 1, steps, total / (step + 1), so_far, metric))
        score = ranks.first(lambda: _validate(backbone, split, filter_seen))
        epoch += 1
        if score is None or score > best:
            best, best_epoch = -1.0 if score is None else score, epoch
        seconds += time.perf_counter() - started
        where |= {"epoch": epoch, "best_epoch": best_epoch, "best": best, "seconds": seconds, "sgd_after": sgd_after}
        where = ranks.first(partial(checkpoints.keep, backbone, optimizer, folder, where, carried))
    reached = best if len(split.valid) else None
    scores = {"best_ndcg": None if ranking else reached, "best_auc": reached if ranking else None}
    result = Fit(epoch, best_epoch, seconds=seconds, sgd_after=sgd_after, start=start, **scores)

    def leave() -> Fit:
        if best_epoch:
            checkpoints.load_best(backbone, folder, where)
        return checkpoints.save_weights(backbone, folder, result)

    fitted = ranks.first(leave)
    if ranks.rank():
        checkpoints.load_weights(backbone, folder, start)
    backbone.eval()
    return fitted


def _start(
    backbone: Backbone, settings: Training, folder: Path, start: str | None, carried: dict[str, torch.Tensor]
) -> tuple[dict[str, Any], torch.optim.Optimizer]:
    """The whereabouts of an interrupted fit, or of a fresh one, and its optimizer."""
    if found := checkpoints.resume(backbone, folder, start, carried):
        where, state = found
        optimizer = _optimizer(backbone, settings, sgd=where["sgd_after"] is not None)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return where, optimizer
    fresh = {"epoch": 0, "best_epoch": 0, "best": -1.0, "seconds": 0.0, "sgd_after": None, "weights": None}
    return fresh | ({} if start is None else {"start": start}), _optimizer(backbone, settings, sgd=False)


def _targets(batch: Batch | tuple[Events, Events, torch.Tensor]) -> int:
    """What the loss of a batch is the mean over."""
    return int((batch.targets > 0).sum() if isinstance(batch, Batch) else batch[1].count.sum())


def _validate(backbone: Backbone, split: Split | Impressions, filter_seen: bool) -> float | None:
    if not len(split.valid):
        return None
    if isinstance(split, Impressions):
        return validation_auc(backbone, split)
    return validation_ndcg(backbone, split, split.valid, filter_seen=filter_seen)


@torch.no_grad()
def validation_ndcg(
    backbone: Backbone, split: Split, targets: Targets, limit: int = 20_000, filter_seen: bool = True
) -> float:
    """NDCG@10 over (at most `limit` evenly spaced) targets by the plain forward pass, seen items filtered or not."""
    backbone.eval()
    if len(targets) > limit:
        some = np.linspace(0, len(targets) - 1, limit).astype(int)
        targets = Targets(targets.users[some], targets.at[some])
    device = next(backbone.parameters()).device

    def to_device(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    table, gains = backbone.catalogue(), 0.0
    for rows in by_length(targets, split.dataset, backbone.max_length, _BIG_BATCH):
        users, at = targets.users[rows], targets.at[rows]
        events = map_tensors(to_device, window(split.dataset, users, at, backbone.max_length))
        last = (events.count.long() - 1)[:, None, None].expand(-1, 1, table.shape[1])
        hidden = backbone(events).gather(1, last).transpose(0, 1)
        asked = map_tensors(to_device, question(split.dataset, users, at, filter_seen))
        ranks = rank(hidden, table, asked)
        gains += float(((ranks < 10) / (ranks + 2.0).log2()).sum())
    return gains / max(len(targets), 1)


@torch.no_grad()
def validation_auc(backbone: Backbone, data: Impressions, limit: int = 20_000) -> float:
    """AUC over (at most `limit` evenly spaced) validation requests by the full state; 0.5 where a class is missing."""
    backbone.eval()
    asked = data.valid.rows(np.unique(np.linspace(0, len(data.valid) - 1, min(limit, len(data.valid))).astype(int)))
    device = next(backbone.parameters()).device

    def to_device(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, non_blocking=True)

    scores, labels = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    for rows in by_length(asked, data.dataset, backbone.max_length, _BIG_BATCH):
        history, tokens, liked = map_tensors(to_device, ask(data, asked.rows(rows), backbone.max_length))
        logits = backbone.score(backbone.read(tokens, backbone.prefill(history).state), tokens)
        real = tokens.mask()
        scores.append(logits[real].double().cpu().numpy())
        labels.append(liked[real].cpu().numpy())
    nobody = np.zeros(sum(map(len, scores)), dtype=np.int64)
    (found,) = auc_by_user(lists(np.concatenate(scores), np.concatenate(labels), nobody))[0] if len(nobody) else (0.5,)
    return 0.5 if math.isnan(found) else float(found)


def arithmetic(amp: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """What `amp` of a suite ("auto", "fp32" or "bf16") comes to on a device."""
    return "bf16" if amp == "bf16" or (amp == "auto" and fast_bfloat16(device)) else "fp32"


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matmuls beat float32 ones here: some CPUs emulate them at a hundredth of the speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    flags = Path("/proc/cpuinfo")
    return flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def _schedule(epoch: float, epochs: int) -> float:
    """Linear warm-up over the first epoch, then half a cosine to 0."""
    return min(epoch + 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))


def _optimizer(backbone: Backbone, settings: Training, sgd: bool) -> torch.optim.Optimizer:
    parameters, decay = backbone.parameters(), settings.weight_decay
    if sgd:
        return torch.optim.SGD(parameters, settings.sgd_lr, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(parameters, settings.lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
