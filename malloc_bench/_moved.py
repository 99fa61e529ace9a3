"""Modules that moved in 0.2 still answer to their old names, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

#: old room -> the modules of it that have moved, as old name: new place
_MOVED = {
    f"malloc_bench.{old}": f"malloc_bench.{new}"
    for room, pairs in {
        "": {
            "describe": "cli.describe", "cells": "suite.cells", "plan": "suite.plan", "runner": "run.runner",
            "sitting": "run.session", "run_folder": "run.folder", "progress": "run.progress", "rows": "run.rows",
            "asking": "evaluation.requests", "ranking": "evaluation.ranking", "metrics": "evaluation.metrics",
            "backbones.climber_deal": "backbones.climber_partition",
        },
        "data.": {
            **{name: f"data.sources.{name}" for name in ("cards", "card_sources", "download", "archive")},
            **{name: f"data.formats.{name}" for name in ("parse", "ids", "policies", "categories")},
            **{name: f"data.tasks.{name}" for name in ("splits", "batches", "options")},
            **{name: f"data.worlds.{name}" for name in ("synthetic", "world", "ceilings")},
            "exposures": "data.tasks.impressions",
        },
    }.items()
    for old, new in ((room + old, new) for old, new in pairs.items())
}  # fmt: skip


class _Moved(MetaPathFinder, Loader):
    """Asked last, so only for names that nothing else knows."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        new = _MOVED[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


sys.meta_path.append(_Moved())
