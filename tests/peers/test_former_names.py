"""What stands for names that are not installed does what scripts ask of it, and replaces nothing."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.peers import former_names
from tests.peers.notebooks import as_scripts


def test_a_module_that_is_there_keeps_its_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "added", 1, raising=False)
    found = former_names._module("json", dumps=None, added=2)
    assert found is json
    assert json.dumps([1]) == "[1]"
    assert json.added == 1


def test_a_module_that_is_not_there_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nowhere", "nowhere.inside"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    former_names._module("nowhere", inside=former_names._module("nowhere.inside", x=3))
    assert importlib.import_module("nowhere.inside").x == 3
    assert importlib.util.find_spec("nowhere") is not None


def test_fire_reads_literals_and_names_what_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(name="a", size=1, whole=True):
        return name, size, whole

    monkeypatch.setattr(sys, "argv", ["x.py", "--size", "2", "--whole", "False", "--name", "b/c"])
    assert former_names.fire(main) == ("b/c", 2, False)
    monkeypatch.setattr(sys, "argv", ["x.py", "--sise", "2"])
    with pytest.raises(SystemExit, match="--sise is not known; expected one of"):
        former_names.fire(main)


def test_a_flat_tensor_is_split_into_shapes() -> None:
    parts = former_names.split_flat(torch.arange(7.0), [torch.Size([2, 3]), torch.Size([1])])
    assert [part.shape for part in parts] == [(2, 3), (1,)]
    assert torch.equal(torch.cat([part.flatten() for part in parts]), torch.arange(7.0))


def test_a_notebook_becomes_a_script_of_its_code(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["import nothing"]},
        {"cell_type": "code", "source": ["import a\n", "a.b()"]},
        {"cell_type": "code", "source": ["c = 1"]},
    ]
    (tmp_path / "book.ipynb").write_text(json.dumps({"cells": cells}))
    as_scripts(tmp_path)
    assert (tmp_path / "book.py").read_text() == "import a\na.b()\n\nc = 1\n"
