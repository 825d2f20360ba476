"""The notebooks run from top to bottom, and what they keep is what they print."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.source import REPOSITORY
from website.notebooks import FOLDER, page_of, run

#: What each comes to, whatever the noise was.
PRINTS = {
    "audit": "broken: REFUTED",
    "blogs": "REFUTED at least ε = ",
    "mnist": "These 80 training steps are (3.0000, 1e-05)-differentially private",
    "own_model": "Network: ok",
    "reviews_lora": "of 100 others at ε = 8.00",
    "table": "at epsilon 3.000, delta 1e-05, in ",
    "two_processes": "ε = 3.00 after 20 steps",
    "vision": "at epsilon 1.000, delta 1e-05, in ",
}


def printed(notebook: dict) -> list[str]:
    """The texts of each code cell."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [
        "".join(
            "".join(out.get("text") or out["data"].get("text/plain", "")) for out in cell["outputs"]
        )
        for cell in cells
    ]


def kept(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def test_every_notebook_is_run_and_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(PRINTS)
    page = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.ipynb\)", page)) == set(PRINTS)


@pytest.mark.parametrize("name", sorted(PRINTS))
def test_what_is_kept_is_whole_and_tells_nothing_of_a_machine(name: str, tmp_path: Path) -> None:
    text = "\n".join(printed(kept(name)))
    assert PRINTS[name] in text
    assert "Warning" not in text
    assert not re.search(r"/home/|/root/|/tmp/|/work/|site-packages|\x1b", text)
    page = page_of(FOLDER / f"{name}.ipynb", tmp_path / "pictures")
    assert PRINTS[name] in page
    alternatives = re.findall(r"!\[(.*?)\]\(pictures/", page)
    assert len(alternatives) == len(list(tmp_path.rglob("*.png")))
    assert all(len(said) > 25 for said in alternatives)


@pytest.mark.slow
@pytest.mark.usefixtures("python_forks")
@pytest.mark.parametrize("name", sorted(PRINTS))
def test_a_notebook_runs_from_top_to_bottom(name: str, tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    texts = printed(run(FOLDER / f"{name}.ipynb", tmp_path))
    assert PRINTS[name] in "\n".join(texts)
    assert [bool(text) for text in texts] == [bool(text) for text in printed(kept(name))]
    assert str(REPOSITORY) not in "\n".join(texts)
