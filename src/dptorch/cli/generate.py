"""`dptorch generate`: let a trained language model write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["generate"]


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a run, such as runs/notes-1.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="What the text begins with; for table-to-text the table. Give it several times for "
            "several texts.",
            show_default="the beginning of a text",
        ),
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Most tokens of a text.")] = 60,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Take the likeliest word each time, draw nothing.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Below 1 the likely words are drawn more often.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws. It is no secret.")] = 0,
) -> None:
    """Write texts by the model of a run of [bold]dptorch train language-model[/] or table-to-text.

    What the model writes is covered by the run's guarantee, however much it writes.

    [bold]Examples[/]

    [cyan]dptorch generate runs/notes-1[/]

    [cyan]dptorch generate runs/notes-1 --prompt "The patient" --prompt "Today" --temperature 0.8[/]
    """
    from dptorch.text.generation import generate as write
    from dptorch.text.models import load_run

    model, tokenizer = load_run(run, kind="causal")
    prompts = prompt or [""]
    texts = write(
        model,
        tokenizer,
        prompts,
        new_tokens=new_tokens,
        greedy=greedy,
        temperature=temperature,
        seed=seed,
    )
    for beginning, text in zip(prompts, texts, strict=True):
        typer.echo(f"{beginning} {text}".strip())
