"""Bytes packed here are read in a fresh process, which knows nothing but the class: what is read must be in them."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from malloc_bench.backbones import Backbone
from malloc_bench.compressors import Budget, Compressor
from malloc_bench.compressors.base import methods_in
from malloc_bench.registry import load_file, told
from malloc_bench.state import Fitted
from malloc_bench.testing.worlds import World, packed

OTHERS = (7, 30)  # histories of the users that templates are made of
_SECONDS = 300
_BEGAN = dict(os.environ)  # before any method could leave something there


@dataclass(frozen=True)
class Case:
    """A compressor somewhere. backbone: as a structural part finds it; weights: those that it has once adapted; fitted:
    what the compressor has learned there."""

    compressor: Compressor
    backbone: Backbone | None
    budget: Budget | None
    weights: dict[str, Tensor] | None = None
    fitted: Fitted | None = None

    def world(self) -> World:
        part = self.compressor.structural
        if self.backbone is None or part is None:
            return World("elsewhere", self.backbone, self.fitted)
        adapted = part.adapted(self.backbone).eval()
        adapted.load_state_dict(self.weights or adapted.state_dict())
        return World("elsewhere", adapted, self.fitted)

    @torch.no_grad()  # as states are made in a run
    def written(self) -> tuple[Case, list[bytes], Tensor]:
        """With the weights that were used: the bytes of the users of `LENGTHS`, and what is read from their states."""
        world = self.world().fit(self.compressor, self.budget)
        state = self.compressor.compress(world.prefill(self.compressor.needs), self.budget)
        weights = None if world.backbone is None else world.backbone.state_dict()
        return replace(self, weights=weights, fitted=world.fitted), packed(state), world.read(state)

    def read(self, blobs: Sequence[bytes]) -> Tensor:
        world = self.world()
        template = self.compressor.compress(world.prefill(self.compressor.needs, OTHERS), self.budget)
        return world.read(template.unpack(blobs))


def portable(compressor: Compressor) -> bool:
    """Whether another process can import it: no class of a function, a prompt or a notebook."""
    try:
        pickle.dumps(compressor)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return all(type(part).__module__ != "__main__" for part in methods_in(compressor))


def read_elsewhere(cases: Sequence[tuple[Case, list[bytes]]]) -> list[np.ndarray | str]:
    """What a fresh process reads of each case's bytes, or why it cannot, in one line."""
    modules = [sys.modules[type(part).__module__] for case, _ in cases for part in methods_in(case.compressor)]
    files = {module.__name__: getattr(module, "__file__", None) for module in modules}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "asked"), Path(folder, "answer")
        asked.write_bytes(pickle.dumps((files, torch.get_num_threads(), [pickle.dumps(case) for case in cases])))
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        said = Path(folder, "said")
        with said.open("wb") as file:  # no pipe: what a method leaves running would hold it open
            code = _run([sys.executable, "-m", __name__, str(asked), str(answer)], {**_BEGAN, "PYTHONPATH": path}, file)
        if code or not answer.exists():
            why = said.read_text(errors="replace").strip()[-300:]
            raise AssertionError(f"a fresh process ended with {code}: {why}")
        return pickle.loads(answer.read_bytes())


def _run(command: Sequence[str], environment: dict[str, str], said: BinaryIO) -> int:
    """The exit code of a process that is ended after `_SECONDS`, and with it all that it has started."""
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
    )
    try:
        return process.wait(_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _end_with_parent() -> None:
    """When the parent's end of stdin closes, however it ends, this process ends with all that it has started."""
    held = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def hear() -> None:
        os.read(held, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=hear, daemon=True).start()


def _main(asked: str, answer: str) -> None:
    _end_with_parent()
    files, threads, cases = pickle.loads(Path(asked).read_bytes())
    torch.set_num_threads(threads)
    for name, file in files.items():
        try:
            importlib.import_module(name)
        except ImportError:
            load_file(Path(file), name)
    found: list[np.ndarray | str] = []
    for each in cases:
        try:
            case, blobs = pickle.loads(each)
            with torch.no_grad():
                found.append(case.read(blobs).numpy())
        except (Exception, SystemExit) as error:
            found.append(told(error))
    Path(answer).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
