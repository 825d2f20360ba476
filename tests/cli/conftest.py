"""Each command runs in an empty folder, on data that trains in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture
def data() -> Path:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    path = Path("points.csv")
    lines = ["u,v,kind"] + [
        f"{a:.3f},{a + b:.3f},{b}" for a, b in zip(rng.random(300), y, strict=True)
    ]
    path.write_text("\n".join(lines))
    return path
