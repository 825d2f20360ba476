"""No test judges by the clock: a busy machine must not make a right program fail.

Work is counted instead: draws, bytes, calls, modules. Time is measured in `benchmarks/` and by
``dptorch bench``.
"""

from __future__ import annotations

import ast
import re
import textwrap

import hypothesis
import pytest

from tests.source import called, functions, nodes, trees

CLOCKS = {"perf_counter", "process_time", "thread_time", "monotonic", "time", "clock_gettime"}
CLOCKS |= {f"{clock}_ns" for clock in CLOCKS} | {"now", "utcnow", "getrusage", "times"}
IN_TEXT = re.compile(r"\b(perf_counter|process_time|monotonic|time\.time|time\.sleep)(_ns)?\(")

HERE = "test_no_clock.py"  # holds what the others may not
SLEEPERS = {
    "ledger/processes.py": "polls until children have got somewhere",
    "ledger/test_kill.py": "kills at a random instant; what is asserted holds for every instant",
    "ledger/test_schedules.py": "the same",
}


def reads_clock(node: ast.AST, tainted: set[str]) -> bool:
    return any(
        (n.id in tainted)
        if isinstance(n, ast.Name)
        else isinstance(n, ast.Call) and called(n) in CLOCKS and _of_a_clock(n)
        for n in nodes(node)
    )


def _of_a_clock(call: ast.Call) -> bool:
    """``times(x)`` of one's own takes arguments; clocks are read without, or from `os` and the like."""
    if isinstance(call.func, ast.Attribute):
        module = call.func.value
        return isinstance(module, ast.Name) and module.id in {"time", "os", "datetime", "resource"}
    return not call.args and called(call) not in {"time", "times", "now"}


def judged(function: ast.AST) -> list[int]:
    """Lines of assertions whose outcome depends on a clock that the function reads."""
    if not reads_clock(function, set()):
        return []
    tainted: set[str] = set()
    while True:
        found = set(tainted)
        for node in nodes(function):
            if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if node.value is not None and reads_clock(node.value, tainted):
                    for target in targets:
                        found |= {n.id for n in nodes(target) if isinstance(n, ast.Name)}
        if found == tainted:
            break
        tainted = found
    return [
        node.lineno
        for node in nodes(function)
        for judge in [node.test if isinstance(node, (ast.Assert, ast.If, ast.While)) else node]
        if (judge is not node or called(node).startswith("assert_")) and reads_clock(judge, tainted)
    ]


def waits(tree: ast.AST) -> list[int]:
    """Lines of calls that fail after some time, and of examples that have a deadline."""
    return [
        node.lineno
        for node in nodes(tree)
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in ("timeout", "deadline")
        and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
    ]


def sleeps(tree: ast.AST) -> list[int]:
    return [node.lineno for node in nodes(tree) if called(node) == "sleep"]


def clocks_in_text(tree: ast.AST) -> list[int]:
    """Lines of strings that are code for another process and read a clock."""
    return [
        node.lineno
        for node in nodes(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and IN_TEXT.search(node.value)
    ]


@pytest.mark.parametrize("rule", [waits, clocks_in_text], ids=lambda rule: rule.__name__)
def test_nothing_times_out(rule) -> None:
    found = [
        f"{name}:{line}" for name, tree in trees().items() if name != HERE for line in rule(tree)
    ]
    assert found == []


def test_no_assertion_depends_on_a_clock() -> None:
    found = [
        f"{name}:{n}" for name, tree in trees().items() for f in functions(tree) for n in judged(f)
    ]
    assert found == []


def test_only_these_sleep() -> None:
    assert {name for name, tree in trees().items() if sleeps(tree)} == set(SLEEPERS)


def test_examples_have_no_deadline() -> None:
    assert hypothesis.settings.default.deadline is None
    assert hypothesis.HealthCheck.too_slow in hypothesis.settings.default.suppress_health_check


TWINS = {
    "a difference": """
        began = time.perf_counter()
        work()
        taken = time.perf_counter() - began
        assert taken < 1
    """,
    "at once": "start = process_time()\nassert process_time() - start < 1.0",
    "by way of a tuple": "a, b = 1, time.monotonic()\nc = b + 1\nassert c > 2",
    "in a loop": "end = time.time() + 30\nwhile not done and time.time() < end:\n    pass",
    "by a helper": "t = time.time_ns()\ntorch.testing.assert_close(t, 0)",
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_judgement_by_the_clock_is_seen(twin: str) -> None:
    assert judged(ast.parse(textwrap.dedent(TWINS[twin])))


def test_time_outs_sleeps_and_clocks_in_text_are_seen() -> None:
    assert waits(ast.parse("subprocess.run(x, timeout=3)"))
    assert waits(ast.parse("settings(deadline=200)"))
    assert not waits(ast.parse("settings(deadline=None)\nLoader(timeout=0)"))
    assert sleeps(ast.parse("time.sleep(1)"))
    assert clocks_in_text(ast.parse("code = 'start = time.perf_counter()'"))
    assert not judged(ast.parse("assert model.time(3) == times(entries).sum()"))
