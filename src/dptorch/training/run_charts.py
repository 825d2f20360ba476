"""Charts of the page about a run, as SVG images inside data URIs, and the style of all charts.

What colours tell apart, dashes or marks do too, so that a print in grey can be read.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "accuracy_against_epsilon",
    "canvas",
    "data_uri",
    "diagnostic",
    "dress",
    "epsilon_against_steps",
    "perplexity_against_epsilon",
    "powers",
    "results_against_epsilon",
]

INK = "#1d2733"
MUTED = "#66717e"
GRID = "#e4e8ec"
BLUE = "#1f5fa8"
AMBER = "#a8641f"
#: Colours, dashes and marks of several lines in one chart, in this order.
SERIES = (BLUE, AMBER, "#3f8f5f", "#7a5aa6", "#a33a2c", "#5b8f99")
DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (3, 2)), (0, (8, 2, 2, 2)), (0, (1, 1.5)))
MARKS = "osD^vP*X<>hpd"
BROWSER_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Points = Sequence[tuple[float, float]]


def accuracy_against_epsilon(points: Points, chance: float) -> str:
    """Test accuracy (0 to 1) against ε; `chance`, that of the largest class, as a reference."""
    figure, axes = canvas("privacy spent, ε", "test accuracy")
    _line(axes, [(e, 100 * a) for e, a in points], BLUE, "{:.1f}%")
    axes.axhline(100 * chance, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
    axes.annotate(
        "always the largest class",
        (0, 100 * chance),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        ha="left",
        color=MUTED,
        fontsize=9,
    )
    axes.set_ylim(0, 104)
    axes.yaxis.set_major_formatter("{x:.0f}%")
    return data_uri(figure)


def perplexity_against_epsilon(points: Points) -> str:
    """Test perplexity against ε, on a scale of powers: it falls fast at first."""
    figure, axes = canvas("privacy spent, ε", "test perplexity")
    _line(axes, points, BLUE, "{:.1f}")
    powers(axes)
    return data_uri(figure)


def powers(axes: Any) -> None:
    """Give the values a scale of powers, with some of the numbers written out."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def epsilon_against_steps(points: Points, budget: float | None) -> str:
    """ε against steps; the budget, if there was one, as a reference."""
    figure, axes = canvas("training step", "privacy spent, ε")
    _line(axes, points, BLUE, "{:.2f}")
    top = max([e for _, e in points] + [budget or 0.0])
    if budget is not None:
        axes.axhline(budget, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.annotate(
            f"budget {budget:g}",
            (0, budget),
            xycoords=("axes fraction", "data"),
            xytext=(4, 5),
            textcoords="offset points",
            color=MUTED,
            fontsize=9,
        )
    axes.set_ylim(0, 1.12 * top if top > 0 else 1)
    return data_uri(figure)


def results_against_epsilon(
    lines: Mapping[str, Points],
    levels: Mapping[str, float],
    label: str,
    *,
    percent: bool = False,
    falling: bool = False,
) -> str:
    """A test result against ε for several runs by name; those without privacy are levels.

    Args:
        lines: (ε, result) after each epoch.
        levels: the results without privacy.
        label: what the results are.
        percent: they are shares, and shown in percent.
        falling: they are perplexities, fall fast at first, and have a scale of powers.
    """
    figure, axes = canvas("privacy spent, ε", label, size=(7.6, 4.2))
    scale = 100 if percent else 1
    for number, (name, points) in enumerate(lines.items()):
        x, y = [e for e, _ in points], [scale * value for _, value in points]
        color, dashes = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
        axes.plot(x, y, color=color, linewidth=2, linestyle=dashes, label=name)
        axes.plot(x[-1:], y[-1:], MARKS[number % len(MARKS)], color=color, markersize=6)
    for name, value in levels.items():
        axes.axhline(scale * value, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        axes.annotate(
            f"{name}, without privacy", (1, scale * value), xycoords=("axes fraction", "data"),
            xytext=(-4, -13), textcoords="offset points", ha="right", color=MUTED, fontsize=9,
        )  # fmt: skip
    axes.set_xlim(left=0)
    if percent:
        axes.yaxis.set_major_formatter("{x:.0f}%")
    if falling:
        powers(axes)
    place = "upper right" if falling else "lower right"
    axes.legend(frameon=False, loc=place, fontsize=9.5, labelcolor=INK)
    return data_uri(figure)


def diagnostic(points: Points, label: str, *, percent: bool = False) -> str:
    """A statistic of private data against steps, in a colour of its own."""
    figure, axes = canvas("training step", label, size=(4.0, 2.7))
    scale = 100 if percent else 1
    _line(axes, [(s, scale * v) for s, v in points], AMBER, "{:.0f}%" if percent else "{:.2f}")
    if percent:
        axes.set_ylim(0, 108)
        axes.yaxis.set_major_formatter("{x:.0f}%")
    else:
        axes.set_ylim(0, 1.15 * max(v for _, v in points) or 1)
    return data_uri(figure)


def canvas(x_label: str, y_label: str, size: tuple[float, float] = (5.6, 3.5)) -> tuple[Any, Any]:
    """A figure in the reports' style: labelled below and above, grid lines across."""
    # Figure rather than pyplot: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes: Any = figure.add_subplot()
    dress(axes, x_label, y_label)
    return figure, axes


def dress(axes: Any, x_label: str, y_label: str, *, grid: str = "y") -> None:
    """Give axes the reports' style: labelled below and above, grid lines across the values."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0, pad=6)
    axes.set_xlabel(x_label, color=MUTED, fontsize=10, labelpad=8)
    axes.set_title(y_label, loc="left", color=INK, fontsize=11, pad=12)


def _line(axes: Any, points: Points, color: str, label: str) -> None:
    x, y = [p[0] for p in points], [p[1] for p in points]
    axes.plot(x, y, color=color, linewidth=2, solid_capstyle="round")
    axes.plot(x[-1:], y[-1:], "o", color=color, markersize=6)
    axes.annotate(
        label.format(y[-1]),
        (x[-1], y[-1]),
        # below a rising line, above a falling one, so that it stands clear of both
        xytext=(0, -20 if y[-1] >= y[0] else 9),
        textcoords="offset points",
        ha="right",
        color=color,
        fontsize=11,
        fontweight="bold",
    )
    axes.set_xlim(0, 1.03 * max(x) if max(x) > 0 else 1)


def data_uri(figure: Any) -> str:
    """The figure as an address that holds the whole image."""
    import matplotlib

    text = io.StringIO()
    # Text stays text, so that the browser sets it in its own font; a fixed salt and no date make
    # the same run give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dptorch"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue().replace("'DejaVu Sans'", BROWSER_FONTS)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
