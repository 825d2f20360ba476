"""Keep the forms of per-example gradients by parameter, with their norms, until they are summed.

Shape legend: B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from dptorch.errors import PrivacyError
from dptorch.tape.gradients.base import PerExampleGradient, lengthened, without_cancellation
from dptorch.tape.gradients.dense import Dense
from dptorch.tape.gradients.summing_order import least_peak_order

__all__ = ["FormStore", "nonzero", "weighted_sum"]

#: Takes a squared norm: (parameter id, form) -> ([B], the form to keep).
Measure = Callable[[int, PerExampleGradient], tuple[Tensor, PerExampleGradient]]


class FormStore:
    """The forms that gradients of parameters and param-only tensors have, by tensor id.

    A parameter used at several sites has several forms; it counts as the one it is.

    Args:
        measure: takes the squared norms of one form.
    """

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self._forms: dict[int, list[PerExampleGradient]] = {}
        self._squared: dict[int, Tensor] = {}
        self._versions: dict[int, list[int]] = {}  # of what is kept, when `_squared` was taken
        self._contents: dict[
            int, list[int]
        ] = {}  # checksums of what is kept, where they are needed

    def __contains__(self, key: int) -> bool:
        return key in self._forms

    def __iter__(self) -> Iterator[int]:
        return iter(self._forms)

    def add(self, key: int, form: PerExampleGradient) -> None:
        """Add one site's gradient, whose norm is not needed yet.

        Raises:
            PrivacyError: if memory was written to since `note_contents`.
        """
        self._squared.pop(key, None)
        if key in self._contents:
            self._refuse_changed(key, "a parameter")
            del self._contents[key]
        forms = self._forms.setdefault(key, [])
        if not isinstance(form, Dense):
            forms.append(form)
        elif forms and isinstance(forms[0], Dense):
            forms[0] = forms[0].merged([form])  # takes no more memory than one of them
        else:
            forms.insert(0, form)

    def add_measured(self, key: int, form: PerExampleGradient, squared: Tensor) -> None:
        """Add a gradient whose squared norms [B] are known."""
        self._forms[key] = [form]
        self._squared[key] = squared
        self._versions[key] = _versions([form])

    def absorb(self, other: FormStore) -> None:
        """Take over all that another store keeps: gradients of the same examples.

        Raises:
            PrivacyError: if memory was written to since `note_contents`.
        """
        for key, forms in other._forms.items():
            other._refuse_changed(key, "a parameter")
            for form in forms:
                self.add(key, form)
        other.clear()

    def forget_norm(self, key: int) -> None:
        """Take the norms anew when they are asked for."""
        self._squared.pop(key, None)

    def squared_norm(self, key: int) -> Tensor:
        """Squared norms of the sum of all sites' gradients, cross terms included, [B]."""
        if key not in self._squared:
            self._merge(key)
            self._squared[key] = self._squared_norm_of_sum(key)
            self._versions[key] = _versions(self._forms[key])
        return self._squared[key]

    def note_contents(self) -> None:
        """Keep checksums of all that is kept: it will be summed later, and may be written to until
        then behind the back of torch's version counter (``.data``, a numpy buffer)."""
        for key in self._forms:
            self._merge(key)
        self._contents = {key: _checksums(forms) for key, forms in self._forms.items()}

    def note_norm(self, key: int, squared: Tensor) -> None:
        """Keep the squared norms [B] of a gradient that is not kept itself."""
        self._squared[key] = squared

    def _merge(self, key: int) -> None:
        """Put together what fits, all sites at once: a cell that is called T times in a loop has T
        gradients, and to merge them as they arrive would copy the first one T times."""
        rest, merged = self._forms[key], []
        while rest:
            first, *rest = rest
            alike = [f for f in rest if first.fits(f)]
            rest = [f for f in rest if not first.fits(f)] if alike else rest
            merged.append(first.merged(alike) if alike else first)
        self._forms[key] = merged

    def _squared_norm_of_sum(self, key: int) -> Tensor:
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
        squared = without_cancellation(total.clamp(min=0), magnitude, forms, formed=False)
        # Cross terms can be as wrong as what they are of: a norm of the whole is that much longer.
        return lengthened(squared, sum(form.recomputed_error() for form in forms))

    def weighted_sum(
        self, key: int, name: str, coefficients: Tensor, kept: Tensor | None
    ) -> Tensor | None:
        """The weighted sum over the examples `kept`; None for no example.

        Raises:
            PrivacyError: if memory was written to since the norms were taken.
        """
        self._refuse_changed(key, f"'{name}'")
        return weighted_sum(self._forms[key], coefficients, kept)

    def dense(self, key: int, name: str) -> Tensor:
        """Every example's gradient, [B, *shape].

        Raises:
            PrivacyError: as `weighted_sum`.
        """
        self._refuse_changed(key, f"'{name}'")
        if key not in self._squared:
            self._merge(key)
        return _summed(self._forms[key]).dense()

    def pop(self, key: int) -> PerExampleGradient:
        """Take out the sum of a tensor's gradients."""
        self._merge(key)
        return _summed(self._forms.pop(key))

    def drop(self, key: int) -> None:
        """Free one tensor's gradients; their norms stay."""
        self._forms.pop(key, None)

    def free(self, key: int) -> None:
        """Free one tensor's gradients and norms."""
        self._forms.pop(key, None)
        self._squared.pop(key, None)

    def clear(self) -> None:
        """Free everything."""
        self._forms.clear()
        self._squared.clear()

    def least_peak_order(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """The names in the order that minimises peak memory when each is summed and then freed.

        Ties keep arrival order: the input of the layer that comes last is the batch, which nobody
        frees.
        """
        wanted = {id(p): name for name, p in parameters.items()}
        kept = {wanted[key]: forms for key, forms in self._forms.items() if key in wanted}
        sizes = {n: p.numel() * p.element_size() for n, p in parameters.items() if n in kept}
        first = least_peak_order(kept, sizes)
        return [*first, *(n for n in parameters if n not in kept)]

    def _refuse_changed(self, key: int, name: str) -> None:
        """What a norm was taken of must be what is added up."""
        forms, before = self._forms[key], self._versions.get(key)
        written = key in self._squared and before is not None and before != _versions(forms)
        contents = self._contents.get(key)
        if written or (contents is not None and contents != _checksums(forms)):
            raise PrivacyError(
                f"an input or an output gradient of the layer with {name} was changed in place "
                "between backward() and clipping: the norms are those of other gradients. Call "
                "optimizer.step() or virtual_step() before the memory of a batch is used again."
            )


def nonzero(coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """The coefficients that are not 0, and which they are; None for all of them."""
    if bool(coefficients.all()):
        return coefficients, None
    kept = coefficients.nonzero().flatten()
    return coefficients[kept], kept


def weighted_sum(
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


def _checksums(forms: Iterable[PerExampleGradient]) -> list[int]:
    """A number for each tensor that is kept, in which every bit counts by its position."""
    return [_checksum(t) for form in forms for t in form.held()]


def _checksum(t: Tensor) -> int:
    octets = t.detach().contiguous().flatten().view(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, -octets.numel() % 8))
    words = octets.view(torch.int64)
    # Odd multipliers: no change of one word is lost modulo 2^64.
    weights = torch.arange(words.numel(), device=words.device) * 0x9E3779B97F4A7C16 + 1
    return int((words * weights).sum())


def _summed(forms: Sequence[PerExampleGradient]) -> PerExampleGradient:
    if len(forms) == 1:
        return forms[0]
    total = forms[0].dense()
    for form in forms[1:]:
        total = total + form.dense()
    return Dense(total)


def _versions(forms: Iterable[PerExampleGradient]) -> list[int]:
    """How often each of the tensors that are kept was written to."""
    return [t._version for form in forms for t in form.held() if not t.is_inference()]
