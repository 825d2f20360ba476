"""The options of `dptorch train vision`, in the groups that its help shows.

Their fields are those of `dptorch.vision.job.VisionJob`; what they leave out (None) the recipe or
`dptorch.vision.recipes` decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dptorch.cli.options import panel_option as _option
from dptorch.cli.options import plan_option
from dptorch.cli.train_options import BatchSize, Device, PhysicalBatch, Seed, Workers

__all__ = [
    "AccuracyOptions",
    "MethodOptions",
    "OptimizerOptions",
    "VisionDataOptions",
    "VisionModelOptions",
    "VisionTrainingOptions",
]

DATA, MODEL, TRAINING, ACCURACY = "Data", "Model", "Training", "What helps against the noise"
RECIPE = "as the recipe, or "


@dataclass(frozen=True)
class VisionDataOptions:
    """Where the pictures come from, and what is done to each."""

    data: Annotated[
        str | None,
        _option(
            DATA,
            help="Folder of CIFAR-10, CIFAR-100, MNIST or CelebA as torchvision keeps them; of images, "
            "one subfolder for each class; or of [bold].parquet[/] files as Hugging Face keeps them.",
            default=False,
        ),
    ] = None
    recipe: Annotated[
        str | None,
        _option(
            DATA,
            help="Model and settings of a paper: [bold]cifar10-wrn-16-4[/], "
            "[bold]cifar10-beit-large[/], [bold]cifar100-beit-large[/], [bold]cifar10-vit-large[/], "
            "[bold]celeba-resnet18[/], [bold]cifar10-resnet18[/].",
            default=False,
        ),
    ] = None
    format: Annotated[
        str | None,
        _option(
            DATA,
            help="[bold]cifar10[/], [bold]cifar100[/], [bold]mnist[/], [bold]celeba[/], "
            "[bold]parquet[/] or [bold]folder[/].",
            default="what is found in --data",
        ),
    ] = None
    download: Annotated[
        bool,
        _option(DATA, "--download", help="Let torchvision download --format into --data."),
    ] = False
    label: Annotated[
        str | None,
        _option(
            DATA,
            help="Parquet: column of the class. CelebA: an attribute, several with commas, or "
            "[bold]all[/].",
            default="label",
        ),
    ] = None
    test_fraction: Annotated[
        float,
        _option(
            DATA,
            help="Fraction held out for testing, by a hash of each picture, if there is no test set. ε "
            "does not cover them.",
        ),
    ] = 0.2
    image_size: Annotated[
        int | None,
        _option(
            DATA,
            help="Side in pixels that pictures are resized to.",
            default="what the model was made for, or the data's",
        ),
    ] = None
    channels: Annotated[
        int | None, _option(DATA, help="1 for grey, 3 for RGB.", default="the data's")
    ] = None
    scale: Annotated[
        str | None,
        _option(
            DATA,
            help="[bold]standardise[/] each picture by itself, [bold]half[/] (from -1 to 1) or "
            "[bold]imagenet[/] (its published means).",
            default="what the model was made for, or standardise",
        ),
    ] = None


@dataclass(frozen=True)
class VisionModelOptions:
    """What is trained."""

    model: Annotated[
        str | None,
        _option(
            MODEL,
            help="[bold]timm:NAME[/], [bold]torchvision:NAME[/] (BatchNorm becomes GroupNorm), "
            "[bold]wrn-16-4[/], [bold]cnn[/], [bold]linear[/], or your own "
            "[bold]package.module:factory[/].",
            default=RECIPE + "cnn; with --features linear",
        ),
    ] = None
    pretrained: Annotated[
        bool | None,
        _option(
            MODEL,
            "--pretrained/--no-pretrained",
            help="timm, torchvision: begin with published weights, which are downloaded.",
            default=RECIPE + "no",
        ),
    ] = None
    init: Annotated[
        str | None,
        _option(
            MODEL,
            help="Weights to begin from: a [bold].safetensors[/] or [bold].pt[/] file of this model, "
            "or the folder of a run. The statement names them.",
            default=False,
        ),
    ] = None
    init_data: Annotated[
        str | None,
        _option(MODEL, help="What the file of --init was trained on, in words.", default=False),
    ] = None
    init_epsilon: Annotated[
        float | None,
        _option(
            MODEL,
            help="ε that the maker of that file states for that data.",
            default="trained without privacy, on public data",
        ),
    ] = None
    init_delta: Annotated[float | None, _option(MODEL, help="δ of it.", default=False)] = None
    features: Annotated[
        str | None,
        _option(
            MODEL,
            help="Fixed features instead of pixels: [bold]scattering[/] or [bold]hog[/] (grey).",
            default=False,
        ),
    ] = None


@dataclass(frozen=True)
class MethodOptions:
    """Which parameters are trained."""

    method: Annotated[
        str | None,
        _option(
            MODEL,
            help="What is trained: [bold]full[/], [bold]last-layer[/], [bold]bias-only[/] (BiTFiT), "
            "[bold]norm-only[/], [bold]lora[/] or [bold]ffa-lora[/].",
            default=RECIPE + "full",
        ),
    ] = None
    lora_rank: Annotated[int, _option(MODEL, help="Rank of LoRA.")] = 8


@dataclass(frozen=True)
class OptimizerOptions:
    """What makes steps of gradients."""

    optimizer: Annotated[
        str | None,
        _option(
            TRAINING,
            help="[bold]sgd[/], [bold]adam[/], [bold]adamw[/] or [bold]rmsprop[/].",
            default=RECIPE + "sgd",
        ),
    ] = None
    momentum: Annotated[
        float | None, _option(TRAINING, help="Of sgd and rmsprop.", default=RECIPE + "0")
    ] = None
    weight_decay: Annotated[
        float | None,
        _option(TRAINING, help="Decoupled from the gradient in adamw.", default=RECIPE + "0"),
    ] = None
    decay: Annotated[
        str | None,
        _option(
            TRAINING,
            help="Of the learning rate: [bold]constant[/], [bold]linear[/] or [bold]cosine[/].",
            default=RECIPE + "constant",
        ),
    ] = None
    warmup: Annotated[
        float | None,
        _option(
            TRAINING,
            help="Fraction of the steps over which the learning rate rises first.",
            default=RECIPE + "0",
        ),
    ] = None


@dataclass(frozen=True)
class VisionTrainingOptions:
    """How it is trained."""

    epochs: Annotated[float | None, plan_option("epochs", TRAINING, default=RECIPE + "10")] = None
    sample_rate: Annotated[
        float | None,
        plan_option("sample_rate", TRAINING, more="Large is good.", default=RECIPE + "0.05"),
    ] = None
    batch_size: BatchSize = None
    learning_rate: Annotated[
        float | None,
        _option(
            TRAINING,
            "--learning-rate",
            "--lr",
            help="Of the optimizer.",
            default=RECIPE + "1 for sgd, 0.001 for the others",
        ),
    ] = None
    max_physical_batch_size: PhysicalBatch = 64
    clipping_mode: Annotated[
        str | None,
        _option(
            TRAINING,
            help="How the norms of gradients are computed, which changes speed and memory only; or "
            "[bold]non-private[/], to compare with: such a run has no ε.",
            default="auto",
        ),
    ] = None
    num_workers: Workers = 0
    device: Device = "auto"
    seed: Seed = None


@dataclass(frozen=True)
class AccuracyOptions:
    """What costs no privacy and makes the noise hurt less."""

    augment: Annotated[
        str | None,
        _option(
            ACCURACY,
            help="Views of a picture: [bold]flip[/], [bold]crop[/], [bold]flip-crop[/] or "
            "[bold]none[/].",
            default=RECIPE + "none",
        ),
    ] = None
    views: Annotated[
        int | None,
        _option(
            ACCURACY,
            help="Augmentation multiplicity: views of an example in a step, whose mean gradient is "
            "clipped. A step takes as many times longer, and all views of an example are in memory.",
            default=RECIPE + "1",
        ),
    ] = None
    ema: Annotated[
        float | None,
        _option(
            ACCURACY,
            help="Take the exponential average of the weights over the steps, with this decay: 0.99.",
            default=RECIPE + "the last weights",
        ),
    ] = None
    tail: Annotated[
        float | None,
        _option(
            ACCURACY,
            help="Take the mean of the weights over this last share of the steps: 0.5.",
            default=False,
        ),
    ] = None
    low_pass: Annotated[
        float | None,
        _option(
            ACCURACY,
            help="Filter noisy gradients over the steps (DOPPLER), with this memory in [0, 1): 0.9.",
            default=False,
        ),
    ] = None
    kalman: Annotated[
        float | None,
        _option(
            ACCURACY,
            help="Filter noisy gradients by a prediction from the last step (DiSK), with this share of "
            "the new one: 0.7. A step takes twice as long.",
            default=False,
        ),
    ] = None
    moment_scaling: Annotated[
        float | None,
        _option(
            ACCURACY,
            help="Scale gradients by their noisy second moments before they are clipped, and back "
            "after the noise (scale-then-privatize), with this memory in [0, 1): 0.9.",
            default=False,
        ),
    ] = None
