"""The code on every page runs as printed, and the commands on it exist with their options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tests.source import REPOSITORY, TESTS
from tests.website.command_lines import shell_lines, unknown
from website.reference import commands

import dptorch

DOCS = REPOSITORY / "docs"
#: Pages whose code other tests run, because it needs data, processes or other libraries.
ELSEWHERE = {
    "accounting.md": "accounting/test_docs.py",
    "audit.md": "audit/test_audit_page.py",
    "clipping.md": "test_readme.py",
    "guides.md": "test_readme.py",
    "migrating.md": "compat/test_several_forwards.py",
    "noise.md": "test_readme.py",
    "prediction.md": "prediction/test_docs.py",
    "scale.md": "distributed/test_scale.py",
    "tables.md": "tables/test_docs.py",
    "tasks.md": "cli/test_train_text.py",
    "transformers.md": "integrations/transformers/test_docs.py",
    "vision.md": "vision/test_command.py",
}

#: What the code of a page takes for granted.
GIVEN = {"sampling.md": lambda: {"dptorch": dptorch, "model": torch.nn.Linear(4, 2)}}


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def with_code() -> list[str]:
    return sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if blocks(page))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in with_code() if name not in ELSEWHERE])
def test_the_code_of_a_page_runs_as_printed(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope = GIVEN.get(name, lambda: {})()
    for block in blocks(DOCS / name):
        exec(compile(block, name, "exec"), scope)
    shown = capsys.readouterr().out or "assert" in "".join(blocks(DOCS / name))
    assert shown or name in GIVEN, "a program on a page prints or asserts what it is for"


def test_pages_that_are_run_elsewhere_are_named_there() -> None:
    assert set(ELSEWHERE) <= set(with_code())
    for page, test in ELSEWHERE.items():
        assert page in (TESTS / test).read_text()


def test_commands_on_pages_exist_with_their_options() -> None:
    known = dict(commands())
    pages = [REPOSITORY / "README.md", *DOCS.rglob("*.md")]
    lines = [line for page in pages for line in shell_lines(page.read_text())]
    assert len(lines) > 40
    assert {line: lost for line in lines if (lost := unknown(line, known))} == {}
    assert unknown("dptorch train --epsilom 3", known) == ["--epsilom"]  # the broken twins
    assert unknown("dptorch train --resume runs/demo", known) == ["runs/demo"]
    assert unknown("dptorch trian --epsilon 3", known) == ["trian"]
