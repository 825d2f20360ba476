"""A step that does not fit into memory goes on in smaller parts, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dptorch.engine.out_of_memory import is_out_of_memory
from dptorch.errors import PrivacyWarning
from dptorch.training import load_model, run_folder
from dptorch.training.job import Job, Setup, prepare
from dptorch.training.loop import train


class Memory(torch.autograd.Function):
    """Fits `rows` rows, in the forward pass or in the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: int, where: str) -> torch.Tensor:
        ctx.rows, ctx.where = rows, where
        if where == "forward" and len(x) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        if ctx.where == "backward" and len(grads[0]) > ctx.rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return grads[0].clone(), None, None


def with_memory(job: Job, rows: int, where: str) -> Setup:
    """A job whose model fits so many rows while it is trained."""
    setup = prepare(job)
    inner = setup.model.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = inner(x)
        return Memory.apply(out, rows, where) if setup.model.training else out

    setup.model.forward = forward  # type: ignore[method-assign]
    return setup


@pytest.mark.slow
def test_a_step_that_does_not_fit_goes_on_in_smaller_parts(job: Job, tmp_path: Path) -> None:
    """Parts of 16, of 8 and of 4 where 5 rows fit; the run is that of any other parts."""
    job = replace(job, epochs=1, max_physical_batch_size=16)
    plain = run_folder.create(tmp_path, "plain")
    train(prepare(job), plain)
    expected, wanted = plain.read_metrics()[-1], load_model(plain.path).state_dict()
    assert any(v.any() for v in wanted.values())
    for where in ("forward", "backward"):
        setup = with_memory(job, 5, where)
        folder = run_folder.create(tmp_path, where)
        with pytest.warns(PrivacyWarning, match="out of memory with 8 examples in the model"):
            train(setup, folder)
        last = folder.read_metrics()[-1]
        assert last["step"] == setup.engine.plan.steps == 4
        for name in ("epsilon", "not_private_mean_batch_size", "not_private_clipped_fraction"):
            assert last[name] == expected[name]
        for name, value in load_model(folder.path).state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_one_row_that_does_not_fit_ends_the_run(job: Job, tmp_path: Path) -> None:
    setup = with_memory(replace(job, max_physical_batch_size=2), 0, "forward")
    with (
        pytest.warns(PrivacyWarning, match="from here on 1"),
        pytest.raises(torch.OutOfMemoryError),
    ):
        train(setup, run_folder.create(tmp_path, "none"))
    assert setup.engine.steps_done == 0


def test_other_errors_are_not_for_want_of_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
