"""Draw the ratios of time: of every workload, and how they grow along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dptorch.bench.engines import NON_PRIVATE
from dptorch.bench.suite import Row, family, is_wrong
from dptorch.training.run_charts import MARKS, MUTED, SERIES, dress

__all__ = ["alternative", "draw"]


def draw(kind: str, all_rows: Sequence[Row], file: Path) -> bool:
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


def alternative(rows: Sequence[Row]) -> str:
    """What the plot shows, for who does not see it."""
    private = [
        r for r in rows if r.ratio is not None and r.engine != NON_PRIVATE and not is_wrong(r)
    ]
    ours = sorted(r.ratio or 0 for r in private if r.engine == "dptorch/auto")
    others = sorted(r.ratio or 0 for r in private if family(r.engine) != "dptorch")
    said = [
        f"{name} {least[0]:.2f} to {least[-1]:.2f}"
        for name, least in (("dptorch/auto", ours), ("other libraries", others))
        if least
    ]
    return f"time of a private step as a multiple of the ordinary one: {'; '.join(said)}"


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """A colour for each family, and a mark for each engine, which can be told in grey."""
    engines = list(dict.fromkeys(r.engine for r in rows))
    families = list(dict.fromkeys(map(family, engines)))
    return {
        engine: (SERIES[families.index(family(engine)) % len(SERIES)], MARKS[i % len(MARKS)])
        for i, engine in enumerate(engines)
    }


def _dots(figure_class: Any, rows: Sequence[Row]) -> Any:
    workloads = list(dict.fromkeys(r.workload for r in rows))
    figure = figure_class(figsize=(9, 1.5 + 0.45 * len(workloads)))
    axes = figure.subplots()
    for engine, (colour, marker) in _styles(rows).items():
        mine = [r for r in rows if r.engine == engine]
        y = [workloads.index(r.workload) for r in mine]
        face = ["none" if is_wrong(r) else colour for r in mine]
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
