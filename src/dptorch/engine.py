"""PrivacyEngine: binds a plan to a model, an optimizer and a loader, and keeps the ordinary loop."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from dptorch.accounting import Adjacency
from dptorch.clipping import coefficients
from dptorch.errors import (
    BudgetExhausted,
    ConfigurationError,
    PrivacyError,
    PrivacyWarning,
    one_of,
)
from dptorch.noise import GaussianNoise
from dptorch.plan import PrivacyPlan, PrivacySpent, make_plan
from dptorch.randomness import RootKey
from dptorch.release import ClippedSum
from dptorch.sampling import PhysicalBatch, PoissonSampler, PrivateLoader
from dptorch.statement import Statement, make_statement
from dptorch.stepping import OptimizerBinding, check_parameters
from dptorch.tape import Recording, Tape
from dptorch.tape.batch import BatchDims
from dptorch.tape.mixing import refuse_mixing
from dptorch.tape.tape import PER_EXAMPLE
from dptorch.tape.watch import Watch, watch_on

__all__ = ["PrivacyEngine", "Private", "StepDiagnostics", "make_private"]

_CLIPPING_MODES = ("auto",)
_OWN_LOADER = "the user's own loader"


@dataclass(frozen=True)
class StepDiagnostics:
    """Exact functions of private data in the last logical batch: NOT PRIVATE. Do not publish.

    Attributes:
        examples: how many examples were in it.
        mean_norm: mean per-example gradient norm (NaN if there was none).
        clipped_fraction: fraction whose contribution was scaled down.
        dropped: how many were dropped because their gradient was not finite.
    """

    examples: int
    mean_norm: float
    clipped_fraction: float
    dropped: int


class _Batch(NamedTuple):
    """A tape that gradients have reached, and the physical batch its forward pass was made on (None
    without the engine's loader)."""

    tape: Tape
    part: PhysicalBatch | None


class PrivacyEngine:
    """Makes an ordinary training loop differentially private.

    Build it, `attach` an optimizer, take batches from `loader`, and train as always::

        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    Args:
        model: any module; unmodified. Parameters that should not be trained are frozen before.
        batch_size, sample_rate, sample_size, epochs, steps, target_epsilon, noise_multiplier,
        target_delta, max_grad_norm, clipping_fn, clipping_style, accountant, adjacency,
        loss_reduction, unit: see `dptorch.plan.make_plan`.
        plan: a plan made before, instead of all of the above.
        clipping_mode: how per-example norms are computed; "auto" chooses for each layer. Every
            mode gives the same gradients.
        on_budget_exhausted: what a step past the plan does: "raise" `BudgetExhausted`, or "stop":
            warn once and leave the model as it is.
        batch_dims: which inputs are batched and where, see `dptorch.tape.batch.BatchDims`.
        self_check: look at the first batch for modules that mix examples.
        seed: for tests: randomness from a number, which is not private.

    Guarantees:
        Each `optimizer.step()` applies ``sum_b clip(gradient_b) + N(0, (noise_multiplier *
        max_grad_norm)^2)``, divided by the public expected batch size under a mean loss, and
        nothing else; it is counted before it is applied, and none is applied past the plan. No
        parameter's ``.grad`` ever holds a gradient without noise. The statement lists what this
        assumes of data and loss.

    Raises:
        ConfigurationError: for arguments that cannot be honoured, a model without trainable
            parameters, or a model that has an engine.

    Example:
        >>> import torch, dptorch
        >>> model = torch.nn.Linear(4, 2)
        >>> engine = dptorch.PrivacyEngine(
        ...     model, batch_size=16, sample_size=64, steps=3, noise_multiplier=1.0, seed=0,
        ...     target_delta=1e-3)
        >>> optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> for x, y in engine.loader(data):
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> engine.steps_done, engine.get_privacy_spent().delta
        (3, 0.001)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        plan: PrivacyPlan | None = None,
        batch_size: float | None = None,
        sample_rate: float | None = None,
        sample_size: int | None = None,
        epochs: float | None = None,
        steps: int | None = None,
        target_epsilon: float | None = None,
        noise_multiplier: float | None = None,
        target_delta: float | None = None,
        max_grad_norm: float = 1.0,
        clipping_fn: str = "abadi",
        clipping_mode: str = "auto",
        clipping_style: str = "all-layer",
        accountant: str = "pld",
        adjacency: Adjacency | str | None = None,
        loss_reduction: str = "mean",
        unit: str = "example",
        on_budget_exhausted: str = "raise",
        batch_dims: BatchDims = 0,
        self_check: bool = True,
        seed: int | None = None,
    ) -> None:
        one_of("clipping_mode", clipping_mode, _CLIPPING_MODES)
        self._on_exhausted = one_of("on_budget_exhausted", on_budget_exhausted, ("raise", "stop"))
        if watch_on(model) is not None:
            raise ConfigurationError(
                "this model already has a privacy engine: its gradients would be clipped and noised "
                "twice. Call detach() on the other engine first."
            )
        parameters: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if p.requires_grad
        }
        if not parameters:
            raise ConfigurationError(
                "the model has no trainable parameter. Unfreeze what should be trained with "
                "requires_grad_(True) before making the engine."
            )
        self.model = model
        self._plan = plan or make_plan(
            batch_size=batch_size,
            sample_rate=sample_rate,
            sample_size=sample_size,
            epochs=epochs,
            steps=steps,
            target_epsilon=target_epsilon,
            noise_multiplier=noise_multiplier,
            target_delta=target_delta,
            max_grad_norm=max_grad_norm,
            clipping_fn=clipping_fn,
            clipping_style=clipping_style,
            accountant=accountant,
            adjacency=adjacency,
            loss_reduction=loss_reduction,
            unit=unit,
        )
        self._steps_done = 0
        self._resumed = 0
        self.diagnostics: StepDiagnostics | None = None
        self.sampling_run: Counter[str] = Counter()
        self._parameters = parameters
        self._key = RootKey.from_os() if seed is None else RootKey.from_seed(seed)
        self._fired: list[_Batch] = []
        self._sums: dict[str, Tensor] | None = (
            None  # of the logical batch, moved here by virtual steps
        )
        self._pending: dict[str, Tensor] | None = None  # of backwards since the last step
        self._norms: list[Tensor] = []
        self._seen: set[tuple[int, int]] = set()  # physical batches in _sums
        self._pending_places: set[tuple[int, int]] = set()  # and in _pending
        self._part: PhysicalBatch | None = None  # where the batch handed out last belongs
        self._loss_factors: tuple[float, ...] | None = None
        self._loaders = 0
        self._binding: OptimizerBinding | None = None
        self._warned_exhausted = False
        self._warned_own_loader = False
        # The model's hooks keep the engine alive: a forgotten engine trains nothing, rather than
        # training without privacy.
        self._watch = Watch(
            model,
            parameters,
            batch_dims=batch_dims,
            on_recording=self._new_recording,
            first_inputs=(lambda a, k: refuse_mixing(model, a, k, batch_dims))
            if self_check
            else None,
        )

    # -- binding -----------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer) -> Optimizer:
        """Make `optimizer` step on noisy gradients; returns it.

        Raises:
            ConfigurationError: if it does not hold exactly the model's trainable parameters, or is
                attached to an engine.
        """
        if self._binding is not None:
            raise ConfigurationError(
                "this engine already has an optimizer. Give all parameters to one optimizer (it may "
                "have several groups), or detach() first."
            )
        check_parameters(self._parameters, optimizer)
        self._binding = OptimizerBinding(
            optimizer,
            prepare=self._prepare_step,
            hold=self._hold,
            discard=self._discard,
            owner=self,
        )
        return optimizer

    def detach(self) -> None:
        """Take the engine off model and optimizer; both are then as before, trained parameters kept.

        What was not stepped is dropped. The statement can still be read.
        """
        self._drop_logical_batch()
        if self._binding is not None:
            self._binding.restore()
            self._binding = None
        self._watch.remove()

    def loader(
        self, dataset: Any, *, max_physical_batch_size: int | None = None, **dataloader_kwargs: Any
    ) -> PrivateLoader:
        """Poisson-sampled batches of `dataset`, as the plan assumes. One iteration is one epoch.

        Args:
            dataset: any map-style dataset.
            max_physical_batch_size: most examples to go through the model at once. A larger batch
                arrives in parts; ``optimizer.step()`` then waits for the last of them.
            dataloader_kwargs: collate_fn, num_workers, pin_memory... as in DataLoader.

        Raises:
            ConfigurationError, DataError: for a dataset or arguments that cannot be sampled.
        """
        size = len(dataset)
        if self.plan.sample_size is not None and size and size != self.plan.sample_size:
            raise ConfigurationError(
                f"the dataset has {size} records, but the plan was made for "
                f"sample_size={self.plan.sample_size}. Make the engine with sample_size={size}."
            )
        sampler = PoissonSampler(max(size, 1), self.plan.sample_rate, self._key)
        loader = PrivateLoader(
            dataset,
            sampler,
            steps_per_epoch=max(1, round(1 / self.plan.sample_rate)),
            start_step=lambda: self.steps_done,
            total_steps=self.plan.steps,
            max_physical_batch_size=max_physical_batch_size,
            **dataloader_kwargs,
        )
        loader.on_batch(self._new_part)
        loader.on_start(lambda step: self._drop_logical_batch())
        loader.on_end(self._end_of_loader)
        self._loaders += 1
        return loader

    def public(self) -> AbstractContextManager[None]:
        """Forward passes inside this context are ordinary and unprotected: for public data only.

        Gradients then go to ``.grad`` as usual; the engine's next private step overwrites them.
        """
        return self._watch.paused()

    # -- one step ----------------------------------------------------------------------------------

    def _new_recording(self, recording: Recording) -> None:
        self._collect()
        part = self._part
        recording.tape.on_first_gradient = lambda tape: self._fired.append(_Batch(tape, part))

    def _new_part(self, part: PhysicalBatch) -> None:
        if part.index == 0:
            if self._fired or self._pending is not None or self._sums is not None:
                raise PrivacyError(
                    "the loader's last batch was backpropagated but never stepped. Each of its "
                    "batches is a whole logical batch: call optimizer.step() after each, or "
                    "optimizer.zero_grad() to drop it. For larger batches make the plan's batch "
                    "larger and bound memory with max_physical_batch_size."
                )
            self._drop_logical_batch()
        self._part = part

    def _end_of_loader(self, complete: bool) -> None:
        self._part = None
        if not complete:
            self._drop_logical_batch()

    def _collect(self) -> None:
        """Clip what the backwards since the last call left on the tapes and add it up."""
        fired, self._fired = self._fired, []
        if not fired:
            return
        if len(fired) > 1:
            for batch in fired:
                batch.tape.close()
            raise PrivacyError(
                f"{len(fired)} forward passes of the model went into one backward. If they are on "
                "the same examples, make them in one forward of a wrapping module, so that an "
                "example's gradients are clipped together; if not, call backward() after each."
            )
        tape, part = fired[0]
        with _full_precision():
            self._clip(tape, part)

    def _clip(self, tape: Tape, part: PhysicalBatch | None) -> None:
        norms = tape.norms()
        weights = self._weights(tape, part).to(norms)
        norms = norms * weights
        c = coefficients(norms, self.plan.max_grad_norm, self.plan.clipping_fn)
        c = c * (weights > 0)
        clipped = tape.clipped_sum(c * weights)
        self._norms.append(torch.stack([norms, c])[:, weights > 0].detach())
        tape.close()
        self._pending = _add(self._pending, clipped)

    def _weights(self, tape: Tape, part: PhysicalBatch | None) -> Tensor:
        """[B]: what turns a tape's gradients into those of each example's own loss; 0 for padding.

        Raises:
            PrivacyError: where the batch is not the one that the loader handed out, or the loss is
                not reduced as the plan says.
        """
        b = tape.batch_size
        scale = self._loss_scale(tape)
        weights = torch.full((b,), scale)
        if part is None:
            return weights
        rows = part.examples + part.padding
        if b != rows:
            raise PrivacyError(
                f"the model was given {b} rows where the loader handed out {rows} examples. Each "
                "row must be one example: augmented views of an example go on an axis of their "
                "own, so that its gradients are clipped together, and examples may not be paired, "
                "selected or mixed after the loader."
            )
        place = (part.logical_step, part.index)
        if place in self._seen or place in self._pending_places:
            raise PrivacyError(
                "two backwards were made through the model on one batch: each example would count "
                "twice. Add the losses and call backward() once, or call optimizer.zero_grad() between "
                "them to drop the first."
            )
        self._pending_places.add(place)
        if part.padding:
            weights[part.examples :] = 0
        return weights

    def _loss_scale(self, tape: Tape) -> float:
        """What makes the tape's gradients those of each example's own loss.

        Raises:
            PrivacyError: for a loss that was not followed, is reduced otherwise than the plan says,
                or is multiplied by a factor that is not the same throughout the run.
        """
        b, mean = tape.batch_size, self.plan.loss_reduction == "mean"
        if tape.loss is None:
            raise PrivacyError(
                "the loss could not be followed from the model's outputs to backward(), so it may "
                "mix examples. Compute it from what the model returns (tensors in tuples, lists, "
                "dicts or dataclasses) with torch functions, and call loss.backward()."
            )
        kind, factors = tape.loss.kind, tape.loss.factors
        scale = float(b) if mean else 1.0
        if kind == PER_EXAMPLE or b == 1:
            return 1.0
        if kind != self.plan.loss_reduction:
            # A sum divided by the number of rows is a mean, and a mean times it a sum.
            factors = tuple(f * b if mean else f / b for f in factors)
            if not all(math.isclose(f, 1.0, rel_tol=1e-6) for f in factors):
                raise PrivacyError(
                    f"the loss is a {kind} over the examples, but the engine was told "
                    f"loss_reduction={self.plan.loss_reduction!r}: gradients would be off by the "
                    f"batch size. Use loss_reduction={kind!r}, without dividing by anything that "
                    "depends on the batch."
                )
        before = self._loss_factors
        if before is None:
            self._loss_factors = factors
        elif len(before) != len(factors) or not all(
            math.isclose(f, g, rel_tol=1e-6) for f, g in zip(factors, before, strict=True)
        ):
            raise PrivacyError(
                f"the terms of the loss are multiplied by {_list(factors)}, before by "
                f"{_list(before)}. A factor that depends on the batch (a number of tokens, a sum of "
                "weights) lets one example rescale all others. Use public constants, and the "
                "learning rate for a schedule."
            )
        return scale

    def _hold(self) -> None:
        """``optimizer.virtual_step()``: keep this batch's clipped sum for a later step."""
        self._collect()
        self._need_gradient("virtual_step")
        assert self._pending is not None
        self._sums = _add(self._sums, self._pending)
        self._pending = None
        self._seen |= self._pending_places
        self._pending_places = set()

    def _need_gradient(self, what: str) -> None:
        if self._pending is None:
            raise PrivacyError(
                f"optimizer.{what}() without a backward: no gradient has arrived since the last "
                "step. Call loss.backward() on a loss computed from model(...) first; a forward "
                "under torch.no_grad() does not count."
            )

    def _prepare_step(self) -> bool:
        """Fill ``.grad`` with the noisy gradient of a complete logical batch."""
        self._collect()
        if self.exhausted:
            return self._refuse()
        self._need_gradient("step")
        self._hold()
        part = self._part
        if part is not None and not part.is_last:
            return False
        self._refuse_changed_parameters()
        assert self._sums is not None
        clipped = ClippedSum(self._sums, self.plan.max_grad_norm)
        context = _fingerprint(self._sums)
        step = self._steps_done
        # Counted before it is visible: whatever happens from here on, the step has been spent.
        self._steps_done += 1
        sampled = part is not None and part.logical_step == step
        self.sampling_run["poisson" if sampled else _OWN_LOADER] += 1
        if not sampled:
            self._warn_of_own_loader()
        self._sums = None
        self._summarise()
        noise = GaussianNoise(self.plan.noise_multiplier)
        noisy = noise.privatize(clipped, self._key, step, context=context)
        divisor = self.plan.expected_batch_size if self.plan.loss_reduction == "mean" else 1.0
        with torch.no_grad():
            for name, p in self._parameters.items():
                p.grad = noisy.values[name].div_(divisor).to(p.dtype)
        return True

    def _refuse_changed_parameters(self) -> None:
        """What is trained must still be what the engine follows and the optimizer holds."""
        now = {id(p) for p in self.model.parameters() if p.requires_grad}
        if now != {id(p) for p in self._parameters.values()}:
            raise PrivacyError(
                "the model's trainable parameters have changed since the engine was made (frozen, "
                "unfrozen, replaced or added). Freeze and unfreeze before making it: detach() this "
                "engine, and make another for the steps that remain; their epsilons add up."
            )
        assert self._binding is not None
        check_parameters(self._parameters, self._binding.optimizer)

    def _warn_of_own_loader(self) -> None:
        if not self._warned_own_loader:
            self._warned_own_loader = True
            warnings.warn(
                "a batch did not come from engine.loader(), so it is no Poisson sample as far as "
                "is known: epsilon is stated without amplification by sampling, and is much "
                "larger. Take batches from engine.loader(dataset).",
                PrivacyWarning,
                stacklevel=5,
            )

    def _refuse(self) -> bool:
        self._drop_logical_batch()
        message = (
            f"all {self.plan.steps} steps of the plan are done "
            f"(epsilon={self.get_privacy_spent().epsilon:.4g}): another step would exceed the "
            "budget and was not taken. Plan more steps, or stop training here."
        )
        if self._on_exhausted == "raise":
            raise BudgetExhausted(message)
        if not self._warned_exhausted:
            self._warned_exhausted = True
            warnings.warn(message, PrivacyWarning, stacklevel=4)
        return False

    def _discard(self) -> None:
        """``zero_grad``: drop what was not stepped."""
        self._pending = None
        self._pending_places = set()
        for batch in self._fired:
            batch.tape.close()
        self._fired = []

    def _drop_logical_batch(self) -> None:
        """A logical batch that was left half done is drawn again: nothing of it may remain."""
        self._discard()
        self._sums = None
        self._norms = []
        self._seen = set()

    def _summarise(self) -> None:
        norms, c = torch.cat(self._norms, 1) if self._norms else torch.zeros(2, 0)
        finite = norms.isfinite()
        clipped = (c * norms < norms * (1 - 1e-6)) & finite
        n = norms.numel()
        self.diagnostics = StepDiagnostics(
            examples=n,
            mean_norm=norms[finite].mean().item() if bool(finite.any()) else math.nan,
            clipped_fraction=clipped.float().mean().item() if n else math.nan,
            dropped=int((~finite).sum()),
        )
        self._norms = []
        self._seen = set()

    # -- reporting and state -----------------------------------------------------------------------

    @property
    def plan(self) -> PrivacyPlan:
        """What the run committed to; it cannot be changed."""
        return self._plan

    @property
    def steps_done(self) -> int:
        """Steps taken, empty batches included."""
        return self._steps_done

    @property
    def exhausted(self) -> bool:
        """Whether every planned step is done."""
        return self.steps_done >= self.plan.steps

    @property
    def noise_multiplier(self) -> float:
        """Standard deviation of the noise over max_grad_norm."""
        return self.plan.noise_multiplier

    def get_privacy_spent(self) -> PrivacySpent:
        """(ε, δ) spent so far. Amplification by sampling counts only if every batch came from the
        engine's loader."""
        amplified = not self.sampling_run[_OWN_LOADER]
        epsilon = self.plan.epsilon(self.steps_done, amplified=amplified)
        return PrivacySpent(epsilon, self.plan.target_delta)

    def statement(self) -> Statement:
        """The privacy statement of the run so far; ``print`` it."""
        return make_statement(
            self.plan,
            self.steps_done,
            dict(self.sampling_run),
            self._key.provenance,
            self._resumed,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the run after `load_state_dict`. Contains the secret key of
        the noise: keep it as safe as the data."""
        return {
            "plan": self.plan.to_json(),
            "steps_done": self.steps_done,
            "resumed": self._resumed,
            "loss_factors": self._loss_factors,
            "sampling_run": dict(self.sampling_run),
            "key": self._key.export(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the run that `state_dict` came from.

        Raises:
            ConfigurationError: if the state belongs to another plan; the differences are named.
        """
        theirs = PrivacyPlan.from_json(state["plan"])
        if theirs != self.plan:
            raise ConfigurationError(
                "the checkpoint belongs to another plan (this engine's, the checkpoint's): "
                + "; ".join(self.plan.differences(theirs))
            )
        if self._loaders or self.steps_done:
            raise ConfigurationError(
                "load the checkpoint into a new engine, before making its loader: this one has "
                f"done {self.steps_done} steps with a key of its own."
            )
        steps = state["steps_done"]
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ConfigurationError(
                f"the checkpoint has steps_done={steps!r}, not a number of steps."
            )
        key = RootKey.restore(state["key"])
        self._steps_done = steps
        self._resumed = state["resumed"] + 1
        factors = state["loss_factors"]
        self._loss_factors = None if factors is None else tuple(factors)
        self.sampling_run = Counter(state["sampling_run"])
        self._key = key


def _add(total: dict[str, Tensor] | None, more: dict[str, Tensor]) -> dict[str, Tensor]:
    if total is None:
        return more
    for name, value in more.items():
        total[name].add_(value)
    return total


def _list(factors: tuple[float, ...]) -> str:
    return ", ".join(f"{f:.6g}" for f in factors)


def _fingerprint(sums: dict[str, Tensor]) -> int:
    """64 bits that differ between different sums, and not between equal ones.

    The noise depends on it, so that going back to a checkpoint and on with other data does not
    repeat the noise, while repeating the same step repeats the same release.
    """
    digest = hashlib.blake2b(digest_size=8)
    for value in sums.values():
        flat = value.double().flatten()
        digest.update(torch.stack([flat.sum(), flat.square().sum()]).cpu().numpy().tobytes())
    return int.from_bytes(digest.digest(), "big")


@contextmanager
def _full_precision() -> Iterator[None]:
    """Norms, factors and sums are computed in float32 at least, whatever autocast says."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


class Private(NamedTuple):
    """What `make_private` returns."""

    model: nn.Module
    optimizer: Optimizer
    loader: PrivateLoader
    engine: PrivacyEngine


def make_private(
    model: nn.Module,
    optimizer: Optimizer,
    loader: DataLoader[Any],
    *,
    max_physical_batch_size: int | None = None,
    **engine_kwargs: Any,
) -> Private:
    """Make an existing model, optimizer and DataLoader private in one call.

    The loader is replaced by one that draws Poisson batches of the same dataset with the same mean
    size, collate function and workers. Model and optimizer are the same objects.

    Args:
        model, optimizer: as for `PrivacyEngine` and its `attach`.
        loader: a DataLoader with a batch size over a map-style dataset.
        max_physical_batch_size: see `PrivacyEngine.loader`.
        engine_kwargs: see `PrivacyEngine`; batch size and number of records come from the loader.

    Returns:
        (model, optimizer, loader, engine).

    Raises:
        ConfigurationError: for arguments that cannot be honoured.

    Example:
        >>> import torch, dptorch
        >>> model = torch.nn.Linear(4, 2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> model, optimizer, loader, engine = dptorch.make_private(
        ...     model, torch.optim.Adam(model.parameters()),
        ...     torch.utils.data.DataLoader(data, batch_size=8),
        ...     epochs=2, target_epsilon=3.0, target_delta=1e-3)
        >>> engine.plan.steps, len(loader)
        (16, 8)
    """
    if loader.batch_size is None:
        raise ConfigurationError(
            "the loader has no batch size (batch_size=None, or a batch_sampler of its own), so the "
            "expected batch size is not known. Pass a DataLoader with batch_size=, or use "
            "PrivacyEngine and its loader()."
        )
    if type(loader.sampler) not in (RandomSampler, SequentialSampler):
        raise ConfigurationError(
            f"the loader draws with {type(loader.sampler).__name__}, which Poisson sampling would "
            "replace. Apply a subset to the dataset itself (torch.utils.data.Subset), and weights "
            "to the loss."
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    if size == 0:
        raise ConfigurationError("the loader's dataset is empty; there is nothing to train on.")
    engine_kwargs.setdefault("batch_size", min(loader.batch_size, size))
    engine_kwargs.setdefault("sample_size", size)
    engine = PrivacyEngine(model, **engine_kwargs)
    try:
        engine.attach(optimizer)
        private = engine.loader(
            loader.dataset,
            max_physical_batch_size=max_physical_batch_size,
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
        )
    except BaseException:
        engine.detach()
        raise
    return Private(model, optimizer, private, engine)
