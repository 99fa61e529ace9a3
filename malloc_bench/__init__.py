"""malloc-bench: how small can a recommender's user state get before recommendations suffer? Measured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from malloc_bench import _moved as _moved

if TYPE_CHECKING:
    from malloc_bench.backbones import get_backbone
    from malloc_bench.compressors import Budget, get_compressor
    from malloc_bench.data import get_dataset
    from malloc_bench.registry import register
    from malloc_bench.results import load_results
    from malloc_bench.run.loaded import load_run
    from malloc_bench.run.runner import run_suite
    from malloc_bench.state import Prefill, UserState
    from malloc_bench.suite.suite import load_suite

__all__ = [
    "Budget", "Prefill", "UserState", "get_backbone", "get_compressor", "get_dataset", "load_results", "load_run",
    "load_suite", "register", "run_suite",
]  # fmt: skip

#: public name -> module, imported when it is first asked for: torch alone takes seconds
_HOME = {
    "Budget": "compressors",
    "Prefill": "state",
    "UserState": "state",
    "get_backbone": "backbones",
    "get_compressor": "compressors",
    "get_dataset": "data",
    "load_results": "results",
    "load_run": "run.loaded",
    "load_suite": "suite",
    "register": "registry",
    "run_suite": "run.runner",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"malloc_bench.{_HOME[name]}"), name)
    elif name == "__version__":
        value = importlib.import_module("importlib.metadata").version("malloc-bench")
    else:
        raise AttributeError(f"module 'malloc_bench' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "__version__"})
