"""The privacy statement: what was guaranteed, under which assumptions, and what was not."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from dptorch import accounting
from dptorch.accounting import Adjacency, Event
from dptorch.distributed.agreement import SAME_DATA
from dptorch.errors import PrivacyError
from dptorch.plan import PrivacyPlan
from dptorch.randomness import KeySource
from dptorch.risk import in_words, rounded_up
from dptorch.sampling.schemes import OWN_LOADER

if TYPE_CHECKING:
    from dptorch.ledger.counting import Attempts

__all__ = ["ASSUMED", "NOT_COVERED", "ONCE_A_STEP", "RELEASED", "Statement", "make_statement"]

_ADJACENCY_TEXT = {
    Adjacency.ADD_REMOVE: "adding or removing one {unit}",
    Adjacency.ZERO_OUT: "replacing one {unit} by one that contributes nothing",
    Adjacency.REPLACE_ONE: "replacing one {unit} by another",
}

#: What a run releases.
RELEASED = (
    "the model's trained parameters after every step, and anything computed from them and from data "
    "that is not private"
)
#: What no statement covers.
NOT_COVERED = (
    "values logged in training that are exact functions of private data: loss, gradient norms, "
    "the clipped fraction, batch sizes",
    "choices made by looking at private data, inside the run or outside: hyper-parameters (tuning), "
    "learning-rate schedules that follow the loss, early stopping, which run to keep",
    "metrics computed on private data, and any preprocessing that used statistics of it",
    "buffers of the model, and parameters or gradients written by anything but the engine and the "
    "optimizer's steps",
    "other engines and other runs on the same data: their epsilons add up, but for runs that go on "
    "from one checkpoint, which cost more than that together",
    "releases of the same data without differential privacy, whoever makes them",
    "how long steps take, memory and other side channels of the machine: a large batch takes longer",
    "files: the data, and the checkpoint of an unfinished run, which holds the key of the noise",
)
TRUST: Final = "central: whoever trains sees the data, and nothing here protects it from them"
RELEASE: Final = "not interactive: nobody asks questions of the data; each step is one release"
VARIANT: Final = "approximate differential privacy, (epsilon, delta)"
VERSION: Final = 1
FLOATING_POINT = "attacks on floating-point arithmetic: noise and sums are floating-point numbers"
_MECHANISMS = {
    "gaussian": "Gaussian noise",
    "discrete_gaussian": "discrete Gaussian noise",
    "banded": "Gaussian noise correlated over {bands} steps",
    "inverse-banded": "Gaussian noise made of that of {bands} steps",
    "buffered-toeplitz": "Gaussian noise correlated over all steps by buffers",
}
#: What every statement assumes; ``{unit}`` is the unit of privacy.
ASSUMED = (
    "every row of a batch, its label and its weight come from one {unit} alone: no mixing in the "
    "dataset, the collate function or the loop",
    "what the model is given in a step beside the batch is no other copy of the data (a second loader)",
    "what the loss and its terms are multiplied by is public: constants, and what the program says is "
    "public (public_number)",
    "no number or array that is read from a batch, no size that its values decide (how many rows a "
    "mask picks) and no error that they raise decides what is computed for another {unit}: in the loop "
    "(a loss, a norm, a text of them; a scheduler of the learning rate that follows the loss), or in "
    "the model by code that is trusted (transformers, timm, torchvision, peft, what runs in "
    "dptorch.tape.trusted_reads)",
    "no value of the batch leaves the model, or comes back, by what torch functions do not show: code "
    "that turns them off, threads that run already, extensions in other languages, writes to the .data "
    "of a parameter, storages, constructors of one type (torch.FloatTensor(t))",
    "what is computed for one {unit} depends neither on its place in the batch nor on the number of "
    "rows (the first batch is tested for both, but not how many rows a generator makes beside it), nor "
    "on how long the others are (tested on the first batch that is padded to its longest row, of an "
    "own loader's once a second width is seen; where a mask shows the padding, or the padding is 0)",
)
#: What holds of `dptorch.PrivacyEngine.loader` and is the user's word for any other.
ONCE_A_STEP = "no {unit} is in more than one row of all batches that add up to a step"
DRAWS = (
    "what is drawn for one {unit} by its place in the batch (dropout, augmentation) has a secret seed: "
    "engine.loader gives torch, Python and NumPy one before a batch, if torch.manual_seed was called"
)
SAME_GRADIENT = (
    "the gradient of one example, a floating-point number before it is rounded, is the same in any "
    "batch (it is where examples go through the model one at a time)"
)
OWN_BATCHES = (
    "what the loop computes from a batch of its own loader before the batch meets the model, and in "
    "passes without gradients, keeps the examples apart, and nothing that is trained on the data "
    "computes from it what the model or its loss takes: it is followed from a model's arguments on"
)
NOT_FOLLOWED = (
    "what the loop computes from these parts of the batches of engine.loader, which are not followed, "
    "keeps the examples apart: {parts}"
)


@dataclass(frozen=True)
class Statement:
    """A statement about one run; ``str()`` is the text, `to_dict` the same for machines.

    Attributes:
        plan: what the run committed to.
        adjacency: the neighbouring relation that is stated: the plan's, but zero-out instead of
            add/remove where a step took its batch from a loader of the user's own.
        steps: steps taken, empty batches included.
        epsilon: certified ε of what ran: by an accountant whose number is an upper bound.
        accountant: its name: the plan's, or "pld" where the plan's gives no bound.
        epsilon_exact: the same by the exact accountant, for planning; None where it does not cover.
        epsilon_if_poisson: certified ε that the run would have had under Poisson sampling at its rate.
        epsilon_unamplified: certified ε without amplification by sampling: of steps in each of which
            any record may take part once.
        sampling_run: how many steps each sampler served.
        key_source: where the randomness came from.
        versions: software that ran.
        resumed: how often the run went on from a checkpoint.
        repeated: steps that were released again, because the run was killed after its last
            checkpoint; every ε counts them. Known only with a ledger.
        ledger: the run's id and data set in the ledger that its steps were written to beforehand.
        model_digest: SHA-256 of the model that a run released, weights and preprocessing.
        read_from_data: what of the preprocessing was read off the private data, in words.
        notes: what else a reader has to know, in words: what weights training began from.
        ranks: how many processes took the steps together.
        not_followed: what the loader has handed out in forms that are not followed, in words.
    """

    plan: PrivacyPlan
    adjacency: Adjacency
    steps: int
    epsilon: float
    accountant: str
    epsilon_exact: float | None
    epsilon_if_poisson: float
    epsilon_unamplified: float
    sampling_run: dict[str, int]
    key_source: KeySource
    versions: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    repeated: int = 0
    ledger: dict[str, str] | None = None
    model_digest: str | None = None
    read_from_data: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ranks: int = 1
    not_followed: tuple[str, ...] = ()

    @property
    def sampling_holds(self) -> bool:
        """Whether every step drew its batch as the plan says."""
        return all(scheme == self.plan.sampling or not n for scheme, n in self.sampling_run.items())

    @property
    def own_loader_steps(self) -> int:
        """How many steps took their batch from a loader of the user's own."""
        return self.sampling_run.get(OWN_LOADER, 0)

    @property
    def private(self) -> bool:
        """Whether the randomness was secret."""
        return self.key_source.is_private

    @property
    def public(self) -> list[str]:
        """The numbers that anyone may know, so that none may come from the private data."""
        plan = self.plan
        numbers = [
            f"sampling rate {plan.sample_rate:.6g}",
            f"expected batch size {plan.expected_batch_size:g}, which sums are divided by",
            f"steps {plan.steps}",
            f"noise multiplier {plan.noise_multiplier:.6g}",
            f"clipping norm {plan.max_grad_norm:g}",
            f"delta {plan.target_delta:g}",
        ]
        if plan.capacity is not None:
            numbers.append(f"capacity {plan.capacity}")
        if plan.bands is not None:
            numbers.append(f"groups that take turns {plan.bands}")
        if plan.coefficients:
            numbers.append("coefficients " + ", ".join(f"{c:.9g}" for c in plan.coefficients))
        size = [f"number of {plan.unit}s {plan.sample_size}"] * (plan.sample_size is not None)
        return [*numbers, *size]

    @property
    def assumed(self) -> list[str]:
        """What the engine cannot see and the guarantee rests on."""
        plan, unit = self.plan, self.plan.unit
        own = [
            f"in the {self.own_loader_steps} steps on a loader of the user's own, "
            f"{ONCE_A_STEP.format(unit=unit)}: the loader draws without replacement, a step "
            "does not go on over the end of an epoch, and no batch is backpropagated twice. "
            "What is in k rows of a step counts k times"
        ] * bool(self.own_loader_steps)
        users = (
            f"user_ids gives the user of each example; a batch that the engine did not draw has "
            f"at most {plan.max_examples_per_user} examples of a user"
        )
        number = (
            f"the number {plan.sample_size} was not taken from the private data: under add/remove "
            "the number of records is protected"
        )
        read = (
            "what was read off the private data to prepare it says nothing of anyone, because no "
            f"noise was added to it: {'; '.join(self.read_from_data)}"
        )
        order = (
            f"the data set is the same, in the same order, throughout {plan.places_kept}: each "
            f"{unit} keeps its turns (their number and a few of the examples are compared)"
        )
        removable = self.adjacency is Adjacency.ADD_REMOVE
        return [
            *own,
            *(item.format(unit=unit) for item in ASSUMED),
            *[OWN_BATCHES] * len(own),
            *[NOT_FOLLOWED.format(parts="; ".join(self.not_followed))] * bool(self.not_followed),
            *[users] * (unit == "user"),
            *[number] * (plan.sample_size is not None and removable),
            DRAWS.format(unit=unit),
            *[read] * bool(self.read_from_data),
            *[order] * bool(plan.places_kept) + [SAME_DATA] * (self.ranks > 1),
            *[SAME_GRADIENT] * (plan.mechanism == "discrete_gaussian"),
        ]

    @property
    def mechanism_text(self) -> str:
        """The noise in words, and what it is added to."""
        plan = self.plan
        if self.steps and not any(self.sampling_run.values()):
            return "none: ordinary training, whose gradients were neither clipped nor noised"
        noise = _MECHANISMS[plan.mechanism].format(bands=len(plan.coefficients))
        noise = f"{noise}, multiplier {plan.noise_multiplier:.6g}"
        clipped = f"{plan.max_grad_norm:g} ({plan.clipping_fn}, {plan.clipping_style})"
        return f"{noise}, on sums of gradients clipped to {clipped}"

    @property
    def not_covered(self) -> list[str]:
        """What the guarantee says nothing of."""
        return [*NOT_COVERED, *[FLOATING_POINT] * (self.plan.mechanism != "discrete_gaussian")]

    @property
    def adjacency_text(self) -> str:
        """Which two data sets the statement compares."""
        return _ADJACENCY_TEXT[self.adjacency].format(unit=self.plan.unit)

    @property
    def unit_text(self) -> str:
        """The unit of privacy, and what it leaves open."""
        plan = self.plan
        if plan.unit == "user":
            return (
                f"one user with all their examples, of which at most {plan.max_examples_per_user} "
                f"enter a step, each clipped to {plan.max_example_norm:g}"
            )
        if plan.unit == "packed sequence":
            return (
                "one packed sequence, that is one row; a person or document spread over several rows "
                "is NOT covered as a whole"
            )
        return f"one {plan.unit}"

    @property
    def in_words(self) -> list[str]:
        """What the guarantee means for one person, in plain words; of a seeded run nothing."""
        if not self.private:
            return ["The noise came from a seed that is known, so that this run protects nobody."]
        plan = self.plan
        return in_words(self.epsilon, plan.target_delta, plan.unit, plan.sample_size)

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain values, which `dptorch/statement.schema.json` describes."""
        plan = self.plan
        return {
            "statement_version": VERSION,
            "epsilon": self.epsilon,
            "epsilon_exact": self.epsilon_exact,
            "epsilon_if_poisson_sampled": self.epsilon_if_poisson,
            "epsilon_without_amplification": self.epsilon_unamplified,
            "accountant": self.accountant,
            "delta": plan.target_delta,
            "unit": plan.unit,
            "unit_text": self.unit_text,
            "adjacency": self.adjacency.value,
            "adjacency_text": self.adjacency_text,
            "steps": self.steps,
            "resumed": self.resumed,
            "repeated": self.repeated,
            "ledger": self.ledger,
            "model_digest": self.model_digest,
            "read_from_data": list(self.read_from_data),
            "notes": list(self.notes),
            "sampling_planned": plan.sampling,
            "sampling_law": plan.scheme.describe(plan.terms, plan.unit),
            "sampling_theorem": self.plan.theorem,
            "sampling_run": dict(self.sampling_run),
            "sampling_holds": self.sampling_holds,
            "key_provenance": self.key_source.value,
            "private_randomness": self.private,
            "plan": json.loads(plan.to_json()),
            "variant": VARIANT,
            "trust_model": TRUST,
            "release_type": RELEASE,
            "in_words": self.in_words,
            "released": RELEASED,
            "public": self.public,
            "assumed": self.assumed,
            "not_covered": self.not_covered,
            "versions": dict(self.versions),
        }

    def __str__(self) -> str:
        plan = self.plan
        adjacency = self.adjacency_text
        run = ", ".join(f"{n} steps: {s}" for s, n in self.sampling_run.items() if n) or "no step"
        lines = [
            f"These {self.steps} training steps are ({rounded_up(self.epsilon)}, "
            f"{plan.target_delta:g})-differentially private with respect to {adjacency}"
            + (", provided that" if self.own_loader_steps else "."),
            *[
                f"{ONCE_A_STEP.format(unit=plan.unit)}. ({self.own_loader_steps} of the steps took "
                "their batches from a loader",
                "of the user's own, which the engine does not see.)",
            ]
            * bool(self.own_loader_steps),
            "",
            "In words:",
            *(f"  {paragraph}" for paragraph in self.in_words),
            "",
            f"Variant              {VARIANT}",
            f"Trust model          {TRUST}",
            f"Releases             {RELEASE}",
            f"Unit of privacy      {self.unit_text}",
            f"Adjacency            {self.adjacency.value}: {adjacency}",
            f"delta                {plan.target_delta:g}",
            f"Mechanism            {self.mechanism_text}",
            f"Steps                {self.steps} of {plan.steps} planned, empty batches included"
            + (f"; resumed {self.resumed} times" if self.resumed else "")
            + (f"; {self.repeated} repeated after a kill, and counted" if self.repeated else ""),
            f"Sampling planned     {plan.sampling}: {plan.scheme.describe(plan.terms, plan.unit)}",
            *([f"Theorem              {plan.theorem}"] if plan.coefficients else []),
            f"Sampling run         {run}",
            *self._epsilon_lines(),
            f"Randomness           key from the {self.key_source.value}",
            "Ledger               "
            + ("run {run} on {dataset}".format(**self.ledger) if self.ledger else "none"),
            *([f"Model                sha256 {self.model_digest}"] if self.model_digest else []),
            "",
            *self._notes(),
            f"Released and covered: {RELEASED}.",
            "Assumed:",
            *(f"  - {item}" for item in self.assumed),
            "Treated as public, so that none of it may come from the private data:",
            *(f"  - {item}" for item in self.public),
            "Not covered:",
            *(f"  - {item}" for item in self.not_covered),
            "",
            "Software: " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
        ]
        return "\n".join(lines) + "\n"

    def _epsilon_lines(self) -> list[str]:
        lines = [
            f"epsilon              {rounded_up(self.epsilon)} certified for what ran "
            f"(accountant {self.accountant}, an upper bound)"
        ]
        blank = " " * 21
        if self.epsilon_exact is not None:
            lines.append(
                f"{blank}{rounded_up(self.epsilon_exact)} exact, for planning (no certified bound)"
            )
        if self.plan.sampling != "poisson" or not self.sampling_holds:
            lines.append(
                f"{blank}{rounded_up(self.epsilon_if_poisson)} is what Poisson accounting would have "
                f"claimed at rate {self.plan.sample_rate:.6g}; NOT valid for what ran"
            )
        lines += [
            f"{blank}{rounded_up(self.epsilon_unamplified)} without amplification: holds for any "
            "data-independent batching in which a",
            f"{blank}record is in at most one row of a step, and its place does not depend on other "
            "records",
        ]
        return lines

    def _notes(self) -> list[str]:
        notes = [f"NOTE: {note}" for note in self.notes]
        if not self.sampling_holds:
            notes.append(
                f"NOTE: not every batch was drawn by the engine as planned ({self.plan.sampling}). The "
                "first line states the epsilon without amplification for the steps that were not."
            )
        if self.adjacency is not self.plan.adjacency:
            notes.append(
                f"NOTE: planned was {self.plan.adjacency.value}. In a loader of the user's own, adding "
                f"or removing one {self.plan.unit} can move others into other batches, which no "
                f"epsilon here covers. The statement is therefore {self.adjacency.value}: "
                f"{self.adjacency_text}, in the same place. The number is the same."
            )
        if self.resumed and self.ledger is None:
            notes.append(
                "NOTE: the run went on from a checkpoint. Other runs that went on from it, or past it, "
                "drew the same batches for the same steps. They cost more together than their epsilons "
                "added up: k of them cost what one costs whose noise is smaller by sqrt(k). A ledger "
                "counts them so, as repeated steps of one run; this run has none."
            )
        if self.plan.unit == "packed sequence":
            notes.append(
                "NOTE: the unit is the packed row. A person whose text is in several rows is protected "
                "less with every further row."
            )
        if not self.private:
            notes.append(
                "NOTE: the noise comes from a seed given by the user. Whoever knows the seed can "
                "remove the noise. This run is for tests; it protects nobody."
            )
        return [line for note in notes for line in (note, "")]


class RunInLedger(Protocol):
    """What a statement says of a run's ledger; see `dptorch.ledger.RunLedger`."""

    @property
    def name(self) -> dict[str, str]: ...

    @property
    def attempts(self) -> Attempts: ...

    @property
    def adjacencies(self) -> tuple[Adjacency, ...]: ...

    @property
    def repeated_steps(self) -> int: ...


def make_statement(
    plan: PrivacyPlan,
    steps: int,
    sampling_run: dict[str, int],
    key_source: KeySource,
    resumed: int = 0,
    *,
    ledger: RunInLedger | None = None,
) -> Statement:
    """The statement for a run that took `steps` steps of `plan`.

    Args:
        ledger: that of the run, which knows of steps that were released more than once.
    """
    own = sum(n for scheme, n in sampling_run.items() if scheme != plan.sampling)
    adjacency = plan.adjacency
    # The ledger knows of steps that were lost after the last checkpoint, too.
    if own or (ledger is not None and adjacency not in ledger.adjacencies):
        adjacency = Adjacency.ZERO_OUT if adjacency is Adjacency.ADD_REMOVE else adjacency
    bound = accounting.get_accountant(plan.accountant).is_upper_bound
    accountant = plan.accountant if bound else "pld"
    poisson = plan.if_poisson()
    repeated = 0 if ledger is None else ledger.repeated_steps
    if ledger is not None and repeated:
        history = ledger.attempts.events()
        if_poisson = ledger.attempts.events(each_as=poisson.event(1))
    else:
        history = plan.history(steps, own_loader_steps=own)
        if_poisson = poisson.history(steps)
    most = 1 if ledger is None else max(map(ledger.attempts.times, range(steps)), default=1)
    unamplified = plan.unamplified(steps + repeated, most)

    def epsilon(history: list[Event], accountant: str) -> float:
        return accounting.get_accountant(accountant).epsilon(
            history, plan.target_delta, adjacency=adjacency
        )

    try:
        exact = epsilon(history, "exact")
    except PrivacyError:
        exact = None
    return Statement(
        plan=plan,
        adjacency=adjacency,
        steps=steps,
        epsilon=epsilon(history, accountant),
        accountant=accountant,
        epsilon_exact=exact,
        epsilon_if_poisson=epsilon(if_poisson, accountant),
        epsilon_unamplified=epsilon(unamplified, accountant),
        sampling_run=sampling_run,
        key_source=key_source,
        versions={
            "dptorch": version("dptorch"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        resumed=resumed,
        repeated=repeated,
        ledger=None if ledger is None else ledger.name,
    )
