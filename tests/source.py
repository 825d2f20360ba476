"""The tests' own source, parsed, for the tests that hold rules about it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent


@cache
def trees() -> dict[str, ast.Module]:
    """Every Python file of the tests by its path from here; other people's documents are none."""
    return {
        str(path.relative_to(TESTS)): ast.parse(path.read_text())
        for path in sorted(TESTS.rglob("*.py"))
        if "documents" not in path.parts
    }


@cache
def nodes(tree: ast.AST) -> list[ast.AST]:
    """All that is in a tree, walked once however many rules look at it."""
    return list(ast.walk(tree))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (node for node in nodes(tree) if isinstance(node, ast.FunctionDef))


def called(node: ast.AST) -> str:
    """The last name of what a call calls: ``sleep`` of ``time.sleep``; otherwise nothing."""
    function = node.func if isinstance(node, ast.Call) else None
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
