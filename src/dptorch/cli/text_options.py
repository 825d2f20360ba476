"""The options of `dptorch train TASK` for texts, in the groups that its help shows.

Their fields are those of `dptorch.text.job.TextJob`; what they leave out (None) the recipe or
`dptorch.text.recipes` decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from dptorch.cli.options import panel_option as _option
from dptorch.cli.options import plan_option
from dptorch.cli.train_options import (
    PRIVACY,
    BatchSize,
    Device,
    PhysicalBatch,
    PrivacyOptions,
    Seed,
    Workers,
)

__all__ = [
    "ClassOptions",
    "GenerationOptions",
    "TextDataOptions",
    "TextModelOptions",
    "TextPrivacyOptions",
    "TextTrainingOptions",
]

DATA, MODEL, TRAINING = "Data", "Model", "Training"
RECIPE = "as the recipe, or "


@dataclass(frozen=True)
class TextDataOptions:
    """Where the rows come from."""

    data: Annotated[
        str | None,
        _option(
            DATA,
            help="Your rows: [bold].csv[/], [bold].tsv[/], [bold].jsonl[/], [bold].json[/] or "
            "[bold].parquet[/]; a directory that [bold]datasets[/] saved, or with train.csv and "
            "test.csv in it; or [bold]hub:NAME[/], which is downloaded.",
            default="the recipe's",
        ),
    ] = None
    recipe: Annotated[
        str | None,
        _option(
            DATA,
            help="Columns and settings of a paper: [bold]sst2[/], [bold]qnli[/], [bold]qqp[/], "
            "[bold]mnli[/] (RoBERTa), [bold]e2e[/], [bold]dart[/] (GPT-2); or [bold]reviews[/], "
            "[bold]bible[/], from packages. Data and model are downloaded, unless --data and --model "
            "name folders.",
            default=False,
        ),
    ] = None
    test_data: Annotated[str | None, _option(DATA, help="A file of test rows.", default=False)] = (
        None
    )
    test_fraction: Annotated[
        float,
        _option(
            DATA,
            help="Fraction held out for testing, by a hash of the text, if there are no test rows. ε "
            "does not cover them.",
        ),
    ] = 0.2
    text: Annotated[
        str | None, _option(DATA, help="Column of the text, or table.", default="text")
    ] = None


@dataclass(frozen=True)
class ClassOptions:
    """Columns and prompts of text classification."""

    pair: Annotated[str | None, _option(DATA, help="Column of a second text.", default="none")] = (
        None
    )
    label: Annotated[str | None, _option(DATA, help="Column of the class.", default="label")] = None
    template: Annotated[
        str | None,
        _option(
            MODEL,
            help="Classify by the word that a masked model fills in: [bold]'{text} It was {mask}.'[/]. "
            "Better than a new head where rows are few.",
            default="the recipe's, or a new head",
        ),
    ] = None
    label_words: Annotated[
        str | None,
        _option(
            MODEL,
            help="With --template: a word for each class, in the order of the classes, with commas.",
            default=False,
        ),
    ] = None
    prompt: Annotated[
        bool, _option(MODEL, "--prompt/--no-prompt", help="Use the recipe's template.")
    ] = True
    pool: Annotated[
        str | None,
        _option(
            MODEL,
            help="What a new head is given: [bold]model[/], as the model's own class does, or "
            "[bold]mean[/], means of a text's hidden states, for encoders of sentences.",
            default=RECIPE + "model",
        ),
    ] = None
    head_learning_rate: Annotated[
        float | None,
        _option(TRAINING, help="Of the new head.", default="--learning-rate"),
    ] = None
    head_first: Annotated[
        float | None,
        _option(
            TRAINING,
            help="Share of the steps in which the new head alone moves, within the same ε. What is "
            "below a head of zeros has no gradient.",
            default=RECIPE + "0",
        ),
    ] = None


@dataclass(frozen=True)
class TextModelOptions:
    """What is trained."""

    model: Annotated[
        str | None,
        _option(
            MODEL,
            help="Pretrained model: a folder that [bold]save_pretrained[/] wrote, or a name on the "
            "hub, which is downloaded. It counts as public.",
            default="the recipe's",
        ),
    ] = None
    method: Annotated[
        str | None,
        _option(
            MODEL,
            help="[bold]full[/], [bold]lora[/], [bold]ffa-lora[/] (first factor frozen), "
            "[bold]bias-only[/] (BiTFiT), [bold]last-layer[/] or [bold]prefix[/].",
            default=RECIPE + "lora",
        ),
    ] = None
    lora_rank: Annotated[int, _option(MODEL, help="Rank of LoRA.")] = 8
    prefix_length: Annotated[int, _option(MODEL, help="Number of vectors of a prefix.")] = 10
    max_length: Annotated[
        int | None,
        _option(MODEL, help="Tokens of an example that are read.", default=RECIPE + "128"),
    ] = None


@dataclass(frozen=True)
class TextPrivacyOptions(PrivacyOptions):
    """The guarantee, with the defaults of tasks on texts."""

    target_epsilon: Annotated[
        float | None,
        plan_option(
            "target_epsilon",
            PRIVACY,
            more="The noise is calibrated so that all steps together spend at most this.",
            default=RECIPE + "3",
        ),
    ] = None
    max_grad_norm: Annotated[
        float | None, plan_option("max_grad_norm", PRIVACY, default=RECIPE + "1")
    ] = None
    clipping_fn: Annotated[
        str | None, plan_option("clipping_fn", PRIVACY, default=RECIPE + "abadi")
    ] = None


@dataclass(frozen=True)
class TextTrainingOptions:
    """How it is trained."""

    epochs: Annotated[float | None, plan_option("epochs", TRAINING, default=RECIPE + "5")] = None
    sample_rate: Annotated[
        float | None,
        plan_option("sample_rate", TRAINING, more="Large is good.", default=RECIPE + "0.1"),
    ] = None
    batch_size: BatchSize = None
    learning_rate: Annotated[
        float | None,
        _option(
            TRAINING,
            "--learning-rate",
            "--lr",
            help="Of AdamW.",
            default=RECIPE + "0.002; full 0.0005, bias-only and last-layer 0.005, prefix 0.01",
        ),
    ] = None
    decay: Annotated[
        str | None,
        _option(
            TRAINING,
            help="[bold]linear[/] or [bold]cosine[/] to 0 at the last step, or [bold]constant[/].",
            default=RECIPE + "linear",
        ),
    ] = None
    weight_decay: Annotated[
        float | None, _option(TRAINING, help="Of AdamW.", default=RECIPE + "0")
    ] = None
    max_physical_batch_size: PhysicalBatch = 16
    precision: Annotated[
        str | None,
        _option(
            TRAINING,
            help="[bold]float32[/], or [bold]bf16[/]: the model's products in bfloat16, and norms, "
            "sums, noise and steps in float32. Faster on GPUs, and on CPUs with AMX.",
            default=RECIPE + "float32",
        ),
    ] = None
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
class GenerationOptions:
    """Texts that are generated when a run is done."""

    new_tokens: Annotated[int, _option("Generated texts", help="Most tokens of one.")] = 40


Prompts = Annotated[
    Path | None,
    _option(
        "Generated texts",
        "--prompts",
        help="File with the beginning of a sample in each line. They must be public.",
        default="three samples from the beginning of a text",
    ),
]
