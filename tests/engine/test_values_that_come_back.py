"""Values of a batch that go where nothing is followed, NumPy or the data set, and come back mixed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.data import Dataset

from dptorch.errors import ExamplesMixError, NotCoveredError, PrivacyError, PrivacyWarning
from dptorch.tape import trusted_reads
from dptorch.tape.recording import backward, batches, handed_out
from tests.engine.setup import SIZE, Loss, make_data, make_engine, make_model, steps_with

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


def _centre_in_place(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    array = x.numpy()
    array -= array.mean(0)
    return F.cross_entropy(m(x), y)


def _weigh_in_place(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(m(x), y, reduction="none")
    weights = each.detach()
    array = np.asarray(weights)
    np.exp(array, out=array)
    array /= array.mean()
    return (each * weights).mean()


def _scale_outputs_in_place(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    array = out.detach().numpy()
    array /= np.abs(array).max()
    return F.cross_entropy(out, y)


@pytest.mark.parametrize(
    ("loss", "own"),
    [
        (_centre_in_place, False),
        (_weigh_in_place, False),
        (_weigh_in_place, True),
        (_scale_outputs_in_place, True),
    ],
)
def test_memory_that_numpy_wrote_to_is_refused(
    loss: Loss, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExamplesMixError, match="written to through NumPy"):
        steps_with(loss, make_model(), own=own)
    # Broken twin: nobody looks whether memory that left was written to.
    monkeypatch.setattr(batches.Batch, "refuse_written", lambda batch: None)
    assert steps_with(loss, make_model(), own=own) == 2


def _logged(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Arrays that are looked at, a copy that is written to, and a write by torch."""
    x.numpy().mean()
    x.mul_(0.5)
    out = m(x)
    shown = out.detach().numpy().copy()
    shown[shown < 0] = np.nan
    rounded = out.detach().softmax(1).numpy().round(2)
    rounded[0] = 1.0
    return F.cross_entropy(out, y)


@pytest.mark.parametrize("own", [False, True])
def test_arrays_for_a_log_run(own: bool) -> None:
    assert steps_with(_logged, make_model(), own=own) == 2


def by_numpy(change: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(change(x.numpy()))


def _pickled(x: Tensor) -> Tensor:
    found: Tensor = pickle.loads(pickle.dumps(x))
    return (found - found.mean(0)) / found.std(0)


def _copied_into(x: Tensor) -> Tensor:
    return x.copy_(by_numpy(lambda v: v - v.mean(0))(x))


COLUMNS: dict[str, Callable[[Tensor], Tensor]] = {
    "standardised": by_numpy(lambda v: (v - v.mean(0)) / v.std(0)),
    "centred": by_numpy(lambda v: v - v.mean(0)),
    "over the largest": by_numpy(lambda v: v / np.abs(v).max(0)),
    "pickled": _pickled,
    "copied into the batch": _copied_into,
    "a constant column": by_numpy(
        lambda v: np.where(np.arange(5) == 0, 1, v - v.mean(0)).astype("f")
    ),
}


def given(change: Callable[[Tensor], Tensor]) -> Loss:
    return lambda m, x, y: F.cross_entropy(m(change(x)), y)


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_came_back_scaled_by_statistics_are_mixed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PrivacyError, match=r"times .* plus"):
        steps_with(given(COLUMNS[name]), make_model())
    # Broken twin: a tensor is compared as a whole.
    monkeypatch.setattr(batches, "_lines_of_columns", lambda a, b: [])
    if name != "copied into the batch":
        assert steps_with(given(COLUMNS[name]), make_model()) == 2


def test_columns_that_came_back_scaled_by_constants_are_rows() -> None:
    mean = np.array([0.485, 0.456, 0.406, 0.0, 1.5], dtype="f")
    scale = np.array([0.229, 0.224, 0.225, 1.0, 2.0], dtype="f")
    assert steps_with(given(by_numpy(lambda v: (v - mean) / scale)), make_model()) == 2


class Shifted(Dataset[Any]):
    """Rows plus whatever the loop has put in `shift`."""

    def __init__(self) -> None:
        self.rows = make_data()
        self.shift: Any = 0.0

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[i]
        return x + self.shift, y


@pytest.mark.parametrize("mixed", [False, True])
def test_a_data_set_that_keeps_a_statistic_is_refused(
    mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> int:
        torch.manual_seed(0)
        model, data = make_model(), Shifted()
        engine = make_engine(model, steps=2)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        for _ in range(2):
            for x, y in engine.loader(data):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                data.shift = x.detach().mean(0) if mixed else 0.5
        return engine.steps_done

    if mixed:
        with pytest.raises(ExamplesMixError, match="the data set or its collate function"):
            train()
        # Broken twin: what the loader hands out is one example a row, whatever it was.
        monkeypatch.setattr(handed_out, "refuse_mixed", lambda t: None)
    assert train() == 2


@pytest.mark.parametrize("before", [False, True])
def test_a_teacher_that_is_trained_without_an_engine_is_refused(
    before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distilled(trained: bool) -> int:
        torch.manual_seed(0)
        teacher = nn.Linear(5, 3)
        optimizer = torch.optim.SGD(teacher.parameters(), 1.0)

        def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            out = teacher(x)
            if trained:
                F.cross_entropy(out, y).backward()
                optimizer.step()
            with torch.no_grad():
                target = teacher(x) if before else out
            return F.mse_loss(m(x), target.detach())

        return steps_with(loss, make_model())

    with (
        pytest.warns(PrivacyWarning, match="a model without an engine is trained"),
        pytest.raises(ExamplesMixError, match="a model without an engine trains"),
    ):
        distilled(trained=True)
    assert distilled(trained=False) == 2
    # Broken twin: what the teacher learns from one step's examples goes into the next step's loss.
    monkeypatch.setattr(backward, "note_trained_beside", lambda loss, mark: [])
    assert distilled(trained=True) == 2


def around_the_loss(hooks: Callable[[], Any]) -> Loss:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        with hooks():
            return out.square().mean() + F.cross_entropy(out, y)

    return loss


def normed() -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda t: t / t.norm() if t.is_floating_point() else t, lambda t: t)


def test_saved_tensors_hooks_around_a_loss_are_refused() -> None:
    with pytest.raises(NotCoveredError, match="saved_tensors_hooks"):
        steps_with(around_the_loss(normed), make_model())
    assert steps_with(around_the_loss(save_on_cpu), make_model()) == 2
    with trusted_reads():  # the broken twin: a promise that they give back what they were given
        assert steps_with(around_the_loss(normed), make_model()) == 2
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad(), normed():
        assert x.square().sum() == 3


def _weighed_by_an_array(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    weights = np.abs(x.numpy()).max(axis=1)
    return (F.cross_entropy(m(x), y, reduction="none") * torch.from_numpy(weights)).mean()


@pytest.mark.filterwarnings("default::dptorch.errors.PrivacyWarning")
def test_arrays_of_a_batch_that_weigh_its_losses_are_warned_of() -> None:
    """They may keep the examples apart, and are on the statement's list of what is assumed."""
    with pytest.warns(PrivacyWarning, match="whose origin is not known, enters the loss"):
        assert steps_with(_weighed_by_an_array, make_model()) == 2
