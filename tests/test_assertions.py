"""Every test asserts something, itself or by a helper that does."""

from __future__ import annotations

import ast

from tests.source import called, functions, nodes, trees

ASSERTING = {"raises", "warns", "fail", "deprecated_call"}  # of pytest


Trees = dict[str, ast.Module]  # by path from tests/
Helper = tuple[str, str]  # file, function


def origins(name: str, tree: ast.Module) -> dict[str, Helper]:
    """Where the functions that a file may call come from: itself, or another file of the tests."""
    found = {function.name: (name, function.name) for function in functions(tree)}
    for node in nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            file = node.module.removeprefix("tests.").replace(".", "/") + ".py"
            found |= {(alias.asname or alias.name): (file, alias.name) for alias in node.names}
    return found


def silent(trees: Trees) -> list[str]:
    """Tests that assert nothing, and call nothing that does."""
    asserting: set[Helper] = set()
    calls: dict[Helper, set[Helper]] = {}
    for name, tree in trees.items():
        known = origins(name, tree)
        for function in functions(tree):
            inside = nodes(function)
            names = set(map(called, inside))
            calls[name, function.name] = {known[n] for n in names if n in known}
            if (
                names & ASSERTING
                or any(n.startswith("assert_") for n in names)
                or any(isinstance(node, ast.Assert) for node in inside)
            ):
                asserting.add((name, function.name))
    while found := {f for f, others in calls.items() if others & asserting} - asserting:
        asserting |= found
    return [
        f"{name}::{function}"
        for name, function in calls
        if function.startswith("test_") and (name, function) not in asserting
    ]


def test_every_test_asserts() -> None:
    assert silent(trees()) == []


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
