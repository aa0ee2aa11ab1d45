"""The building: imports go one way, without circles; files and functions stay small (docs/design.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightprune"
# From the lowest floor to the highest: a room imports from floors below its own, never from its own floor or above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("metrics",),
    ("integrations", "hub"),
    ("anatomy", "data"),
    ("plan", "module"),
    ("importance", "surgery"),
    ("masks", "strategies"),
    ("pipeline",),
    ("selectors", "regularizers", "cut", "recovery", "callbacks"),
    ("reweighting", "export"),
    ("__init__",),  # the public names, imported when they are asked for
    ("cli", "testing"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it, also for type checkers alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return {name for name in found if name in MODULES and name != module_name(path)}


ARROWS = {name: imports_of(path) for name, path in MODULES.items()}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} <= FLOOR.keys()


def test_imports_go_upward_only() -> None:
    wrong = [
        f"{module} -> {target}"
        for module, targets in ARROWS.items()
        for target in targets
        if room_of(module) != room_of(target) and FLOOR[room_of(target)] >= FLOOR[room_of(module)]
    ]
    assert wrong == []


def reached_from(start: str) -> set[str]:
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        for target in ARROWS[ahead.pop()] - seen:
            seen.add(target)
            ahead.append(target)
    return seen


def test_no_circle() -> None:
    assert [module for module in MODULES if module in reached_from(module)] == []


def test_few_files_at_the_top() -> None:
    assert len(list(PACKAGE.glob("*.py"))) < 12


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_are_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_functions_are_short(path: Path) -> None:
    assert {name: lines for name, lines in functions(path) if lines > 60} == {}
