"""The options of `dptorch train`, in the groups that its help shows.

The fields of `ModelOptions`, `PrivacyOptions` and `TrainingOptions` are those of
`dptorch.training.job.Job`; what they leave out (None) the recipe or the data decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dptorch.cli.options import panel_option as _option
from dptorch.cli.options import plan_option
from dptorch.training.hyperparameters import SUGGESTED

__all__ = [
    "BatchSize",
    "ClippingStyle",
    "DataOptions",
    "Device",
    "LedgerOptions",
    "ModelOptions",
    "OutputOptions",
    "PhysicalBatch",
    "PrivacyOptions",
    "ReadingOptions",
    "Seed",
    "TrainingOptions",
    "Workers",
]

DATA, MODEL, PRIVACY, TRAINING, OUTPUT = "Data", "Model", "Privacy", "Training", "Run and output"
LEDGER = "Ledger"

# Options that tasks have in common, each written once.

BatchSize = Annotated[
    float | None, plan_option("batch_size", TRAINING, more="Instead of --sample-rate.")
]
ClippingStyle = Annotated[
    str,
    _option(
        PRIVACY,
        metavar="STYLE",
        help="What is clipped together: [bold]all-layer[/], or for less memory "
        "[bold]layer-wise[/], [bold]param-wise[/], [bold]block-wise[/], or modules of your "
        "model, separated by commas, each a block of its own: [bold]encoder.*,head[/].",
    ),
]
PhysicalBatch = Annotated[
    int,
    _option(
        TRAINING,
        help="Largest number of examples in memory at once. It changes speed and memory only.",
    ),
]
Workers = Annotated[int, _option(TRAINING, help="Processes that read data.")]
Device = Annotated[str, _option(TRAINING, help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[
    int | None,
    _option(
        TRAINING,
        help="Make the run repeatable, for tests. [bold]Such a run is not private[/]: whoever "
        "knows the seed can remove the noise.",
        default="secret randomness",
    ),
]


def _suggested(name: str) -> str:
    """Return what the recipes set a hyperparameter to, for `--help`."""
    values = {recipe: f"{getattr(found, name)}" for recipe, found in SUGGESTED.items()}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{recipe}: {value}" for recipe, value in values.items())


@dataclass(frozen=True)
class DataOptions:
    """Where the data comes from."""

    recipe: Annotated[
        str | None,
        _option(
            DATA,
            help="Data, preprocessing, model and settings that fit together: [bold]mnist[/] "
            "(a convolutional network), [bold]mnist-features[/] or [bold]digits[/] (linear models on "
            "fixed features, trained in seconds).",
            default="mnist",
        ),
    ] = None
    data: Annotated[
        Path | None,
        _option(
            DATA,
            help="Your own data instead: a folder of images (one subfolder for each class), "
            "[bold].npz[/] (arrays x, y), or a table: [bold].csv[/], packed or not, "
            "[bold].parquet[/].",
            default=False,
        ),
    ] = None
    shards: Annotated[
        int | None,
        _option(
            DATA,
            help="Instead of training privately: split the examples into this many disjoint parts and "
            "train a model on each, [bold]without privacy[/]. Answers of all of them together are "
            "private under the budget of [bold]dptorch serve[/].",
            default=False,
        ),
    ] = None


@dataclass(frozen=True)
class ReadingOptions:
    """How the user's own data is read."""

    label: Annotated[str, _option(DATA, help="CSV, Parquet: the column to predict.")] = "label"
    bounds: Annotated[
        str | None,
        _option(
            DATA,
            metavar="LOW,HIGH",
            help="Tabular data: clip values to this range and scale it to [-1, 1]. Choose it by what "
            "the columns mean, not by the data. Or a JSON file with a range for each column: "
            '{"age": [0, 120], ...}.',
            default="values are used as they are",
        ),
    ] = None
    image_size: Annotated[int, _option(DATA, help="Image folder: side in pixels.")] = 28
    channels: Annotated[int, _option(DATA, help="Image folder: 1 for grey, 3 for RGB.")] = 3
    schema: Annotated[
        Path | None,
        _option(
            DATA,
            help="Table: a JSON file that says what its columns are, which is to be predicted and "
            "whom ε protects. [bold]dptorch schema[/] proposes one.",
            default="every column but the label is a number",
        ),
    ] = None
    unit_column: Annotated[
        str | None,
        _option(
            DATA,
            help="Table: the column that says whose a row is. ε then protects a person with all their "
            "rows.",
            default="the schema's; otherwise one row",
        ),
    ] = None
    on_bad_row: Annotated[
        str,
        _option(DATA, help="Table: [bold]error[/], or [bold]skip[/] rows that do not fit."),
    ] = "error"
    subgroups: Annotated[
        str | None,
        _option(
            DATA,
            metavar="COLUMNS",
            help="Table: columns by whose values test accuracy is told apart: sex,region. Noise "
            "costs small groups most.",
            default=False,
        ),
    ] = None
    test_fraction: Annotated[
        float,
        _option(
            DATA,
            help="Fraction held out for testing, if the data has no test set of its own. ε does not "
            "cover the test examples.",
        ),
    ] = 0.2


@dataclass(frozen=True)
class ModelOptions:
    """What is trained."""

    model: Annotated[
        str | None,
        _option(
            MODEL,
            help="[bold]cnn[/], [bold]mlp[/], [bold]linear[/], the name of a recipe, "
            "[bold]torchvision:NAME[/], [bold]timm:NAME[/], or your own "
            "[bold]package.module:factory[/].",
            default="the recipe's; for your own data cnn or mlp",
        ),
    ] = None
    pretrained: Annotated[
        bool,
        _option(
            MODEL,
            "--pretrained",
            help="torchvision, timm: start from their published weights, which are downloaded.",
        ),
    ] = False


@dataclass(frozen=True)
class PrivacyOptions:
    """The guarantee: noise or budget, clipping, sampling."""

    target_epsilon: Annotated[
        float | None,
        plan_option(
            "target_epsilon",
            PRIVACY,
            more="The noise is calibrated so that all steps together spend at most this.",
            default=_suggested("target_epsilon"),
        ),
    ] = None
    noise_multiplier: Annotated[
        float | None, plan_option("noise_multiplier", PRIVACY, more="ε follows from it.")
    ] = None
    target_delta: Annotated[float | None, plan_option("target_delta", PRIVACY)] = None
    max_grad_norm: Annotated[
        float | None,
        plan_option("max_grad_norm", PRIVACY, default=_suggested("max_grad_norm")),
    ] = None
    clipping_fn: Annotated[
        str | None, plan_option("clipping_fn", PRIVACY, default=_suggested("clipping_fn"))
    ] = None
    clipping_style: ClippingStyle = "all-layer"
    mechanism: Annotated[str, plan_option("mechanism", PRIVACY)] = "gaussian"
    bands: Annotated[str | None, plan_option("bands", PRIVACY)] = None
    coefficients: Annotated[str | None, plan_option("coefficients", PRIVACY)] = None
    accountant: Annotated[str, plan_option("accountant", PRIVACY)] = "pld"
    sampling: Annotated[str, plan_option("sampling", PRIVACY)] = "poisson"


@dataclass(frozen=True)
class TrainingOptions:
    """How the model is trained."""

    epochs: Annotated[
        float | None,
        plan_option(
            "epochs",
            TRAINING,
            more="Every step costs privacy, so few are better.",
            default=_suggested("epochs"),
        ),
    ] = None
    sample_rate: Annotated[
        float | None,
        plan_option(
            "sample_rate", TRAINING, more="Large is good.", default=_suggested("sample_rate")
        ),
    ] = None
    batch_size: BatchSize = None
    learning_rate: Annotated[
        float | None,
        _option(
            TRAINING,
            "--learning-rate",
            "--lr",
            help="Learning rate of SGD. Gradients are clipped to be small, so it is far larger than "
            "in ordinary training.",
            default=_suggested("learning_rate"),
        ),
    ] = None
    momentum: Annotated[
        float | None, _option(TRAINING, help="Momentum of SGD.", default=_suggested("momentum"))
    ] = None
    tail: Annotated[
        float | None,
        _option(
            TRAINING,
            help="Take the mean of the weights over this last share of the steps: it has less noise. 0 "
            "takes the last weights.",
            default=_suggested("tail"),
        ),
    ] = None
    max_physical_batch_size: PhysicalBatch = 512
    clipping_mode: Annotated[
        str | None,
        _option(
            TRAINING,
            help="How the norms of gradients are computed: [bold]auto[/], [bold]non-ghost[/], "
            "[bold]ghost[/] (two passes, little memory), [bold]BK-MixOpt[/], ... It changes speed "
            "and memory only.",
            default="auto",
        ),
    ] = None
    num_workers: Workers = 0
    device: Device = "auto"
    seed: Seed = None
    canaries: Annotated[
        int,
        _option(
            TRAINING,
            help="Add this many made-up examples, each with probability 1/2, so that [bold]dptorch "
            "audit[/] can measure what the run leaks. 1000 is usual. They cost some accuracy.",
            default="none",
        ),
    ] = 0


@dataclass(frozen=True)
class OutputOptions:
    """The run's folder, and what is written."""

    name: Annotated[
        str | None, _option(OUTPUT, help="Name of the run.", default="the recipe and a number")
    ] = None
    runs: Annotated[Path, _option(OUTPUT, help="Folder that holds the runs.")] = Path("runs")
    overwrite: Annotated[
        bool, _option(OUTPUT, "--overwrite", help="Replace an earlier run of that name.")
    ] = False
    resume: Annotated[
        bool,
        _option(
            OUTPUT,
            "--resume",
            help="Continue an interrupted run. Give its --name and no other setting.",
        ),
    ] = False
    nproc: Annotated[
        int | None,
        _option(
            OUTPUT,
            help="Train with this many processes, each on its share of every batch, and on a GPU of "
            "its own where there are any. The result is that of one process. Under torchrun leave it "
            "out.",
            default="1",
        ),
    ] = None
    release: Annotated[
        Path | None,
        _option(
            OUTPUT,
            help="When the run is done, write what may be published of it to this new folder. See "
            "[bold]dptorch release[/].",
            default=False,
        ),
    ] = None
    diagnostics: Annotated[
        bool,
        _option(
            OUTPUT,
            "--diagnostics/--no-diagnostics",
            help="Record training loss, gradient norms and clipping. They are [bold]not "
            "private[/]: leave them out of what you publish.",
        ),
    ] = True


@dataclass(frozen=True)
class LedgerOptions:
    """The ledger that the run's steps are written to."""

    ledger: Annotated[
        str | None,
        _option(
            LEDGER,
            envvar="DPTORCH_LEDGER",
            help="Where every step is written down before it is applied, so that all runs on one "
            "data set add up: a file, or [bold]postgresql://user@host/database[/]. See "
            "[bold]dptorch ledger[/].",
            default="ledger.db in the folder of the runs",
        ),
    ] = None
    no_ledger: Annotated[
        bool,
        _option(
            LEDGER,
            "--no-ledger",
            help="Keep no ledger. Steps that are lost when a run is killed are then not counted.",
        ),
    ] = False
    dataset: Annotated[
        str | None,
        _option(
            LEDGER,
            help="Name of the data set in the ledger. It is public, and must always be the same for "
            "the same data.",
            default="a random id kept beside the data; for recipes their name",
        ),
    ] = None
