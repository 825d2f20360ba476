"""Losses computed outside the recording are followed, whatever the outputs come in."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.oracles.loop import one_example_loop, relative_error
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, ExamplesMixError
from dptorch.tape import Recording, Tape
from dptorch.tape.recording.outputs import RecordedTensor, promote
from dptorch.tape.recording.patches import patched

B, D = 4, 3
pytestmark = pytest.mark.usefixtures("float64")


@dataclass
class Output:
    logits: Tensor
    constant: Tensor


class Wrapped(nn.Module):
    """A linear layer whose result comes in something."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.layer(x))


def recorded(model: nn.Module, x: Tensor) -> tuple[Tape, Any]:
    """The tape of one forward pass, and its outputs as an engine's hooks leave them."""
    recording = Recording(model)
    with patched(), recording:
        out = model(recording.tag_batch(x))
    return recording.tape, promote(out, recording)


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a tensor": (lambda out: out, lambda out: out),
    "a tuple": (lambda out: (out, out.detach()), lambda out: out[0]),
    "a dict of lists": (lambda out: {"a": [1, out]}, lambda out: out["a"][1]),
    "a dataclass": (lambda out: Output(out, torch.zeros(B)), lambda out: out.logits),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_loss_outside_is_the_loop(name: str) -> None:
    wrap, unwrap = CONTAINERS[name]
    model, x = Wrapped(wrap), torch.randn(B, D)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return unwrap(model(x)).square().sum(1)

    expected = one_example_loop(model, (x,), losses)
    tape, out = recorded(model, x)
    assert isinstance(unwrap(out), RecordedTensor)
    unwrap(out).square().sum(1).mean().backward()
    formed = tape.per_example_gradients()
    for key, gradient in expected.items():
        assert relative_error(B * formed[key], gradient) <= 1e-9, key


def test_examples_are_followed_without_a_gradient_and_constants_are_not() -> None:
    model, x = Wrapped(lambda out: [out, out.detach(), torch.zeros(B)]), torch.randn(B, D)
    _, (logits, detached, constant) = recorded(model, x)
    assert type(detached) is type(logits.detach()) is RecordedTensor
    with torch.no_grad():
        assert type(logits + 1) is RecordedTensor
    assert type(constant) is Tensor
    with pytest.raises(ExamplesMixError):  # what a detached statistic would carry to the others
        (logits * detached.mean()).sum().backward()


def test_pickles_are_ordinary_tensors_and_copies_are_followed() -> None:
    _, out = recorded(Wrapped(lambda out: out), torch.randn(B, D))
    made = pickle.loads(pickle.dumps(out.detach()))
    assert type(made) is Tensor
    assert torch.equal(made, out.detach())
    held = out.detach()
    first, second = copy.deepcopy([held, held])
    assert first is second
    for made in (first, copy.copy(held)):
        assert type(made) is RecordedTensor
        assert torch.equal(made, held)
        assert (made.data_ptr() == held.data_ptr()) == (made is not first)
    leaf = out.detach().requires_grad_()
    assert copy.deepcopy(leaf).is_leaf
    assert copy.deepcopy(leaf).requires_grad


def test_outputs_of_two_models_meet_in_one_loss() -> None:
    """As of a generator and of what judges it: each example's gradient, in both."""
    first, second, x = nn.Linear(D, D), nn.Linear(D, D), torch.randn(B, D)

    def losses(model: nn.Module, x: Tensor) -> Tensor:
        return (model[0](x) * model[1](x)).sum(1)

    expected = one_example_loop(nn.ModuleList([first, second]), (x,), losses)
    tape, one = recorded(first, x)
    other, two = recorded(second, x)
    (one * two).sum().backward()
    for i, found in enumerate((tape, other)):
        for key, gradient in found.per_example_gradients().items():
            assert relative_error(gradient, expected[f"{i}.{key}"]) <= 1e-9, (i, key)


def test_outputs_for_other_numbers_of_examples_do_not_meet() -> None:
    first, second = nn.Linear(D, D), nn.Linear(D, D)
    _, one = recorded(first, torch.randn(B, D))
    _, two = recorded(second, torch.randn(1, D))
    with pytest.raises(ConfigurationError, match="for 1 and for 4 examples meet in one loss"):
        one + two
