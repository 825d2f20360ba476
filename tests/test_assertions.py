"""Every test asserts something, itself or by a helper that does."""

from __future__ import annotations

import ast

from tests.source import called, functions, trees

ASSERTING = {"raises", "warns", "fail", "deprecated_call"}  # of pytest


Trees = dict[str, ast.Module]  # by path from tests/
Helper = tuple[str, str]  # file, function


def origins(name: str, tree: ast.Module) -> dict[str, Helper]:
    """Where the functions that a file may call come from: itself, or another file of the tests."""
    found = {function.name: (name, function.name) for function in functions(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            file = node.module.removeprefix("tests.").replace(".", "/") + ".py"
            found |= {(alias.asname or alias.name): (file, alias.name) for alias in node.names}
    return found


def asserts(function: ast.FunctionDef, known: dict[str, Helper], helpers: set[Helper]) -> bool:
    """Whether a function asserts, or calls one that does."""
    return any(
        isinstance(node, ast.Assert)
        or called(node) in ASSERTING
        or called(node).startswith("assert_")
        or known.get(called(node)) in helpers
        for node in ast.walk(function)
    )


def silent(trees: Trees) -> list[str]:
    """Tests that assert nothing."""
    known = {name: origins(name, tree) for name, tree in trees.items()}
    asserting: set[Helper] = set()
    while True:
        found = {
            (name, function.name)
            for name, tree in trees.items()
            for function in functions(tree)
            if asserts(function, known[name], asserting)
        }
        if found == asserting:
            break
        asserting = found
    return [
        f"{name}::{function.name}"
        for name, tree in trees.items()
        for function in functions(tree)
        if function.name.startswith("test_") and (name, function.name) not in asserting
    ]


def test_every_test_asserts() -> None:
    assert silent(dict(trees())) == []


def test_one_that_does_not_is_seen() -> None:
    helpers = "def check(x): assert x\ndef through(x): check(x)\n"
    tests = """
from tests.helpers import through
def check(x): return x
def test_good(): through(1)
def test_bad(): check(1)
"""
    files = {"helpers.py": ast.parse(helpers), "twin.py": ast.parse(tests)}
    assert silent(files) == ["twin.py::test_bad"]
