"""Where things lie: shipped cards and suites, the cache, the user's own data folder."""

from __future__ import annotations

import os
from pathlib import Path


def shipped(kind: str) -> Path:
    """The folder of shipped `suites` or `datasets`: of the checkout, or of the installed wheel."""
    package = Path(__file__).parent
    packed = package / f"_{kind}"
    return packed if packed.is_dir() else package.parent / kind


def home() -> Path:
    """Cache of data and checkpoints: `MALLOC_BENCH_HOME`, default `~/.cache/malloc-bench`."""
    return Path(os.environ.get("MALLOC_BENCH_HOME") or Path.home() / ".cache" / "malloc-bench")


def local_data() -> Path | None:
    """The user's own folder of downloaded data sets (`MALLOC_BENCH_DATA`), where there is one."""
    folder = os.environ.get("MALLOC_BENCH_DATA")
    return Path(folder) if folder else None
