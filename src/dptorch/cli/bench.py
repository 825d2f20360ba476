"""`dptorch bench`: measure a private step beside other libraries' and the ordinary one."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dptorch.errors import ConfigurationError, one_of

if TYPE_CHECKING:
    from rich.console import Console

    from dptorch.bench.cost_page import Measurements
    from dptorch.bench.engines import Engine
    from dptorch.bench.suite import Options, Tell
    from dptorch.bench.workloads import Recipe

__all__ = ["bench"]

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
_DTYPES |= {name: name for name in _DTYPES.values()}
#: Of a sweep or a search for the largest batch, where nothing else is named.
_FEW_WORKLOADS = ("mlp", "gpt2", "resnet_gn")
_FEW_ENGINES = ("dptorch/auto", "opacus/hooks", "opacus/ghost", "fastdp/MixOpt-origin")
_WHAT, _HOW, _OUT = "What", "How", "Results"


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(help="Which models. --list shows them. All by default.", show_default=False),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="An engine like dptorch/auto, or a family like opacus. Can be given several times. "
            "All by default.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="Measure a checkout of fastdp, private-transformers or private-vision too.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B|T|d|L|V",
            help="Instead, how cost grows with the batch, the length, the width, the layers or the "
            "vocabulary. Can be given several times.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            help="Of the sweep: 64,128,256. By default 1/4 to 2 times the usual one.",
            rich_help_panel=_WHAT,
            show_default=False,
        ),
    ] = None,
    largest_batch: Annotated[
        bool,
        typer.Option(
            "--largest-batch",
            help="Instead, how many examples fit below --memory-cap in one step.",
            rich_help_panel=_WHAT,
        ),
    ] = False,
    memory_cap: Annotated[
        str, typer.Option(help="For --largest-batch: 4GB, 512MiB.", rich_help_panel=_WHAT)
    ] = "4GB",
    seconds: Annotated[
        float,
        typer.Option(min=0, help="Of timing for each workload.", rich_help_panel=_HOW),
    ] = 60.0,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="So many rounds instead.", rich_help_panel=_HOW),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.", rich_help_panel=_HOW)] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.", rich_help_panel=_HOW)] = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp64.", rich_help_panel=_HOW)] = "fp32",
    memory: Annotated[
        bool,
        typer.Option(help="Measure peaks, each engine in its own process.", rich_help_panel=_HOW),
    ] = True,
    check: Annotated[
        bool,
        typer.Option(help="Hold gradients against a loop over examples.", rich_help_panel=_HOW),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the order of steps.", rich_help_panel=_HOW)] = 0,
    output: Annotated[
        Path,
        typer.Option(help="Folder for CSV, JSON, Markdown and plot.", rich_help_panel=_OUT),
    ] = Path("bench"),
    docs: Annotated[
        bool,
        typer.Option(
            "--docs",
            help="Write docs/cost.md and what it shows, in docs/cost/.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    listing: Annotated[
        bool, typer.Option("--list", help="Show workloads and engines, measure nothing.")
    ] = False,
) -> None:
    """Measure what a private step costs: time and memory, as a ratio to the step without privacy.

    Engines step in turns, so a busy machine changes the ratios little. What an engine cannot run is
    said, and one whose gradient is wrong is marked.

    [bold]Examples[/]

    [cyan]dptorch bench mlp gpt2 --engine dptorch --engine opacus --seconds 20[/]

    [cyan]dptorch bench --sweep T gpt2 --values 64,128,256,512[/]

    [cyan]dptorch bench --sweep B --sweep T --sweep d --sweep L --sweep V gpt2 --docs[/]

    [cyan]dptorch bench --largest-batch --memory-cap 4GB resnet_gn[/]

    [cyan]dptorch bench gpt2_small --device cuda --dtype bf16[/]
    """
    from rich.console import Console

    from dptorch.bench.all_engines import choose, engines
    from dptorch.bench.memory import memory_bytes
    from dptorch.bench.peers import read_peers
    from dptorch.bench.suite import Options
    from dptorch.bench.workloads import AXES, WORKLOADS, get_workload

    console = Console()
    peers = read_peers(peer or [])
    available = engines(peers)
    if listing:
        _list(console, available.values(), WORKLOADS.values())
        return
    axes: list[str | None] = [one_of("sweep", axis, AXES) for axis in sweep or []]
    if len(axes) > 1 and values:
        raise ConfigurationError("--values is of one --sweep: give one.")
    if axes and largest_batch:
        raise ConfigurationError(
            "--sweep and --largest-batch: give one, they are runs of their own."
        )
    few = bool(axes) or largest_batch
    usual = _FEW_WORKLOADS if few else [n for n, w in WORKLOADS.items() if w.default]
    chosen = [get_workload(name) for name in workloads or usual]
    if few and not engine:
        engine = [name for name in _FEW_ENGINES if name in available]
    options = Options(
        engines=choose(available, engine or []),
        peers=peers,
        seconds=seconds,
        rounds=rounds,
        threads=threads,
        device=_device(device),
        dtype=_DTYPES[one_of("dtype", dtype, _DTYPES)],
        memory=memory,
        check=check,
        seed=seed,
    )
    cap = memory_bytes(memory_cap) if largest_batch else None
    folder = _docs_folder() if docs else output
    for axis in axes or [None]:
        for run in _runs(chosen, options, axis, _values(values), cap, console):
            files = _write(run, folder, docs)
    console.print("Written: " + ", ".join(str(f) for f in files))


def _list(console: Console, engines: Iterable[Engine], workloads: Iterable[Recipe]) -> None:
    from rich.table import Table

    table = Table("workload", "what", "size", title="Workloads", title_justify="left")
    for w in workloads:
        table.add_row(w.name, w.what, str(w.size))
    console.print(table)
    table = Table("engine", "what", title="Engines", title_justify="left")
    for e in engines:
        table.add_row(e.name, e.what)
    console.print(table)


def _device(name: str) -> str:
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = name
    if kind not in ("cpu", "cuda"):
        raise ConfigurationError(f"--device {name!r}: expected cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(f"--device {name!r}: torch finds no CUDA device here. Use cpu.")
    return name


def _values(text: str | None) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")] if text else []
    except ValueError:
        found = [0]
    if any(value < 1 for value in found):
        raise ConfigurationError(f"--values {text!r}: expected positive numbers like 64,128,256.")
    return found


def _docs_folder() -> Path:
    if not Path("docs").is_dir():
        raise ConfigurationError("--docs: there is no folder docs here. Use --output FOLDER.")
    return Path("docs/cost")


def _runs(
    recipes: list[Recipe],
    options: Options,
    axis: str | None,
    values: list[int],
    cap: int | None,
    console: Console,
) -> Iterator[Measurements]:
    """Measure, showing a bar and a table for each workload; what there is after each of them, so
    that an interrupted run has its results."""
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

    from dptorch.bench.cost_page import Measurements, remarks, terminal_table
    from dptorch.bench.suite import Row, facts, largest, measure, sweep_sizes
    from dptorch.bench.workloads import Unavailable

    kind = f"sweep-{axis}" if axis else "largest-batch" if cap is not None else "cost"
    about = {e.name: e.what for e in options.engines}
    rows: list[Row] = []
    run = Measurements(kind, _command(), facts(options), about, rows, cap)
    jobs = []
    for recipe in recipes:
        try:
            sizes = [recipe.size] if axis is None else sweep_sizes(recipe, axis, values)
        except Unavailable as error:
            console.print(f"{recipe.name}: n/a: {error}")
        else:
            jobs += [(recipe, size) for size in sizes]
    if not jobs:
        raise ConfigurationError(f"--sweep {axis}: none of these workloads has a {axis} to vary.")
    bar = Progress(
        SpinnerColumn(), BarColumn(bar_width=20), MofNCompleteColumn(),
        TextColumn("{task.description}"), console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=len(jobs))
        tell: Tell = lambda text, over: bar.update(task, description=text, advance=int(over))
        for recipe, size in jobs:
            found = (
                largest(recipe, options, cap, tell=tell)
                if cap is not None
                else measure(recipe, options, size, tell=tell)
            )
            rows += found
            console.print(terminal_table(found))
            for remark in remarks(found):
                console.print(f"[dim]{escape(remark)}[/]", soft_wrap=True)
            yield run


def _command() -> str:
    """What was typed, without where this machine keeps checkouts."""
    import sys

    words, result = sys.argv[1:], ["dptorch"]
    for before, word in zip(["", *words], words, strict=False):
        name, _, path = word.removeprefix("--peer=").partition("=")
        is_peer = before == "--peer" or word.startswith("--peer=")
        if is_peer and path:
            word = f"{'--peer=' if word.startswith('--') else ''}{name}=PATH"
        result.append(shlex.quote(word))
    return " ".join(result)


def _write(run: Measurements, folder: Path, docs: bool) -> list[Path]:
    """Save the run, and the page of all runs in the folder; returns the files."""
    from dptorch.bench.cost_page import load, page, save

    files = save(run, folder)
    text = page(load(folder))
    if docs:
        markdown, text = folder.with_suffix(".md"), text.replace("](", f"]({folder.name}/")
    else:
        markdown = folder / "cost.md"
    markdown.write_text(text)
    return [*files, markdown]
