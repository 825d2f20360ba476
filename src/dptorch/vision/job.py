"""A job on pictures: everything that determines a run, and the objects it is run with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dptorch.engine.checkpoint import Stateful
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, one_of
from dptorch.postprocessing import (
    Ahead,
    KalmanFilter,
    LowPassFilter,
    MomentScaling,
    Scaled,
    WeightAverage,
)
from dptorch.randomness import RootKey
from dptorch.training.job import (
    RunSettings,
    Setup,
    device_of,
    left_out,
    plan_of,
    refuse_pairs,
    require_positive,
    with_rate,
)
from dptorch.training.models import build_model
from dptorch.training.origin import Origin, origin_of
from dptorch.training.pictures import Look
from dptorch.training.schedules import Schedule
from dptorch.vision.augmentation import Augmentation, Views
from dptorch.vision.dataset import download, read_pictures
from dptorch.vision.formats import LAYOUTS, find_format
from dptorch.vision.methods import apply_method
from dptorch.vision.recipes import defaults_of, get_recipe
from dptorch.vision.task import ImageClassification
from dptorch.vision.weights import load_weights

__all__ = ["OPTIMIZERS", "TASK", "VisionJob", "prepare"]

TASK: Final = "vision"
OPTIMIZERS: Final = ("sgd", "adam", "adamw", "rmsprop")


@dataclass(frozen=True)
class VisionJob(RunSettings):
    """What `dptorch train vision` was asked for. None means: as `dptorch.vision.recipes` says.

    `prepare` returns a job with every None decided that has a default, and that is what `run.json`
    records.

    Attributes:
        task: "vision".
        recipe: a name in `dptorch.vision.recipes.RECIPES`.
        data: folder or file of pictures.
        format: of its files, a name in `dptorch.vision.formats.LAYOUTS`; None to look.
        download: let torchvision download it if it is not there.
        label: column of the class (Parquet); attributes, with commas, or "all" (CelebA).
        test_fraction: held out where there is no test set.
        image_size, channels, scale, features: see `dptorch.training.pictures.Look`.
        model, pretrained: see `dptorch.training.models.build_model`.
        init: weights to begin from: a file, or the folder of a run; init_data, init_epsilon,
            init_delta: what their maker says of them. See `dptorch.vision.weights`.
        method: what is trained, a name in `dptorch.vision.methods.METHODS`.
        lora_rank: of LoRA.
        optimizer: a name in `OPTIMIZERS`; momentum, weight_decay: of it.
        decay, warmup: see `dptorch.training.schedules.Schedule`.
        augment, views: see `dptorch.vision.augmentation.Augmentation`.
        ema, tail: an exponential average of the weights, or an even one over the last share of the
            steps; see `dptorch.postprocessing.WeightAverage`.
        low_pass: coefficient of `dptorch.postprocessing.LowPassFilter`.
        kalman: κ of `dptorch.postprocessing.KalmanFilter`.
        moment_scaling: β of `dptorch.postprocessing.MomentScaling`.

    The rest is as in `dptorch.training.job.RunSettings`, but that the clipping mode may be
    "non-private", for a comparison.

    Example:
        >>> job = VisionJob(data="photos", views=4)
        >>> VisionJob.from_dict(job.to_dict()) == job
        True
    """

    task: str = TASK
    recipe: str | None = None
    data: str | None = None
    format: str | None = None
    download: bool = False
    label: str | None = None
    test_fraction: float = 0.2
    image_size: int | None = None
    channels: int | None = None
    scale: str | None = None
    features: str | None = None
    model: str | None = None
    pretrained: bool | None = None
    init: str | None = None
    init_data: str | None = None
    init_epsilon: float | None = None
    init_delta: float | None = None
    method: str | None = None
    lora_rank: int = 8
    optimizer: str | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    decay: str | None = None
    warmup: float | None = None
    augment: str | None = None
    views: int | None = None
    ema: float | None = None
    tail: float | None = None
    low_pass: float | None = None
    kalman: float | None = None
    moment_scaling: float | None = None
    max_physical_batch_size: int = 64


def prepare(job: VisionJob) -> Setup:
    """Read the pictures, build the network and the engine; nothing is spent or written.

    Raises:
        ConfigurationError: options contradict each other or have impossible values.
        DataError: the data cannot be read.
        PrivacyError: the network cannot be trained privately.
    """
    _refuse_contradictions(job)
    job = _decide(job)
    device = device_of(job.device)
    assert job.data
    data = read_pictures(
        job.data,
        _look(job),
        format=job.format,
        label=job.label,
        test_fraction=job.test_fraction,
    )
    size = data.records
    job = with_rate(job, size)
    plan = plan_of(job, sample_size=size)
    if job.seed is not None:
        torch.manual_seed(job.seed)
    shape, outputs = data.input_shape, data.outputs
    network = _network(job, shape, outputs)
    origin = _begin(network, job)
    network = apply_method(network, job.method or "", rank=job.lora_rank)
    augmentation = _augmentation(job, data.input_shape)
    model = Views(network, dims=len(shape) + 1) if augmentation is not None else network
    ahead = None if job.kalman is None else Ahead(model)
    model = model if ahead is None else ahead
    scaled = None if job.moment_scaling is None else Scaled(model)
    model = (model if scaled is None else scaled).to(device)
    engine = PrivacyEngine(model, plan=plan, clipping_mode=job.clipping_mode, seed=job.seed)
    optimizer = _optimizer(model, job)
    engine.attach(optimizer)
    kept: dict[str, Stateful] = {}
    if augmentation is not None:
        kept["augmentation"] = augmentation
    if scaled is not None:  # before the filters, which take gradients as they are
        assert job.moment_scaling is not None
        kept["moment_scaling"] = MomentScaling(scaled, optimizer, beta=job.moment_scaling)
    if job.low_pass is not None:
        kept["low_pass"] = LowPassFilter(optimizer, job.low_pass)
    kalman = None
    if ahead is not None:
        assert job.kalman is not None
        kept["kalman"] = kalman = KalmanFilter(ahead, optimizer, kappa=job.kalman)
    if job.ema is not None or job.tail is not None:
        first = 0 if job.tail is None else left_out(job.tail, plan.steps)
        kept["average"] = WeightAverage(model, optimizer, decay=job.ema, first_step=first)
    assert job.model
    task = ImageClassification(
        classes=data.classes,
        schedule=Schedule(job.decay or "constant", plan.steps, job.warmup or 0.0),
        augmentation=augmentation,
        steps_done=lambda: engine.steps_done,
        build=partial(build_model, job.model, shape, outputs),
        several=bool(data.preparation.get("several")),
        batch_size=2 * job.max_physical_batch_size,
        ahead=None if kalman is None else kalman.weights,
    )
    return Setup(
        job, data, model, engine, optimizer, device, task=task, kept=kept,
        notes=_notes(job, origin),
        began_from=None if origin is None else origin.to_dict(),
    )  # fmt: skip


def _refuse_contradictions(job: VisionJob) -> None:
    refuse_pairs(
        job,
        ("batch_size", "sample_rate", "one determines the other"),
        ("target_epsilon", "noise_multiplier", "one determines the other"),
        ("ema", "tail", "both average the weights"),
        ("low_pass", "kalman", "both filter the gradients"),
    )
    if job.pretrained and job.init is not None:
        raise ConfigurationError("pretrained=True and init exclude each other: both give weights.")
    require_positive(job, "epochs", "learning_rate", "max_physical_batch_size")
    if job.optimizer is not None:
        one_of("optimizer", job.optimizer, OPTIMIZERS)
    if job.target_epsilon is not None and not job.target_epsilon > 0:
        raise ConfigurationError(
            f"target_epsilon={job.target_epsilon:g}: expected a positive number. 1 is strong "
            "protection, 3 to 8 is usual."
        )


def _decide(job: VisionJob) -> VisionJob:
    """Fill in what was left open."""
    suggested = defaults_of(job.recipe, job.optimizer)
    if job.batch_size is not None or job.sample_rate is not None:
        suggested["batch_size"] = suggested["sample_rate"] = None
    if job.noise_multiplier is not None:
        suggested["target_epsilon"] = None
    if job.ema is not None or job.tail is not None:
        suggested["ema"] = suggested["tail"] = None
    filled = {name: value for name, value in suggested.items() if getattr(job, name) is None}
    job = replace(job, **filled)
    if job.data is None:
        raise ConfigurationError(
            "--data is missing: the folder with the pictures. dptorch train vision --help lists "
            "formats; add --download to have cifar10, cifar100, mnist or celeba downloaded into it."
        )
    if job.format is not None:
        one_of("format", job.format, LAYOUTS)
    if job.download:
        download(job.data, job.format)
    found, _ = find_format(Path(job.data), job.format)
    model = job.model or ("linear" if job.features is not None else "cnn")
    native, imagenet = _made_for(model)
    channels = job.channels or (found.channels if native is None else 3)
    scale = (
        "standardise" if native is None else "imagenet" if imagenet and channels == 3 else "half"
    )
    return replace(
        job,
        model=model,
        format=found.name,
        pretrained=bool(job.pretrained),
        channels=channels,
        scale=job.scale or scale,
        image_size=job.image_size or native or found.size or 32,
    )


def _made_for(model: str) -> tuple[int | None, bool]:
    """(side of the pictures that a published model was made for, whether by ImageNet's means)."""
    source, _, name = model.partition(":")
    if source == "torchvision":
        return 224, True
    if source != "timm":
        return None, False
    try:
        import timm
    except (ImportError, RuntimeError):
        return 224, False  # build_model says what is missing
    about = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if about is None:
        return 224, False
    return int(about.input_size[-1]), about.mean != (0.5, 0.5, 0.5)


def _look(job: VisionJob) -> Look:
    assert job.image_size
    assert job.channels
    assert job.scale
    return Look(job.image_size, job.channels, job.scale, job.features)


def _network(job: VisionJob, shape: tuple[int, ...], outputs: int) -> nn.Module:
    assert job.model
    try:
        return build_model(job.model, shape, outputs, pretrained=bool(job.pretrained))
    except OSError as error:
        raise ConfigurationError(
            f"the weights of {job.model} cannot be downloaded ({' '.join(str(error).split())[:200]}). "
            "Leave out --pretrained to begin with random ones."
        ) from error


def _begin(network: nn.Module, job: VisionJob) -> Origin | None:
    """Load the weights to begin from, and say what is known of them."""
    assert job.data
    if job.init is None:
        if any(v is not None for v in (job.init_data, job.init_epsilon, job.init_delta)):
            raise ConfigurationError(
                "init_data, init_epsilon and init_delta say what is known of the weights of --init. "
                "Give those too."
            )
        if not job.pretrained:
            return None
        about: Any = getattr(network, "pretrained_cfg", None)  # of timm
        tag = about.get("tag") if isinstance(about, dict) else getattr(about, "tag", None)
        return Origin(f"{job.model} ({tag or 'default'})", "the data that their publisher names")
    origin = origin_of(
        job.init, job.init_data, job.init_epsilon, job.init_delta, job.data, protects=job.protects
    )
    load_weights(network, job.init)
    return origin


def _notes(job: VisionJob, origin: Origin | None) -> tuple[str, ...]:
    """What the statement says of the settings of a recipe, and of the weights it began with."""
    chosen = () if job.recipe is None else (get_recipe(job.recipe).chosen,)
    return chosen if origin is None else (*chosen, origin.note)


def _augmentation(job: VisionJob, shape: tuple[int, ...]) -> Augmentation | None:
    if (job.augment or "none") == "none" and (job.views or 1) == 1:
        return None
    if len(shape) != 3:
        raise ConfigurationError(
            f"augment={job.augment!r}: views are of pictures, and features={job.features!r} are "
            "computed before. Leave one out."
        )
    key = None if job.seed is None else RootKey.from_seed(job.seed)
    return Augmentation(job.augment or "none", job.views or 1, key)


def _optimizer(model: nn.Module, job: VisionJob) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    rate, weight_decay = job.learning_rate or 0.0, job.weight_decay or 0.0
    momentum = job.momentum or 0.0
    kind = one_of("optimizer", job.optimizer or "sgd", OPTIMIZERS)
    if kind == "adamw":
        return torch.optim.AdamW(trainable, lr=rate, weight_decay=weight_decay)
    if kind == "adam":
        return torch.optim.Adam(trainable, lr=rate, weight_decay=weight_decay)
    settings: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay}
    if kind == "rmsprop":
        return torch.optim.RMSprop(trainable, lr=rate, **settings)
    return torch.optim.SGD(trainable, lr=rate, **settings)
