"""The sampling attack: tell members from others by labels alone, asked again and again.

The adversary asks for the labels of many slightly changed copies of an example and takes their
frequencies for the model's confidence; a model that gives labels only then leaks nearly what its
scores do (Rahimian, Orekondy, Fritz 2020, arXiv:2009.00395). Noise on each answer that is not accounted
for all of them averages out in the same way. Accounted noise does not: k answers of μ each allow an AUC
of Φ(μ √k / √2) at most, which each curve is held against.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dptorch.accounting import gaussian_mu_for
from dptorch.audit.evidence import Evidence
from dptorch.audit.roc import auc
from dptorch.errors import ConfigurationError, DataError
from dptorch.prediction import PrivatePredictor, assign_shards
from dptorch.prediction.ensemble import ENSEMBLE, load_ensemble
from dptorch.training import recipes
from dptorch.training.job import Job
from dptorch.training.readers import load_data
from dptorch.training.run_folder import RunFolder, load_model

__all__ = ["SamplingAttack", "SamplingCurve", "attack_run", "play_sampling"]

Labels = Callable[[Tensor], Tensor]
Examples = tuple[Tensor, Tensor]

_QUERIES: Final = (1, 3, 10, 30, 100)
_CLIP: Final = 10.0


@dataclass(frozen=True)
class SamplingCurve:
    """How well the attack does on one way of answering.

    Attributes:
        name: of the way.
        auc: of the attack, after each number of queries.
        allowed: the most that the guarantee of those answers allows; None where there is none.
    """

    name: str
    auc: tuple[float, ...]
    allowed: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SamplingAttack:
    """The attack on a run; ``str()`` is a table.

    Attributes:
        queries: how many labels of an example were asked for.
        curves: one for each way of answering.
        examples: members, and as many others.
    """

    queries: tuple[int, ...]
    curves: tuple[SamplingCurve, ...]
    examples: int

    @property
    def error(self) -> float:
        """Two standard errors of an AUC of 0.5."""
        return 2 * math.sqrt((2 * self.examples + 1) / (12 * self.examples**2))

    def to_json(self) -> str:
        """Plain values as JSON."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        width = max(len(curve.name) for curve in self.curves)
        lines = [
            f"Sampling attack on {self.examples} members and as many others: AUC after k labels each.",
            f"Guessing is 0.5. With so few examples an AUC is known to about {self.error:.2f}.",
            "",
            " " * width + "".join(f"{k:>8}" for k in self.queries),
        ]
        for curve in self.curves:
            lines.append(f"{curve.name:<{width}}" + "".join(f"{a:>8.3f}" for a in curve.auc))
            if curve.allowed is not None:
                allowed = "".join(f"{a:>8.3f}" for a in curve.allowed)
                lines.append(f"{'  at most':<{width}}" + allowed)
        return "\n".join(lines) + "\n"


def play_sampling(
    labels_of: Labels,
    members: Examples,
    others: Examples,
    *,
    queries: Sequence[int] = _QUERIES,
    spread: float = 0.2,
    seed: int = 0,
) -> list[Evidence]:
    """Attack a predictor that answers with labels.

    Args:
        labels_of: inputs [N, ...] -> int64 labels [N].
        members, others: (inputs, true labels).
        queries: numbers of labels of an example after which the attack is judged.
        spread: standard deviation of the changes, in units of that of all inputs. The first label is
            that of the example itself.
        seed: of the changes.

    Returns:
        for each of `queries`, how often each example got its true label.
    """
    inputs, truth = (torch.cat(pair) for pair in zip(members, others, strict=True))
    inside = np.arange(len(inputs)) < len(members[0])
    generator = torch.Generator().manual_seed(seed)
    scale = spread * float(inputs.std())
    right, found = np.zeros(len(inputs)), []
    for k in range(1, max(queries) + 1):
        change = scale * torch.randn(inputs.shape, generator=generator) if k > 1 else 0.0
        right += (labels_of(inputs + change) == truth).numpy()
        if k in queries:
            found.append(Evidence.of(right[inside] / k, right[~inside] / k))
    return found


def attack_run(
    folder: str | Path,
    *,
    examples: int = 150,
    queries: Sequence[int] = _QUERIES,
    budget: tuple[float, float] = (1.0, 1e-5),
    seed: int = 0,
) -> SamplingAttack:
    """Attack a run, by its model or its shards, with the data that it was trained on.

    Of a run that was trained privately its model is attacked. Of shards, these are attacked:

    - the model of the first shard, by its labels;
    - the same with the noise of DP-Logits that `budget` asks for *one* answer, spent anew each time;
    - the same with noise for all answers together;
    - the votes of all shards, without noise;
    - and with noise for all answers together.

    Args:
        folder: of `dptorch train`; its data has to be where it was.
        examples: how many members, and others, are attacked.
        queries: numbers of labels of each.
        budget: (ε, δ) that the noise is for.
        seed: of noise and changes: this is a measurement, not a service.

    Raises:
        DataError: the run or its data cannot be read.
        ConfigurationError: the run predicts numbers.
    """
    about = RunFolder(Path(folder)).read_json("run.json")
    job = Job.from_dict(about["job"])
    data = (
        recipes.get_recipe(job.recipe or "mnist").load()
        if job.data is None
        else load_data(job.data, job.reading)
    )
    if not data.classes:
        raise ConfigurationError("the run predicts a number, and the attack asks for labels.")
    others = _some(data.test, range(examples))
    if about.get("kind") != ENSEMBLE:
        if "statement" not in about:
            raise DataError(f"{folder} holds no finished run.")
        model = load_model(folder)
        members = _some(data.train, range(examples))
        curve = _curve("trained privately", _plain(model), members, others, queries, seed)
        limit = _allowed_by(about["statement"]["epsilon"], about["statement"]["delta"])
        limited = SamplingCurve(curve.name, curve.auc, (limit,) * len(queries))
        return SamplingAttack(tuple(queries), (limited,), len(members[0]))
    models = load_ensemble(folder).models
    users = None if data.table is None else data.table.units
    members = _some(data.train, assign_shards(data.train, len(models), users)[0][:examples])
    others = (others[0][: len(members[0])], others[1][: len(members[0])])
    total = 2 * len(members[0]) * max(queries)
    mu = gaussian_mu_for(*budget)
    curves = []
    for name, answering, each in (
        ("one shard, no noise", _plain(models[0]), None),
        (
            f"one shard, noise for epsilon {budget[0]:g} an answer",
            _noisy(models[:1], "gaussian", seed, (1e6, budget[1]), noise=1 / mu, clip=_CLIP),
            mu,
        ),
        (
            f"one shard, noise for epsilon {budget[0]:g} in all",
            _noisy(models[:1], "gaussian", seed, budget, queries=total, clip=_CLIP),
            mu / math.sqrt(total),
        ),
        (f"votes of {len(models)} shards, no noise", _votes(models), None),
        (
            f"votes of {len(models)} shards, noise for epsilon {budget[0]:g} in all",
            _noisy(models, "gnmax", seed, budget, queries=total),
            mu / math.sqrt(total),
        ),
    ):
        curve = _curve(name, answering, members, others, queries, seed)
        allowed = None if each is None else tuple(_gaussian_auc(each, k) for k in queries)
        curves.append(SamplingCurve(name, curve.auc, allowed))
    return SamplingAttack(tuple(queries), tuple(curves), len(members[0]))


def _curve(
    name: str, labels_of: Labels, members: Examples, others: Examples, queries: Any, seed: int
) -> SamplingCurve:
    found = play_sampling(labels_of, members, others, queries=queries, seed=seed)
    return SamplingCurve(name, tuple(auc(evidence) for evidence in found))


def _plain(model: Callable[[Tensor], Tensor]) -> Labels:
    def labels(inputs: Tensor) -> Tensor:
        with torch.no_grad():
            return model(inputs).argmax(1)

    return labels


def _votes(models: Sequence[Callable[[Tensor], Tensor]]) -> Labels:
    return lambda inputs: torch.stack([_plain(m)(inputs) for m in models]).mode(0).values


def _noisy(
    models: Sequence[Any], mechanism: str, seed: int, budget: tuple[float, float], **terms: Any
) -> Labels:
    predictor = PrivatePredictor(list(models), mechanism, budget=budget, seed=seed, **terms)
    return lambda inputs: predictor.predict(inputs).labels


def _gaussian_auc(mu: float, queries: int) -> float:
    """The largest AUC against k answers of Gaussian privacy mu each."""
    from scipy.special import ndtr

    return float(ndtr(mu * math.sqrt(queries) / math.sqrt(2)))


def _allowed_by(epsilon: float, delta: float) -> float:
    """The largest AUC under (ε, δ): the area below min(e^ε x + δ, 1 - e^-ε (1 - δ - x)).

    Example:
        >>> _allowed_by(0.0, 0.0), round(_allowed_by(1.0, 1e-5), 3)
        (0.5, 0.731)
    """
    from scipy.integrate import trapezoid

    growth = math.exp(min(epsilon, 700.0))
    x = np.linspace(0.0, 1.0, 20_001)
    y = np.clip(np.minimum(delta + growth * x, 1 - (1 - delta - x) / growth), 0.0, 1.0)
    return float(trapezoid(y, x))


def _some(data: Dataset[Any], rows: Sequence[int]) -> Examples:
    taken = [data[i] for i in rows if i < len(data)]  # type: ignore[arg-type]
    inputs = torch.stack([x for x, _ in taken])
    return inputs, torch.tensor([int(y) for _, y in taken])
