"""Small jobs that train in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dptorch.training import run_folder
from dptorch.training.job import Job, prepare
from dptorch.training.loop import train
from dptorch.training.run_folder import RunFolder


@pytest.fixture
def blobs(tmp_path: Path) -> Path:
    """Two well separated classes of 4-dimensional points: 240 to train, 60 to test."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 300)
    x = rng.normal(size=(300, 4)) + 3.0 * y[:, None]
    path = tmp_path / "blobs.npz"
    np.savez(path, x=x[:240], y=y[:240], x_test=x[240:], y_test=y[240:])
    return path


@pytest.fixture
def job(blobs: Path) -> Job:
    """Four epochs of four steps on `blobs`, repeatable."""
    return Job(
        data=str(blobs), model="linear", epochs=4, sample_rate=0.25, noise_multiplier=2.0, seed=3
    )


@pytest.fixture
def finished(job: Job, tmp_path: Path) -> RunFolder:
    """The folder of a complete run of `job`."""
    folder = run_folder.create(tmp_path / "runs", "small")
    train(prepare(job), folder)
    return folder
