"""Notebooks: written as Markdown pages, with the outputs that they keep."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def page_of(notebook: Path, pictures: Path) -> str:
    """A notebook as Markdown; its pictures are written to the folder `pictures`."""
    parts: list[str] = []
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{source}\n```")
            parts += _outputs(cell, pictures, f"{notebook.stem}-{number}")
    parts.append(f"Download [{notebook.name}]({notebook.name}).")
    return "\n\n".join(parts) + "\n"


def _outputs(cell: dict[str, Any], pictures: Path, name: str) -> Iterator[str]:
    for number, output in enumerate(cell["outputs"]):
        data = output.get("data", {})
        if "image/png" in data:
            pictures.mkdir(parents=True, exist_ok=True)
            file = pictures / f"{name}-{number}.png"
            file.write_bytes(base64.b64decode(data["image/png"]))
            said = cell["metadata"].get("alt", "what the cell draws")
            yield f"![{said}]({pictures.name}/{file.name})"
        elif text := "".join(output.get("text") or data.get("text/plain", "")):
            yield f"```text\n{text.rstrip()}\n```"
