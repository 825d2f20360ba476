"""The tape: what the per-example gradients of one backward are made of, and what can be asked of it.

Shape legend: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from dptorch.errors import PrivacyError
from dptorch.tape.gradients import Dense, PerExampleGradient
from dptorch.tape.gradients.base import without_cancellation
from dptorch.tape.guard import ParameterGuard
from dptorch.tape.provenance import Reduced
from dptorch.tape.rules.generic import batched_vjp

__all__ = ["PER_EXAMPLE", "Tape"]

# The kind of a loss with one value for each example.
PER_EXAMPLE = "per example"


class Tape:
    """Per-example gradients of the parameters of one model over one batch.

    Attributes:
        batch_size: number of examples B; 0 until a batch was seen.
        fired: whether any gradient has arrived.
        loss: how the loss of the last backward was reduced over the examples, or `PER_EXAMPLE`;
            None if the recording did not see it.
        names: parameter name of each parameter's id. A tied parameter has one name, its first.

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

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.batch_size = 0
        self.uses: dict[int, int] = {}
        self.fired = False
        self.closed = False
        self.on_first_gradient: Callable[[Tape], None] | None = None
        self.loss: Reduced | None = None
        self.guard: ParameterGuard | None = None
        self._forms: dict[int, list[PerExampleGradient]] = {}
        self._squared: dict[int, Tensor] = {}
        self._intermediate: dict[int, Tensor] = {}  # param-only tensors, kept alive by id
        self._resolved = False
        self._aside = False

    # -- filled by the recording ------------------------------------------------------------------

    def add(self, parameter: Tensor, form: PerExampleGradient) -> None:
        """Add one site's gradient of a parameter or a param-only tensor.

        Raises:
            PrivacyError: after `close`.
        """
        if self._aside:
            return
        if self.closed:
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
        key = id(parameter)
        if key not in self.names:
            self._intermediate[key] = parameter
        elif self.uses.get(key, 0) == 1 and key not in self._forms:
            # The only use: take its norm now, while its factors are in the cache, and keep the
            # smaller of the factors and the formed gradient.
            self._squared[key], form = form.measured()
        else:
            self._squared.pop(key, None)
        forms = self._forms.setdefault(key, [])
        for i, earlier in enumerate(forms):
            merged = earlier.merge(form)
            if merged is not None:
                forms[i] = merged
                return
        forms.append(form)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Backwards inside are not the loss's: their gradients are not kept."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def _resolve(self) -> None:
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

    def _ready(self) -> None:
        if not self.fired:
            raise PrivacyError(
                "The tape is empty: no gradient has reached it. Call loss.backward() on a loss "
                "computed from the model's output inside the recording."
            )
        self._resolve()

    def squared_norms(self) -> dict[str, Tensor]:
        """Each parameter's squared per-example gradient norms, {name: [B]}.

        A parameter used at several sites counts as the one it is: cross terms included.
        """
        self._ready()
        result = {}
        for key, forms in self._forms.items():
            if key not in self._squared:
                self._squared[key] = _squared_norm_of_sum(forms)
            result[self.names[key]] = self._squared[key]
        return result

    def norms(self) -> Tensor:
        """L2 norm of each example's whole gradient, [B], at least float32.

        An example whose gradient is not finite has a norm that is not finite.
        """
        squared = [s.reshape(-1) for s in self.squared_norms().values()]
        dtype = torch.float64 if any(s.dtype == torch.float64 for s in squared) else torch.float32
        return torch.stack([s.to(dtype) for s in squared]).sum(0).sqrt()

    def clipped_sum(self, coefficients: Tensor) -> dict[str, Tensor]:
        """``sum_b coefficients[b] * gradient[b]`` for every parameter, {name: tensor}.

        A parameter that the loss did not reach has a gradient of zero.

        Args:
            coefficients: [B]. An example with coefficient 0 is left out altogether.

        Guarantees:
            A non-finite gradient of an example with coefficient 0 does not enter the sum.
        """
        self._ready()
        if coefficients.shape != (self.batch_size,):
            raise ValueError(
                f"coefficients has shape {tuple(coefficients.shape)}, expected one number for each "
                f"of the {self.batch_size} examples."
            )
        if bool((coefficients == 0).any()):
            kept = coefficients.nonzero().flatten()
            coefficients = coefficients[kept]
            forms = {k: [f.take(kept) for f in fs] for k, fs in self._forms.items()}
        else:
            forms = self._forms
        result = {}
        for name, p in self.parameters.items():
            parts = forms.get(id(p), [])
            if not parts or not coefficients.numel():
                dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
                result[name] = torch.zeros(p.shape, dtype=dtype, device=p.device)
                continue
            total = parts[0].weighted_sum(coefficients)
            for part in parts[1:]:
                total = total + part.weighted_sum(coefficients)
            result[name] = total
        return result

    def per_example_gradients(self) -> dict[str, Tensor]:
        """Every example's gradient of every parameter, {name: [B, *shape]}: for study and tests.

        This forms what the rest of the library takes care never to form.
        """
        self._ready()
        result = {}
        for name, p in self.parameters.items():
            forms = self._forms.get(id(p))
            if forms:
                result[name] = self._sum(forms).dense().reshape(self.batch_size, *p.shape)
            else:
                result[name] = p.detach().new_zeros(self.batch_size, *p.shape)
        return result

    def close(self) -> None:
        """Free everything and accept no more gradients."""
        self._forms.clear()
        self._squared.clear()
        self._intermediate.clear()
        self.fired = False
        self.closed = True


def _squared_norm_of_sum(forms: Sequence[PerExampleGradient]) -> Tensor:
    """Squared norms of the sum of several sites' gradients, cross terms included, [B]."""
    total = forms[0].squared_norm()
    if len(forms) == 1:
        return total
    magnitude = forms[0].magnitude()
    for form in forms[1:]:
        total = total + form.squared_norm()
        magnitude = magnitude + form.magnitude()
    for i, first in enumerate(forms):
        for second in forms[i + 1 :]:
            total = total + 2 * first.inner(second)
    return without_cancellation(total.clamp(min=0), magnitude, forms, formed=False)
