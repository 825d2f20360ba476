"""A job: everything that determines a run, and the objects it is run with."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from typing_extensions import Unpack

from dptorch.accounting import Workload
from dptorch.distributed import Ranks
from dptorch.engine.checkpoint import Stateful
from dptorch.engine.privacy_engine import PrivacyEngine
from dptorch.errors import ConfigurationError, DataError
from dptorch.plan import PlanSettings, PrivacyPlan, make_plan
from dptorch.postprocessing import WeightAverage
from dptorch.tables import Schema
from dptorch.tape.gradients.clipping_modes import NON_PRIVATE, get_mode
from dptorch.training import recipes
from dptorch.training.canaries import Canaries, make_canaries, plant
from dptorch.training.data import ReadOptions, TrainTest
from dptorch.training.hyperparameters import Hyperparameters, for_own_data
from dptorch.training.models import build_model
from dptorch.training.readers import load_data
from dptorch.training.schedules import schedule_of
from dptorch.training.table_tasks import task_of
from dptorch.training.task import Classification, Task

__all__ = [
    "PLAN_SETTINGS",
    "AnyJob",
    "Job",
    "RunSettings",
    "Setup",
    "device_of",
    "left_out",
    "plan_of",
    "prepare",
    "refuse_pairs",
    "require_positive",
    "with_rate",
]

#: The fields of a job that are settings of its plan, but the style of clipping.
PLAN_SETTINGS = (
    "sample_rate",
    "epochs",
    "target_epsilon",
    "noise_multiplier",
    "target_delta",
    "max_grad_norm",
    "clipping_fn",
    "mechanism",
    "bands",
    "coefficients",
    "accountant",
    "sampling",
)


J = TypeVar("J", bound="RunSettings")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What every kind of job has: settings of the plan, and how it is run. None means: as suggested.

    Attributes:
        epochs: passes over the data, in expectation.
        batch_size, sample_rate: how many examples a step draws in expectation, either way.
        target_epsilon, noise_multiplier: the budget or the noise, either way.
        target_delta, max_grad_norm, clipping_fn, mechanism, bands, accountant, sampling: see
            `dptorch.plan.PlanSettings`.
        coefficients: of correlated noise: a name there, or "sgd" for the momentum and the schedule of
            learning rates that the job has.
        clipping_style: a style's name, or names and patterns of modules, comma separated, each of
            which is clipped on its own.
        clipping_mode: see `dptorch.PrivacyEngine`; no effect on the result, but no "non-private".
        learning_rate: of the optimizer.
        num_workers: processes that load data.
        device: "auto", or any torch device.
        seed: for reproducible tests; a run with a seed is not private.
        diagnostics: record statistics of private data, under names that say so.
    """

    epochs: float | None = None
    batch_size: float | None = None
    sample_rate: float | None = None
    target_epsilon: float | None = None
    noise_multiplier: float | None = None
    target_delta: float | None = None
    max_grad_norm: float | None = None
    clipping_fn: str | None = None
    clipping_mode: str = "auto"
    clipping_style: str = "all-layer"
    mechanism: str = "gaussian"
    bands: str | None = None
    coefficients: str | None = None
    accountant: str = "pld"
    sampling: str = "poisson"
    learning_rate: float | None = None
    num_workers: int = 0
    device: str = "auto"
    seed: int | None = None
    diagnostics: bool = True

    @property
    def protects(self) -> bool:
        """Whether the run adds noise from a secret key."""
        return self.seed is None and get_mode(self.clipping_mode) is not NON_PRIVATE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `run.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[J], values: Mapping[str, Any]) -> J:
        """The job that `to_dict` described.

        Raises:
            DataError: a key is unknown, so the run is of another version of dptorch.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise DataError(f"run.json has the unknown setting {unknown[0]!r}: another version's?")
        return cls(**values)


@dataclass(frozen=True)
class Job(RunSettings):
    """What `dptorch train` was asked for. None means: as the recipe or the data suggests.

    `prepare` returns a job with every None decided, and that is what `run.json` records.

    Attributes:
        recipe: name in `dptorch.training.recipes.RECIPES`; the default unless `data` is given.
        data: path of the user's own data; read as `reading` says.
        model: a name that `dptorch.training.models.build_model` knows.
        pretrained: load published weights (torchvision, timm).
        momentum: of SGD.
        tail: the result is the mean of the weights over this last share of the steps; 0 for the last
            weights.
        max_physical_batch_size: most examples in memory at once; no effect on the result.
        canaries: how many made-up examples to plant, each in by a coin, for a later audit.

    The rest is as in `RunSettings`.
    """

    recipe: str | None = None
    data: str | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    model: str | None = None
    pretrained: bool = False
    momentum: float | None = None
    tail: float | None = None
    max_physical_batch_size: int = 512
    canaries: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Job:
        """The job that `to_dict` described; see `RunSettings.from_dict`.

        Example:
            >>> job = Job(recipe="mnist", reading=ReadOptions(bounds=(0.0, 1.0)))
            >>> Job.from_dict(job.to_dict()) == job
            True
        """
        reading = dict(values.get("reading", {}))
        if reading.get("bounds") is not None:
            reading["bounds"] = tuple(reading["bounds"])
        columns = reading.get("column_bounds", {})
        reading["column_bounds"] = {name: tuple(pair) for name, pair in columns.items()}
        return super().from_dict({**values, "reading": ReadOptions(**reading)})


class AnyJob(Protocol):
    """What the loop, the ledger and the pages read of a job, whatever its task."""

    @property
    def recipe(self) -> str | None:
        """The recipe's name."""

    @property
    def data(self) -> str | None:
        """Where the user's own data is."""

    @property
    def model(self) -> str | None:
        """The model's name."""

    @property
    def max_physical_batch_size(self) -> int:
        """Most examples in memory at once."""

    @property
    def num_workers(self) -> int:
        """Processes that load data."""

    @property
    def seed(self) -> int | None:
        """Of a run that is not private."""

    @property
    def diagnostics(self) -> bool:
        """Whether statistics of private data are recorded."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `run.json`."""


class Chosen(Protocol):
    """What a statement says of a run that was chosen among others."""

    @property
    def epsilon(self) -> float:
        """What publishing it costs."""

    @property
    def accountant(self) -> str:
        """The one that this comes from."""

    @property
    def note(self) -> str:
        """How it was chosen, in words."""

    @property
    def number_is_secret(self) -> bool:
        """Whether nobody may learn among how many."""


@dataclass(frozen=True, eq=False)
class Setup:
    """A job with every choice made and every object built; nothing has been written yet.

    `canaries` are those that the run plants, if it does; `data` has them in. `task` says what is
    trained for. `kept` has state of its own, which goes into the checkpoint; the weights that its
    `WeightAverage` has are the run's result, where there is one. `notes` go into the statement, and
    `began_from` into `run.json`: what is known of the weights that training began from. `selection`
    says how the run is chosen among others, if it is.
    """

    job: AnyJob
    data: TrainTest
    model: nn.Module
    engine: PrivacyEngine
    optimizer: torch.optim.Optimizer
    device: torch.device
    canaries: Canaries | None = None
    task: Task = field(default_factory=Classification)
    kept: Mapping[str, Stateful] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    selection: Chosen | None = None
    began_from: Mapping[str, Any] | None = None

    @property
    def private(self) -> bool:
        """Whether noise is added: False for a run to compare with."""
        return self.engine.plan.noise_multiplier > 0

    def with_result(self) -> AbstractContextManager[None]:
        """A context in which the model has the weights that are tested and published."""
        averages = [kept for kept in self.kept.values() if isinstance(kept, WeightAverage)]
        return averages[0].applied() if averages else nullcontext()


def prepare(job: Job, *, canaries: Canaries | None = None) -> Setup:
    """Load the data, decide what was left open, build the model and the engine.

    Args:
        job: what is asked for.
        canaries: of a run that is resumed; otherwise `job.canaries` are made.

    Raises:
        ConfigurationError: options contradict each other or have impossible values.
        DataError: the data cannot be read.
        PrivacyError: the model cannot be trained privately (it mixes examples, say).
    """
    _refuse_contradictions(job)
    device = device_of(job.device)
    notes: tuple[str, ...] = ()
    if job.data is None:
        recipe = recipes.get_recipe(job.recipe or "mnist")
        data = recipe.load()
        model_name, suggested = recipe.model, recipe.hyperparameters
        notes = (recipe.chosen,)
        job = replace(job, recipe=recipe.name)
    else:
        data = load_data(job.data, job.reading)
        model_name, suggested = for_own_data(data.input_shape)
    if job.canaries and data.table is not None:
        _refuse_canaries(data.table.schema)
    if job.canaries and canaries is None:
        canaries = make_canaries(data, job.canaries, Ranks.of().share_key(job.seed))
    # What the plan is told: with canaries, how many of them are in stays out of it.
    size = data.records + (len(canaries) // 2 if canaries is not None else 0)
    if canaries is not None:
        data = plant(data, canaries)
    job = _decide(job, model_name, suggested, sample_size=size)

    if job.seed is not None:
        torch.manual_seed(job.seed)
    assert job.model is not None
    model = build_model(job.model, data.input_shape, data.outputs, pretrained=job.pretrained).to(
        device
    )
    known: PlanSettings = {"sample_size": size}
    schema = None if data.table is None else data.table.schema
    if schema is not None and schema.unit is not None:
        known |= {"unit": "user", "max_examples_per_user": schema.unit.max_rows}
    plan = plan_of(job, **known)
    if canaries is not None:
        # The number of real examples is public. How many canaries are in is not: one that is out
        # counts as a record that contributes nothing.
        plan = replace(plan, sample_size=None)
    engine = PrivacyEngine(model, plan=plan, clipping_mode=job.clipping_mode, seed=job.seed)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=job.learning_rate or 0.0,
        momentum=job.momentum or 0.0,
    )
    engine.attach(optimizer)
    kept: dict[str, Stateful] = {}
    if job.tail:
        kept["average"] = WeightAverage(model, optimizer, first_step=left_out(job.tail, plan.steps))
    return Setup(job, data, model, engine, optimizer, device, canaries, task_of(data), kept, notes)


def left_out(tail: float, steps: int) -> int:
    """Number of steps before the last share `tail` of them.

    Raises:
        ConfigurationError: it is no share.
    """
    if not 0 < tail <= 1:
        raise ConfigurationError(f"tail={tail}: expected a share of the steps in (0, 1].")
    return round((1 - tail) * steps)


def _refuse_contradictions(job: Job) -> None:
    pairs = [
        ("recipe", "data", "the recipe brings its own data"),
        ("batch_size", "sample_rate", "one determines the other"),
        ("target_epsilon", "noise_multiplier", "one determines the other"),
    ]
    for first, second, why in pairs:
        a, b = getattr(job, first), getattr(job, second)
        if a is not None and b is not None:
            options = (
                f"--{name.removeprefix('target_').replace('_', '-')}" for name in (first, second)
            )
            left, right = options
            raise ConfigurationError(f"{left} {a} and {right} {b} exclude each other: {why}.")
    if get_mode(job.clipping_mode) is NON_PRIVATE:
        raise ConfigurationError(
            f"clipping_mode={job.clipping_mode!r} trains without privacy, and a run's folder says "
            "what its privacy is. For a comparison make a PrivacyEngine with it in a loop of your own."
        )
    if job.target_epsilon is not None and not job.target_epsilon > 0:
        raise ConfigurationError(
            f"target_epsilon={job.target_epsilon:g} asks for a model that does not depend on the data "
            "at all, so that nothing can be learned. Expected a positive number: 1 is strong "
            "protection, 3 to 8 is usual."
        )
    require_positive(job, "epochs", "learning_rate", "max_physical_batch_size")
    if job.momentum is not None and not 0 <= job.momentum < 1:
        raise ConfigurationError(f"momentum={job.momentum}: expected a number in [0, 1).")


def _refuse_canaries(schema: Schema) -> None:
    """Canaries are rows of one class each."""
    what = "a number to predict" if schema.label.is_number else "a unit" if schema.unit else None
    if what is not None:
        raise ConfigurationError(
            f"--canaries are single examples with a class, and the schema has {what}. Audit the plan "
            "instead: dptorch audit RUN --adversary white-box."
        )


def with_rate(job: J, sample_size: int) -> J:
    """The job with the sampling rate that its batch size means, if it has one.

    Raises:
        ConfigurationError: the batch is larger than the data, or has less than one example.
    """
    if job.batch_size is None:
        return job
    if not 0 < job.batch_size <= sample_size:
        raise ConfigurationError(
            f"batch_size={job.batch_size:g}: expected between 1 and the {sample_size} training "
            "examples."
        )
    return replace(job, batch_size=None, sample_rate=job.batch_size / sample_size)


def plan_of(job: RunSettings, **more: Unpack[PlanSettings]) -> PrivacyPlan:
    """The plan of a job whose loss is a mean; `more` is what no job has: sample_size, the unit."""
    style: str | list[str] = job.clipping_style
    if any(mark in job.clipping_style for mark in ",.*"):  # modules, each a block of its own
        style = [part.strip() for part in job.clipping_style.split(",") if part.strip()]
    settings: Any = {name: getattr(job, name) for name in PLAN_SETTINGS} | more
    if job.coefficients == "sgd":
        settings["coefficients"] = partial(_workload, job)
    return make_plan(loss_reduction="mean", clipping_style=style, **settings)


def _workload(job: RunSettings, steps: int) -> Workload:
    """What the optimizer of a job makes of the gradients of `steps` steps."""
    kind = getattr(job, "optimizer", None) or "sgd"
    if kind != "sgd" or not hasattr(job, "momentum"):
        raise ConfigurationError(
            "coefficients='sgd' is for noise that fits SGD's momentum and learning rates, and this run "
            "is not trained by SGD. Use 'prefix-sum' or 'square-root'."
        )
    momentum: float = getattr(job, "momentum", None) or 0.0
    decay, warmup = getattr(job, "decay", None), getattr(job, "warmup", None)
    return Workload(momentum, schedule_of(decay or "constant", steps, warmup or 0.0))


def refuse_pairs(job: RunSettings, *pairs: tuple[str, str, str]) -> None:
    """Raise ConfigurationError if both of two settings are given; the third text says why not."""
    for first, second, why in pairs:
        a, b = getattr(job, first), getattr(job, second)
        if a is not None and b is not None:
            one, other = (f"{v:g}" if isinstance(v, float) else repr(v) for v in (a, b))
            raise ConfigurationError(
                f"{first}={one} and {second}={other} exclude each other: {why}."
            )


def require_positive(job: RunSettings, *names: str) -> None:
    """Raise ConfigurationError unless each of these settings is left out or above 0."""
    for name in names:
        value = getattr(job, name)
        if value is not None and not value > 0:
            raise ConfigurationError(f"{name}={value}: expected a positive number.")


def _decide(job: Job, model: str, suggested: Hyperparameters, *, sample_size: int) -> Job:
    """Fill in what was left open."""
    job = with_rate(job, sample_size)
    budget = job.target_epsilon
    if budget is None and job.noise_multiplier is None:
        budget = suggested.target_epsilon
    filled: dict[str, Any] = {
        "model": job.model or model,
        "target_epsilon": budget,
    }
    for name in (
        "sample_rate",
        "epochs",
        "target_delta",
        "max_grad_norm",
        "clipping_fn",
        "learning_rate",
        "momentum",
        "tail",
    ):
        value = getattr(job, name)
        filled[name] = getattr(suggested, name) if value is None else value
    return replace(job, **filled)


def device_of(name: str) -> torch.device:
    """Return the device of that name, or for "auto" the GPU, if there is one.

    Raises:
        ConfigurationError: it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():  # of several processes each has one of its own
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigurationError(
            f"--device {name} cannot be used here ({reason}). Use --device auto or cpu."
        ) from error
    return device
