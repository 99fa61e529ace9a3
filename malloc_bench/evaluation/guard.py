"""What a method must leave as it found it: the tensors it was given, and the process it runs in."""

from __future__ import annotations

import contextlib
import os
import random
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from malloc_bench.registry import shown, told
from malloc_bench.state import map_tensors

_ROW = 512  # words


class InputChanged(RuntimeError):
    """A method wrote into what it was given."""


class ProcessChanged(RuntimeError):
    """A method changed a setting of the whole process."""


class Failure(NamedTuple):
    """Why a job has no values: in a line, and in full."""

    reason: str
    traceback: str


def failure(error: BaseException) -> Failure:
    """Of the exception that is being handled."""
    return Failure(told(error), shown(traceback.format_exc()))


def fingerprint(*parts: Any) -> list[tuple[Any, ...]]:
    """Shape, dtype and a checksum of the content of every tensor in parts (`map_tensors`); reads memory about once."""
    found: list[tuple[Any, ...]] = []
    map_tensors(lambda x: found.append((x.shape, x.dtype, *_sums(x))) or x, parts)  # type: ignore[func-returns-value]
    return found


def _sums(x: Tensor) -> Iterator[int]:
    """Checksums of wrapping sums over rows and over columns of the words: any one change shows, and any swap."""
    flat = x.detach().contiguous().view(-1)
    flat = (flat.clone() if flat.storage_offset() else flat).view(torch.uint8)  # words are read where words begin
    size = len(flat) // (8 * _ROW) * 8 * _ROW
    words = flat[:size].view(torch.int64).view(-1, _ROW)
    for part in (words.sum(1), words.sum(0), flat[size:]):
        yield zlib.crc32(part.cpu().numpy().tobytes())


@contextlib.contextmanager
def unwritten(*models: nn.Module) -> Iterator[None]:
    """Weights are afterwards as they were: what methods are given leads to them (maps of outputs, layers of probes).

    Raises InputChanged where they were written into.
    """
    every = {id(x): x for model in models for x in (*model.parameters(), *model.buffers())}
    kept = [(x, x.detach().clone()) for x in every.values()]
    before, changed = fingerprint([was for _, was in kept]), False
    try:
        yield
    finally:
        after = fingerprint([x.detach() for x, _ in kept])
        for (x, was), one, other in zip(kept, before, after):
            if one != other:
                x.data, changed = was, True
    if changed:
        raise InputChanged("a method changed the weights of the backbone")


# of torch's compilers, whatever they put there; as names are kept, for none is decoded at every look
_COMPILERS = tuple(os.environ.encodekey(name) for name in ("TORCHINDUCTOR_", "TRITON_"))


def _environment() -> dict[Any, Any]:
    kept: dict[Any, Any] = getattr(os.environ, "_data")  # noqa: B009 - typing does not know it
    return {name: value for name, value in kept.items() if not name.startswith(_COMPILERS)}


def _set_environment(was: dict[Any, Any]) -> None:
    for name in _environment().keys() - was.keys():
        del os.environ[os.fsdecode(name)]
    os.environ.update({os.fsdecode(name): os.fsdecode(value) for name, value in was.items()})


#: Settings of the process, each with how it is read and put back.
_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "torch's choice of algorithms": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "the working folder": (os.getcwd, os.chdir),
    "the environment": (_environment, _set_environment),
}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Settings of the process, the gradient mode and the random numbers are afterwards as they were.

    Raises ProcessChanged where a setting was changed, whatever else went wrong.
    """
    before = {name: read() for name, (read, _) in _SETTINGS.items()}
    grad, drawn = torch.is_grad_enabled(), (torch.get_rng_state(), np.random.get_state(), random.getstate())
    error: Exception | None = None
    changed: dict[str, Any] = {}
    try:
        yield
    except Exception as caught:
        error = caught
    finally:
        changed = {name: now for name, was in before.items() if (now := _SETTINGS[name][0]()) != was}
        for name in changed:
            _SETTINGS[name][1](before[name])
        torch.set_grad_enabled(grad)
        torch.set_rng_state(drawn[0])
        np.random.set_state(drawn[1])
        random.setstate(drawn[2])
    for name, now in changed.items():
        what = "" if isinstance(now, dict) else f" from {before[name]} to {now}"
        raise ProcessChanged(f"the method changed {name}{what}, for the whole process") from error
    if error is not None:
        raise error
