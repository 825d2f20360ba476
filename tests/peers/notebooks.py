"""Notebooks as scripts: the code cells, one after another."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["as_scripts"]


def as_scripts(folder: Path) -> None:
    """Write a script of the same name beside every notebook below `folder`."""
    for path in folder.rglob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        path.with_suffix(".py").write_text("\n\n".join(code) + "\n")
