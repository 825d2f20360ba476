"""The page of the five documents names tests and commands that exist."""

from __future__ import annotations

import re

from tests.source import REPOSITORY, TESTS
from tests.website.command_lines import unknown
from website.reference import commands

PAGE = (REPOSITORY / "docs" / "five_documents.md").read_text()
WORDS = {"met", "another way", "in part", "not run", "not met", "refused"}


def rows(text: str) -> list[tuple[str, str, str]]:
    """What a document says, the word, and where it is."""
    found = re.findall(r"^\| (.+?) \| ([a-z ]+) \| (.+) \|$", text, re.MULTILINE)
    return [row for row in found if row[1] in WORDS or "`test_" in row[2]]


def faults(text: str) -> list[str]:
    files = (file.read_text() for file in TESTS.rglob("test_*.py"))
    tests = {
        name for file in files for name in re.findall(r"^ *def (test_\w+)\(", file, re.MULTILINE)
    }
    lost = [name for name in re.findall(r"`(test_\w+)`", text) if name not in tests]
    known = dict(commands())
    for line in re.findall(r"`(dptorch [a-z][^`]*)`", text):
        lost += [f"{line}: {word}" for word in unknown(line, known)]
    for said, word, where in rows(text):
        if word not in WORDS:
            lost.append(f"{said}: {word}")
        elif word == "not run" and "`" not in where and "no " not in where:
            lost.append(f"{said}: no command")
    return lost


def test_every_promise_has_its_place() -> None:
    assert len(rows(PAGE)) > 75
    assert {word for _, word, _ in rows(PAGE)} == WORDS
    assert faults(PAGE) == []


def test_a_place_that_is_none_is_found() -> None:
    """The broken twin."""
    text = "| a | met | `test_no_such_test` |\n| b | not run | on a GPU |\n"
    text += "| c | proved | `test_fastdp` |\n| d | not run | `dptorch bench --dokcs` |\n"
    assert faults(text) == [
        "test_no_such_test",
        "dptorch bench --dokcs: --dokcs",
        "b: no command",
        "c: proved",
    ]
