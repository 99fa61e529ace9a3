"""Is a run what was written: every row, the parquet, the manifest and every file that belongs to a row."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from malloc_bench.files import DIGEST, Damaged, ResultsError, file_digest, read_sealed
from malloc_bench.results import no_results, read_parquet, read_row, rows_of


@dataclass
class Verified:
    """What was looked at, and a line for all that is not as written."""

    rows: int = 0
    files: int = 0  # beside the rows: parquet, manifest, values by user, latency samples
    damaged: list[str] = field(default_factory=list)
    without: Counter[str] = field(default_factory=Counter)  # folder of which nothing was kept -> files that rows name

    def __str__(self) -> str:
        said = f"{len(self.damaged)} damaged" if self.damaged else "all as written"
        without = "".join(f", without {folder}/ ({n:,} files)" for folder, n in sorted(self.without.items()))
        return f"{self.rows:,} rows, {self.files:,} files{without}: {said}"


def verify(run: str | Path) -> Verified:
    """Hold a run's folder against the digests in it. Changes no file.

    A file of a row that is gone is damage where others lie in its folder: a run may be kept without all of a kind, and
    is said to be, but not without some. Raises FileNotFoundError where the folder holds neither rows nor a parquet.
    """
    folder, found = Path(run), Verified()
    paths, parquet = sorted((folder / "rows").glob("*.json")), folder / "results.parquet"
    if not paths and not parquet.is_file():
        raise no_results(folder)
    digests: dict[str, Any] = {}
    for path in paths:
        row, fault = read_row(path)
        digests[path.stem] = None if fault else row[DIGEST]
        if fault:
            found.damaged.append(f"rows/{path.name}: {fault}")
        else:
            found.rows += 1
            _files(folder, row["hashes"], found)
    if parquet.is_file():
        found.files += 1
        found.damaged += _parquet(parquet, digests, found)
    if (folder / "manifest.json").exists():
        found.files += 1
        try:
            read_sealed(folder / "manifest.json")
        except Damaged as error:
            found.damaged.append(f"manifest.json: {error}")
    else:
        found.damaged.append("manifest.json: gone")
    return found


def _files(folder: Path, hashes: Any, found: Verified) -> None:
    """Look at the files that belong to a row."""
    files = hashes.get("files") if isinstance(hashes, Mapping) else None
    for name, known in (files or {}).items():
        path = folder / name
        if path.exists():
            found.files += 1
            if file_digest(path) != known:
                found.damaged.append(f"{name}: not what was written")
        elif path.parent.is_dir() and any(path.parent.iterdir()):
            found.damaged.append(f"{name}: gone")
        else:
            found.without[str(Path(name).parent)] += 1


def _parquet(path: Path, digests: Mapping[str, Any], found: Verified) -> Iterator[str]:
    """What is wrong with the parquet. digests: of the rows beside it, by cell; without any it is the truth itself."""
    try:
        frame = read_parquet(path)
    except ResultsError as error:
        yield f"{path.name}: {error}".replace(f"{path} ", "")
        return
    if not digests:
        found.rows = len(frame)
        for hashes in frame["hashes"].drop_nulls():
            _files(path.parent, json.loads(hashes), found)
    for cell, known in frame.select("cell_id", DIGEST).iter_rows() if digests else ():
        if cell not in digests:
            yield f"rows/{cell}.json: gone ({path.name} has it)"
        elif digests[cell] is not None and known is not None and digests[cell] != known:
            yield f"{path.name}: has another row than rows/{cell}.json (malloc-bench report makes it anew)"


def sample(run: str | Path, k: int, seed: int = 0) -> list[str]:
    """Ids of k cells of a run that ended ok, drawn at random; all of them where there are fewer. Raises ValueError."""
    cells = sorted(row["cell_id"] for row in rows_of(run) if row["status"] == "ok")
    if not cells:
        raise ValueError(f"{run} holds no rows that ended ok, which say how to compute a cell again")
    return random.Random(seed).sample(cells, min(k, len(cells)))
