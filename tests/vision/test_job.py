"""Runs on pictures: from files to a trained network, every method, kill and resume, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("peft")

from benchmarks.overfit import ENOUGH, PICTURES, overfit

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.postprocessing import LowPassFilter, WeightAverage
from dptorch.training import load_model, run_folder
from dptorch.training.loop import Silent, train
from dptorch.training.run_folder import RunFolder
from dptorch.vision.job import VisionJob, prepare
from dptorch.vision.methods import METHODS, plain_state
from dptorch.vision.recipes import RECIPES
from tests.oracles.loop import norms_of, one_example_loop, relative_error
from tests.vision.files import write_celeba, write_cifar10, write_folder, write_mnist

C = 0.05
FAST: dict[str, Any] = {"epochs": 1, "sample_rate": 0.5, "noise_multiplier": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_cifar10(tmp_path_factory.mktemp("cifar")))


def run(job: VisionJob, folder: Path, **how: Any) -> RunFolder:
    made = run_folder.create(folder, "run")
    train(prepare(job), made, **how)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_clipped_sum_over_single_examples(method: str, cifar: str) -> None:
    job = VisionJob(data=cifar, model="timm:test_resnet", image_size=32, method=method,
                    lora_rank=2, **FAST)  # fmt: skip
    setup = prepare(job)
    setup.engine.detach()
    model, rows = setup.model.double(), 4
    batch = torch.utils.data.default_collate([setup.data.train[i] for i in range(rows)])
    batch = [batch[0].double(), batch[1]]

    def loss_of(model: torch.nn.Module, *values: torch.Tensor) -> torch.Tensor:
        return setup.task.loss(model, values, setup.device)[0][None]

    truth = one_example_loop(model, batch, loss_of)
    shares = (C / norms_of(truth)).clamp(max=1)
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=rows, steps=1, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=C, seed=0,
    )  # fmt: skip
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = engine.attach(torch.optim.SGD(trainable.values(), lr=0.0))
    for part in engine.loader(torch.utils.data.TensorDataset(*batch), max_physical_batch_size=3):
        setup.task.loss(model, part, setup.device)[0].backward()
        optimizer.step()
    assert engine.steps_done == 1
    found = torch.cat([p.grad.flatten() for p in trainable.values() if p.grad is not None])
    expected = torch.cat([torch.tensordot(shares, truth[n], 1).flatten() / rows for n in trainable])
    assert relative_error(found, expected) < 1e-9
    everything = {n for n, _ in model.named_parameters()}
    assert (set(trainable) == everything) == (method == "full")


@pytest.mark.slow
def test_adapters_are_in_the_weights_of_the_network_that_is_written(cifar: str) -> None:
    job = VisionJob(data=cifar, model="timm:test_resnet", image_size=32, method="lora", lora_rank=2,
                    optimizer="adam", learning_rate=0.01, **FAST)  # fmt: skip
    setup = prepare(job)
    for batch in setup.engine.loader(setup.data.train):
        setup.task.loss(setup.model, batch, setup.device)[0].backward()
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    x = torch.stack([setup.data.test[i][0] for i in range(4)])
    plain = setup.task.build().eval()  # type: ignore[attr-defined]
    plain.load_state_dict(plain_state(setup.model))
    assert not any("lora" in name for name in plain.state_dict())
    with torch.no_grad():
        adapted = setup.model.eval()(x)
        assert torch.allclose(plain(x), adapted, atol=1e-5)
        for name, module in setup.model.named_modules():
            if name.endswith("lora_B.default"):
                module.weight.zero_()
        assert not torch.allclose(setup.model(x), adapted, atol=1e-3)  # they had been trained


class StopAt(Silent):
    """Stops a run as Ctrl-C does, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stepped(self, step: int, train_loss: float) -> None:
        import signal

        if step == self.step:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.usefixtures("drawn")
def test_a_run_with_everything_resumes_bit_for_bit(cifar: str, tmp_path: Path) -> None:
    job = VisionJob(
        data=cifar, augment="flip-crop", views=2, ema=0.9, kalman=0.7, moment_scaling=0.5,
        optimizer="adamw", weight_decay=0.01, decay="cosine", warmup=0.2, max_physical_batch_size=20,
        **FAST | {"epochs": 2},
    )  # fmt: skip
    whole = run(job, tmp_path / "whole")
    part = run_folder.create(tmp_path / "part", "run")
    assert train(prepare(job), part, observer=StopAt(2)).interrupted
    assert not train(prepare(job), part, resume=True).interrupted
    states = [load_model(folder.path).state_dict() for folder in (whole, part)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    about = whole.read_json("run.json")
    assert about["job"]["augment"] == "flip-crop"
    assert len(about["confusion"]) == 10
    assert sum(map(sum, about["confusion"])) == about["data"]["test_examples"] == 40
    page = (whole.path / "report.html").read_text()
    assert "What it says of pictures" in page
    assert "Views of an example</th><td>2</td>" in page


@pytest.mark.slow
def test_the_average_is_what_is_tested_and_published(cifar: str, tmp_path: Path) -> None:
    job = VisionJob(data=cifar, tail=0.5, **FAST | {"epochs": 2})
    setup = prepare(job)
    folder = run_folder.create(tmp_path, "tail")
    train(setup, folder)
    average, published = setup.kept["average"], load_model(folder.path).state_dict()
    assert isinstance(average, WeightAverage)
    assert average.first_step == 2
    last = {n: p.detach().clone() for n, p in setup.model.named_parameters()}
    assert not all(torch.equal(last[n], published[n]) for n in last)
    with average.applied():
        assert all(torch.equal(p, published[n]) for n, p in setup.model.named_parameters())
        tested = setup.task.evaluate(setup.model, setup.data.test, setup.device)
    assert folder.read_metrics()[-1]["test_loss"] == tested["test_loss"]
    low_pass = prepare(VisionJob(data=cifar, low_pass=0.5, **FAST)).kept["low_pass"]
    assert isinstance(low_pass, LowPassFilter)


@pytest.mark.slow
def test_a_run_on_pictures_predicts_files(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "pets", size=60)
    job = VisionJob(data=str(root), epochs=6, sample_rate=0.5, noise_multiplier=0.3, seed=0,
                    learning_rate=0.3)  # fmt: skip
    folder = run(job, tmp_path)
    model = dptorch.load(folder.path)
    said = model.predict([root / "cat" / "0.png", root / "dog" / "1.png"])
    assert said.tolist() == ["cat", "dog"]


@pytest.mark.slow
def test_sample_predictions_are_from_all_over_the_test_set(tmp_path: Path) -> None:
    """Folders are read class by class: the first pictures would all be of one."""
    root = write_folder(tmp_path / "pets", size=60, own_test=True)
    setup = prepare(VisionJob(data=str(root), **FAST))
    labels = [int(setup.data.test[i][1]) for i in range(len(setup.data.test))]
    assert len(set(labels[:12])) == 1
    found = setup.task.finish(setup.model.eval(), setup.data.test, setup.device)["pictures"]
    assert len(found) == 12
    assert {picture["class"] for picture in found} == {"cat", "dog"}


@pytest.mark.slow
def test_attributes_have_a_loss_each_and_a_mean_accuracy(tmp_path: Path) -> None:
    job = VisionJob(data=str(write_celeba(tmp_path)), label="all", image_size=24, **FAST)
    folder = run(job, tmp_path / "runs")
    about = folder.read_json("run.json")
    assert [row["group"] for row in about["groups"]] == ["Male", "Smiling", "Young"]
    assert about["data"]["classes"] == ["Male", "Smiling", "Young"]
    mean = sum(row["accuracy"] for row in about["groups"]) / 3
    assert about["result"]["test_accuracy"] == pytest.approx(mean)
    model = dptorch.load(folder.path)
    files = sorted((tmp_path / "celeba" / "img_align_celeba").iterdir())[:2]
    shares = model.predict_proba(files)
    assert [set(filter(None, row.split(","))) for row in model.predict(files)] == [
        {name for name, share in zip(about["data"]["classes"], row, strict=True) if share > 0.5}
        for row in shares
    ]


@pytest.mark.slow
def test_without_privacy_it_says_so_everywhere(cifar: str, tmp_path: Path) -> None:
    job = VisionJob(data=cifar, clipping_mode="non-private", epochs=1, sample_rate=0.5, seed=0)
    with pytest.warns(UserWarning, match="neither clipped nor noised"):
        folder = run(job, tmp_path)
    assert folder.read_metrics()[-1]["epsilon"] == float("inf")
    page = (folder.path / "report.html").read_text()
    assert "without clipping and without" in page
    assert "What the guarantee means" not in page
    assert json.loads((folder.path / "statement.json").read_text())["epsilon"] is None


@pytest.mark.slow
@pytest.mark.parametrize("features", ["hog", "scattering"])
def test_fixed_features_take_the_pixels_place(features: str, tmp_path: Path) -> None:
    job = VisionJob(data=str(write_mnist(tmp_path)), features=features, **FAST)
    setup = prepare(job)
    assert setup.job.model == "linear"
    assert len(setup.data.input_shape) == 1
    x = setup.data.train[0][0]
    assert float(x.norm()) == pytest.approx(1.0, abs=1e-4)
    assert setup.data.train[0][0] is x, "features are computed once"
    with pytest.raises(ConfigurationError, match="views are of pictures"):
        prepare(VisionJob(data=str(tmp_path), features=features, augment="flip", **FAST))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_reach_the_budget_that_they_state(name: str, tmp_path: Path) -> None:
    """On files of the same format: the published ε at their own rate, and the shape of the network."""
    recipe = RECIPES[name]
    from dptorch.plan import make_plan
    from dptorch.training.models import build_model

    sizes = {"cifar10": 50_000, "cifar100": 50_000, "celeba": 162_770}
    classes = {"cifar10": 10, "cifar100": 100, "celeba": 40}[recipe.settings["format"]]
    own = ("batch_size", "epochs", "target_delta", "max_grad_norm")
    for epsilon, _ in recipe.published:
        plan = make_plan(
            sample_size=sizes[recipe.settings["format"]],
            target_epsilon=epsilon,
            **{key: recipe.settings[key] for key in own},
        )
        assert 0.99 * epsilon < plan.epsilon() <= epsilon
    with torch.device("meta"):
        side = 224 if "224" in recipe.settings["model"] else recipe.settings.get("image_size", 32)
        network = build_model(recipe.settings["model"], (3, side, side), classes)
    assert network(torch.zeros(2, 3, side, side, device="meta")).shape == (2, classes)
    assert not any("BatchNorm" in type(m).__name__ for m in network.modules())


@pytest.mark.slow
def test_a_recipe_overfits_64_pictures(tmp_path: Path) -> None:
    """The WRN recipe's optimizer, views and average on a small network; `make zoo` has its own."""
    how = {"model": "cnn", "epochs": 30, "views": 2, "learning_rate": 1.0, "ema": 0.9}
    assert overfit(tmp_path, **how) >= ENOUGH / PICTURES


@pytest.mark.slow
def test_the_statement_says_whose_settings_a_recipe_has(cifar: str) -> None:
    job = VisionJob(recipe="cifar10-wrn-16-4", data=cifar, model="cnn", batch_size=50, epochs=1)
    (note,) = prepare(job).notes
    assert "settings are those of De et al. 2022" in note


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": None}, "--data is missing"),
        ({"ema": 0.9, "tail": 0.5}, "both average the weights"),
        ({"low_pass": 0.5, "kalman": 0.7}, "both filter the gradients"),
        ({"tail": 1.5}, r"tail=1\.5: expected a share"),
        ({"optimizer": "adma"}, "mean 'adam'"),
        ({"format": "cifar"}, "mean 'cifar10'"),
        ({"views": 2}, "2 times the same"),
        ({"scale": "imagenet", "channels": 1}, "RGB pictures"),
        ({"method": "lorra"}, "mean 'lora'"),
        ({"features": "hog"}, "channels=1"),
        ({"batch_size": 1000}, "between 1 and the 100 training examples"),
        ({"epochs": -1}, "expected a positive number"),
        ({"format": "folder", "download": True}, "cannot be downloaded"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str, cifar: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        prepare(VisionJob(**{"data": cifar, "noise_multiplier": 1.0} | settings))
