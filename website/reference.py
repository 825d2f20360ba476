"""The reference: every public name, found in the source without importing it, and every command."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

#: The modules whose ``__all__`` is public, under the headings of the reference.
MODULES = {
    "Train": ("dptorch", "dptorch.plan", "dptorch.statement", "dptorch.distributed"),
    "Mechanism": (
        "dptorch.clipping",
        "dptorch.noise",
        "dptorch.sampling",
        "dptorch.tape",
        "dptorch.validation",
        "dptorch.errors",
        "dptorch.randomness",
    ),
    "Budgets": ("dptorch.accounting", "dptorch.ledger", "dptorch.risk"),
    "Data and tasks": (
        "dptorch.tables",
        "dptorch.statistics",
        "dptorch.text",
        "dptorch.vision.augmentation",
        "dptorch.training",
        "dptorch.postprocessing",
    ),
    "Other trainers": (
        "dptorch.integrations.transformers",
        "dptorch.integrations.estimators",
        "dptorch.integrations.perplexity",
        "dptorch.integrations.membership",
    ),
    "Predictions and audits": (
        "dptorch.prediction",
        "dptorch.plan.prediction_plan",
        "dptorch.audit",
        "dptorch.audit.roc",
        "dptorch.audit.scores",
        "dptorch.blogs",
    ),
    "Other libraries' names": (
        "dptorch.compat.opacus",
        "dptorch.compat.opacus0",
        "dptorch.compat.fastdp",
        "dptorch.compat.private_transformers",
        "dptorch.compat.private_vision",
        "dptorch.compat.forgetnet",
    ),
}


@dataclass(frozen=True)
class Name:
    """A public name: where it is defined, what it is, and its text."""

    path: str
    node: ast.AST
    text: str

    @property
    def is_value(self) -> bool:
        """Whether it is a constant or an alias of a type, which has no docstring."""
        return isinstance(self.node, (ast.Assign, ast.AnnAssign))


def file_of(module: str) -> Path | None:
    """The file of a module of the package, or None."""
    path = SOURCE.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return file
    return None


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def exported(module: str) -> list[str]:
    """The names in a module's ``__all__``; names joined to it by ``+`` and ``*`` are not read."""
    file = file_of(module)
    if file is None:
        raise ValueError(f"{module} is no module of src/")
    for node in _parsed(file).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    return []


def _assigned(node: ast.AST) -> str:
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return node.target.id
    return ""


def _comment(file: Path, node: ast.AST) -> str:
    """The ``#:`` lines above an assignment."""
    lines = file.read_text().splitlines()[: node.lineno - 1]  # type: ignore[attr-defined]
    said: list[str] = []
    while lines and lines[-1].lstrip().startswith("#:"):
        said.insert(0, lines.pop().lstrip()[2:].strip())
    return " ".join(said)


def find(module: str, name: str) -> Name | None:
    """Where a name that a module exports is defined; imports are followed."""
    file = file_of(module)
    if file is None:
        return None
    statements = list(_top(_parsed(file)))
    for node in statements:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return Name(f"{module}.{name}", node, ast.get_docstring(node) or "")
        if _assigned(node) == name:
            return Name(f"{module}.{name}", node, _comment(file, node))
    if inner := file_of(f"{module}.{name}"):
        tree = _parsed(inner)
        return Name(f"{module}.{name}", tree, ast.get_docstring(tree) or "")
    for node in ast.walk(_parsed(file)):  # a function too may import it, when it is asked for
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name)
    return None


def _top(node: ast.Module | ast.If) -> Iterator[ast.stmt]:
    """The statements of a module, those under ``if TYPE_CHECKING`` included."""
    for statement in node.body:
        yield from _top(statement) if isinstance(statement, ast.If) else (statement,)


def without_text() -> list[str]:
    """Public names without reference text, and public methods of public classes."""
    lost = []
    for module in (module for group in MODULES.values() for module in group):
        for name in exported(module):
            found = find(module, name)
            if found is None or not found.text:
                lost.append(f"{module}.{name}")
            elif isinstance(found.node, ast.ClassDef):
                lost += [f"{module}.{name}.{m}" for m in _silent_methods(found.node)]
    return lost


def _silent_methods(node: ast.ClassDef) -> Iterator[str]:
    """Methods without text, in a class that has no base to inherit it from."""
    if node.bases:
        return
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            marks = [ast.unparse(mark) for mark in method.decorator_list]
            other = any("overload" in mark or mark.endswith(".setter") for mark in marks)
            if not other and not ast.get_docstring(method):
                yield method.name


def page_of(module: str) -> str:
    """The reference page of a module, in Markdown."""
    file = file_of(module)
    assert file is not None
    first, *_ = (ast.get_docstring(_parsed(file)) or "").split("\n\n")
    lines = [f"# {module}", "", first, ""]
    for name in exported(module):
        found = find(module, name)
        if found is None or name == "__version__":
            continue
        if found.is_value or isinstance(found.node, ast.Module):
            lines += [f"## `{name}` {{#{module}.{name}}}", "", found.text, ""]
            if found.is_value:
                lines += ["```python", _shortened(ast.unparse(found.node)), "```", ""]
        else:
            lines += [f"::: {found.path}", ""]
    return "\n".join(lines)


def _shortened(code: str, most: int = 400) -> str:
    return code if len(code) <= most else code[:most].rsplit(",", 1)[0] + ", ..."


def index() -> str:
    """The page that lists all modules and their names."""
    lines = ["# Reference", ""]
    lines += ["Every public name, from its docstring. [Commands](commands.md) have a page.", ""]
    for heading, modules in MODULES.items():
        lines += [f"## {heading}", "", "| module | names |", "|---|---|"]
        for module in modules:
            names = ", ".join(f"`{name}`" for name in exported(module))
            lines.append(f"| [`{module}`]({module}.md) | {names} |")
        lines.append("")
    return "\n".join(lines)


def commands() -> Iterator[tuple[str, Any]]:
    """The commands of ``dptorch`` by their whole names, as click's objects."""
    from typer.main import get_command

    from dptorch.cli.app import app

    def below(prefix: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield prefix, command
        for name, child in sorted(getattr(command, "commands", {}).items()):
            if not child.hidden:
                yield from below(f"{prefix} {name}", child)

    return below("dptorch", get_command(app))


def commands_page() -> str:
    """The page of all commands with their options."""
    lines = ["# Commands", "", "`dptorch COMMAND --help` says the same in a terminal.", ""]
    for name, command in commands():
        lines += [f"## {name}", "", *_help(command.help or ""), ""]
        options = [p for p in command.params if not getattr(p, "hidden", False)]
        if options and name != "dptorch":
            lines += ["| argument or option | |", "|---|---|"]
            for option in options:
                spelled = ", ".join(f"`{o}`" for o in [*option.opts, *option.secondary_opts])
                if option.param_type_name == "argument":
                    spelled = f"`{option.metavar or option.name.upper()}`"
                said = _plain(getattr(option, "help", "") or "")
                lines.append(f"| {spelled} | {said.replace('|', chr(92) + '|')} |")
            lines.append("")
    return "\n".join(lines)


def _help(text: str) -> Iterator[str]:
    """The paragraphs of a command's help; its examples, which are in cyan, as one block of code."""
    examples = re.findall(r"\[cyan\](.*?)\[/\]", text, re.DOTALL)
    text = re.sub(r"\[cyan\].*?\[/\]", "", text, flags=re.DOTALL)
    for paragraph in re.sub(r"\[/\]|\[bold\]", "", text).replace("\b", "").split("\n\n"):
        said = _plain(paragraph)
        if said and said != "Examples" and not said.endswith(":"):
            yield from (said, "")
    if examples:
        yield from ("```text", *(" ".join(example.split()) for example in examples), "```", "")


def _plain(text: str) -> str:
    """Help on one line; what Markdown would read as a tag or a mark is kept from it."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"([<>*_\[\]])", r"\\\1", text)
