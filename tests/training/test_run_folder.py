"""What a run leaves on disk, and that it is never half of it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from dptorch.errors import ConfigurationError, DataError
from dptorch.training import load_model, run_folder
from dptorch.training.run_folder import RunFolder


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.write_json("run.json", {"step": 1})

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            folder.write_json("run.json", {"step": 2})
    assert folder.read_json("run.json") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_what_is_public_is_readable_by_others(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        RunFolder(tmp_path).write("statement.txt", "public")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "statement.txt").stat().st_mode) == 0o644


def test_an_existing_folder_is_an_error_and_kept(tmp_path: Path) -> None:
    run_folder.create(tmp_path, "a").write("run.json", "{}")
    with pytest.raises(ConfigurationError, match="--resume to continue it, --overwrite to replace"):
        run_folder.create(tmp_path, "a")
    assert (tmp_path / "a" / "run.json").exists()
    run_folder.create(tmp_path, "a", overwrite=True)
    assert not (tmp_path / "a" / "run.json").exists()


def test_overwrite_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "final.tex").write_text("years of work")
    with pytest.raises(ConfigurationError, match="not the folder of a run"):
        run_folder.create(tmp_path, "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "final.tex").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", ".hidden"])
def test_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a run"):
        run_folder.create(tmp_path, name, overwrite=True)


def test_next_name_counts_on(tmp_path: Path) -> None:
    (tmp_path / "mnist-1").mkdir()
    assert run_folder.next_name(tmp_path, "mnist") == "mnist-2"


def test_reopen_lists_the_runs_there_are(tmp_path: Path) -> None:
    run_folder.create(tmp_path, "mine").write("run.json", "{}")
    with pytest.raises(ConfigurationError, match=r"Runs in .*: mine"):
        run_folder.reopen(tmp_path, "yours")


@pytest.mark.slow
def test_a_trained_model_is_loaded_back(finished: RunFolder) -> None:
    model = load_model(finished.path)
    about = finished.read_json("run.json")
    with torch.no_grad():
        logits = model(torch.tensor([[3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]))
    assert not model.training
    assert logits.argmax(1).tolist() == [1, 0]
    assert about["result"]["test_accuracy"] > 0.9


def test_loading_from_elsewhere_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run\.json"):
        load_model(tmp_path)
