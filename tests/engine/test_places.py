"""Data sets in another order, where a record's place decides when it takes part again."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from dptorch.engine.places import Places
from dptorch.errors import PrivacyError
from tests.engine.setup import make_engine

SIZE = 24
EPOCHWISE = ("sequential", "shuffled", "random-allocation")
BANDED: dict[str, Any] = {"mechanism": "banded", "bands": 4, "noise_multiplier": 1e-9}
INVERSE: dict[str, Any] = {"mechanism": "inverse-banded", "noise_multiplier": 1e-9}
PLANS: dict[str, dict[str, Any]] = {
    **{sampling: {"sampling": sampling} for sampling in EPOCHWISE},
    "banded": BANDED,
    "inverse-banded": INVERSE,
    "buffered-toeplitz": {**INVERSE, "mechanism": "buffered-toeplitz"},
}


def data(*, turned: bool = False) -> TensorDataset:
    """One coordinate for each record."""
    x = torch.eye(SIZE)
    return TensorDataset(x.flip(0) if turned else x)


def start(**plan: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(SIZE, 1, bias=False)
    engine = make_engine(model, sample_rate=1 / 4, steps=8, max_grad_norm=1.0, **plan)
    return engine, model, engine.attach(torch.optim.SGD(model.parameters(), lr=SIZE / 4))


def steps(run: Any, dataset: Dataset[Any], number: int, **loader: Any) -> Tensor:
    """How often each record took part in `number` steps of an iteration."""
    engine, model, optimizer = run
    before = model.weight.detach().clone()
    for (x,) in islice(engine.loader(dataset, **loader), number):
        (-model(x)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved: Tensor = model.weight.detach() - before
    return moved[0].round()


@pytest.mark.parametrize("name", PLANS)
def test_another_order_in_the_middle_of_an_epoch_is_refused(name: str) -> None:
    run = start(**PLANS[name])
    steps(run, data(), 2)
    with pytest.raises(PrivacyError, match=r"data set of step 2 is another one, or in another"):
        steps(run, data(turned=True), 2)
    assert run[0].steps_done == 2
    steps(run, data(), 2)
    assert run[0].steps_done == 4
    assert any("keeps its turns" in each for each in run[0].statement().assumed)


@pytest.mark.parametrize("name", EPOCHWISE)
def test_without_the_comparison_records_take_part_twice(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin."""
    monkeypatch.setattr(Places, "_compare", lambda *_: None)
    run = start(**PLANS[name])
    times = steps(run, data(), 2) + steps(run, data(turned=True), 2)
    assert times.max() == 2
    once = start(**PLANS[name])
    assert torch.equal(steps(once, data(), 2) + steps(once, data(), 2), torch.ones(SIZE))


@pytest.mark.parametrize("name", PLANS)
def test_between_epochs_the_order_may_change_unless_turns_go_on(name: str) -> None:
    run = start(**PLANS[name])
    steps(run, data(), 4)
    if name in EPOCHWISE:
        assert torch.equal(steps(run, data(turned=True), 4), torch.ones(SIZE))
    else:
        with pytest.raises(PrivacyError, match="another order"):
            steps(run, data(turned=True), 4)


def test_schemes_that_draw_anew_know_no_places() -> None:
    for sampling in ("poisson", "fixed-size"):
        run = start(sampling=sampling)
        steps(run, data(), 2)
        steps(run, data(turned=True), 2)
        assert run[0].steps_done == 4
        assert not any("keeps its turns" in each for each in run[0].statement().assumed)


def test_a_run_that_goes_on_compares_too() -> None:
    run = start(sampling="sequential")
    steps(run, data(), 2)
    state = run[0].state_dict()
    run[0].detach()
    for turned in (True, False):
        run = start(sampling="sequential")
        run[0].load_state_dict(state)
        if turned:
            with pytest.raises(PrivacyError, match="another order"):
                steps(run, data(turned=True), 1)
            run[0].detach()
    assert torch.equal(steps(run, data(), 2), (torch.arange(SIZE) >= SIZE // 2).float())


class Augmented(Dataset[Any]):
    """Examples that are others each time."""

    def __init__(self, own: torch.Generator | None) -> None:
        self.own, self.x = own, data().tensors[0]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> tuple[Tensor]:
        return (self.x[i] * (1 + torch.rand((), generator=self.own)),)


@pytest.mark.parametrize("own", [None, torch.Generator()], ids=["global", "own"])
def test_augmented_examples_run_and_draw_what_they_drew(own: Any) -> None:
    run = start(sampling="sequential")
    steps(run, Augmented(own), 2)
    state = torch.get_rng_state()
    steps(run, Augmented(own), 2, generator=torch.Generator())
    assert run[0].steps_done == 4
    if own is not None:  # comparing draws nothing from the global generator
        assert torch.equal(torch.get_rng_state(), state)


def test_the_ids_of_users_are_places_too() -> None:
    users = [i // 2 for i in range(SIZE)]
    run = start(
        sampling="random-allocation",
        unit="user",
        max_examples_per_user=2,
        sample_size=SIZE // 2,
    )
    steps(run, data(), 2, user_ids=users)
    with pytest.raises(PrivacyError, match="another order"):
        steps(run, data(), 2, user_ids=users[::-1])
