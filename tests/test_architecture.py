"""The layout of the package: imports run one way, nothing is in a circle, every room is on the map.

Imports are read from the source text, so lazy ones (inside functions) and typing ones count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src"
MAP = REPOSITORY / "docs" / "architecture.md"
LONGEST_FILE = 500
LARGEST_ROOT = 6

#: From the ground up. A module may import what stands before its own room, and its own room.
ROOMS = (
    "errors",
    "atomic_files",
    "randomness",
    "risk",
    "native",
    "accounting.adjacency",
    "accounting.arguments",
    "accounting.events",
    "accounting.toeplitz",
    "accounting.buffered",
    "accounting.correlated",
    "accounting.pairs",
    "accounting.composition",
    "accounting.accountants",
    "accounting.planning",
    "accounting",
    "sampling",
    "clipping",
    "noise",
    "tape.provenance",
    "tape.propagation",
    "tape.gradients",
    "tape.rules",
    "tape.recording",
    "tape",
    "distributed",
    "validation",
    "plan",
    "ledger",
    "statement",
    "engine",
    "integrations.transformers",
    "blogs",
    "postprocessing",
    "tables",
    "training",
    "prediction",
    "audit",
    "integrations",
    "text",
    "vision",
    "prediction.serving",
    "statistics",
    "compat",
    "bench",
    "cli",
    "compat.private_vision.__main__",  # a command
    "",
)


def modules_of(source: Path) -> dict[str, Path]:
    """Every module under `source` by its dotted name; a package's is that of its `__init__`."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(text: str, modules: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in modules:
                    yield inner
                elif node.module in modules:
                    yield node.module


def graph_of(source: Path) -> dict[str, set[str]]:
    """Module -> the modules it imports."""
    modules = modules_of(source)
    return {
        name: set(imports_of(path.read_text(), modules)) - {name} for name, path in modules.items()
    }


@cache
def room_of(module: str) -> str:
    """The longest room that `module` is in."""
    inside = module.removeprefix("dptorch").removeprefix(".")
    fits = [r for r in ROOMS if inside == r or (r and inside.startswith(r + "."))]
    assert fits, f"{module} is in no room: give it a place in ROOMS and on the map"
    return max(fits, key=len)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a room that stands above."""
    floor = {room: i for i, room in enumerate(ROOMS)}
    return [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if floor[room_of(other)] > floor[room_of(module)]
    ]


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Modules that can be reached from themselves: what is left when leaves are taken off."""
    left = {module: set(others) for module, others in graph.items()}
    while leaves := [module for module, others in left.items() if not others & left.keys()]:
        for module in leaves:
            del left[module]
    return set(left)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return graph_of(SOURCE)


def test_no_import_runs_upwards(graph):
    assert upward(graph) == []


def test_no_file_is_in_a_circle(graph):
    assert circles(graph) == set()


def test_mechanisms_know_nothing_of_each_other(graph):
    """Tape, noise, clipping and sampling meet in the engine, but for the type of a clipped sum."""
    mechanisms = ("tape", "noise", "clipping", "sampling")

    def mechanism_of(module: str) -> str | None:
        first = module.removeprefix("dptorch.").partition(".")[0]
        return first if first in mechanisms else None

    met = {
        (mechanism_of(module), other)
        for module, others in graph.items()
        for other in others
        if mechanism_of(module) and mechanism_of(other) not in (None, mechanism_of(module))
    }
    assert met == {("noise", "dptorch.clipping.sums")}


def test_what_runs_upwards_or_in_a_circle_is_found(tmp_path):
    """The broken twin: a lazy import upwards, and a circle closed by a typing import."""
    package = tmp_path / "dptorch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "errors.py").write_text("def f():\n    from dptorch.plan import g\n")
    (package / "plan.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dptorch import errors\n"
    )
    graph = graph_of(tmp_path)
    assert upward(graph) == ["dptorch.errors -> dptorch.plan"]
    assert circles(graph) == {"dptorch.errors", "dptorch.plan"}


def shadowed(modules: dict[str, Path]) -> list[str]:
    """Modules that their package hides: its ``__init__`` binds their name to something else.

    ``from dptorch.pkg.name import name`` in ``dptorch/pkg/__init__.py`` makes ``dptorch.pkg.name``
    that function, so that the module cannot be reached as an attribute.
    """
    found = []
    for package, path in modules.items():
        if path.name != "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            bound: list[tuple[str, str]] = []  # (name, where it comes from)
            if isinstance(node, ast.ImportFrom):
                bound = [(a.asname or a.name, f"{node.module}.{a.name}") for a in node.names]
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound = [(node.name, "here")]
            found += [
                inner
                for name, origin in bound
                if (inner := f"{package}.{name}") in modules and origin != inner
            ]
    return found


def test_no_module_is_shadowed_by_a_name_of_its_package():
    assert shadowed(modules_of(SOURCE)) == []


def test_a_shadowed_module_is_found(tmp_path):
    """The broken twin."""
    package = tmp_path / "dptorch"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from dptorch.check import check\nfrom dptorch import plan\ndef prepare(): ...\n"
    )
    for name in ("check", "plan", "prepare"):
        (package / f"{name}.py").write_text("")
    assert shadowed(modules_of(tmp_path)) == ["dptorch.check", "dptorch.prepare"]


def test_files_are_short():
    long = {
        str(path.relative_to(SOURCE)): lines
        for path in SOURCE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert long == {}


def test_the_root_is_small():
    assert len(list((SOURCE / "dptorch").glob("*.py"))) <= LARGEST_ROOT


def test_every_file_or_its_room_is_on_the_map():
    """A room is written ``name/`` on the map, a file by its name with or without ``.py``."""
    text = MAP.read_text()
    named = set(re.findall(r"[\w.]+/?", text))
    missing = []
    for path in SOURCE.rglob("*.py"):
        where = path.relative_to(SOURCE / "dptorch")
        rooms = {f"{part}/" for part in where.parts[:-1]}
        if where.name != "__init__.py" and not {where.name, where.stem, *rooms} & named:
            missing.append(str(where))
    assert missing == []


def test_every_room_of_the_map_exists():
    """What the map draws as a folder or a file is there."""
    block = next(b for b in MAP.read_text().split("\n\n") if "src/dptorch/" in b)
    folders = {p.name + "/" for p in SOURCE.rglob("*") if p.is_dir()} | {"src/dptorch/"}
    files = {p.name for p in SOURCE.rglob("*") if p.is_file()}
    first = [line.split()[0] for line in block.splitlines() if line.strip()]
    gone = [
        word
        for word in first
        if (word.endswith("/") and word not in folders)
        or (word.endswith((".py", ".c")) and word not in files)
    ]
    assert gone == []
