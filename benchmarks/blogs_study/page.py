"""The page of the study: docs/blogs.md with its plots."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.blogs_study.measure import Result, Study, Timing
from benchmarks.blogs_study.methods import METHODS
from benchmarks.blogs_study.scale import with_section
from dptorch.training.run_charts import INK, dress

__all__ = ["write_page"]

COLORS = {
    "non-private": "#66717e",
    "BloGS, index 2024": "#b3261e",
    "BloGS, index 0.1.21": "#e08a1e",
    "DP-SGD": "#1f5fa8",
    "Gaussian sibling": "#2e8b6b",
}
MARKERS = {"BloGS, index 2024": "s", "BloGS, index 0.1.21": "D", "Gaussian sibling": "^"}

INTRODUCTION = """\
# DP-BloGS: what the block-wise gradient shuffle costs, learns and leaks

`dptorch.blogs` has ForgetNet's method as it was published in code: every tensor of the batch gradient
is clipped, cut into blocks, and the blocks are put into a random order, once per optimizer step. It
has this page because the number that the method calls epsilon is not one.

**A permutation guarantees nothing.** What a step may release for a data set is the set of
rearrangements of its clipped blocks. Two such sets are equal or have nothing in common. So for two
neighbouring data sets either nothing was to be hidden, or one look at one step tells which of the two
it was, with certainty: (ε, δ)-differential privacy holds for no finite ε and no δ below 1. Norms, sums,
extremes and every block's content pass unchanged, however small the blocks are. The method's paper
(arXiv:2407.21347) was withdrawn by its author in January 2025.

Therefore `dptorch` reports the published formulas' number as the *BloGS index* (`nominal_epsilon`),
beside `formal_epsilon = inf` and "guarantee: none (heuristic)". With `mechanism="gaussian"` the same
call trains with a proven ε: each example's gradient is clipped layer by layer, layer l to C_l, and gets
noise of standard deviation σ C_l / √w_l, with weights w_l that sum to one. One accountant at noise
multiplier σ covers the whole step, because Σ (C_l / σ_l)² = 1 / σ².

    engine = BloGSPrivacyEngine(optimizer, model, target_epsilon=1.0, delta=1e-5, clip_value=1.0,
                                steps=steps, batch_size=64, dataset_size=len(train),
                                mechanism="gaussian")
    for x, y in engine.loader(train): ...

"""

READING = """\
## How to read the tables

- *Reported* is what the method says of the run: an index for BloGS, a proven ε for the other two.
  Where not even blocks of one coordinate keep to the target, BloGS ran with those; its number is then
  above the target.
- *Accuracy* is on held-out records (for text, of the next token), one seed, at the better of the same
  learning rates for every method (Adam). Choosing on the test set flatters all methods alike.
- *One step: says* is what the method says of a single step whose batch is known: the index after one
  step, or ε without amplification by sampling. *Proves* is a lower bound on its ε at 95 % confidence
  from a game: the adversary knows weights, batch and one record in question, sees the gradient that the
  optimizer got, and says whether the record was in. For shuffles it compares values bit for bit; for
  noise it projects on the record's contribution. All guesses right prove {ceiling:.2f}, the most that
  this many games can: for a shuffle the true value is infinite.
- *Final model proves* is a lower bound from one run with {canaries} canaries (records with a random
  label, or random text) that were in with probability one half, guessed by their loss under the final
  model (Steinke et al., 2023). Such a black-box attack sees little. That it finds nothing where a step
  gives everything away is no protection: it is a weak attack, on a model that has learned little.
- **REFUTED** means that a bound exceeds what the method says of that step, or of the run. An audit
  can refute a claim; it confirms none.

"""


def write_page(study: Study, folder: Path) -> Path:
    """Write ``blogs.md``, its plots and the numbers behind them into `folder`.

    Returns:
        the page. Plots and ``results.json`` are in ``folder/blogs``.
    """
    assets = folder / "blogs"
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "results.json").write_text(json.dumps(asdict(study), indent=1) + "\n")
    plots = {"accuracy.svg": _accuracy_plot(study), "leakage.svg": _leakage_plot(study)}
    for name, figure in plots.items():
        _save(figure, assets / name)
    page = folder / "blogs.md"
    page.write_text(with_section(_markdown(study), folder))
    return page


def _markdown(study: Study) -> str:
    from benchmarks.blogs_study.tasks import CANARIES

    ceiling = max(r.step_ceiling for r in study.results)
    parts = [INTRODUCTION]
    if study.quick:
        parts.append("*This is a quick run: too short to compare accuracies.*\n\n")
    parts += [
        "## What they learn, and what they leak\n\n",
        "![Accuracy on held-out records against the target, by method; a panel a task]"
        "(blogs/accuracy.svg)\n\n",
        "![ε that one step proves against what its method says, by method; a panel a task]"
        "(blogs/leakage.svg)\n\n",
    ]
    for task, about in study.about.items():
        rows = [r for r in study.results if r.task == task]
        parts += [f"### {task}\n\n{about}.\n\n", _results_table(rows), "\n"]
    parts.append(READING.format(ceiling=ceiling, canaries=CANARIES))
    parts += ["## What a step costs\n\n", _TIMING_TEXT, _timing_table(study.timings), "\n"]
    parts += ["## Make this page\n\n", _COMMAND]
    return "".join(parts)


_TIMING_TEXT = """\
Time for forward, backward and step over that of ordinary training, median and 10th to 90th percentile
of rounds in which the methods take turns. A shuffle reads and writes the gradient once, so its cost is
that of a copy as long as blocks are larger than a few numbers. Blocks of one coordinate, what the
method falls back to where a target cannot be met, cost a random permutation of all parameters.

"""
_COMMAND = """\
    pip install 'dptorch[report,transformers]'
    python -m benchmarks.blogs_study --output docs

`--quick` does a small part of it, to see that it works. Every number is in
[blogs/results.json](blogs/results.json).
"""


def _results_table(rows: Iterable[Result]) -> str:
    lines = [
        "| method | target | reported | accuracy | one step: says | proves | final model proves | |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in rows:
        verdict = "no claim"
        if math.isfinite(r.target):
            verdict = "**REFUTED**" if r.refuted else "not refuted"
        lines.append(
            f"| {r.method} | {_plain(r.target)} | {_reported(r)} | {100 * r.accuracy:.1f} % | "
            f"{_plain(float(f'{r.step_claim:.2g}'))} | ε ≥ {r.step_lower:.2f} | "
            f"ε ≥ {r.final_lower:.2f} | {verdict} |"
        )
    return "\n".join(lines) + "\n"


def _reported(r: Result) -> str:
    if r.reported is None:
        return "–"
    kind = "index" if r.method.startswith("BloGS") else "ε"
    return f"{kind} {r.reported:.3g}"


def _timing_table(timings: Sequence[Timing]) -> str:
    models = list(dict.fromkeys(t.model for t in timings))
    methods = [m for m in dict.fromkeys(t.method for t in timings) if m != "non-private"]
    lines = ["| method | " + " | ".join(models) + " |", "|---|" + "---:|" * len(models)]
    for method in methods:
        cells = [
            next(
                (
                    f"{t.median:.2f} ({t.low:.2f} to {t.high:.2f})"
                    for t in timings
                    if t.method == method and t.model == model
                ),
                "–",
            )
            for model in models
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _plain(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "–"


def _accuracy_plot(study: Study) -> Any:
    """One panel a task: accuracy against target; the non-private one as a line."""
    figure, panels = _panels(len(study.about), "accuracy on held-out records")
    for axes, task in zip(panels, study.about, strict=True):
        axes.set_title(task, loc="left", fontsize=11, color=INK)
        for method in METHODS.values():
            rows = [r for r in study.results if r.task == task and r.method == method.name]
            color = COLORS[method.name]
            if method.kind == "none":
                for r in rows:
                    axes.axhline(
                        100 * r.accuracy, color=color, linestyle=(0, (2, 3)), label=r.method
                    )
                continue
            axes.plot(
                [r.target for r in rows],
                [100 * r.accuracy for r in rows],
                color=color,
                marker=MARKERS.get(method.name, "o"),
                markersize=5,
                linewidth=1.8,
                label=method.name,
            )
        axes.set_xscale("log")
        targets = sorted({r.target for r in study.results if math.isfinite(r.target)})
        axes.set_xticks(targets, [f"{t:g}" for t in targets], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("target ε (an index, for BloGS)")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:.0f}%")
    _legend(figure, panels[0])
    return figure


def _leakage_plot(study: Study) -> Any:
    """One panel a task: what one step proves against what the method says of it."""
    figure, panels = _panels(len(study.about), "ε proved from a single step, at 95 % confidence")
    claimed = [r for r in study.results if math.isfinite(r.target)]
    high = 1.5 * max(r.step_claim for r in claimed)
    low = min(0.7 * min(r.step_claim or 1e-3 for r in claimed), 0.1)
    top = 1.15 * max(r.step_ceiling for r in study.results)
    line = np.geomspace(low, high, 200)
    for axes, task in zip(panels, study.about, strict=True):
        axes.set_title(task, loc="left", fontsize=11, color=INK)
        axes.fill_between(line, np.minimum(line, top), top, color="#b3261e", alpha=0.07)
        axes.plot(line, line, color="#66717e", linewidth=1)
        for method in METHODS.values():
            rows = [r for r in claimed if r.task == task and r.method == method.name]
            if rows:
                axes.plot(
                    [r.step_claim for r in rows],
                    [r.step_lower for r in rows],
                    MARKERS.get(method.name, "o"),
                    color=COLORS[method.name],
                    markersize=6,
                    label=method.name,
                )
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(-0.1, top)
        axes.set_xlabel("what the method says of that step")
        axes.annotate(
            "refuted", (0.04, 0.93), xycoords="axes fraction", color="#b3261e", fontsize=9
        )
    _legend(figure, panels[0])
    return figure


def _panels(n: int, title: str) -> tuple[Any, list[Any]]:
    # Figure rather than pyplot: no global state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * n + 0.4, 3.6), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    panels = [figure.add_subplot(1, n, i + 1) for i in range(n)]
    for axes in panels:
        dress(axes, "", "")
    return figure, panels


def _legend(figure: Any, axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )


def _save(figure: Any, path: Path) -> None:
    import matplotlib

    # Letters as outlines, no date, fixed ids: the same run gives the same file anywhere.
    with matplotlib.rc_context({"svg.hashsalt": "dptorch"}):
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
