"""The sampling attack on a run, beside what the same data gives by other ways of answering.

Whatever the run is, the attack is played on a model without protection, on the same with the noise of
DP-Logits, on the votes of models of disjoint parts, and on a model that was trained privately. What the
run does not have is trained here with its data, and thrown away.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dptorch.accounting import gaussian_mu_for
from dptorch.audit.roc import auc
from dptorch.audit.sampling_attack import (
    QUERIES,
    Examples,
    Labels,
    SamplingAttack,
    SamplingCurve,
    play_sampling,
)
from dptorch.errors import ConfigurationError, DataError, PrivacyWarning
from dptorch.prediction import PrivatePredictor, assign_shards, train_shards
from dptorch.prediction.ensemble import ENSEMBLE, fit_plainly, load_ensemble
from dptorch.training import recipes
from dptorch.training.data import TrainTest
from dptorch.training.job import Job, prepare
from dptorch.training.models import build_model
from dptorch.training.readers import load_data
from dptorch.training.run_folder import RunFolder, load_model

__all__ = ["attack_run"]

_CLIP: Final = 10.0
_USEFUL: Final = (
    0.25  # standard deviation over the sensitivity 2B: half of what logits are clipped to
)
_SHARDS: Final = 10
_EPSILON: Final = 8.0
_MOST_EXAMPLES: Final = 20_000  # to train with; more take longer than a look is worth


@dataclass
class _Models:
    """What is attacked; None is still to be trained.

    Attributes:
        members: places of attacked examples in the training set, which all the models saw.
        guarantee: (ε, δ) of the private model.
        notes: of what was trained here, and of what could not be.
    """

    members: Sequence[int]
    plain: nn.Module | None = None
    shards: list[Any] | None = None
    private: nn.Module | None = None
    guarantee: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)


def attack_run(
    folder: str | Path,
    *,
    examples: int = 150,
    queries: Sequence[int] = QUERIES,
    budget: tuple[float, float] = (1.0, 1e-5),
    seed: int = 0,
) -> SamplingAttack:
    """Attack a run, and other ways of answering, with the data that it was trained on.

    These are attacked, by their labels:

    - a model without protection (of a run of shards, that of the first);
    - the same with noise of DP-Logits that looks useful, half the clip, spent anew each time;
    - the same with the noise that `budget` asks for, for all answers together;
    - the votes of models on disjoint parts, without noise, and with noise for all answers together;
    - a model that was trained privately.

    One of them is the run. The others are trained here, if the data has at most 20,000 training
    examples: the plain ones by `dptorch.prediction.ensemble.fit_plainly`, the private one as
    `dptorch train` does it at ε = 8.

    Args:
        folder: of `dptorch train`; its data has to be where it was.
        examples: how many members, and others, are attacked.
        queries: numbers of labels of each.
        budget: (ε, δ) that the noise of answers is for.
        seed: of noise, changes and what is trained here: this is a measurement, not a service.

    Raises:
        DataError: the run or its data cannot be read.
        ConfigurationError: the run predicts numbers, or is of another command.
    """
    about = RunFolder(Path(folder)).read_json("run.json")
    if "task" in about["job"]:
        raise ConfigurationError(
            f"{folder} is a run of dptorch train {about['job']['task']}. The sampling attack takes "
            "runs of dptorch train on tables, arrays, folders of images and recipes."
        )
    job, data = _job_and_data(about)
    if not data.classes:
        raise ConfigurationError("the run predicts a number, and the attack asks for labels.")
    models = _models_of(folder, about, data, examples)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)  # a seed, and nothing is published
        torch.manual_seed(seed)
        _train_missing(models, job, data, seed)
    members = _some(data.train, models.members)
    others = _some(data.test, range(len(members[0])))
    members = (members[0][: len(others[0])], members[1][: len(others[0])])
    curves = []
    for name, answering, allowed in _ways(models, 2 * len(members[0]), queries, budget, seed):
        found = play_sampling(answering, members, others, queries=queries, seed=seed)
        curves.append(SamplingCurve(name, tuple(auc(evidence) for evidence in found), allowed))
    return SamplingAttack(tuple(queries), tuple(curves), len(members[0]), tuple(models.notes))


def _job_and_data(about: Mapping[str, Any]) -> tuple[Job, TrainTest]:
    """What to train the missing models with: the run's data and model, and nothing else of its job."""
    run = Job.from_dict(about["job"])
    recipe = run.recipe or ("mnist-features" if about.get("kind") == ENSEMBLE else "mnist")
    job = Job(
        recipe=recipe if run.data is None else None,
        data=run.data,
        reading=run.reading,
        model=run.model,
        device="cpu",
    )
    if run.data is None:
        return job, recipes.get_recipe(recipe).load()
    return job, load_data(run.data, run.reading)


def _models_of(
    folder: str | Path, about: Mapping[str, Any], data: TrainTest, examples: int
) -> _Models:
    """What the run itself has."""
    size = data.sizes[0]
    if about.get("kind") == ENSEMBLE:
        shards = load_ensemble(folder).models
        users = None if data.table is None else data.table.units
        first = assign_shards(data.train, len(shards), users)[0][:examples]
        return _Models(first, plain=shards[0], shards=list(shards))
    if "statement" not in about:
        raise DataError(f"{folder} holds no finished run.")
    members, model = range(min(examples, size)), load_model(folder)
    epsilon = about["statement"]["epsilon"]
    if epsilon is None or math.isinf(float(epsilon)):
        return _Models(members, plain=model)
    guarantee = (float(epsilon), float(about["statement"]["delta"]))
    return _Models(members, private=model, guarantee=guarantee)


def _train_missing(models: _Models, job: Job, data: TrainTest, seed: int) -> None:
    """Train what the run does not have, or note why not."""
    here: list[str] = []
    size = data.sizes[0]
    if size > _MOST_EXAMPLES:
        models.notes.append(
            f"Only the run itself was attacked: models to compare it with are trained on at most "
            f"{_MOST_EXAMPLES:,} examples, and there are {size:,}."
        )
        return

    def fit(part: Dataset[Any]) -> nn.Module:
        assert job.model is not None
        model = build_model(job.model, data.input_shape, data.outputs)
        fit_plainly(model, part)
        return model

    if models.plain is None:
        models.plain = fit(data.train)
        here.append("the plain model")
    if models.shards is None:
        users = None if data.table is None else data.table.units
        try:
            models.shards = list(train_shards(fit, data.train, _SHARDS, users=users))
            here.append(f"{_SHARDS} models on disjoint parts")
        except DataError as error:
            models.notes.append(f"No votes of models on disjoint parts: {error}")
    if models.private is None:
        models.private, models.guarantee = _train_privately(job, seed)
        here.append(f"the private model (epsilon {_EPSILON:g})")
    models.notes.append(
        f"Trained for this comparison with the run's data, and thrown away: {', '.join(here)}."
    )


def _train_privately(job: Job, seed: int) -> tuple[nn.Module, tuple[float, float]]:
    setup = prepare(replace(job, target_epsilon=_EPSILON, seed=seed))
    engine, table = setup.engine, setup.data.table
    loader = engine.loader(
        setup.data.train,
        user_ids=None if table is None or table.units is None else list(table.units),
    )
    setup.model.train()
    while engine.steps_done < engine.plan.steps:
        for batch in loader:
            loss, _ = setup.task.loss(setup.model, batch, setup.device)
            loss.backward()
            setup.task.before_step(setup.optimizer, engine.steps_done)
            setup.optimizer.step()
            setup.optimizer.zero_grad()
    spent = engine.get_privacy_spent()
    engine.detach()
    with setup.with_result():
        model = build_model(str(job.model), setup.data.input_shape, setup.data.outputs)
        model.load_state_dict(setup.model.state_dict())
    return model.eval(), (spent.epsilon, spent.delta)


def _ways(
    models: _Models,
    examples: int,
    queries: Sequence[int],
    budget: tuple[float, float],
    seed: int,
) -> list[tuple[str, Labels, tuple[float, ...] | None]]:
    """(name, what answers, the most that its guarantee allows) of each way of answering."""
    total, epsilon = examples * max(queries), budget[0]
    mu = gaussian_mu_for(*budget) / math.sqrt(total)

    def of_gaussians(each: float) -> tuple[float, ...]:
        return tuple(_gaussian_auc(each, k) for k in queries)

    found: list[tuple[str, Labels, tuple[float, ...] | None]] = []
    if models.plain is not None:
        useful = {"noise": _USEFUL, "clip": _CLIP}
        honest = {"queries": total, "clip": _CLIP}
        one = [models.plain]
        found += [
            ("plain model", _plain(models.plain), None),
            (
                "plain model, noise that looks useful",
                _noisy(one, "gaussian", seed, (1e6, budget[1]), **useful),
                of_gaussians(1 / _USEFUL),
            ),
            (
                f"plain model, noise for epsilon {epsilon:g} in all",
                _noisy(one, "gaussian", seed, budget, **honest),
                of_gaussians(mu),
            ),
        ]
    if models.shards is not None:
        votes = f"votes of {len(models.shards)} shards"
        found += [
            (f"{votes}, no noise", _votes(models.shards), None),
            (
                f"{votes}, noise for epsilon {epsilon:g} in all",
                _noisy(models.shards, "gnmax", seed, budget, queries=total),
                of_gaussians(mu),
            ),
        ]
    if models.private is not None:
        assert models.guarantee is not None
        limit = (_allowed_by(*models.guarantee),) * len(queries)
        name = f"trained privately, epsilon {models.guarantee[0]:.3g}"
        found.append((name, _plain(models.private), limit))
    return found


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
