"""What a fit leaves on the disk: the weights of its best epoch, and while it runs the state to go on from.

Each JSON file is sealed, says whose it is, and holds the sha256 of the tensors beside it: what does not match, be it
torn, rotten or another fit's, is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from malloc_bench.backbones import Backbone
from malloc_bench.files import Damaged, atomic_write, file_digest, read_sealed, sealed

log = logging.getLogger(__name__)

DONE, WEIGHTS, RESUME = "fit.json", "model.safetensors", "resume.json"


@dataclass(frozen=True)
class Fit:
    """What a fit came to: epochs run, the best of them, its validation score, seconds spent (all sessions).

    The score is NDCG@10 for retrieval and AUC for ranking; the other one is None, both where nothing validates, and
    the best epoch is then the last. sgd_after: the epochs that Adam had run when SGD took over; None: it never did.
    weights: sha256 of the file of weights. start: that of the un-adapted ones that it began from; None: from scratch.
    """

    epochs: int
    best_epoch: int
    best_ndcg: float | None
    seconds: float
    best_auc: float | None = None
    sgd_after: int | None = None
    weights: str | None = None
    start: str | None = None


def finished(folder: Path) -> Fit | None:
    """The fit whose weights lie in `folder`, whole; None where there is none, with a warning where it is spoilt."""
    try:
        about = read_sealed(folder / DONE)
        _same("its name", about.pop("folder", None), folder.name)
        fit = Fit(**about)
        _same(WEIGHTS, file_digest(folder / WEIGHTS), fit.weights)
    except FileNotFoundError:
        return None
    except (Damaged, TypeError) as error:
        log.warning("the weights in %s are not what was written (%s) and are made again", folder, error)
        return None
    return fit


def _same(what: str, found: str | None, written: str | None) -> None:
    if found is None or found != written:
        raise Damaged(f"{what} does not match")


def load_weights(backbone: Backbone, folder: Path, start: str | None = None) -> Fit | None:
    """The finished fit in `folder` from those weights, loaded; None where there is none, or none that fits."""
    fit = finished(folder)
    if fit is None:
        return None
    if fit.start != start:
        log.warning("the weights in %s began from others than are there now and are made again", folder)
        return None
    try:
        backbone.load_state_dict(read_tensors(folder / WEIGHTS, fit.weights))
    except (OSError, RuntimeError, Damaged) as error:
        log.warning("the weights in %s do not fit (%s) and are made again", folder, _line(error))
        return None
    backbone.eval()
    _forget_the_way(folder)
    return fit


def save_weights(backbone: Backbone, folder: Path, fit: Fit) -> Fit:
    """Leave the weights and the fit, with their hash in it, and nothing of the way there; raises ResultsError."""
    fit = Fit(**{**asdict(fit), "weights": write_tensors(folder / WEIGHTS, backbone.state_dict())})
    atomic_write(folder / DONE, sealed({**asdict(fit), "folder": folder.name}))
    _forget_the_way(folder)
    return fit


def _forget_the_way(folder: Path) -> None:
    """Of a finished fit; who loads it forgets what one that was killed here, or could not delete, has left."""
    for leftover in (*folder.glob("resume*"), *folder.glob("best-*")):
        with contextlib.suppress(OSError):
            leftover.unlink()


def copy_weights(source: Path, target: Path) -> None:
    """A finished fit as another folder of the same name; what is whole there stays. Raises ResultsError."""
    for name in (WEIGHTS, DONE):  # the small file that vouches for the large one comes last
        content = (source / name).read_bytes()
        if file_digest(target / name) != hashlib.sha256(content).hexdigest():
            atomic_write(target / name, content)


# ---- of a fit that runs


def resume(
    backbone: Backbone, folder: Path, start: str | None = None, carried: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, Any], dict[int, dict[str, torch.Tensor]]] | None:
    """The whereabouts of an interrupted fit from `start`, its optimizer's state by parameter, its weights loaded and
    what it `carried` set; None: none.

    None, with a warning, also where anything of it is not what was written; the backbone is then as it was.
    """
    try:
        where = read_sealed(folder / RESUME)
        _same("its name", where.pop("folder", None), folder.name)
        if where.get("start") != start:
            raise Damaged("it began from other weights")
        tensors = read_tensors(folder / f"resume-{where['epoch']}.safetensors", where.pop("resume"))
        _same("the best epoch", file_digest(folder / f"best-{where['best_epoch']}.safetensors"), where["weights"])
        numbers = {name: i for i, (name, _) in enumerate(backbone.named_parameters())}
        state: dict[int, dict[str, torch.Tensor]] = {i: {} for i in numbers.values()}
        for label, tensor in tensors.items():
            kind, _, rest = label.partition(".")
            if kind == "optimizer":
                key, _, name = rest.partition(".")
                state[numbers[name]][key] = tensor
        kept = [(x, tensors[f"carried.{name}"].reshape(x.shape)) for name, x in (carried or {}).items()]
        backbone.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
    except FileNotFoundError:
        return None
    except (Damaged, KeyError, OSError, RuntimeError) as error:
        log.warning("the unfinished training in %s cannot be gone on from (%s) and begins anew", folder, _line(error))
        return None
    for tensor, found in kept:
        tensor.copy_(found)
    return where, state


def keep(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    where: Mapping[str, Any],
    carried: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Keep an epoch: the tensors first, then the small file that names them; a kill between the two leaves the older

    ones in force. Returns `where` with the hash of the best epoch's weights. Raises ResultsError.
    """
    current, best = (f"{kind}-{where[key]}.safetensors" for kind, key in (("resume", "epoch"), ("best", "best_epoch")))
    tensors = {f"model.{k}": v for k, v in backbone.state_dict().items()}
    tensors |= {f"carried.{k}": v for k, v in (carried or {}).items()}
    for name, parameter in backbone.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    where = dict(where)
    if where["best_epoch"] == where["epoch"]:
        where["weights"] = write_tensors(folder / best, backbone.state_dict())
    written = write_tensors(folder / current, tensors)
    atomic_write(folder / RESUME, sealed({**where, "resume": written, "folder": folder.name}))
    for older in (*folder.glob("resume-*"), *folder.glob("best-*")):
        if older.name not in (current, best):
            older.unlink()
    return where


def load_best(backbone: Backbone, folder: Path, where: Mapping[str, Any]) -> None:
    """Load the weights of the best epoch so far; raises Damaged where they are not what was written."""
    backbone.load_state_dict(read_tensors(folder / f"best-{where['best_epoch']}.safetensors", where["weights"]))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Tensors as an atomic safetensors file; its sha256. Raises ResultsError."""
    content = save({k: v.detach().contiguous().cpu() for k, v in tensors.items()})
    atomic_write(path, content)
    return hashlib.sha256(content).hexdigest()


def read_tensors(path: Path, written: str | None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file whose sha256 is known; raises Damaged, OSError."""
    content = path.read_bytes()  # hashed and parsed from the same bytes: nothing can change between
    _same(path.name, hashlib.sha256(content).hexdigest(), written)
    try:
        return load(content)
    except SafetensorError as error:
        raise Damaged(str(error)) from None


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
