"""What depends on an example's place, or on how many there are, is found; what does not, is not."""
# ruff: noqa: NPY002  (models in the wild use numpy's global generator)

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dptorch
from dptorch.errors import ExamplesMixError
from dptorch.validation.mixing import find_mixing
from dptorch.validation.placing import find_place_dependence

B = 16
Program = Callable[["Model", Tensor], Tensor]


class Model(nn.Module):
    """Two layers, and a program between them."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.a, self.b, self.embedding = nn.Linear(6, 8), nn.Linear(8, 3), nn.Embedding(64, 8)
        self.drop, self.program = nn.Dropout(0.3), program

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.program(self, self.a(x)).tanh()))


def every_second(m: Model, h: Tensor) -> Tensor:
    return torch.where((torch.arange(len(h)) % 2 == 0)[:, None], h, -h)


PLACES: dict[str, Program] = {
    "every second": every_second,
    "an embedding of places": lambda m, h: h + m.embedding(torch.arange(len(h))),
    "a factor for each place": lambda m, h: h * torch.arange(1.0, len(h) + 1)[:, None],
    "the first rows": lambda m, h: torch.cat([h[:3], -h[3:]]),
    "rows one by one": lambda m, h: torch.stack([r * (-1) ** i for i, r in enumerate(h)]),
}
NUMBERS: dict[str, Program] = {
    "a threshold at this number": lambda m, h: h if len(h) > B - 1 else -h,
    "a threshold below": lambda m, h: h if len(h) > 5 else -h,
    "a factor": lambda m, h: h * len(h),
    "a layer more": lambda m, h: h if h.shape[0] > 5 else m.embedding(h.argmax(1)),
}
NEITHER: dict[str, Program] = {
    "nothing": lambda m, h: h,
    "shapes": lambda m, h: h.view(h.shape[0], 2, 4).flatten(1),
    "places in a sequence": lambda m, h: h * torch.arange(h.shape[1]),
    "random numbers": lambda m, h: h + torch.randn(len(h), 8),
    "random numbers of numpy": lambda m, h: (
        h + torch.from_numpy(np.random.randn(len(h), 8)).float()
    ),
    "random numbers of Python": lambda m, h: h * random.random(),
    "a loop over rows": lambda m, h: torch.stack([r * 2 for r in h]),
    "a state of zeros": lambda m, h: h + torch.zeros(len(h), 8),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_place_in_the_batch_is_found(name: str) -> None:
    found = find_place_dependence(Model(PLACES[name]), (torch.randn(B, 6),), {}, 0)
    assert (
        found
        == "the model (Model): what is computed for an example depends on its place in the batch."
    )


@pytest.mark.parametrize("name", NUMBERS)
def test_the_number_of_examples_is_found(name: str) -> None:
    found = find_place_dependence(Model(NUMBERS[name]), (torch.randn(B, 6),), {}, 0)
    assert found is not None
    assert "depends on the number of examples." in found


@pytest.mark.parametrize("name", NEITHER)
def test_what_depends_on_neither_passes(name: str) -> None:
    model, x = Model(NEITHER[name]), torch.randn(B, 6)
    before = torch.get_rng_state()
    assert find_place_dependence(model, (x,), {}, 0) == ""
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_half_precision_rounds_otherwise_for_other_numbers_of_rows() -> None:
    """Under autocast a difference of a hundredth is rounding, in float32 it is none."""
    slightly = Model(lambda m, h: h * (1 + 0.01 * (len(h) % 2)))
    found = find_place_dependence(slightly, (torch.randn(B, 6),), {}, 0)
    assert found is not None
    assert "the number of examples" in found
    with torch.autocast("cpu", torch.bfloat16):
        assert find_place_dependence(slightly, (torch.randn(B, 6),), {}, 0) == ""
        for program in (*PLACES.values(), *NUMBERS.values()):
            assert find_place_dependence(Model(program), (torch.randn(B, 6),), {}, 0)


def test_too_few_rows_tell_nothing() -> None:
    model = Model(every_second)
    assert find_place_dependence(model, (torch.randn(1, 6),), {}, 0) is None
    assert find_place_dependence(model, (torch.randn(2, 6),), {}, 0) != ""


def test_a_list_of_rows_is_not_put_in_another_order() -> None:
    class Listed(nn.Module):
        def forward(self, x: Tensor, factors: list[float]) -> Tensor:
            return x * torch.tensor(factors)[:, None]

    assert find_place_dependence(Listed(), (torch.randn(3, 2), [1.0, 2.0, 3.0]), {}, 0) == ""


def test_an_engine_refuses_and_its_twin_without_the_check_does_not() -> None:
    def forward(*, self_check: bool) -> None:
        model = Model(every_second)
        dptorch.PrivacyEngine(
            model,
            batch_size=8,
            sample_size=100,
            steps=5,
            noise_multiplier=1.0,
            target_delta=1e-5,
            self_check=self_check,
        )
        model(torch.randn(B, 6))

    with pytest.raises(ExamplesMixError, match="its place in the batch"):
        forward(self_check=True)
    forward(self_check=False)


def unseen(m: Model, h: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return -h if bool(h.detach().abs().max() > 1e3) else h * 1


def test_what_only_a_large_example_sets_off_is_found_where_nothing_sees_it() -> None:
    x = torch.randn(4, 6)
    assert find_mixing(Model(unseen).eval(), (x,), {}) == "the model (Model)"
    assert find_mixing(Model(lambda m, h: h.clamp(-1e3, 1e3)).eval(), (x,), {}) == ""
