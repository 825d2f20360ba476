"""Write measurements as CSV, Markdown, a plot, and a table on the terminal.

Runs are kept as ``KIND.json`` and ``KIND.csv`` in a folder, KIND being ``cost``, ``sweep-B``,
``sweep-T``, ..., ``largest-batch``. A new run takes the place of earlier ones of its kind for
the workloads that it measured; the page is made of all that the folder holds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dptorch.bench.engines import NON_PRIVATE
from dptorch.bench.exactness import WRONG
from dptorch.bench.suite import Row
from dptorch.bench.workloads import AXES, WORKLOADS
from dptorch.training.run_charts import MARKS, MUTED, SERIES, dress

__all__ = ["KINDS", "Measurements", "load", "page", "remarks", "save", "terminal_table"]

KINDS = ("cost", *(f"sweep-{axis}" for axis in AXES), "largest-batch")


@dataclass(frozen=True)
class Measurements:
    """What one command measured.

    Args:
        kind: one of `KINDS`.
        command: that repeats it.
        facts: machine, versions, date.
        about: what each engine is, by name.
        rows: the results.
        cap: of memory, in bytes, for ``largest-batch``.
    """

    kind: str
    command: str
    facts: dict[str, Any]
    about: dict[str, str]
    rows: list[Row]
    cap: int | None = None


def save(run: Measurements, folder: Path) -> list[Path]:
    """Write the run, beside what earlier ones say of other workloads, as JSON and CSV, and a plot;
    returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{run.kind}.{ending}" for ending in ("json", "csv", "svg")]
    runs = [*_others(_read(files[0]), run), run]
    rows = _in_order(runs)
    files[0].write_text(json.dumps([asdict(r) for r in runs], indent=1, ensure_ascii=False) + "\n")
    with files[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _short(v) for k, v in asdict(row).items()})
    return files if _plot(run.kind, rows, files[2]) else files[:2]


def load(folder: Path) -> list[Measurements]:
    """The runs that a folder holds, in the order of `KINDS`, the oldest of a kind first."""
    return [run for kind in KINDS for run in _read(folder / f"{kind}.json")]


def _read(file: Path) -> list[Measurements]:
    if not file.exists():
        return []
    return [
        Measurements(**r | {"rows": [Row(**x) for x in r["rows"]]})
        for r in json.loads(file.read_text())
    ]


def _others(earlier: Sequence[Measurements], new: Measurements) -> list[Measurements]:
    """Earlier runs without the workloads of the new one. Another cap is another question."""
    measured = {row.workload for row in new.rows}
    left = [
        replace(run, rows=[row for row in run.rows if row.workload not in measured])
        for run in earlier
        if run.cap == new.cap
    ]
    return [run for run in left if run.rows]


def _in_order(runs: Sequence[Measurements]) -> list[Row]:
    """The rows of all, workload by workload."""
    names = list(WORKLOADS)
    return sorted((row for run in runs for row in run.rows), key=lambda r: names.index(r.workload))


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


# -- Markdown --------------------------------------------------------------------------------------


def page(runs: Sequence[Measurements]) -> str:
    """One Markdown page of everything measured."""
    text = [_INTRODUCTION]
    for kind in dict.fromkeys(run.kind for run in runs):
        of_kind = [run for run in runs if run.kind == kind]
        rows = _in_order(of_kind)
        text += [_TITLES[kind], "", *_circumstances(of_kind), ""]
        if kind == "cost":
            text += [*_summary(rows), "", f"![{_alternative(rows)}]({kind}.svg)", ""]
            text += _each_workload(rows)
        elif kind == "largest-batch":
            text += _largest(of_kind[-1], rows)
        else:
            text += [*_sweep(kind, rows), "", f"![how the cost of a step grows]({kind}.svg)", ""]
    about = {name: what for run in runs for name, what in run.about.items()}
    text += ["## Engines", "", *(f"- `{name}`: {what}" for name, what in about.items()), ""]
    return "\n".join(text)


_INTRODUCTION = f"""# What a private step costs

As a ratio to the same step without privacy: forward, loss, backward, clipping, noise, SGD and
zero_grad, on a fixed batch. This page is written by the commands that it shows; they can be
repeated anywhere.

*Time*: one process, engines in a random order in each round; an engine's step is divided by an
ordinary step a moment before or after it. The median over rounds, and the 10th to 90th percentile.
The row `{NON_PRIVATE}` is the ordinary loop divided by itself: what it differs from 1 by is the
error of the measurement. *CPU*: the same of CPU time, all threads together.
*Allocated*: most bytes of tensors at any time, above the model and its batch. *Resident*: the
growth of the process during steps, which also sees what libraries take past the allocator. Each
engine has a process of its own for both, and both are ratios to the ordinary loop.
*Error*: of one noiseless step on a small version of the workload, against a loop over single
examples. Where it is above {WRONG:g} the engine clips or sums something else than each example's
gradient, and its time is that of another computation: such times are in brackets, and no best of
anything.
"""

_TITLES = {
    "cost": "## Time and memory",
    "largest-batch": "## Largest batch",
    **{f"sweep-{axis}": f"## How cost grows with {axis}" for axis in AXES},
}


def _circumstances(runs: Sequence[Measurements]) -> list[str]:
    """Of each run; where there are several, below the workloads that it was the last to measure."""
    text: list[str] = []
    for run in runs:
        if len(runs) > 1:
            text += [*([""] if text else []), f"{', '.join(_by_workload(run.rows))}:", ""]
        facts = (f"- {name}: {value}" for name, value in run.facts.items())
        text += [f"    {run.command}", "", *facts]
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def _summary(all_rows: Sequence[Row]) -> list[str]:
    """The fastest right engine of each family on each workload; nothing if none was checked."""
    right = [r for r in all_rows if r.ratio and r.gradient_error is not None and not _wrong(r)]
    if not right:
        return []
    families = list(dict.fromkeys(_family(r.engine) for r in all_rows if r.engine != NON_PRIVATE))
    times, memory = [], []
    for workload, rows in _by_workload(all_rows).items():
        label = f"{workload}, {_size(rows[0])}"
        best = []
        for family in families:
            mine = [r for r in right if r.workload == workload and _family(r.engine) == family]
            best.append(min(mine, key=lambda r: r.ratio or 0, default=None))
        times.append([label, *(_number(r.ratio) if r else "none" for r in best)])
        memory.append([label, *(_number(r.allocator_ratio) if r else "none" for r in best)])
    what = "Each library's fastest engine that clips each example's whole gradient: time"
    return [
        f"{what}.", "", *_table(["workload", *families], times), "",
        "Allocated memory of the same engines.", "", *_table(["workload", *families], memory),
    ]  # fmt: skip


def _each_workload(all_rows: Sequence[Row]) -> list[str]:
    text = []
    for workload, rows in _by_workload(all_rows).items():
        text += [
            f"### {workload}",
            "",
            f"{_sentence(WORKLOADS[workload].what)}. {_size(rows[0])}.",
            "",
        ]
        text += [*_table(_HEAD, [_cells(r) for r in rows if r.ratio is not None]), ""]
        notes = [f"- `{r.engine}`: n/a: {r.reason}" for r in rows if r.reason]
        text += [*notes, ""] if notes else []
    return text


_HEAD = ("engine", "ms", "time", "p10-p90", "CPU", "allocated", "resident", "error", "rounds")


def _cells(row: Row) -> list[str]:
    time = _number(row.ratio)
    return [
        row.engine,
        _number(row.step_ms, 1 if (row.step_ms or 0) < 100 else 0),
        f"({time})" if _wrong(row) else time,
        f"{_number(row.ratio_p10)}-{_number(row.ratio_p90)}",
        _number(row.cpu_ratio),
        _number(row.allocator_ratio),
        _number(row.resident_ratio),
        "" if row.gradient_error is None else f"{row.gradient_error:.0e}",
        str(row.rounds or ""),
    ]


def _sweep(kind: str, all_rows: Sequence[Row]) -> list[str]:
    text = []
    axis = kind.partition("-")[2]
    for workload, rows in _by_workload(all_rows).items():
        values = sorted({getattr(r, axis) for r in rows})
        for what, column in (("Time", "ratio"), ("Allocated memory", "allocator_ratio")):
            found = {(r.engine, getattr(r, axis)): r for r in rows if getattr(r, column)}
            engines = [e for e in dict.fromkeys(r.engine for r in rows) if e != NON_PRIVATE]
            body = [
                [e, *(_number(getattr(found.get((e, v)), column, None)) for v in values)]
                for e in engines
            ]
            if column == "ratio":
                body = [*_growth(rows, axis, values), *body]
            if found:
                head = ["engine", *(f"{axis}={v}" for v in values)]
                text += ["", f"{workload}: {what.lower()}", "", *_table(head, body)]
        reasons = {f"- `{r.engine}`: n/a: {r.reason}": None for r in rows if r.reason}
        text += ["", *reasons] if reasons else []
    return text


def _growth(rows: Sequence[Row], axis: str, values: Sequence[int]) -> list[list[str]]:
    """How the model and the ordinary step grow."""
    plain = {getattr(r, axis): r for r in rows if r.engine == NON_PRIVATE}
    counts = [plain[v].parameters if v in plain else None for v in values]
    return [
        ["trained parameters", *("" if n is None else _parameters(n) for n in counts)],
        [
            "ordinary step, ms",
            *(_number(plain[v].step_ms, 1) if v in plain else "" for v in values),
        ],
    ]


def _parameters(number: int) -> str:
    return f"{number}" if number < 10**5 else f"{number / 1e6:.3g} M"


def _largest(run: Measurements, rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(r.engine for r in rows))
    found = {(r.workload, r.engine): r for r in rows}

    def table(of: Callable[[Row], float | None]) -> list[str]:
        body = []
        for workload in _by_workload(rows):
            cells = [found.get((workload, e)) for e in names]
            values = [None if r is None else of(r) for r in cells]
            body.append([workload, *("n/a" if v is None else _count(v) for v in values)])
        return _table(["workload", *names], body)

    cap = f"{(run.cap or 0) / 1e9:g} GB"
    on = "the process, Python and libraries included" if "cuda" not in run.command else "the device"
    notes = [f"- `{r.engine}` on {r.workload}: n/a: {r.reason}" for r in rows if r.reason]
    return [
        f"Examples in one step below a memory cap of {cap} for {on}, to 5 %.", "",
        *table(lambda row: row.largest_batch), "",
        "Examples in one second, each engine at its own largest batch: the median of five steps, each "
        "engine alone in a process of its own.", "",
        *table(_throughput), "", *notes, "",
    ]  # fmt: skip


def _count(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _throughput(row: Row) -> float | None:
    """Examples in one second at the largest batch."""
    if not row.largest_batch or not row.step_ms:
        return None
    return 1000 * row.largest_batch / row.step_ms


def _by_workload(rows: Sequence[Row]) -> dict[str, list[Row]]:
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.workload, []).append(row)
    return grouped


def _family(engine: str) -> str:
    return engine.split("/")[0]


def _wrong(row: Row) -> bool:
    return row.gradient_error is not None and not row.gradient_error <= WRONG


def _size(row: Row) -> str:
    return ", ".join(f"{k}={getattr(row, k)}" for k in AXES if getattr(row, k) is not None)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


# -- terminal --------------------------------------------------------------------------------------


def terminal_table(rows: Sequence[Row]) -> Table:
    """The rows of one workload and size."""
    title = f"{rows[0].workload}: {_size(rows[0])}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    fits = any(r.largest_batch is not None for r in rows)
    heads = ("engine", "largest batch", "examples/s") if fits else _HEAD[:-1]
    for head in heads:
        first = head == "engine"  # the one to be broken where the terminal is narrow
        table.add_column(head, justify="left" if first else "right", no_wrap=not first)
    for row in rows:
        if fits:
            size, rate = row.largest_batch, _throughput(row)
            table.add_row(
                row.engine, "n/a" if size is None else f"{size:,}", _count(rate) if rate else ""
            )
        elif row.ratio is None:
            table.add_row(row.engine, "n/a")
        else:
            table.add_row(*_cells(row)[:-1], style="red" if _wrong(row) else None)
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table of these rows cannot say: why an engine is not in it, and what red means."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.engine)
    notes = [f"{', '.join(engines)}: n/a: {reason}" for reason, engines in reasons.items()]
    if any(_wrong(r) for r in rows):
        notes.append("Red, in brackets: not the gradient it should be, so another computation.")
    return notes


# -- plot ------------------------------------------------------------------------------------------


def _plot(kind: str, all_rows: Sequence[Row], file: Path) -> bool:
    """Draw the ratios of time; False where there are none, or no matplotlib to draw with."""
    rows = [r for r in all_rows if r.ratio is not None and r.engine != NON_PRIVATE]
    if not rows:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    from matplotlib.figure import Figure

    figure = _dots(Figure, rows) if kind == "cost" else _lines(Figure, rows, kind)
    with matplotlib.rc_context({"svg.hashsalt": "dptorch"}):  # the same file for the same numbers
        figure.savefig(file, facecolor="white", metadata={"Date": None}, bbox_inches="tight")
    return True


def _alternative(rows: Sequence[Row]) -> str:
    """What the plot shows, for who does not see it."""
    private = [r for r in rows if r.ratio is not None and r.engine != NON_PRIVATE and not _wrong(r)]
    ours = sorted(r.ratio or 0 for r in private if r.engine == "dptorch/auto")
    others = sorted(r.ratio or 0 for r in private if _family(r.engine) != "dptorch")
    said = [
        f"{name} {least[0]:.2f} to {least[-1]:.2f}"
        for name, least in (("dptorch/auto", ours), ("other libraries", others))
        if least
    ]
    return f"time of a private step as a multiple of the ordinary one: {'; '.join(said)}"


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """A colour for each family, and a mark for each engine, which can be told in grey."""
    engines = list(dict.fromkeys(r.engine for r in rows))
    families = list(dict.fromkeys(map(_family, engines)))
    return {
        engine: (SERIES[families.index(_family(engine)) % len(SERIES)], MARKS[i % len(MARKS)])
        for i, engine in enumerate(engines)
    }


def _dots(figure_class: Any, rows: Sequence[Row]) -> Any:
    workloads = list(dict.fromkeys(r.workload for r in rows))
    figure = figure_class(figsize=(9, 1.5 + 0.45 * len(workloads)))
    axes = figure.subplots()
    for engine, (colour, marker) in _styles(rows).items():
        mine = [r for r in rows if r.engine == engine]
        y = [workloads.index(r.workload) for r in mine]
        face = ["none" if _wrong(r) else colour for r in mine]
        axes.scatter(
            [r.ratio for r in mine], y, marker=marker, edgecolors=colour, facecolors=face,
            label=engine, s=36, zorder=3,
        )  # fmt: skip
    dress(axes, "hollow: not the right gradient", "time of a step / non-private step", grid="x")
    axes.axvline(1, color=MUTED, linewidth=1)
    _ratio_axis(axes, "x", rows)
    axes.set_yticks(range(len(workloads)), workloads)
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return figure


def _lines(figure_class: Any, rows: Sequence[Row], kind: str) -> Any:
    axis = kind.partition("-")[2]
    workloads = list(dict.fromkeys(r.workload for r in rows))
    figure = figure_class(figsize=(1 + 3.6 * len(workloads), 3.4))
    panels = figure.subplots(1, len(workloads), squeeze=False)[0]
    for panel, workload in zip(panels, workloads, strict=True):
        shown = [r for r in rows if r.workload == workload]
        for engine, (colour, marker) in _styles(rows).items():
            mine = sorted((getattr(r, axis), r.ratio) for r in shown if r.engine == engine)
            if mine:
                panel.plot(*zip(*mine, strict=True), color=colour, marker=marker, label=engine)
        dress(panel, axis, f"{workload}: time / non-private")
        panel.set(xscale="log")
        ticks = sorted({getattr(r, axis) for r in shown})
        panel.set_xticks(ticks, [str(t) for t in ticks])
        panel.minorticks_off()
        _ratio_axis(panel, "y", shown)
        panel.axhline(1, color=MUTED, linewidth=1)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return figure


def _ratio_axis(axes: Any, which: str, rows: Sequence[Row]) -> None:
    """Logarithmic, with the numbers people read."""
    highest = max(r.ratio or 1 for r in rows)
    ticks = [t for t in (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if t <= 1.5 * highest]
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}ticks")(ticks, [f"{t:g}" for t in ticks])
    getattr(axes, f"{which}axis").minorticks_off()
