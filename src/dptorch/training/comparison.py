"""Several runs on one page: what each reached at what ε, beside training without privacy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dptorch.errors import ConfigurationError, DataError
from dptorch.training import run_charts
from dptorch.training.run_folder import RunFolder
from dptorch.training.run_page import missing_packages, page_template, wilson_interval
from dptorch.training.task import TESTED

__all__ = ["Compared", "Comparison", "compare"]

#: Settings that are not shown: they say where files are, or change speed alone.
_SILENT: Final = frozenset(
    {"data", "reading", "task", "max_physical_batch_size", "num_workers", "device", "diagnostics",
     "noise_multiplier", "test_data", "download", "canaries", "seed"}
)  # fmt: skip
_OF_PRIVACY: Final = frozenset({"target_epsilon", "target_delta", "max_grad_norm", "clipping_fn"})


@dataclass(frozen=True)
class Compared:
    """One run of a comparison.

    Attributes:
        name: of its folder.
        about: what its `run.json` says.
        points: (ε, test result) after each epoch.
        result: the test result at the end.
        interval: its 95 % interval, of an accuracy.
    """

    name: str
    about: dict[str, Any]
    points: tuple[tuple[float, float], ...]
    result: float
    interval: tuple[float, float] | None

    @property
    def epsilon(self) -> float:
        """What was spent; infinite without privacy."""
        return float(self.about["result"]["epsilon"])

    @property
    def private(self) -> bool:
        """Whether it has an ε."""
        return math.isfinite(self.epsilon)


@dataclass(frozen=True)
class Comparison:
    """Runs beside each other, those without privacy first and then by ε.

    Attributes:
        runs: them.
        column: of `metrics.csv` by which they are compared.
        differing: settings in which they differ: name, and its value in each run.
        same_test: whether all were tested on test sets of one source and size.
    """

    runs: tuple[Compared, ...]
    column: str
    differing: tuple[tuple[str, tuple[Any, ...]], ...]
    same_test: bool

    @property
    def words(self) -> str:
        """The test result in words."""
        return TESTED[self.column][0]

    def shown(self, value: float) -> str:
        """A test result as it is written."""
        if self.column == "test_accuracy":
            return f"{100 * value:.1f} %"
        return f"{value:{TESTED[self.column][1]}}"

    def to_html(self) -> str:
        """The page.

        Raises:
            ConfigurationError: jinja2 or matplotlib is not installed.
        """
        if missing := missing_packages():
            raise ConfigurationError(
                f"The page needs {' and '.join(missing)}. Install with: pip install 'dptorch[report]'."
            )
        private = [run for run in self.runs if run.private]
        chart = private and run_charts.results_against_epsilon(
            {run.name: run.points for run in private},
            {run.name: run.result for run in self.runs if not run.private},
            self.words,
            percent=self.column == "test_accuracy",
            falling=self.column == "test_perplexity",
        )
        template = page_template("dptorch.training", "comparison.html.j2")
        text: str = template.render(comparison=self, chart=chart)
        return text


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Read several runs.

    Args:
        folders: of runs that finished or were interrupted, such as "runs/demo".

    Raises:
        ConfigurationError: fewer than two, or runs that have no test result in common.
        DataError: a folder is not that of such a run.
    """
    if len(folders) < 2:
        raise ConfigurationError(
            f"{len(folders)} runs: expected at least two folders of runs to compare."
        )
    read = [(Path(folder), *_read(Path(folder))) for folder in folders]
    common = [c for c in TESTED if all(c in rows[-1] for _, _, rows in read)]
    if not common:
        raise ConfigurationError(
            f"the runs {', '.join(path.name for path, _, _ in read)} have no test result in common: "
            "compare accuracies with accuracies."
        )
    column = common[0]
    runs = []
    for path, about, rows in read:
        result, interval = rows[-1][column], None
        if column == "test_accuracy":
            interval = wilson_interval(result, about["data"]["test_examples"])
        points = tuple((row["epsilon"], row[column]) for row in rows if column in row)
        runs.append(Compared(path.resolve().name, about, points, result, interval))
    runs.sort(key=lambda run: (run.private, run.epsilon))
    tests = {(r.about["data"]["source"], r.about["data"]["test_examples"]) for r in runs}
    return Comparison(tuple(runs), column, _differing(runs), len(tests) == 1)


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, float]]]:
    folder = RunFolder(path)
    about = folder.read_json("run.json")
    if "result" not in about or "test_examples" not in about["data"]:
        raise DataError(
            f"{path}: no run with test results. Runs that are not finished have none, and releases "
            "leave them out."
        )
    return about, folder.read_metrics()


def _differing(runs: Sequence[Compared]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    names = list(dict.fromkeys(name for run in runs for name in run.about["job"]))
    found = []
    for name in names:
        values = tuple(
            run.about["job"].get(name) if run.private or name not in _OF_PRIVACY else None
            for run in runs
        )
        if name not in _SILENT and any(value != values[0] for value in values):
            found.append((name.removeprefix("target_").replace("_", " "), values))
    return tuple(found)
