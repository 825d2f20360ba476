"""Notebooks: run from top to bottom, and written as Markdown pages with the outputs that they keep.

``python -m website.notebooks`` runs them all again and keeps what they print.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from website.reference import ROOT, SOURCE

FOLDER = ROOT / "examples" / "notebooks"


def run(notebook: Path, folder: Path) -> Any:
    """Run a notebook in `folder`, in a kernel of its own, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; with its code and its traceback.
    """
    import nbformat
    from nbclient import NotebookClient

    found = nbformat.read(notebook, as_version=4)
    # The index has no CPU build of torchvision for the pinned torch; the tests import this first too.
    first = nbformat.v4.new_code_cell("import tests.oracles.torchvision_on_cpu")
    found.cells.insert(0, first)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(SOURCE), str(ROOT)]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TTY_COMPATIBLE": "0",  # rich draws no bars that move
        "COLUMNS": "100",
    }
    client = NotebookClient(found, timeout=None, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    found.cells.remove(first)
    for cell in found.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = _joined(out for out in cell.outputs if out.get("name") != "stderr")
            cell.execution_count -= 1  # the first cell is not the reader's
    return found


def _joined(outputs: Iterator[Any]) -> list[Any]:
    """Outputs in which what was printed in pieces is one text."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


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
    parts.append(f'<a href="{notebook.name}" download>Download {notebook.name}</a>')
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


if __name__ == "__main__":
    import nbformat

    for path in sorted(FOLDER.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as scratch:
            nbformat.write(run(path, Path(scratch)), path)
        print(path.relative_to(ROOT))
