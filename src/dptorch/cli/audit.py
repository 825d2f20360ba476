"""`dptorch audit`: compare a run's claimed ε with a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dptorch.cli.options import AsJson
from dptorch.errors import ConfigurationError

__all__ = ["audit"]


def audit(
    target: Annotated[
        Path,
        typer.Argument(
            help="The folder of a run, such as runs/demo, or a plan as JSON.", show_default=False
        ),
    ],
    adversary: Annotated[
        str,
        typer.Option(
            help="[bold]black-box[/]: ask the run's model about the canaries it planted. "
            "[bold]white-box[/]: run the plan on canaries before an observer of every step. "
            "[bold]auto[/]: the first if the run planted any."
        ),
    ] = "auto",
    canaries: Annotated[
        int | None,
        typer.Option(help="White box: how many. More prove more.", show_default="1000"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="White box: play only the first steps of the plan.", show_default="all"),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of a refutation, 1 - α.")] = 0.95,
    threshold: Annotated[
        str,
        typer.Option(
            help="Black box: how guesses are chosen without looking at the truth: bonferroni, split "
            "or multi-split."
        ),
    ] = "bonferroni",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Make a white-box audit repeatable.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for audit.json, audit.txt and audit.html.",
            show_default="the run's own; none for a plan",
        ),
    ] = None,
    sampling_attack: Annotated[
        bool,
        typer.Option(
            "--sampling-attack",
            help="Ask the run's model, or its shards, for labels alone, again and again, and compare "
            "with other ways of answering and with what guarantees allow. It needs the run's data, and "
            "trains what the run is not.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Audit a run: a lower bound on its true ε, and whether it refutes the claim.

    The verdict is REFUTED or NOT REFUTED, never more: a leak that this adversary does not see stays
    unseen. Exit code 1 if the claim is refuted.

    [bold]Examples[/]

    [cyan]dptorch train --canaries 1000 --name demo[/]

    [cyan]dptorch audit runs/demo[/]

    [cyan]dptorch audit runs/demo --adversary white-box --confidence 0.99[/]

    [cyan]dptorch audit plan.json --json[/]

    [cyan]dptorch audit --sampling-attack runs/digits[/]
    """
    if sampling_attack:
        return _sampling(target, out or target, seed or 0, as_json)
    from dptorch.atomic_files import replacing
    from dptorch.audit import audit as run_audit
    from dptorch.audit.audit_page import write_report
    from dptorch.audit.black_box import has_canaries
    from dptorch.audit.result import AuditResult
    from dptorch.training.run_page import missing_packages

    white = adversary == "white-box" or (
        adversary == "auto" and not (target.is_dir() and has_canaries(target))
    )
    settings: dict[str, Any] = {"device": device}
    if white:
        given = {"canaries": canaries, "steps": steps, "seed": seed}
        settings |= {name: value for name, value in given.items() if value is not None}
        if not as_json:
            settings["progress"] = _bar
    else:
        settings |= {"threshold": threshold, "progress": not as_json}
    result: AuditResult = run_audit(
        target, adversary=adversary, significance=1 - confidence, **settings
    )
    folder = out or (target if target.is_dir() else None)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("audit.json", result.to_json()), ("audit.txt", str(result))):
            with replacing(folder / name) as partial:
                partial.write_text(text, encoding="utf-8")
        if not missing_packages():
            write_report(result, folder / "audit.html")
    if as_json:
        typer.echo(result.to_json(), nl=False)
    else:
        console = Console(highlight=False, soft_wrap=True)
        console.print()
        head, _, rest = str(result).partition("\n")
        console.print(f"[bold {'red' if result.refuted else 'green'}]{head}[/]")
        console.print(rest, markup=False, end="")
        if folder is not None:
            name = "audit.txt" if missing_packages() else "audit.html"
            console.print(f"Report: {folder / name}")
    if result.refuted:
        raise typer.Exit(1)


def _sampling(run: Path, folder: Path, seed: int, as_json: bool) -> None:
    """Play the sampling attack on a run, and write what it found."""
    from dptorch.atomic_files import replacing
    from dptorch.audit.attacked_run import attack_run
    from dptorch.audit.audit_charts import sampling_chart
    from dptorch.training.run_page import missing_packages

    if not (run / "run.json").is_file():
        raise ConfigurationError(f"{run} is not the folder of a run (it has no run.json).")
    found = attack_run(run, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "sampling_attack.json") as partial:
        partial.write_text(found.to_json(), encoding="utf-8")
    if not missing_packages():
        page = (
            "<!doctype html><meta charset='utf-8'><title>Sampling attack</title>"
            f"<img alt='AUC of the attack against labels asked for' src='{sampling_chart(found)}'>"
            f"<pre>{found}</pre>"
        )
        with replacing(folder / "sampling_attack.html") as partial:
            partial.write_text(page, encoding="utf-8")
    typer.echo(found.to_json() if as_json else str(found), nl=False)


def _bar(steps: Any, total: int) -> Any:
    """A line that counts steps, where there is a terminal."""
    from rich.progress import track

    return track(steps, description="Playing steps", total=total, transient=True)
