"""What there is, in words: the lines of `malloc-bench list` and `malloc-bench show`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from malloc_bench import registry
from malloc_bench.paths import shipped
from malloc_bench.registry import UnknownName, clipped, suggest

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone
    from malloc_bench.compressors import Compressor

KINDS = ("datasets", "backbones", "compressors", "suites")
OURS = "malloc-bench"

Lines = list[tuple[str, str]]


# ---- list


MANY = 10  # variants of one card from which on they are one line


def listing(kind: str, words: Sequence[str] = (), grouped: bool = False) -> tuple[list[str], list[list[str]]]:
    """Column heads and one row a part of a kind: those that have all the words somewhere, or, without any, all.

    grouped: data sets of one card with many variants are one row, where no word asks for them. Raises UnknownName where
    there is no such kind, or nothing has the words.
    """
    makers = {"datasets": _datasets, "backbones": _backbones, "compressors": _compressors, "suites": _suites}
    if kind not in makers:
        raise UnknownName(f"nothing is listed under '{kind}'.{suggest(kind, makers)}")
    heads, rows = makers[kind]()
    if not words:
        return heads, _grouped(rows) if grouped and kind == "datasets" else rows
    found = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in words)]
    if not found:
        names = [row[0] for row in rows]
        raise UnknownName(f"none of {len(names)} {kind} has '{' '.join(words)}'. Did you mean {near(words[0], names)}?")
    return heads, found


def near(name: str, names: Iterable[str]) -> str:
    """Three names that are like one: `'a', 'b' or 'c'`, those that begin with it or have it first."""
    every = sorted(names)
    like = difflib.get_close_matches(name, every, n=3, cutoff=0.3) or every
    first = [each for each in every if each.startswith(name)] + [each for each in every if name in each]
    *others, last = map(repr, list(dict.fromkeys([*first, *like]))[:3])
    return f"{', '.join(others)} or {last}" if others else last


def _grouped(rows: list[list[str]]) -> list[list[str]]:
    """Rows of data sets, those of one card as one row where they are many."""
    from malloc_bench.data.sources.cards import card_files

    files = card_files()
    by_card: dict[Path, list[list[str]]] = {}
    for row in rows:
        by_card.setdefault(files[row[0]], []).append(row)
    found = []
    for path, each in by_card.items():
        if len(each) < MANY:
            found += each
            continue
        said = f"{len(each)} variants, such as {each[0][0]}: malloc-bench list datasets {path.stem}-"
        found.append([f"{path.stem}-...", said, "", "", "", each[0][-1]])
    return sorted(found)


def _compressors() -> tuple[list[str], list[list[str]]]:
    found = [(name, registry.find("compressors", name)) for name in registry.names("compressors")]
    found.sort(key=lambda each: (each[1].family, each[0]))
    return ["name", "family", "paper", "from"], [[name, cls.family, cls.paper, origin(cls)] for name, cls in found]


def _backbones() -> tuple[list[str], list[list[str]]]:
    found = [(name, registry.find("backbones", name)) for name in registry.names("backbones")]
    return ["name", "paper", "from"], [[name, cls.paper, origin(cls)] for name, cls in found]


def _datasets() -> tuple[list[str], list[list[str]]]:
    from malloc_bench.data import DataError
    from malloc_bench.data.sources.cards import card_files, load_card

    rows = []
    files = card_files()
    for name, path in sorted(files.items()):
        try:
            card = load_card(name, files)
        except DataError as error:  # one bad card must not hide the others
            rows.append([name, f"cannot be read: {error}", "", "", "", str(path.parent)])
            continue
        counts: Any = card.published or card.parameters
        size = ["" if (n := getattr(counts, key, None)) is None else f"{n:,}" for key in ("users", "items", "events")]
        ours = path.parent == shipped("datasets")
        rows.append([name, card.title, *size, OURS if ours else str(path.parent)])
    return ["name", "title", "users", "items", "events", "from"], rows


def _suites() -> tuple[list[str], list[list[str]]]:
    files = sorted(shipped("suites").glob("*.yaml"))
    return ["name", "what it does"], [[file.stem, header(file.read_text(encoding="utf-8"))[0]] for file in files]


def origin(cls: type) -> str:
    """The distribution that a class comes with, or its module where it comes with none."""
    package = cls.__module__.split(".")[0]
    if package == __name__.split(".")[0]:
        return OURS
    return ", ".join(dict.fromkeys(metadata.packages_distributions().get(package, []))) or cls.__module__


def header(text: str) -> list[str]:
    """The comment lines at the top of a YAML file, at least one."""
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]] or [""]


# ---- show


def show(name: str) -> list[tuple[str, Lines]]:
    """(kind, [(label, text)]) of everything that has the name; raises UnknownName with the nearest."""
    from malloc_bench.data import list_datasets
    from malloc_bench.data.sources.cards import is_path

    if is_path(name):  # of a card of the user's own
        return [("dataset", _dataset(name))]
    suites = [path.stem for path in shipped("suites").glob("*.yaml")]
    shown: list[tuple[str, Lines]] = []
    if name in registry.names("compressors"):
        shown.append(("compressor", _compressor(registry.find("compressors", name))))
    if name in registry.names("backbones"):
        shown.append(("backbone", _backbone(registry.find("backbones", name))))
    if name in list_datasets():
        shown.append(("dataset", _dataset(name)))
    if name in suites:
        shown.append(("suite", _suite(name)))
    if not shown:
        known = {*registry.names("compressors"), *registry.names("backbones"), *list_datasets(), *suites}
        raise UnknownName(f"nothing is named '{clipped(name)}'. Did you mean {near(name[:100], known)}?")
    return shown


def explained(name: str, run: Path, only: Mapping[str, Sequence[str]]) -> list[tuple[str, Lines]]:
    """(kind, [(cell, a line)]) of what a method makes of a run's budgets by what it learned; raises ValueError."""
    from malloc_bench import load_run
    from malloc_bench.results import rows_of
    from malloc_bench.suite import suite
    from malloc_bench.suite.cells import Cell

    loaded = load_run(run)
    rows = rows_of(loaded.folder)
    cells = [Cell.of_row(row) for row in rows]
    suite.only(cells, only)  # what no row of the run has is said first, whichever method was named
    of_it = [cell for cell in cells if name in (cell.compressor.name, cell.compressor.label)]
    if not of_it:
        raise ValueError(f"{run} has no row of {name}: name a run of a suite with {name} in it (--run)")
    asked = suite.only(of_it, only)
    lines: Lines = []
    for row, cell in zip(rows, cells):
        said = loaded.explained(row["cell_id"]) if cell in asked else ()
        lines += [(str(cell) if not n else "", line) for n, line in enumerate(said)]
    if not lines:
        raise ValueError(f"{run}: {name} makes nothing of a budget by what it learned, or has no row here")
    return [("plan", lines)]


def _compressor(cls: type[Compressor]) -> Lines:
    from malloc_bench.compressors import Compressor
    from malloc_bench.compressors.base import inner_methods
    from malloc_bench.state import Stats

    method = _default(cls)
    if cls.flops is not Compressor.flops:
        own = _doc(cls.flops) or "see its file"
    elif method is not None and any(inner_methods(method)):
        own = "what the inner method costs"
    else:
        own = "none that is matmul-like"
    work = (
        f"{own.rstrip('.')}, beside gathering what it reads" if method is not None and method.needs != Stats() else own
    )
    return [
        ("", _doc(cls)),
        ("family", cls.family),
        ("paper", cls.paper),
        ("formula", cls.formula),
        ("stores", cls.stores),
        *([("note", cls.note)] if cls.note else []),
        ("size", _size(cls)),
        ("reads", _reads(cls)),
        ("work of compress", work),
        *([("grows as", ", ".join(f"{what} {term}" for what, term in cls.growth.items()))] if cls.growth else []),
        *_parameters(cls),
        *(("tuned over", f"{key}: {', '.join(map(str, values))}") for key, values in cls.grid.items()),
        ("version", str(cls.version)),
        ("from", f"{origin(cls)}, {_file(cls)}"),
    ]


def stores(name: str) -> str:
    """What a compressor keeps, in words; blank for one that is not known here, such as a user's own."""
    known = name in registry.names("compressors")
    return registry.find("compressors", name).stores.rstrip(".") if known else ""


def _size(cls: type[Compressor]) -> str:
    method = _default(cls)
    if method is None:
        return "depends on its parameters"
    return "by the budget" if method.takes_budget else "follows from its parameters: one cell, no budget"


def _reads(cls: type[Compressor]) -> str:
    method = _default(cls)
    if method is None:
        return "the state, and what its parameters ask for"
    words = ["the state"]
    if method.needs.column_sum:
        words.append("the attention that each slot received, summed over queries")
    if method.needs.window:
        words.append(f"the attention weights of the newest {method.needs.window} queries")
    return ", and ".join(words)


def _default(cls: type[Compressor]) -> Compressor | None:
    from malloc_bench.state import Stats

    try:
        made = cls()
        return made if made.needs | Stats() and made.takes_budget is not None else None
    except (Exception, SystemExit):  # some parameter has no default, or the class a fault, which `check` tells of
        return None


def _backbone(cls: type[Backbone]) -> Lines:
    where = "of every event in each layer" if cls.has_slots else "in each layer, as large for any history"
    return [
        ("", _doc(cls)),
        ("paper", cls.paper),
        ("stores", f"{', '.join(cls.fields)} {where}"),
        ("", _doc(cls.Config)),
        *_parameters(cls.Config),
        *(("preset", f"{name}: {json.dumps(dict(params))}") for name, params in cls.presets.items()),
        ("version", str(cls.version)),
        ("from", f"{origin(cls)}, {_file(cls)}"),
    ]


def _dataset(name: str) -> Lines:
    from malloc_bench.data.sources.cards import card_files, is_path, load_card

    card = load_card(name)
    lines = [("", card.title), ("", card.description)]
    if card.published:
        counts = card.published.model_dump(exclude_none=True)
        lines.append(("published", ", ".join(f"{n:,} {what}" for what, n in counts.items())))
    if card.parameters:
        lines.append(("generated", ", ".join(f"{key} {value}" for key, value in card.parameters.model_dump().items())))
    lines += [
        ("source", f"{source} (member {m if isinstance(m, str) else ', '.join(m)})" if m else str(source))
        for source in card.sources
        for m in [getattr(source, "member", None)]
    ]
    lines += [("licence", card.licence), ("citation", card.citation), ("homepage", card.homepage)]
    lines = [line for line in lines if line[1]]  # an own card leaves some out
    return [*lines, ("from", name if is_path(name) else str(card_files()[name]))]


def _suite(name: str) -> Lines:
    from malloc_bench.suite.suite import load_suite

    suite = load_suite(name)
    listed = {
        "datasets": suite.datasets,
        "tasks": [str(task) for task in suite.tasks],
        "split": [str(split or "temporal where there are times, else leave_one_out") for split in suite.splits],
        "backbones": [part.label for part in suite.backbones],
        "compressors": [part.label for part in suite.compressors],
        "budgets": [str(budget.value()) for budget in suite.budgets],
        "seeds": [str(seed) for seed in suite.seeds],
    }
    lines = [("", line.strip()) for line in header(suite.path.read_text(encoding="utf-8"))]
    lines += [(key, ", ".join(values)) for key, values in listed.items()]
    return [*lines, ("cells", str(len(suite.cells()))), ("from", str(suite.path))]


def _parameters(cls: Any) -> Iterable[tuple[str, str]]:
    for f in dataclasses.fields(cls):
        default = "" if f.default is dataclasses.MISSING else f" = {f.default!r}"
        kind = f.type if isinstance(f.type, str) else inspect.formatannotation(f.type)
        yield "parameter", f"{f.name}: {kind}{default}"


def _doc(of: Any) -> str:
    """A docstring with its paragraphs on one line each."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(of.__doc__ or ""))


def _file(cls: type) -> str:
    try:
        return inspect.getfile(cls)
    except (OSError, TypeError):
        return cls.__module__
