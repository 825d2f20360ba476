"""The pictures of README.md and docs/: ``python -m website.figures``.

Lines are told apart by their labels and dashes, so that they can be read without colours too.
"""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dptorch.accounting import SampledGaussian, get_accountant
from dptorch.risk import recognised
from dptorch.training.run_charts import BLUE, INK, MUTED, canvas, data_uri, powers

DOCS = Path(__file__).parents[1] / "docs"
DASHES: tuple[Any, ...] = ((0, (1, 2)), (0, (3, 2)), (0, (6, 2)), (0, (9, 2, 2, 2)), "solid")


def svg(figure: Any) -> str:
    """The figure as SVG on white, so that it is as readable on a dark page."""
    figure.patch.set_facecolor("white")
    text = base64.b64decode(data_uri(figure).split(",", 1)[1]).decode()
    return re.sub(
        r"(<svg[^>]*>)", r'\1<rect width="100%" height="100%" fill="white"/>', text, count=1
    )


def trade_off() -> str:
    """The most that an attack finds, for five values of ε, at δ = 1e-5."""
    figure, axes = canvas(
        "accused wrongly, of those not in the data", "found, of those in the data"
    )
    false_alarms = np.linspace(0, 1, 401)
    labelled = {0.0: 0.55, 0.5: 0.5, 1.0: 0.4, 3.0: 0.1, 8.0: 0.01}  # ε: where along the line
    for (epsilon, place), dashes in zip(labelled.items(), DASHES, strict=True):
        found = [recognised(epsilon, 1e-5, float(a)) for a in false_alarms]
        axes.plot(false_alarms, found, color=BLUE, linewidth=1.8, linestyle=dashes)
        axes.annotate(
            f"ε = {epsilon:g}", (place, recognised(epsilon, 1e-5, place)),
            xytext=(4, 5 if epsilon == 8 else -14), textcoords="offset points",
            color=INK, fontsize=9.5,
        )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.1), yticks=np.linspace(0, 1, 6))
    return svg(figure)


def epsilon_by_steps() -> str:
    """ε against steps at a sampling rate of 0.01 and δ = 1e-5, for three noise multipliers."""
    figure, axes = canvas("training step", "privacy spent, ε")
    accountant, steps = get_accountant("exact"), [1, 50, 200, 500, 1000, 2000, 3000, 4000, 5000]
    for noise, dashes in zip((0.8, 1.0, 2.0), DASHES[::2], strict=True):
        spent = [accountant.epsilon([SampledGaussian(noise, 0.01, n)], 1e-5) for n in steps]
        axes.plot(steps, spent, color=BLUE, linewidth=2, linestyle=dashes)
        axes.annotate(
            f"noise {noise:g}", (steps[-1], spent[-1]), xytext=(4, -3),
            textcoords="offset points", color=INK, fontsize=9.5,
        )  # fmt: skip
    axes.set(xlim=(0, 5900), ylim=(0, None), xticks=range(0, 5001, 1000))
    axes.axhline(0, color=MUTED, linewidth=1)
    return svg(figure)


def reviews() -> str:
    """Test accuracy on movie reviews against ε, as the table of docs/tasks.md has it."""
    rows = re.findall(
        r"^\| (\d) \| ([\d.]+(?:, [\d.]+)+) \| ([\d.]+) \|$", (DOCS / "tasks.md").read_text(), re.M
    )
    figure, axes = canvas("privacy spent, ε", "test accuracy")
    means = [(float(epsilon), 100 * float(mean)) for epsilon, _, mean in rows]
    axes.plot(*zip(*means, strict=True), color=BLUE, linewidth=2, linestyle=DASHES[2])
    for epsilon, runs, mean in rows:
        found = [100 * float(run) for run in runs.split(", ")]
        axes.plot([float(epsilon)] * len(found), found, "o", color=BLUE, markersize=6, mfc="white")
        axes.annotate(
            f"{100 * float(mean):.1f}%", (float(epsilon), 100 * float(mean)), xytext=(8, -14),
            textcoords="offset points", color=INK, fontsize=9.5,
        )  # fmt: skip
    axes.yaxis.set_major_formatter("{x:.0f}%")
    axes.set(xlim=(0, 9), ylim=(74, 81), xticks=[float(epsilon) for epsilon, _, _ in rows])
    return svg(figure)


def model_size() -> str:
    """Test accuracy at ε = 3 and without privacy against parameters, as docs/tasks.md has it."""
    rows = re.findall(
        r"^\| \d \| ([\d.]+) million \| ([\d., ]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (DOCS / "tasks.md").read_text(),
        re.M,
    )
    figure, axes = canvas("parameters of the encoder, in millions", "test accuracy")
    sizes = [float(size) for size, *_ in rows]
    for column, label, dashes in ((2, "ε = 3", DASHES[2]), (3, "without privacy", DASHES[4])):
        means = [100 * float(row[column]) for row in rows]
        axes.plot(sizes, means, color=BLUE, linewidth=2, linestyle=dashes)
        axes.annotate(
            label, (sizes[-1], means[-1]), xytext=(6, -4), textcoords="offset points",
            color=INK, fontsize=9.5,
        )  # fmt: skip
    for size, row in zip(sizes, rows, strict=True):
        found = [100 * float(run) for run in row[1].split(", ")]
        axes.plot([size] * len(found), found, "o", color=BLUE, markersize=5, mfc="white")
    axes.yaxis.set_major_formatter("{x:.0f}%")
    axes.set(xlim=(sizes[0] - 1, sizes[-1] + 5))
    return svg(figure)


def bible() -> str:
    """Perplexity of a byte of unseen passages after each pass, as docs/tasks.md has it."""
    page = (DOCS / "tasks.md").read_text()
    rows = re.findall(r"^\| (\d) \| \d+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    found = re.search(r"frequencies of single bytes alone give ([\d.]+)\.", page)
    assert found is not None
    passes = [int(row[0]) for row in rows]
    figure, axes = canvas("pass over the passages", "perplexity of a byte of unseen passages")
    for column, dashes in ((2, DASHES[0]), (3, DASHES[4])):
        values = [float(row[column]) for row in rows]
        axes.plot(passes, values, "o", color=BLUE, linewidth=2, markersize=5, linestyle=dashes)
    for number, epsilon, private, plain in rows[1:]:
        above = f"{float(private):.1f}, ε = {float(epsilon):.1f}"
        below = f"{float(plain):.1f}, without privacy" if number == rows[-1][0] else f"{plain}"
        for value, text, shift in ((private, above, 8), (plain, below, -15)):
            axes.annotate(
                text, (int(number), float(value)), xytext=(-4, shift), textcoords="offset points",
                color=INK, fontsize=9.5,
            )  # fmt: skip
    level = float(found[1])
    axes.axhline(level, color=MUTED, linewidth=1, linestyle=DASHES[0])
    axes.annotate(
        f"frequencies of single bytes, {level:.1f}", (passes[-1], level), xytext=(20, 4),
        textcoords="offset points", ha="right", color=INK, fontsize=9.5,
    )  # fmt: skip
    powers(axes)
    axes.set(xlim=(-0.1, 5.3), ylim=(3, 330), xticks=passes)
    return svg(figure)


def report(folder: Path) -> None:
    """Photograph the head of a report: a run of the default recipe, in a headless Chromium."""
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    with tempfile.TemporaryDirectory() as runs:
        command = ["dptorch", "train", "--runs", runs, "--name", "demo"]
        subprocess.run([*command, "--no-ledger"], check=True, stdout=subprocess.DEVNULL)
        page = Path(runs) / "demo" / "report.html"
        target = folder / "report.png"
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
             "--window-size=880,1205", f"--screenshot={target}", page.as_uri()],
            check=True, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    from PIL import Image

    Image.open(target).convert("RGB").crop((0, 30, 880, 1205)).quantize(64).save(
        target, optimize=True
    )


if __name__ == "__main__":
    pictures = DOCS / "concepts" / "pictures"
    pictures.mkdir(exist_ok=True)
    (pictures / "trade_off.svg").write_text(trade_off())
    (pictures / "epsilon_by_steps.svg").write_text(epsilon_by_steps())
    (DOCS / "pictures" / "reviews.svg").write_text(reviews())
    (DOCS / "pictures" / "model_size.svg").write_text(model_size())
    (DOCS / "pictures" / "bible.svg").write_text(bible())
    report(DOCS / "pictures")
