"""`dptorch train text-classification | table-to-text | language-model`: tasks on texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dptorch.cli.options import grouped
from dptorch.cli.text_options import (
    ClassOptions,
    GenerationOptions,
    Prompts,
    TextDataOptions,
    TextModelOptions,
    TextPrivacyOptions,
    TextTrainingOptions,
)
from dptorch.cli.train import run_task
from dptorch.cli.train_options import LedgerOptions, OutputOptions
from dptorch.errors import DataError

if TYPE_CHECKING:
    from dptorch.training.job import Setup

__all__ = ["TASK_COMMANDS"]


@grouped
def text_classification(
    ctx: typer.Context,
    source: TextDataOptions,
    classes: ClassOptions,
    model: TextModelOptions,
    privacy: TextPrivacyOptions,
    training: TextTrainingOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
) -> None:
    """Train a classifier of texts, or of pairs of texts, with differential privacy.

    Writes [bold]runs/NAME/[/] with model/ (for from_pretrained; adapters by themselves),
    statement.txt, metrics.csv and report.html. Ctrl-C stops after the current batch, and --resume
    goes on.

    [bold]Examples[/]

    [cyan]dptorch train text-classification --data reviews.csv --model ./roberta-base[/]

    [cyan]dptorch train text-classification --data pairs.jsonl --text question --pair answer --label
    fits --model ./bert --method bias-only --epsilon 8[/]

    [cyan]dptorch train text-classification --recipe sst2 --epsilon 3[/]
    """
    settings = {**vars(classes)}
    _run(ctx, "text-classification", source, model, privacy, training, output, ledger, settings)


@grouped
def table_to_text(
    ctx: typer.Context,
    source: TextDataOptions,
    model: TextModelOptions,
    privacy: TextPrivacyOptions,
    training: TextTrainingOptions,
    generation: GenerationOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
    target: Annotated[
        str | None,
        typer.Option(
            help="Column of the text to write.", rich_help_panel="Data", show_default="target"
        ),
    ] = None,
    generate: Annotated[
        int,
        typer.Option(
            help="Number of test tables that texts are written and scored for.",
            rich_help_panel="Generated texts",
        ),
    ] = 100,
) -> None:
    """Train a language model to write a text about a table, with differential privacy.

    A table is a text, or a list of (subject, relation, object). The run's report has test perplexity,
    BLEU, ROUGE-L and NIST of texts written about test tables, and some of the texts.

    [bold]Examples[/]

    [cyan]dptorch train table-to-text --data restaurants.csv --text mr --target ref --model ./gpt2[/]

    [cyan]dptorch train table-to-text --recipe e2e --data ./e2e --model ./gpt2 --epsilon 8[/]
    """
    settings = {**vars(generation), "target": target, "generate": generate}
    _run(ctx, "table-to-text", source, model, privacy, training, output, ledger, settings)


@grouped
def language_model(
    ctx: typer.Context,
    source: TextDataOptions,
    model: TextModelOptions,
    privacy: TextPrivacyOptions,
    training: TextTrainingOptions,
    generation: GenerationOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
    prompts: Prompts = None,
) -> None:
    """Train a language model on texts, with differential privacy.

    One row is one example: what the guarantee protects. The run's report has test perplexity and
    samples; [bold]dptorch generate runs/NAME[/] writes more.

    [bold]Examples[/]

    [cyan]dptorch train language-model --data notes.jsonl --model ./gpt2 --method lora[/]

    [cyan]dptorch train language-model --data notes.parquet --text body --model ./gpt2 --epsilon 8[/]
    """
    settings: dict[str, Any] = {**vars(generation)}
    if prompts is not None:
        settings["prompts"] = _read(prompts)
    _run(ctx, "language-model", source, model, privacy, training, output, ledger, settings)


def _run(
    ctx: typer.Context,
    task: str,
    source: TextDataOptions,
    model: TextModelOptions,
    privacy: TextPrivacyOptions,
    training: TextTrainingOptions,
    output: OutputOptions,
    ledger: LedgerOptions,
    more: dict[str, Any],
) -> None:
    def prepared() -> Setup:
        from dptorch.text.job import TextJob, prepare

        settings = {**vars(source), **vars(model), **vars(privacy), **vars(training), **more}
        settings["clipping_mode"] = training.clipping_mode or "auto"
        return prepare(TextJob(task=task, diagnostics=output.diagnostics, **settings))

    data = None if source.data is None else Path(source.data.removeprefix("hub:")).name
    stem = data.split(".")[0].replace(":", "-") if data else source.recipe
    run_task(ctx, prepared, stem or task, training, output, ledger)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"--prompts {path} cannot be read ({error}).") from error


TASK_COMMANDS = (text_classification, table_to_text, language_model)
