"""Write measurements as CSV, Markdown, a plot, and a table on the terminal.

Runs are kept as ``PROCESSOR/KIND.json`` and ``.csv`` in a folder, KIND being ``cost``, ``sweep-B``,
``sweep-T``, ..., ``largest-batch``. A new run takes the place of earlier ones of its kind on its
processor for the workloads that it measured; the page is made of all that the folder holds.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dptorch.bench.cost_plots import alternative, draw
from dptorch.bench.engines import NON_PRIVATE
from dptorch.bench.exactness import WRONG
from dptorch.bench.suite import Row, family, is_wrong, processor
from dptorch.bench.workloads import AXES, WORKLOADS

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
    folder = folder / _folder_name(run)
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
    return files if draw(run.kind, rows, files[2]) else files[:2]


def load(folder: Path) -> list[Measurements]:
    """The runs that a folder holds: by processor, in the order of `KINDS`, the oldest of a kind
    first."""
    places = sorted(place for place in folder.iterdir() if place.is_dir())
    return [run for place in places for kind in KINDS for run in _read(place / f"{kind}.json")]


def _folder_name(run: Measurements) -> str:
    """Of the run's processor: ``intel-xeon-processor-with-avx-512-vaes-amx``."""
    return "-".join(re.findall("[a-z0-9]+", processor(run.facts).lower()))


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
    """One Markdown page of everything measured, a section for each processor."""
    text = [_INTRODUCTION]
    for name in dict.fromkeys(processor(run.facts) for run in runs):
        text += [f"## {name}", ""]
        of_processor = [run for run in runs if processor(run.facts) == name]
        for kind in dict.fromkeys(run.kind for run in of_processor):
            text += _section(kind, [run for run in of_processor if run.kind == kind])
    about = {name: what for run in runs for name, what in run.about.items()}
    text += ["## Engines", "", *(f"- `{name}`: {what}" for name, what in about.items()), ""]
    return "\n".join(text)


def _section(kind: str, runs: Sequence[Measurements]) -> list[str]:
    """What one processor took, of one kind."""
    rows = _in_order(runs)
    text = [_TITLES[kind], "", *_circumstances(runs), ""]
    plot = f"{_folder_name(runs[0])}/{kind}.svg"
    if kind == "cost":
        text += [*_summary(rows), "", f"![{alternative(rows)}]({plot})", ""]
        return text + _each_workload(rows)
    if kind == "largest-batch":
        return text + _largest(runs[-1], rows)
    return [*text, *_sweep(kind, rows), "", f"![how the cost of a step grows]({plot})", ""]


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
    "cost": "### Time and memory",
    "largest-batch": "### Largest batch",
    **{f"sweep-{axis}": f"### How cost grows with {axis}" for axis in AXES},
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
    right = [r for r in all_rows if r.ratio and r.gradient_error is not None and not is_wrong(r)]
    if not right:
        return []
    families = list(dict.fromkeys(family(r.engine) for r in all_rows if r.engine != NON_PRIVATE))
    times, memory = [], []
    for workload, rows in _by_workload(all_rows).items():
        label = f"{workload}, {_size(rows[0])}"
        best = []
        for name in families:
            mine = [r for r in right if r.workload == workload and family(r.engine) == name]
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
            f"#### {workload}",
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
        f"({time})" if is_wrong(row) else time,
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
            table.add_row(*_cells(row)[:-1], style="red" if is_wrong(row) else None)
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """What the table of these rows cannot say: why an engine is not in it, and what red means."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.engine)
    notes = [f"{', '.join(engines)}: n/a: {reason}" for reason, engines in reasons.items()]
    if any(is_wrong(r) for r in rows):
        notes.append("Red, in brackets: not the gradient it should be, so another computation.")
    return notes
