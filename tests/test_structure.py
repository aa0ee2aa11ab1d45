"""The building: imports go one way, without circles; files and functions stay small (docs/design.md)."""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightprune"
# From the lowest floor to the highest: a room imports from floors below its own, never from its own floor or above.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("integrations", "hub"),
    ("metrics",),
    ("anatomy", "data"),
    ("plan", "module"),
    ("importance", "surgery"),
    ("masks", "strategies", "costs"),
    ("pipeline",),
    ("selectors", "regularizers", "cut", "recovery", "compensation", "distillation", "callbacks"),
    ("reweighting", "export", "benchmark"),
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


# Private names of other libraries.

PRIVATE_ROOMS = ("integrations", "strategies")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def own_names(files: Sequence[Path] = FILES) -> set[str]:
    """What the package itself defines: functions, classes, names, and what its objects keep on themselves."""
    names: set[str] = set()
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
    return names


def foreign_names(path: Path, own: set[str]) -> Iterator[tuple[str, int]]:
    """The private names of other libraries in a file, and their lines: attributes, imports, names in `getattr`."""
    tree = ast.parse(path.read_text())
    inherited = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") == "super"
    }
    if inherited:  # a method of a foreign base class is defined here and nowhere else
        own = own - (inherited - own_names([file for file in FILES if file != path]))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [] if node.attr in own else [node.attr]
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("lightprune"):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant) and arg.value not in own]
        yield from ((name, node.lineno) for name in names if is_private(name))


def test_private_names_of_other_libraries_stand_in_two_rooms() -> None:
    own = own_names()
    strays = [
        f"{module_name(path)}:{line} {name}"
        for path in FILES
        if room_of(module_name(path)) not in PRIVATE_ROOMS
        for name, line in foreign_names(path, own)
    ]
    assert strays == []


def test_each_private_name_says_what_breaks_without_it() -> None:
    """A comment in the same file names it, and the version of its library in which it was checked."""
    own = own_names()
    untold = []
    for path in FILES:
        if room_of(module_name(path)) in PRIVATE_ROOMS:
            comments = re.findall(r"#[^\n]*(?:\n\s*#[^\n]*)*", path.read_text())
            told = [comment for comment in comments if re.search(r"[A-Za-z] \d+\.\d+", comment)]
            for name, line in foreign_names(path, own):
                if not any(f"`{name}" in comment or f".{name}" in comment for comment in told):
                    untold.append(f"{module_name(path)}:{line} {name}")
    assert untold == []
