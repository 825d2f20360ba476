"""Copy a peer's files with other import lines, and nothing else changed."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.peers.notebooks import as_scripts

__all__ = ["copy_tree", "with_other_imports"]


def with_other_imports(source: str, packages: Mapping[str, str]) -> str:
    """The source with its imports of `packages` replaced; every other line stays as it is.

    Args:
        source: a Python file.
        packages: top-level package -> the module that stands for it.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for old, new in packages.items():
                _replace(lines, node, old, new)
    return "".join(lines)


def _replace(lines: list[str], node: ast.Import | ast.ImportFrom, old: str, new: str) -> None:
    """Change the lines of one import statement in place."""
    if isinstance(node, ast.ImportFrom):
        if not node.level and _is(node.module or "", old):
            _substitute(lines, node, rf"\bfrom\s+{old}\b", f"from {new}")
        return
    for alias in node.names:
        if alias.name == old and alias.asname is None:
            _substitute(lines, node, rf"\b{old}\b(?!\.)", f"{new} as {old}")
        elif _is(alias.name, old) and alias.asname is not None:
            _substitute(lines, node, rf"\b{re.escape(alias.name)}\b", new + alias.name[len(old) :])


def _is(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _substitute(lines: list[str], node: ast.stmt, pattern: str, by: str) -> None:
    for i in range(node.lineno - 1, node.end_lineno or node.lineno):
        changed, count = re.subn(pattern, by, lines[i], count=1)
        if count:
            lines[i] = changed
            return


def copy_tree(source: Path, target: Path, packages: Mapping[str, str]) -> Path:
    """Copy a folder, Python files with other import lines; a file that cannot be parsed as it is.

    The code of a notebook is a Python file beside it.
    """
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".git"))
    as_scripts(target)
    for path in target.rglob("*.py"):
        try:
            path.write_text(with_other_imports(path.read_text(), packages))
        except SyntaxError:
            continue
    return target
