"""The tape: the per-example gradients of one backward, their norms and their clipped sums.

`Tape` puts together three parts: a `FormStore` keeps gradients until they are summed, `TwoPasses`
does without keeping them, and a `GroupWatcher` notices when a group of parameters can be clipped.

Shape legend: B examples.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dptorch.errors import NotCoveredError, PrivacyError
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.gradients.clipping_modes import MODES, Mode, NormMethod
from dptorch.tape.gradients.device_cost import TYPICAL, DeviceCost
from dptorch.tape.gradients.freed import is_freed, needs_freed_values
from dptorch.tape.gradients.group_watcher import GroupWatcher
from dptorch.tape.gradients.parameter_guard import ParameterGuard
from dptorch.tape.gradients.store import FormStore, nonzero
from dptorch.tape.gradients.two_passes import TwoPasses
from dptorch.tape.gradients.vjp import batched_vjp
from dptorch.tape.provenance.tags import Reduced

__all__ = ["Site", "Tape", "TapeConfig", "TapeListener"]


class Site(NamedTuple):
    """What was done for one parameter at one op."""

    parameter: str
    kind: str
    sizes: tuple[tuple[str, int], ...]
    method: NormMethod


@dataclass(frozen=True)
class TapeConfig:
    """How a tape computes norms and sums.

    Attributes:
        mode: which methods it takes.
        device_cost: what mode "auto" judges the methods by.
        memory_budget: bytes of gradients that may be kept until they are clipped. A backward that
            might keep more is made in two passes, if a listener can weigh its gradients in between.
        any_rank: whether a process wants two passes, from whether this one does: all have to make as
            many, if a backward pass sends messages.
        groups: names of the parameters of each group that is clipped in the backward, as soon as
            all its gradients have arrived. Without groups clipping waits for the end.
    """

    mode: Mode = MODES["auto"]
    device_cost: DeviceCost = TYPICAL["cpu"]
    memory_budget: float = math.inf
    groups: tuple[tuple[str, ...], ...] = ()
    any_rank: Callable[[bool], bool] = bool


class TapeListener(Protocol):
    """Is told in the backward what has arrived at a tape."""

    def on_first_gradient(self, tape: Tape) -> None:
        """The first gradient arrives."""

    def on_group(self, tape: Tape, group: int) -> None:
        """All gradients of a group of `TapeConfig.groups` have arrived."""

    def on_norms(self, tape: Tape) -> None:
        """The first of two passes is over. Must call `Tape.weigh`."""

    def on_backward_end(self, tape: Tape, *, retained: bool) -> None:
        """A backward is over. It kept its graph if `retained`, so that another may follow."""

    def on_backward_begin(self, tape: Tape) -> float:
        """A backward of `Tape.loss` begins; returns what its gradient is to be multiplied by."""


class Tape:
    """Per-example gradients of the parameters of one model over one batch.

    Args:
        parameters: by name.
        config: how norms and sums are computed.
        guard: raises where autograd reaches a parameter past the tape.
        listener: is told what arrives.

    Attributes:
        batch_size: number of examples B; 0 until a batch was seen.
        rows: whose rows the examples are: an object that stands for the batch that they were taken
            from, and the number of each example in it.
        means: the means over values of an example, `dptorch.tape.recording.position_means.Mean`.
        seen_before: whether the batch is known to have gone through the model before.
        padding: a `dptorch.tape.recording.padding.Padding`: which sizes follow its longest example.
        fired: whether any gradient has arrived.
        loss: how the loss of the last backward was reduced over the examples and what its terms were
            multiplied by; None if the recording did not see it. The kind is
            `PER_EXAMPLE` of `dptorch.tape.provenance.tags` for a loss that was not reduced, or
            `ONE_EXAMPLE` for one example's alone; without factors, they are not known.
        names: parameter name of each parameter's id. A tied parameter has one name, its first.
        seed: what the gradient of the last backward was multiplied by.
        expected_bytes: size of all sites' inputs and output gradients: the most that could be kept.
        sites: what was done where, for study.

    Example:
        >>> import torch, dptorch
        >>> model = torch.nn.Linear(3, 1)
        >>> with dptorch.record(model) as tape:
        ...     loss = model(torch.ones(4, 3)).pow(2).sum()
        >>> loss.backward()
        >>> tape.norms().shape
        torch.Size([4])
        >>> tape.clipped_sum(torch.ones(4))["weight"].shape
        torch.Size([1, 3])
        >>> model.weight.grad is None
        True
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        config: TapeConfig | None = None,
        *,
        guard: ParameterGuard | None = None,
        listener: TapeListener | None = None,
    ) -> None:
        self.parameters = dict(parameters)
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.config = config or TapeConfig()
        self.batch_size = 0
        self.rows: tuple[object, tuple[int, ...]] | None = None
        self.seen_before = False
        self.padding: Any = None
        self.means: list[Any] = []
        self.fired = False
        self.loss: Reduced | None = None
        self.seed = 1.0
        self.expected_bytes = 0
        self.sites: list[Site] = []
        self._guard = guard
        self._listener = listener
        # A proxy: a tape that its store holds would keep all gradients until garbage is collected.
        self._store = FormStore(partial(Tape._measure, weakref.proxy(self)))
        self._passes = TwoPasses()
        self._watcher: GroupWatcher | None = None
        if self.config.groups:
            ids = {name: id(p) for name, p in self.parameters.items()}
            self._watcher = GroupWatcher(self.config.groups, ids)
        self._uses: dict[int, int] = {}
        self._derived: set[int] = set()  # parameters that param-only tensors were computed from
        self._closed = False
        self._done: set[int] = set()  # parameters that take no more gradients
        self._intermediate: dict[int, Tensor] = {}  # param-only tensors, kept alive by id
        self._resolved = False
        self._aside = False

    # -- filled by the recording ------------------------------------------------------------------

    def note_batch(self, size: int) -> None:
        """Note the number of examples."""
        self.batch_size = size

    def note_use(self, parameter: Tensor) -> None:
        """Note that a site uses a parameter: one gradient of it will arrive."""
        self._uses[id(parameter)] = self._uses.get(id(parameter), 0) + 1

    def uses_of(self, name: str) -> int:
        """How many sites use a parameter; 0 for one that is not followed."""
        return self._uses.get(id(self.parameters.get(name)), 0)

    def note_derived(self, keys: Iterable[int]) -> None:
        """Note the ids of parameters that a param-only tensor was computed from."""
        self._derived.update(keys)

    def note_size(self, nbytes: int) -> None:
        """Note the size of a site's input or output."""
        self.expected_bytes += nbytes

    def note_loss(self, loss: Reduced) -> None:
        """Note how the loss of the backward that begins was reduced."""
        self.loss = loss

    def begin_backward(self) -> float:
        """A backward begins; returns what the listener wants its gradient to be multiplied by."""
        return 1.0 if self._listener is None else self._listener.on_backward_begin(self)

    def end_backward(self, *, retained: bool) -> None:
        """A backward is over; `retained` says that its graph was kept, so that another may follow."""
        if not self.fired or self._listener is None:
            return
        if retained:
            self._store.note_contents()
        self._listener.on_backward_end(self, retained=retained)

    def add(self, parameter: Tensor, form: PerExampleGradient) -> None:
        """Add one site's gradient of a parameter or a param-only tensor.

        Raises:
            PrivacyError: after `close`, or for a parameter whose group has been clipped.
        """
        if self._aside:
            return
        key = id(parameter)
        if self._closed or key in self._done:
            raise PrivacyError(
                "a second backward went through a forward pass whose gradients have been clipped "
                "already: its examples would count twice. Add the losses and call backward() once, "
                "or run the model again."
            )
        if not self.fired:
            self.fired = True
            if self._listener is not None:
                self._listener.on_first_gradient(self)
        if self._guard is not None:
            self._guard.tape_fired()
        name = self.names.get(key)
        # A param-only tensor has no name. It was kept in the first pass, and would count twice.
        if self._passes.summing:
            if name is not None:
                self._passes.add(key, form, name)
            return
        if name is None:
            self._intermediate[key] = parameter
            self._store.add(key, form)
            return
        self._passes.refuse_second_use(key, name)
        derived = key in self._derived
        if self._uses.get(key, 0) == 1 and key not in self._store:
            # The only use: take its norm now, while its factors are in the cache.
            squared, kept = self._measure(key, form)
            # Where param-only tensors are computed from it, the rest of it arrives in `resolve`.
            if self._passes.taking_norms and not derived:
                self._store.note_norm(key, squared)
                self._passes.note(key, form)
                return
            self._store.add_measured(key, kept, squared)
        else:
            self._store.add(key, form)
        if self._watcher is not None and self._listener is not None:
            group = self._watcher.arrived(key, uses=self._uses.get(key, 0), derived=derived)
            if group is not None:
                self._listener.on_group(self, group)

    def _measure(self, key: int, form: PerExampleGradient) -> tuple[Tensor, PerExampleGradient]:
        method = self.config.mode.choose(form.norm_methods(), self.config.device_cost)
        self.sites.append(Site(self.names[key], type(form).__name__, form.sizes(), method))
        return form.measured(method.name)

    def free(self, names: Iterable[str]) -> None:
        """Free what is kept of some parameters and accept no more gradients of them."""
        for name in names:
            key = id(self.parameters[name])
            self._done.add(key)
            self._store.free(key)

    def absorb(self, other: Tape) -> None:
        """Take over the gradients of another forward pass of the model on the same examples.

        Each example's gradients then count as the one gradient they add up to, cross terms included.
        The other tape is closed.

        Raises:
            PrivacyError: the other has other examples, or one of them did not keep its gradients.
        """
        if (self.batch_size, self.rows) != (other.batch_size, other.rows):
            raise PrivacyError(
                f"forward passes on {self.batch_size} and on {other.batch_size} rows of a batch, or on "
                "rows in another order, went into one backward: row i of both must be one example. "
                "Give every pass all rows of the batch, in its order."
            )
        if self.made_two_passes or other.made_two_passes:
            raise PrivacyError("gradients that are added up in the backward cannot be joined.")
        # Param-only tensors are told apart by id, which means nothing to the other tape.
        self.resolve()
        other.resolve()
        self._store.absorb(other._store)
        self.sites += other.sites
        other.close()

    # -- two passes -------------------------------------------------------------------------------

    @property
    def wants_two_passes(self) -> bool:
        """Whether the next backward should be made in two passes."""
        if self._listener is None or self.config.groups or self.fired:
            return False
        if self.config.mode.passes == 2:
            return True
        # A message between ranks: each has to come here, whatever it wants itself.
        return self.config.any_rank(self.expected_bytes > self.config.memory_budget)

    @property
    def made_two_passes(self) -> bool:
        """Whether the sums come from a second pass."""
        return self._passes.made

    @contextmanager
    def first_of_two_passes(self) -> Iterator[None]:
        """A backward inside takes norms and keeps no gradient; another through the same graph, after
        `weigh`, adds up the weighted gradients."""
        with self._passes.first():
            yield
        if self.fired and self._listener is not None:
            self._listener.on_norms(self)

    def weigh(self, coefficients: Mapping[str, Tensor]) -> None:
        """The second backward adds up ``coefficients[name][b] * gradient[b]``."""
        self._passes.weigh({id(self.parameters[n]): c for n, c in coefficients.items()})

    @contextmanager
    def second_of_two_passes(self) -> Iterator[None]:
        """A backward inside adds up the gradients that the first took the norms of."""
        try:
            with self._passes.second():
                yield
        finally:
            self._done.update(self.names)

    # -- param-only tensors, and backwards that are not the loss's ----------------------------------

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Backwards inside are not the loss's: their gradients are not kept."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def resolve(self) -> None:
        """Carry the gradients of param-only tensors back to the parameters they came from."""
        if self._resolved:
            return
        self._resolved = True
        if not self._intermediate:
            return
        tensors = list(self._intermediate.values())
        forms = [self._store.pop(id(t)).dense() for t in tensors]
        bases = list(self.parameters.values())
        if any(map(is_freed, bases)) and needs_freed_values(tensors):
            raise NotCoveredError(
                "a parameter that is computed from parameters (weight_norm, a parametrization) is in "
                "a model on which fully_shard was called, and is needed after its values were freed. "
                "Train such a model replicated, as it is or in DistributedDataParallel."
            )
        with self._guard.suspended() if self._guard else nullcontext():
            found = batched_vjp(
                tensors,
                bases,
                lambda start, stop: [
                    f[start:stop].to(t.dtype) for f, t in zip(forms, tensors, strict=True)
                ],
                self.batch_size,
                sum(p.numel() for p in bases if id(p) not in self._store) or 1,
            )
        self._intermediate.clear()
        for p, gradient in zip(bases, found, strict=True):
            if gradient is not None:
                self.add(p, Dense(gradient))
                self._store.forget_norm(id(p))

    # -- asked by everyone ------------------------------------------------------------------------

    def _ready(self, names: Iterable[str] | None = None) -> None:
        if not self.fired:
            raise PrivacyError(
                "The tape is empty: no gradient has reached it. Call loss.backward() on a loss "
                "computed from the model's output inside the recording."
            )
        if names is None:
            self.resolve()

    def squared_norms(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Each parameter's squared per-example gradient norms, {name: [B]}.

        A parameter used at several sites counts as the one it is: cross terms included.

        Args:
            names: some parameters; by default all.
        """
        self._ready(names)
        wanted = None if names is None else set(names)
        result = {}
        for key in [*self._store, *self._passes.sums]:
            name = self.names.get(key)  # None: a param-only tensor that is not resolved yet
            if name is not None and (wanted is None or name in wanted):
                result[name] = self._store.squared_norm(key)
        return result

    def norms(self, names: Iterable[str] | None = None) -> Tensor:
        """L2 norm of each example's whole gradient, or of some parameters' part of it; [B], at least
        float32.

        An example whose gradient is not finite has a norm that is not finite.
        """
        squared = [s.reshape(-1) for s in self.squared_norms(names).values()]
        if not squared:
            return torch.zeros(self.batch_size)
        dtype = torch.float64 if any(s.dtype == torch.float64 for s in squared) else torch.float32
        return torch.stack([s.to(dtype) for s in squared]).sum(0).sqrt()

    def clipped_sum(
        self,
        coefficients: Tensor,
        names: Iterable[str] | None = None,
        *,
        consume: bool = False,
    ) -> dict[str, Tensor]:
        """``sum_b coefficients[b] * gradient[b]`` for every parameter, {name: tensor}.

        A parameter that the loss did not reach has a gradient of zero. After a backward in two
        passes the coefficients are those of `weigh`.

        Args:
            coefficients: [B]. An example with coefficient 0 is left out altogether.
            names: some parameters; by default all.
            consume: free each gradient as soon as it has been added; nothing else can be asked of it.

        Guarantees:
            A non-finite gradient of an example with coefficient 0 does not enter the sum.
            Held by `test_a_bad_example_is_dropped_and_the_rest_unharmed`.
        """
        self._ready(names)
        if coefficients.shape != (self.batch_size,):
            raise ValueError(
                f"coefficients has shape {tuple(coefficients.shape)}, expected one number for each "
                f"of the {self.batch_size} examples."
            )
        # 0 · NaN is NaN: a gradient that is not finite has to be left out, not multiplied by 0.
        coefficients, kept = nonzero(coefficients)
        wanted = {n: self.parameters[n] for n in (self.parameters if names is None else names)}
        result: dict[str, Tensor | None] = dict.fromkeys(wanted)
        for name in self._store.least_peak_order(wanted) if consume else wanted:
            key = id(wanted[name])
            if key in self._store:
                result[name] = self._store.weighted_sum(key, name, coefficients, kept)
                if consume:
                    self._store.drop(key)
            else:
                result[name] = self._passes.sums.get(key)
        return {n: _zeros(wanted[n]) if t is None else t for n, t in result.items()}

    def per_example_gradients(self) -> dict[str, Tensor]:
        """Every example's gradient of every parameter, {name: [B, *shape]}: for study and tests.

        This forms what the rest of the library takes care never to form.
        """
        self._ready()
        n = self.batch_size
        return {
            name: self._store.dense(id(p), name).reshape(n, *p.shape)
            if id(p) in self._store
            else p.detach().new_zeros(n, *p.shape)
            for name, p in self.parameters.items()
        }

    def close(self) -> None:
        """Free everything and accept no more gradients."""
        self._store.clear()
        self._passes.clear()
        self._intermediate.clear()
        self.fired = False
        self._closed = True


def _zeros(p: Tensor) -> Tensor:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.zeros(p.shape, dtype=dtype, device=p.device)
