"""Numbers that were read from a batch may be logged, and not enter what is computed for an example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.errors import ConfigurationError, ExamplesMixError, PrivacyError
from dptorch.tape.provenance.tags import Mixed
from dptorch.tape.recording import recording
from dptorch.tape.recording.batches import Batch
from dptorch.tape.recording.read_numbers import ReadNumbers
from tests.engine.setup import Loss, make_data, make_engine, make_model, steps_with

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


def of(number: Callable[[Tensor, Tensor, Tensor], Any]) -> Loss:
    """Outputs are divided by a number of the batch."""

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        return F.cross_entropy(out / number(x, out, y), y)

    return loss


def _normalised(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m((x - x.mean().item()) / x.std().item()), y)


def _shifted(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.sub(m(x), float(x.mean())), y)


def _as_a_keyword(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    smooth = torch.sigmoid(x.mean()).item()
    return F.cross_entropy(m(x), y, label_smoothing=smooth)


def _in_the_loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(m(x), y)
    return loss / loss.item()


def _in_a_hinge(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(m(x), y, reduction="none")
    return torch.clamp(each, max=each.mean().item()).mean()


kept: list[float] = []


def _of_the_last_step(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    if kept:
        out = out * kept[-1]
    kept.append(out.abs().max().item())
    return F.cross_entropy(out, y)


READ: dict[str, Loss] = {
    "largest output": of(lambda x, out, y: out.abs().max().item()),
    "float": of(lambda x, out, y: float(out.detach().std())),
    "scale of a quantised tensor": of(
        lambda x, out, y: torch.quantize_per_tensor_dynamic(
            out.detach(), torch.qint8, False
        ).q_scale()
    ),
    "inverse": of(lambda x, out, y: 1 / out.abs().max().item()),
    "square root": of(lambda x, out, y: math.sqrt(out.square().mean().item())),
    "exponential": of(lambda x, out, y: math.exp(-out.std().item())),
    "a constant over it": of(lambda x, out, y: 0.5 / out.std().item()),
    "a multiple of it": of(lambda x, out, y: 1.25 * float(x.std())),
    "ratio": of(lambda x, out, y: out.std().item() / x.std().item()),
    "one example's": of(lambda x, out, y: out[0].norm().item()),
    "normalised inputs": _normalised,
    "shifted": _shifted,
    "keyword": _as_a_keyword,
    "the loss": _in_the_loss,
    "the loss, scaled": lambda m, x, y: F.cross_entropy(m(x), y) * (1e-6 / x.std().item()),
    "hinge": _in_a_hinge,
    "the last step's": _of_the_last_step,
}


FILLED: dict[str, Callable[[int, float], Tensor]] = {
    "full": lambda n, k: torch.full((n,), k),
    "one value": lambda n, k: torch.full((1,), k),
    "scalar": lambda n, k: torch.full((), k),
    "product": lambda n, k: torch.ones(n) * k,
    "inverse": lambda n, k: torch.ones(n) / k,
    "sum": lambda n, k: torch.zeros(n) + k,
    "fill": lambda n, k: torch.zeros(n).fill_(k),
    "diagonal": lambda n, k: torch.diag(torch.eye(n) * k),
    "linspace": lambda n, k: torch.linspace(k, k, n),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", FILLED)
def test_tensors_that_a_read_number_fills_are_recognised(
    name: str, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a factor of the losses, and as the weights of their backward."""

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(m(x), y, reduction="none")
        weights = FILLED[name](len(x), x.norm().item())
        return (each * (weights.double() if double else weights)).mean()

    with pytest.raises((ExamplesMixError, PrivacyError), match=r"line \d+: the number .* was read"):
        steps_with(loss, make_model())
    # Broken twin: only numbers are looked at. (That the factor changes is seen in another batch.)
    monkeypatch.setattr(ReadNumbers, "filled", lambda *_: None)
    assert steps_with(loss, make_model(), sample_rate=1.0) == 1


def test_weights_of_a_backward_that_a_read_number_fills_are_refused() -> None:
    model = make_model()
    engine = make_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for x, y in engine.loader(make_data()):
        losses = F.cross_entropy(model(x), y, reduction="none")
        with pytest.raises(ExamplesMixError, match="weights given to backward"):
            losses.backward(torch.full((len(x),), x.norm().item()))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y, reduction="none").backward(torch.full((len(x),), 1 / 3))
        optimizer.step()
        break
    assert engine.steps_done == 1


def test_a_tensor_that_was_there_before_the_number_does_not_hold_it() -> None:
    """Whatever its value is: constants are not mistaken in a long run."""
    constant = torch.full((), 0.3)

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x) * constant
        read = (x.sum() * 0 + constant).item()
        assert read == constant.item()
        return F.cross_entropy(out * constant, y)

    assert steps_with(loss, make_model()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_numbers_that_were_read_are_recognised(name: str) -> None:
    kept.clear()
    with pytest.raises((ExamplesMixError, PrivacyError), match=r"line \d+: the number .* was read"):
        steps_with(READ[name], make_model())


def test_without_the_look_they_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin."""
    monkeypatch.setattr(recording, "read_numbers", ReadNumbers())
    kept.clear()
    for name in ("largest output", "ratio", "the last step's"):
        assert steps_with(READ[name], make_model()) == 2


def _own_number(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each example's own number, read for itself."""
    out = m(x)
    rows = [out[i] / x[i].norm().item() for i in range(len(x))]
    return F.cross_entropy(torch.stack(rows), y)


def _logged(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = m(x)
    loss = F.cross_entropy(out, y)
    logs = {"loss": loss.item(), "std": out.std().item(), "mean": float(x.mean())}
    total = sum(logs.values()) / len(logs)
    assert math.isfinite(total)
    assert (out.detach() / out.std().item()).mean().item() < 10  # for a picture
    return loss


def _constants(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Constants that are also among the values that are read."""
    out = m(x)
    right = (out.argmax(1) == y).float()
    assert right.sum().item() + right.mean().item() + right.max().item() >= 0
    return F.cross_entropy(out * 1.0 / 0.5 + 0.25, y, label_smoothing=0.1)


@pytest.mark.parametrize("loss", [_own_number, _logged, _constants])
@pytest.mark.parametrize("own", [False, True])
def test_logs_own_numbers_and_constants_run(loss: Loss, own: bool) -> None:
    assert steps_with(loss, make_model(), own=own) == 2


def test_own_numbers_are_not_other_examples() -> None:
    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        rows = [out[i] / x[i - 1].norm().item() for i in range(len(x))]
        return F.cross_entropy(torch.stack(rows), y)

    with pytest.raises(ExamplesMixError, match="was read from"):
        steps_with(loss, make_model())


def scheduled(weight: Callable[[int], Any], *, vector: bool) -> Loss:
    """Two terms, of which one has a weight that follows the steps."""
    steps = iter(range(100))

    def loss(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = m(x)
        each = F.cross_entropy(out, y, reduction="none")
        second = weight(next(steps)) * out.square().sum(1)
        return each + second if vector else each.mean() + second.mean()

    return loss


@pytest.mark.parametrize("vector", [False, True])
def test_a_weight_that_is_said_to_be_public_may_change(vector: bool) -> None:
    def weight(step: int) -> float:
        return min(1.0, 0.01 + step / 3)

    said = scheduled(lambda i: dptorch.tape.public_number(weight(i)), vector=vector)
    assert steps_with(said, make_model()) == 2
    with pytest.raises(PrivacyError, match="public_number"):
        steps_with(scheduled(weight, vector=vector), make_model())
    once = scheduled(lambda i: dptorch.tape.public_number(1.0) * weight(i), vector=vector)
    with pytest.raises(PrivacyError, match="public_number"):
        steps_with(once, make_model())


@pytest.mark.parametrize("value", [True, "1", math.nan, math.inf, torch.tensor(1.0), None])
def test_only_numbers_are_said_to_be_public(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="finite number"):
        dptorch.tape.public_number(value)


@pytest.mark.parametrize(
    "value", [5e-324, 8.508331967369505e-309, 1.7976931348623157e308, 1e-200 / 3]
)
def test_numbers_of_any_size_are_looked_up(value: float) -> None:
    """Beside a number that was read, which the largest and the smallest are no functions of."""
    numbers = ReadNumbers()
    numbers.note(0.123456789123, Mixed("read"), Batch())
    assert numbers.owner_of(0.123456789123 * 250) is not None
    assert numbers.owner_of(value) is None
