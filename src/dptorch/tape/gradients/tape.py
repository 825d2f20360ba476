"""The tape: what the per-example gradients of one backward are made of, and what can be asked of it.

Shape legend: B examples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dptorch.errors import NotCoveredError, PrivacyError
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.gradients.base import without_cancellation
from dptorch.tape.gradients.clipping_modes import MODES, Mode, Way
from dptorch.tape.gradients.device_cost import TYPICAL, DeviceCost
from dptorch.tape.gradients.parameter_guard import ParameterGuard
from dptorch.tape.gradients.summing_order import least_peak_order
from dptorch.tape.gradients.vjp import batched_vjp
from dptorch.tape.provenance.tags import Reduced

__all__ = ["Site", "Tape"]


class Site(NamedTuple):
    """What was done for one parameter at one op."""

    parameter: str
    kind: str
    sizes: tuple[tuple[str, int], ...]
    way: Way


class Tape:
    """Per-example gradients of the parameters of one model over one batch.

    Args:
        parameters: by name.
        mode: how norms and sums are computed.
        device_cost: what "auto" judges the ways by.

    Attributes:
        batch_size: number of examples B; 0 until a batch was seen.
        fired: whether any gradient has arrived.
        loss: how the loss of the last backward was reduced over the examples, or
            `dptorch.tape.provenance.tags.PER_EXAMPLE`;
            None if the recording did not see it.
        names: parameter name of each parameter's id. A tied parameter has one name, its first.
        derived: ids of parameters that param-only tensors were computed from.
        expected_bytes: size of all sites' inputs and output gradients: the most that could be kept.
        memory_budget: bytes of gradients that may be kept until they are clipped; a backward that might
            keep more is made in two passes, if `on_norms` is set.
        sites: what was done where, for study.
        on_group: called in the backward with the number of a group, see `watch_groups`, of which every
            gradient has arrived.
        on_norms: called between the passes of a backward in two passes; must call `weigh`.

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
        mode: Mode = MODES["auto"],
        device_cost: DeviceCost = TYPICAL["cpu"],
    ) -> None:
        self.parameters = dict(parameters)
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.batch_size = 0
        self.uses: dict[int, int] = {}
        self.fired = False
        self.closed = False
        self.on_first_gradient: Callable[[Tape], None] | None = None
        self.loss: Reduced | None = None
        self.guard: ParameterGuard | None = None
        self.mode = mode
        self.memory_budget = math.inf
        self.device_cost = device_cost
        self.derived: set[int] = set()
        self.expected_bytes = 0
        self.sites: list[Site] = []
        self.on_group: Callable[[Tape, int], None] | None = None
        self.on_norms: Callable[[Tape], None] | None = None
        self._group_of: dict[int, int] = {}
        self._waiting: list[set[int]] = []
        self._arrived: dict[int, int] = {}
        self._released: set[int] = set()
        self._two_passes = False
        self.made_two_passes = False
        # Of the second pass: coefficients by parameter, and what they have added up to.
        self._weights: dict[int, tuple[Tensor, Tensor | None]] | None = None
        self._sums: dict[int, Tensor | None] = {}
        self._magnitudes: dict[int, Tensor] = {}  # of the first pass
        self._forms: dict[int, list[PerExampleGradient]] = {}
        self._squared: dict[int, Tensor] = {}
        self._versions: dict[int, list[int]] = {}  # of what is kept, when `_squared` was taken
        self._intermediate: dict[int, Tensor] = {}  # param-only tensors, kept alive by id
        self._resolved = False
        self._aside = False

    # -- filled by the recording ------------------------------------------------------------------

    def add(self, parameter: Tensor, form: PerExampleGradient) -> None:
        """Add one site's gradient of a parameter or a param-only tensor.

        Raises:
            PrivacyError: after `close`, or for a parameter whose group has been clipped.
        """
        if self._aside:
            return
        key = id(parameter)
        if self.closed or key in self._released:
            raise PrivacyError(
                "a second backward went through a forward pass whose gradients have been clipped "
                "already: its examples would count twice. Add the losses and call backward() once, "
                "or run the model again."
            )
        if not self.fired:
            self.fired = True
            if self.on_first_gradient is not None:
                self.on_first_gradient(self)
        if self.guard is not None:
            self.guard.tape_fired()
        if self._weights is not None:
            self._add_weighed(key, form)
            return
        if key not in self.names:
            self._intermediate[key] = parameter
        elif key in self._sums:
            raise NotCoveredError(
                f"parameter '{self.names[key]}' has several gradients from what looked like one use "
                "of it (one op that takes it twice, or a reentrant checkpoint), which a mode of two "
                "backward passes cannot add up. Use clipping_mode='auto' or a 'BK-' mode, with a "
                "larger memory_budget."
            )
        elif self.uses.get(key, 0) == 1 and key not in self._forms:
            # The only use: take its norm now, while its factors are in the cache.
            self._squared[key], kept = self._measure(key, form)
            if self._two_passes and key not in self.derived:
                self._sums[key] = None
                self._magnitudes[key] = form.magnitude()
                return
            form = kept
        else:
            self._squared.pop(key, None)
        forms = self._forms.setdefault(key, [])
        for i, earlier in enumerate(forms):
            merged = earlier.merge(form)
            if merged is not None:
                forms[i] = merged
                break
        else:
            forms.append(form)
        if key in self._squared:
            self._versions[key] = _versions(forms)
        self._count_arrival(key)

    def _measure(self, key: int, form: PerExampleGradient) -> tuple[Tensor, PerExampleGradient]:
        way = self.mode.choose(form.ways(), self.device_cost)
        self.sites.append(Site(self.names[key], type(form).__name__, form.sizes(), way))
        return form.measured(way.name)

    # -- groups, clipped in the backward ----------------------------------------------------------

    def watch_groups(self, groups: Sequence[Iterable[str]]) -> None:
        """Call `on_group` as soon as all gradients of a group of parameters have arrived.

        A group with a parameter that the loss does not reach, or that reaches it through a
        param-only tensor, is not called for.
        """
        ids = {name: key for key, name in self.names.items()}
        self._waiting = [{ids[name] for name in group} for group in groups]
        self._group_of = {key: i for i, group in enumerate(self._waiting) for key in group}

    def _count_arrival(self, key: int) -> None:
        if self.on_group is None or key not in self._group_of:
            return
        self._arrived[key] = self._arrived.get(key, 0) + 1
        if self._arrived[key] < self.uses.get(key, 0) or key in self.derived:
            return
        group = self._group_of[key]
        self._waiting[group].discard(key)
        if not self._waiting[group]:
            self.on_group(self, group)

    def release(self, names: Iterable[str]) -> None:
        """Free what is kept of some parameters and accept no more gradients of them."""
        for name in names:
            key = id(self.parameters[name])
            self._released.add(key)
            self._forms.pop(key, None)
            self._squared.pop(key, None)

    @property
    def wants_two_passes(self) -> bool:
        """Whether the next backward should be made in two passes."""
        if self.on_norms is None or self.fired:
            return False
        return self.mode.passes == 2 or self.expected_bytes > self.memory_budget

    # -- two passes -------------------------------------------------------------------------------

    @contextmanager
    def first_of_two_passes(self) -> Iterator[None]:
        """A backward inside takes norms and keeps no gradient; another through the same graph, after
        `weigh`, adds up the weighted gradients."""
        self._two_passes = True
        try:
            yield
        finally:
            self._two_passes = False
        if self.fired and self.on_norms is not None:
            self.on_norms(self)

    def weigh(self, coefficients: Mapping[str, Tensor]) -> None:
        """The second backward adds up ``coefficients[name][b] * gradient[b]``."""
        distinct = {id(c): _nonzero(c) for c in coefficients.values()}
        self._weights = {id(self.parameters[n]): distinct[id(c)] for n, c in coefficients.items()}

    @contextmanager
    def second_of_two_passes(self) -> Iterator[None]:
        """A backward inside adds up the gradients that the first took the norms of."""
        self.made_two_passes = True
        try:
            yield
        finally:
            self._weights = None
            self._released.update(self.names)

    def _add_weighed(self, key: int, form: PerExampleGradient) -> None:
        assert self._weights is not None
        if key not in self._sums:  # was kept in the first pass
            return
        # A norm is good for the gradient it was taken of: NaN and what is far too long compare equal.
        first, second = self._magnitudes.pop(key, None), form.magnitude()
        if first is None or not torch.allclose(first, second, rtol=1e-3, equal_nan=True):
            raise NotCoveredError(
                f"the two backward passes gave '{self.names[key]}' different gradients: something in "
                "the model's backward is random, or changes from one call to the next. Use "
                "clipping_mode='auto' or a 'BK-' mode, with a larger memory_budget."
            )
        before, found = self._sums[key], _weighted_sum([form], *self._weights[key])
        self._sums[key] = found if before is None or found is None else before + found

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
        forms = [self._sum(self._forms.pop(id(t))).dense() for t in tensors]
        bases = list(self.parameters.values())
        with self.guard.lifted() if self.guard else nullcontext():
            found = batched_vjp(
                tensors,
                bases,
                lambda start, stop: [
                    f[start:stop].to(t.dtype) for f, t in zip(forms, tensors, strict=True)
                ],
                self.batch_size,
                sum(p.numel() for p in bases if id(p) not in self._forms) or 1,
            )
        self._intermediate.clear()
        for p, gradient in zip(bases, found, strict=True):
            if gradient is not None:
                self.add(p, Dense(gradient))
                self._squared.pop(id(p), None)

    @staticmethod
    def _sum(forms: list[PerExampleGradient]) -> PerExampleGradient:
        if len(forms) == 1:
            return forms[0]
        total = forms[0].dense()
        for form in forms[1:]:
            total = total + form.dense()
        return Dense(total)

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
        for key in [*self._forms, *self._sums]:
            name = self.names.get(key)  # None: a param-only tensor that is not resolved yet
            if name is None or (wanted is not None and name not in wanted):
                continue
            if key not in self._squared:
                self._squared[key] = self._squared_norm_of_sum(key)
                self._versions[key] = _versions(self._forms[key])
            result[name] = self._squared[key]
        return result

    def _squared_norm_of_sum(self, key: int) -> Tensor:
        """Squared norms of the sum of several sites' gradients, cross terms included, [B]."""
        forms = self._forms[key]
        if len(forms) == 1:
            squared, forms[0] = self._measure(key, forms[0])
            return squared
        total = torch.zeros(())
        magnitude = torch.zeros(())
        for form in forms:
            total = self._measure(key, form)[0] + total
            magnitude = form.magnitude() + magnitude
        for i, first in enumerate(forms):
            for second in forms[i + 1 :]:
                total = total + 2 * first.inner(second)
        return without_cancellation(total.clamp(min=0), magnitude, forms, formed=False)

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
        """
        self._ready(names)
        if coefficients.shape != (self.batch_size,):
            raise ValueError(
                f"coefficients has shape {tuple(coefficients.shape)}, expected one number for each "
                f"of the {self.batch_size} examples."
            )
        coefficients, kept = _nonzero(coefficients)
        wanted = list(self.parameters if names is None else names)
        result: dict[str, Tensor | None] = dict.fromkeys(wanted)
        for name in self._order(wanted) if consume else wanted:
            key = id(self.parameters[name])
            if key in self._forms:
                self._refuse_changed(key)
                result[name] = _weighted_sum(self._forms[key], coefficients, kept)
                if consume:
                    del self._forms[key]
            else:
                result[name] = self._sums.get(key)
        return {n: _zeros(self.parameters[n]) if t is None else t for n, t in result.items()}

    def _refuse_changed(self, key: int) -> None:
        """What a norm was taken of must be what is added up."""
        before = self._versions.get(key)
        if key in self._squared and before is not None and before != _versions(self._forms[key]):
            raise PrivacyError(
                f"an input or an output gradient of the layer with '{self.names[key]}' was changed in "
                "place between backward() and clipping: the norms are those of other gradients. Call "
                "optimizer.step() or virtual_step() before the memory of a batch is used again."
            )

    def _order(self, names: Sequence[str]) -> list[str]:
        """In which order to sum and free, for the least memory; among equals as they arrived, because
        the input of the layer that comes last is the batch, which nobody frees."""
        wanted = {id(self.parameters[n]): n for n in names}
        kept = {wanted[key]: forms for key, forms in self._forms.items() if key in wanted}
        sizes = {n: p.numel() * p.element_size() for n, p in self.parameters.items() if n in kept}
        first = least_peak_order(kept, sizes)
        return [*first, *(n for n in names if n not in kept)]

    def per_example_gradients(self) -> dict[str, Tensor]:
        """Every example's gradient of every parameter, {name: [B, *shape]}: for study and tests.

        This forms what the rest of the library takes care never to form.
        """
        self._ready()
        result = {}
        for name, p in self.parameters.items():
            forms = self._forms.get(id(p))
            if forms:
                self._refuse_changed(id(p))
                result[name] = self._sum(forms).dense().reshape(self.batch_size, *p.shape)
            else:
                result[name] = p.detach().new_zeros(self.batch_size, *p.shape)
        return result

    def close(self) -> None:
        """Free everything and accept no more gradients."""
        self._forms.clear()
        self._squared.clear()
        self._intermediate.clear()
        self._sums.clear()
        self._weights = None
        self.fired = False
        self.closed = True


def _nonzero(coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """The coefficients that are not 0, and which they are; None for all of them."""
    if bool(coefficients.all()):
        return coefficients, None
    kept = coefficients.nonzero().flatten()
    return coefficients[kept], kept


def _versions(forms: Iterable[PerExampleGradient]) -> list[int]:
    """How often each of the tensors that are kept was written to."""
    return [t._version for form in forms for t in form.held() if not t.is_inference()]


def _zeros(p: Tensor) -> Tensor:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.zeros(p.shape, dtype=dtype, device=p.device)


def _weighted_sum(
    forms: Sequence[PerExampleGradient], coefficients: Tensor, kept: Tensor | None
) -> Tensor | None:
    """The weighted sum over the examples `kept`; what is left out may be NaN. None for no example."""
    if not coefficients.numel():
        return None
    if kept is not None:
        forms = [f.take(kept) for f in forms]
    total = forms[0].weighted_sum(coefficients)
    for form in forms[1:]:
        total = total + form.weighted_sum(coefficients)
    return total
