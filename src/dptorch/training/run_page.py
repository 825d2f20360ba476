"""Write `report.html`, a self-contained page about a run, from the other files in its folder."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dptorch.errors import ConfigurationError, DataError
from dptorch.randomness import KeySource
from dptorch.risk import in_words
from dptorch.training import run_charts
from dptorch.training.run_folder import NOT_PRIVATE, RunFolder
from dptorch.training.task import TESTED

__all__ = [
    "missing_packages",
    "page_template",
    "render",
    "time_in_words",
    "wilson_interval",
    "write_report",
]

DIAGNOSTICS = (
    ("clipped_fraction", "share of gradients clipped", True),
    ("mean_gradient_norm", "mean gradient norm, before clipping", False),
    ("train_loss", "training loss", False),
)


#: Settings of a job on the page, in words; a task has some of them.
TRAINING = (
    ("task", "Task"),
    ("method", "Method"),
    ("epochs", "Epochs"),
    ("learning_rate", "Learning rate"),
    ("head_learning_rate", "Learning rate of the head"),
    ("decay", "Learning rate's decay"),
    ("warmup", "Learning rate's rise, share of steps"),
    ("optimizer", "Optimizer"),
    ("momentum", "Momentum"),
    ("weight_decay", "Weight decay"),
    ("features", "Fixed features"),
    ("augment", "Augmentation"),
    ("views", "Views of an example"),
    ("ema", "Weights averaged with decay"),
    ("tail", "Weights averaged over the last share"),
    ("low_pass", "Low-pass filter of gradients"),
    ("kalman", "Kalman filter of gradients"),
    ("moment_scaling", "Gradients scaled by second moments"),
)


def missing_packages() -> list[str]:
    """The packages of the extra `report` that a report needs and that are not installed."""
    needed = ("jinja2", "matplotlib")
    return [name for name in needed if importlib.util.find_spec(name) is None]


def write_report(folder: RunFolder) -> Path:
    """Render the folder's `report.html`.

    Raises:
        ConfigurationError: jinja2 or matplotlib is not installed.
        DataError: a file of the run is missing or cannot be read.
    """
    if missing := missing_packages():
        raise ConfigurationError(
            f"The report needs {' and '.join(missing)}. Install with: pip install 'dptorch[report]'."
        )
    try:
        statement = (folder.path / "statement.txt").read_text(encoding="utf-8")
        rows = folder.read_metrics()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder.path}: not the folder of a finished run ({error}).") from error
    about = folder.read_json("run.json")
    html = render(folder.path.name, about, rows, statement)
    folder.write("report.html", html)
    return folder.path / "report.html"


def render(
    name: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, float]], statement: str
) -> str:
    """The page as text.

    Args:
        name: of the run.
        about: what `run.json` says.
        rows: the rows of `metrics.csv`, oldest first, at least one; without test results in a
            release that leaves them out.
        statement: what `statement.txt` says.
    """
    template = page_template("dptorch.training")
    last = rows[-1]
    claims = about["statement"]
    epsilon, plan = claims["epsilon"], claims["plan"]
    private = plan["noise_multiplier"] > 0
    tested = "test_accuracy" in last
    others = [(TESTED[c][0], f"{last[c]:{TESTED[c][1]}}") for c in TESTED if c in last]
    low = high = 0.0
    if tested:
        low, high = wilson_interval(last["test_accuracy"], about["data"]["test_examples"])
    return template.render(
        name=name,
        about=about,
        last=last,
        claims=claims,
        epsilon=epsilon,
        accuracy_low=low,
        accuracy_high=high,
        private=private,
        in_words=private
        and in_words(epsilon, plan["target_delta"], claims["unit"], plan["sample_size"]),
        interrupted=about["status"] != "complete",
        seeded=not KeySource(claims["key_provenance"]).is_private,
        tested=tested,
        others=others[1:] if tested else others,
        perplexity_chart="test_perplexity" in last
        and private
        and run_charts.perplexity_against_epsilon(
            [(row["epsilon"], row["test_perplexity"]) for row in rows]
        ),
        accuracy_chart=tested
        and private
        and run_charts.accuracy_against_epsilon(
            [(row["epsilon"], row["test_accuracy"]) for row in rows],
            chance=about.get("majority", 1 / max(1, len(about["data"]["classes"]))),
        ),
        epsilon_chart=private
        and run_charts.epsilon_against_steps(
            [(row["step"], row["epsilon"]) for row in rows], plan["target_epsilon"]
        ),
        diagnostics=_diagnostics(rows),
        settings=_settings(about),
        time="seconds" in last and time_in_words(last),
        groups=[
            {**group, "interval": wilson_interval(group["accuracy"], group["examples"])}
            if "accuracy" in group
            else group
            for group in about.get("groups", [])
        ],
        statement=statement,
    )


def page_template(package: str, name: str = "report.html.j2") -> Any:
    """A template of a package, with the style, the parts and the filters of all reports."""
    from jinja2 import DictLoader, Environment, StrictUndefined
    from markupsafe import Markup

    def text(package: str, name: str) -> str:
        return resources.files(package).joinpath(name).read_text("utf-8")

    environment = Environment(
        loader=DictLoader({"parts.html.j2": text("dptorch.training", "parts.html.j2")}),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(
        up=_rounded_up, percent=_percent, count=_count, plain=_plain, power=_power
    )
    environment.globals["style"] = Markup(text("dptorch.training", "page.css"))
    return environment.from_string(text(package, name))


def wilson_interval(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a probability that was estimated as `share` from n trials (Wilson, 1927).

    Example:
        >>> low, high = wilson_interval(0.95, 1000)
        >>> round(low, 3), round(high, 3)
        (0.935, 0.962)
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def time_in_words(last: Mapping[str, float]) -> str:
    """How long a run took, and an epoch of it, of the last row of its metrics. Tests count.

    Example:
        >>> time_in_words({"seconds": 42.0, "epoch": 20.0}), time_in_words({"seconds": 9, "epoch": 0})
        ('42 seconds, 2.1 an epoch', '9 seconds')
        >>> time_in_words({"seconds": 3600.0, "epoch": 5.0})
        '60 minutes, 12 an epoch'
    """
    minutes = last["seconds"] >= 120
    time = last["seconds"] / (60 if minutes else 1)
    words = f"{_plain(float(f'{time:.3g}'))} {'minutes' if minutes else 'seconds'}"
    if not last.get("epoch"):
        return words
    return f"{words}, {time / last['epoch']:.2g} an epoch"


def _diagnostics(rows: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """(label, chart) of each statistic of private data that was recorded."""
    found = []
    for key, label, percent in DIAGNOSTICS:
        column = NOT_PRIVATE + key
        points = [(row["step"], row[column]) for row in rows if column in row]
        if points:
            found.append((label, run_charts.diagnostic(points, label, percent=percent)))
    return found


def _settings(about: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, object]]]]:
    """The tables of the page: heading and (name, value) rows."""
    plan, job, data = about["statement"]["plan"], about["job"], about["data"]
    privacy = [
        ("Noise multiplier", plan["noise_multiplier"]),
        ("Clipping norm", plan["max_grad_norm"]),
        ("Clipping", f"{plan['clipping_fn']}, {plan['clipping_style']}"),
        ("Sample rate", plan["sample_rate"]),
        ("Expected batch size", plan["expected_batch_size"]),
        ("Steps", f"{about['statement']['steps']} of {plan['steps']}"),
        ("Adjacency", plan["adjacency"]),
        ("Accountant", plan["accountant"]),
    ]
    training = [
        ("Recipe" if job["recipe"] else "Data", job["recipe"] or job.get("data", data["source"])),
        ("Model", f"{job['model']} ({about['model']['class']})"),
        ("Trainable parameters", about["model"]["trainable_parameters"]),
        ("Training examples", data["train_examples"]),
        *([("Test examples", data["test_examples"])] if "test_examples" in data else []),
        *([("Classes", len(data["classes"]))] if data["classes"] else []),
        *((words, job[name]) for name, words in TRAINING if job.get(name) is not None),
    ]
    return [("Privacy plan", privacy), ("Training", training)]


def _rounded_up(value: float, digits: int = 3) -> str:
    """A bound, never shown smaller than it is."""
    if math.isinf(value):
        return "∞"
    return f"{math.ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def _percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}%"


def _power(value: float) -> str:
    """A power of ten as one, with a superscript."""
    mantissa, exponent = f"{value:.3g}".partition("e")[::2] if value < 1e-4 else (f"{value:g}", "")
    if not exponent:
        return mantissa
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if mantissa == "1" else f"{mantissa} · 10{raised}"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _plain(value: object) -> str:
    """A number as a person writes it; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    return f"{value:.5g}"
