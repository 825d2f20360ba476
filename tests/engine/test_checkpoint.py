"""Checkpoints: a resumed run is the uninterrupted one bit for bit, and nothing false is resumed."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

import dptorch
from dptorch.engine import checkpoint
from dptorch.errors import ConfigurationError, DataError, PrivacyError
from tests.engine.resumable import PAIRS, STEPS, Run
from tests.engine.setup import parameters


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.pt"


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "scheduler"), PAIRS)
@pytest.mark.parametrize("at", [4, 6])  # between epochs, and within one
def test_a_resumed_run_is_the_uninterrupted_one(
    path: Path, optimizer: str, scheduler: str, at: int
) -> None:
    run = Run(optimizer, scheduler)
    run.go(at, physical=3)
    run.save(path, extra={"losses": [1.0]})
    run.go(STEPS, physical=3)

    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    resumed = Run(optimizer, scheduler)  # with another key, which the file's replaces
    assert resumed.load(path) == {"losses": [1.0]}
    assert resumed.engine.steps_done == at
    resumed.go(STEPS, physical=3)
    for a, b in zip(run.everything(), resumed.everything(), strict=True):
        assert torch.equal(a, b)
    assert resumed.engine.get_privacy_spent() == run.engine.get_privacy_spent()
    assert resumed.engine.statement().resumed == 1


@pytest.mark.slow
def test_the_comparison_does_see_what_a_checkpoint_forgets(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: leaving out any one part is seen in the result."""
    run = Run()
    run.go(6)
    run.save(path)
    run.go(STEPS)

    def resumed() -> bool:
        random.seed(99)
        other = Run()
        other.load(path)
        other.go(STEPS)
        return torch.equal(parameters(run.model), parameters(other.model))

    assert resumed()
    for target, name in [
        (checkpoint, "_set_random_state"),
        (torch.optim.SGD, "load_state_dict"),
        (schedules.CosineAnnealingLR, "load_state_dict"),
        (dptorch.PrivacyEngine, "load_state_dict"),
        (nn.Sequential, "load_state_dict"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, lambda *_, **__: None, raising=False)
            assert not resumed(), name


def test_the_file_is_for_its_owner_only_and_holds_the_key(path: Path) -> None:
    run = Run()
    before = os.umask(0)
    try:
        run.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # torch.load reads it too, without running code.
    state = torch.load(path, weights_only=True)
    assert state["engine"]["key"] == run.engine.state_dict()["key"]


def test_the_published_model_does_not_hold_the_key(path: Path) -> None:
    run = Run()
    torch.save(run.model.state_dict(), path)
    assert bytes.fromhex(run.engine.state_dict()["key"]["key"]) not in path.read_bytes()
    assert run.engine.state_dict()["key"]["key"].encode() not in path.read_bytes()


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def saved(path: Path) -> Path:
    run = Run()
    run.go(3)
    run.save(path)
    return path


def refuses(saved: Path, run: Run, kind: type[Exception], match: str) -> None:
    """Loading fails with this message, and nothing has changed."""
    engine, others = run.engine.state_dict(), [t.clone() for t in run.everything()]
    rng = torch.get_rng_state()
    with pytest.raises(kind, match=match):
        run.load(saved)
    assert run.engine.state_dict() == engine
    assert torch.equal(torch.get_rng_state(), rng)
    for a, b in zip(others, run.everything(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        ({"noise_multiplier": 0.8}, "noise_multiplier: 0.8, 0.7"),
        ({"max_grad_norm": 2.0}, "max_grad_norm: 2.0, 1.0"),
        ({"steps": 12, "clipping_fn": "automatic"}, "steps: 12, 11; clipping_fn: 'automatic'"),
    ],
)
def test_another_plan_is_refused_by_its_fields(
    saved: Path, plan: dict[str, Any], names: str
) -> None:
    refuses(saved, Run(**plan), ConfigurationError, names)


def test_another_model_is_refused_by_its_parameters(saved: Path) -> None:
    run = Run()
    run.model[3] = nn.Linear(9, 4)
    refuses(saved, run, ConfigurationError, r"'3.weight' is of shape \(3, 9\) there and .*\(4, 9\)")


def test_other_frozen_parameters_are_refused(saved: Path) -> None:
    run = Run()
    model = copy.deepcopy(run.model)
    model[0].requires_grad_(False)
    engine = dptorch.PrivacyEngine(model, plan=run.engine.plan)
    with pytest.raises(
        ConfigurationError, match=r"'0.weight' is .9, 5. there and not trained here"
    ):
        engine.load_state_dict(torch.load(saved, weights_only=True)["engine"])


def test_another_optimizer_is_refused(saved: Path) -> None:
    refuses(saved, Run("adam"), ConfigurationError, "SGD there, Adam here")
    run = Run()
    run.engine.detach()
    with pytest.raises(ConfigurationError, match="with an attached optimizer"):
        run.engine.load_checkpoint(saved, scheduler=run.scheduler)


def test_a_forgotten_scheduler_is_noticed(saved: Path) -> None:
    with pytest.raises(ConfigurationError, match="saved with scheduler and is loaded with nothing"):
        Run().engine.load_checkpoint(saved)


@pytest.mark.parametrize("left", [0, 10, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(saved: Path, left: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(left if left >= 1 else left * len(whole))])
    refuses(saved, Run(), DataError, "cut short")


def test_any_changed_byte_is_found(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    for at in random.Random(0).sample(range(len(whole)), 60):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError):
            checkpoint.read(saved)
    saved.write_bytes(whole)
    assert checkpoint.read(saved)["engine"]["steps_done"] == 3


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "noise": lambda s: s.update(plan=s["plan"].replace("0.7", "0.6")),
    "fewer steps done": lambda s: s.update(steps_done=0),
    "sampling": lambda s: s.update(sampling_run={}),
    "key": lambda s: s.update(key=dptorch.randomness.RootKey.from_os().export()),
    "seal": lambda s: s.update(seal="0" * 64),
    "not a seal": lambda s: s.update(seal=None),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_state_is_refused(saved: Path, edit: str) -> None:
    """Also where the engine's plan was edited alike, and the file was written by the library."""
    state = checkpoint.read(saved)
    EDITS[edit](state["engine"])
    checkpoint.write(saved, state)
    run = Run(noise_multiplier=0.6 if edit == "noise" else 0.7)
    refuses(saved, run, PrivacyError, "has been changed since it was saved")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", bytes(5000)])
def test_other_files_are_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    refuses(path, Run(), DataError, "not a readable checkpoint")
    path.unlink()
    refuses(path, Run(), DataError, "No such file")


def test_a_checkpoint_cannot_run_code(path: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> object:
            return (Path(tmp_path / "owned").touch, ())

    torch.save(Evil(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest().encode()
    with path.open("ab") as file:
        file.write(checkpoint._TRAILER + digest + b"\n")
    refuses(path, Run(), DataError, "not a readable checkpoint")
    assert not (tmp_path / "owned").exists()


def test_an_open_file_holds_what_a_path_does(saved: Path) -> None:
    run, held = Run(), BytesIO()
    run.load(saved)
    held.write(b"before")
    run.save(held)
    assert held.getvalue().endswith(b"\n")
    held.seek(len(b"before"))
    again = Run()
    again.load(held)
    assert held.tell() == len(b"before")
    assert again.engine.steps_done == run.engine.steps_done == 3
    for mine, theirs in zip(again.everything(), run.everything(), strict=True):
        assert torch.equal(mine, theirs)


def test_an_open_file_that_was_changed_is_refused(saved: Path) -> None:
    run, held = Run(), BytesIO()
    run.load(saved)
    run.save(held)
    content = bytearray(held.getvalue())
    content[len(content) // 2] ^= 1
    for bad in (bytes(content), held.getvalue()[:-20]):
        with pytest.raises(DataError, match=r"not what was written|not a readable checkpoint"):
            Run().load(BytesIO(bad))


def test_states_that_could_not_be_loaded_are_refused_when_saved(saved: Path) -> None:
    run, before = Run(), saved.read_bytes()
    message = r"checkpoint\['extra'\]\['x'\]\[1\] is a Fraction"
    with pytest.raises(ConfigurationError, match=message):
        run.save(saved, extra={"x": [1, Fraction(1, 2)]})
    assert saved.read_bytes() == before


def test_an_engine_that_is_under_way_is_not_overwritten(saved: Path) -> None:
    run = Run()
    run.go(1)
    refuses(saved, run, ConfigurationError, "has done 1 steps with a key of its own")


# -- bad days --------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow past 2000 bytes: the system calls fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_checkpoint_from_before(
    saved: Path, request: pytest.FixtureRequest
) -> None:
    run, before = Run(), saved.read_bytes()
    run.go(2)
    request.getfixturevalue("full_disk")
    with pytest.raises(DataError, match=r"could not be written .* from before is kept"):
        run.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name], "no half file is left"
    run.go(3)  # the run is unharmed


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path / "missing", Path("/proc")):
        with pytest.raises(DataError, match="could not be written"):
            Run().save(folder / "run.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_is_not_finite_neither_steps_nor_replaces_a_checkpoint(
    saved: Path, bad: float
) -> None:
    run, before = Run(), saved.read_bytes()
    run.go(2)
    with torch.no_grad():
        run.model[3].weight[1, 2] = bad
    with pytest.raises(PrivacyError, match=r"'3.weight' holds NaN or infinity.*nor counted"):
        run.go(3)
    assert run.engine.steps_done == 2
    with pytest.raises(PrivacyError, match=r"'3.weight' holds NaN"):
        run.save(saved)
    assert saved.read_bytes() == before


def test_a_large_but_finite_model_goes_on() -> None:
    """Its sum is infinite, which must not be taken for an entry that is."""
    finite = {"w": torch.full((1000,), 3e38), "empty": torch.zeros(0)}
    assert finite["w"].sum() == float("inf")
    assert checkpoint.refuse_not_finite(finite) is None
    with pytest.raises(PrivacyError, match="holds NaN or infinity"):
        checkpoint.refuse_not_finite(finite | {"b": torch.tensor([float("inf")])})


@pytest.mark.slow
@pytest.mark.usefixtures("python_forks")
def test_a_fork_does_not_step() -> None:
    """Parent and child would add the same noise to different sums. In a process of its own, because
    the test process has threads that a fork would leave behind."""
    script = """
        import os, torch, dptorch
        from tests.engine.resumable import Run
        run = Run()
        run.go(1)
        child = os.fork()
        if child == 0:
            try:
                run.go(2)
            except dptorch.errors.PrivacyError as error:
                os._exit(7 if "fork" in str(error) else 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        run.go(2)
        assert run.engine.steps_done == 2
        print("the parent goes on")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert "the parent goes on" in done.stdout, done.stderr


def test_the_plan_in_the_file_is_the_plan(saved: Path) -> None:
    state = checkpoint.read(saved)
    assert json.loads(state["engine"]["plan"])["noise_multiplier"] == 0.7
