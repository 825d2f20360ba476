"""The container file: a user without rights, and nothing private in the image."""

import re

from tests.source import REPOSITORY

TEXT = (REPOSITORY / "Containerfile").read_text()


def test_it_runs_as_a_user_without_rights():
    users = re.findall(r"^USER (\d+)$", TEXT, re.MULTILINE)
    assert users
    assert int(users[-1]) > 1000
    assert TEXT.index("USER") > TEXT.rindex("\nRUN")
    assert "sudo" not in TEXT


def test_what_it_copies_exists_and_is_public():
    copied = [
        word
        for line in re.findall(r"^COPY (.*)$", TEXT, re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert "src" in copied
    assert all((REPOSITORY / name).exists() for name in copied)
    assert not {"runs", "."} & set(copied)
    pinned = re.search(r"torch==([\d.]+)", TEXT)[1]
    assert f"\ntorch=={pinned}\n" in (REPOSITORY / "constraints.txt").read_text()


def test_keys_are_where_its_user_can_read_them():
    """A file of keys is its owner's alone, and the run belongs to somebody else."""
    runs = re.findall(r"dptorch-serve[ \\\n#]*(/runs/NAME[^\n]*)", TEXT)
    assert len(runs) == 2
    assert all("--keys /ledger/" in line for line in runs)
    assert "-v ./runs:/runs:ro" in TEXT
