"""The house: imports point downward only, in the order of rooms that the design gives, and nothing goes in circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "malloc_bench"

#: from the top floor down; a room may import what stands behind it, and itself
ROOMS = (
    "cli", "run", "suite", "report", "measure", "training", "testing", "evaluation", "compressors", "data", "backbones",
    "results", "state", "kernels", "files", "strict_yaml", "registry", "paths",
)  # fmt: skip
#: and of these rooms only so much
ONLY = {
    "state": {"kernels"},
    "kernels": set(),
    "registry": set(),
    "paths": set(),
    "report": {"results", "evaluation", "registry"},
}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports when it runs, inside of functions too; not what type checkers alone read."""
    tree = ast.parse(path.read_text())
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{each.name}" for each in node.names} & known.keys() or {node.module}
    return found & known.keys()


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def test_imports_point_downward(graph):
    up = []
    for module, wanted in graph.items():
        here = room(module)
        if here not in ROOMS:
            continue
        allowed = ONLY.get(here, set(ROOMS[ROOMS.index(here) :])) | {here}
        up += [f"{module} -> {each}" for each in wanted if room(each) is not None and room(each) not in allowed]
    assert not up


def test_every_room_has_its_floor(graph):
    assert {room(module) for module in graph} - {None, "_moved"} == set(ROOMS)


def test_nothing_goes_in_circles(graph):
    """Of modules; a package and its own `__init__` apart, which gathers names for those outside."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    plain = {name: wanted - packages for name, wanted in graph.items() if name not in packages}
    tuple(TopologicalSorter(plain).static_order())  # raises CycleError with the circle


def test_files_stay_readable():
    long = {str(path): n for path in PACKAGE.rglob("*.py") if (n := len(path.read_text().splitlines())) > 350}
    assert not long
