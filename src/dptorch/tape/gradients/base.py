"""Per-example gradients of one parameter at one site, in whatever form is cheapest to hold.

Shape legend: B examples, T positions, D inputs, P outputs, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

from dptorch.tape.gradients.clipping_modes import NormMethod

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PerExampleGradient", "weigh", "without_cancellation"]


class PerExampleGradient(ABC):
    """The gradients [B, *shape] of B examples, usually never formed.

    Subclasses must give `held`, `dense` and `take`; the others have an exact, slow default. All
    arithmetic is at least float32, whatever the model's dtype.

    Attributes:
        shape: the parameter's shape.
        batch_size: number of examples B.
    """

    shape: torch.Size
    batch_size: int

    @abstractmethod
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that it keeps alive."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All gradients, [B, *shape]."""

    @abstractmethod
    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> PerExampleGradient:
        """The gradients of some examples only (int64 [B']), in another precision if asked."""

    def squared_norm(self) -> Tensor:
        """Squared L2 norm of each example's gradient, [B]."""
        return square_sum(self.dense())

    def magnitude(self) -> Tensor:
        """What the norm would be if nothing cancelled, [B]: the scale of its rounding error."""
        return self.squared_norm().sqrt()

    def recomputed_error(self) -> Tensor | float:
        """How far the gradient that is summed may be from the one that was measured, [B]: 0 for a form
        that makes both from the same numbers."""
        return 0.0

    def sizes(self) -> tuple[tuple[str, int], ...]:
        """The sizes that decide between methods, with their letters."""
        return ("B", self.batch_size), ("numel", math.prod(self.shape))

    def norm_methods(self) -> tuple[NormMethod, ...]:
        """How its norm and weighted sum can be had, see `dptorch.tape.gradients.clipping_modes`."""
        numel = float(self.batch_size * math.prod(self.shape))
        # Entries of 4 bytes, read once for the norm and once for the sum.
        return (NormMethod("formed", 2 * numel, 2 * numel, 8 * numel, 4 * numel, 4 * numel),)

    def measured(self, method: str) -> tuple[Tensor, PerExampleGradient]:
        """The squared norms, and the form to keep from here on.

        Args:
            method: name of one of `norm_methods`.
        """
        return self.squared_norm(), self

    def inner(self, other: PerExampleGradient) -> Tensor:
        """Inner product with another gradient of the same parameter, example by example, [B]."""
        # Imports run one way, so only one of two classes can know how to meet the other.
        for first, second in ((self, other), (other, self)):
            found = first.factored_inner(second)
            if found is not None:
                return found
        product = self.dense() * other.dense()
        return product.reshape(self.batch_size, -1).sum(1)

    def factored_inner(self, other: PerExampleGradient) -> Tensor | None:
        """`inner` without forming either gradient, or None if this form does not know how."""
        return None

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``sum_b weights[b] * gradient[b]`` of the parameter's shape, for weights [B]."""
        dense = self.dense()
        flat = dense.reshape(self.batch_size, -1)
        # As a product: weighed first, the gradients of all examples would be copied.
        return torch.mv(flat.t(), weights.to(dense.dtype)).view(self.shape)

    def fits(self, other: PerExampleGradient) -> bool:
        """Whether `merged` can take this and `other` together."""
        return False

    def merged(self, others: Sequence[PerExampleGradient]) -> PerExampleGradient:
        """The sum of this and of all others, each of which `fits`, as one object.

        A form that holds factors copies all of them, so it is called once for many others.
        """
        raise NotImplementedError


#: Of the magnitude times the norm, in roundings: a few additions round in the gradient's own direction
#: too, so that a norm that was formed is longer by two roundings of the magnitude. In a difference of
#: squares the margin is larger.
_ALONG = 4.0


def without_cancellation(
    squared: Tensor, magnitude: Tensor, forms: Sequence[PerExampleGradient], *, formed: bool
) -> Tensor:
    """Squared norms that clipping can rely on, however much cancels in a gradient.

    A norm from Gram matrices or cross terms is a difference of large numbers where an example's
    terms nearly cancel: its rounding error is that of the terms. Where the result is not well above
    that error, the gradient is formed in float64 and measured. What may be missing is added to every
    norm: the error of the difference, or that of the sum that will be released, which is formed in the
    original precision.

    Args:
        squared: squared norms [B] as computed.
        magnitude: see `PerExampleGradient.magnitude`, [B].
        forms: whose sum the gradient is.
        formed: whether `squared` was taken from the formed gradient. Its error is then eps times the
            magnitude; in a difference of squares it is eps times the magnitude's square.

    Guarantees:
        The result is at least the true squared norm, but for the rounding of one number.
        Held by `test_a_linear_record_whose_positions_cancel_is_clipped`,
        `test_a_tied_record_whose_uses_cancel_is_clipped`,
        `test_a_record_that_cancels_a_little_is_never_above_the_bound`,
        `test_a_record_that_is_formed_is_never_above_the_bound`,
        `test_a_long_record_whose_positions_cancel_is_clipped` and
        `test_a_gradient_of_many_equal_entries_is_clipped`.
    """
    single = torch.finfo(squared.dtype).eps
    # TF32 rounds the factors of a product to 11 bits, and adds products up as float32 does.
    tf32 = squared.is_cuda and torch.backends.cuda.matmul.allow_tf32
    eps = max(single, 2.0**-11) if tf32 else single
    bound = magnitude.square()
    # Above these a margin lengthens no squared norm of a few positions by more than a thousandth, nor
    # one of thousands that do not cancel: an ordinary example is clipped as if there were none.
    least = (1000 * eps) ** 2 if formed else 4000 * eps
    # Of `bound`, what may be missing. Each of T additions may round by eps / 2 of what is there so far,
    # which is at most half of the magnitude where all cancels, and always the same way.
    of_sum = max(4 * eps, _positions(forms) / 4 * single) ** 2
    share = of_sum if formed else 4 * eps + of_sum
    along = _ALONG * single
    if bool((squared >= least * bound).all()):  # the usual case; not if any is NaN
        longer = torch.add(squared, bound, alpha=share)
        return longer.add_(magnitude * squared.sqrt(), alpha=along) if formed else longer
    # Where it is not finite, the norm with its margin is not either: such an example is left out.
    doubtful = (squared < least * bound) & bound.isfinite()
    if bool(doubtful.any()):
        index = doubtful.nonzero().flatten()
        total = sum(f.take(index, torch.float64).dense() for f in forms)
        assert isinstance(total, Tensor)
        squared = squared.index_copy(0, index, square_sum(total).to(squared.dtype))
    as_formed = doubtful | formed
    longer = squared + torch.where(doubtful, of_sum * bound, share * bound)
    return longer + torch.where(as_formed, along * magnitude * squared.sqrt(), 0.0)


def _positions(forms: Sequence[PerExampleGradient]) -> int:
    """How many products are added up in a gradient that is the sum of `forms`."""
    return sum(dict(form.sizes()).get("T", 1) for form in forms)


def lengthened(squared: Tensor, by: Tensor | float) -> Tensor:
    """Squared norms [B] of gradients whose norms are larger by `by`."""
    return squared if isinstance(by, float) and not by else (squared.sqrt() + by).square()


def underflowed(squared: Tensor, longest: Tensor, terms: int) -> Tensor | None:
    """Examples whose squared norm, a sum of products of two factors' inner products, may lack what
    became zero in one factor and would have been multiplied by a huge other; int64, None for none.

    Args:
        squared: as computed, [B].
        longest: the larger factor's squared length, [B], or the largest of all examples.
        terms: how many products were added up.

    A factor loses at most `terms` times the smallest normal number: below 1 % of the result for all
    examples that are not returned.
    """
    floor = 100 * terms * torch.finfo(squared.dtype).tiny * longest
    low = squared < floor  # all that are finite, where the length itself is not
    return low.nonzero().flatten() if bool(low.any()) else None


class GramForm(Protocol):
    """A gradient whose norm can be had from Gram matrices."""

    def gram(self) -> Tensor: ...
    def magnitude(self) -> Tensor: ...
    def take(self, index: Tensor, dtype: torch.dtype | None = None) -> GramForm: ...


def without_underflow(
    form: GramForm, squared: Tensor, magnitude: Tensor, longest: Tensor, terms: int
) -> tuple[Tensor, Tensor]:
    """Squared norms from Gram matrices, and magnitudes, measured again in float64 where they may have
    lost what became zero in one factor and would have been multiplied by a huge other.

    Args:
        longest, terms: see `underflowed`.
    """
    low = underflowed(squared, longest, terms)
    if low is None or squared.dtype == torch.float64:
        return squared, magnitude
    exact = form.take(low, torch.float64)
    return (
        squared.index_copy(0, low, exact.gram().to(squared.dtype)),
        magnitude.index_copy(0, low, exact.magnitude().to(squared.dtype)),
    )


# Largest intermediate to make at once when it is dropped again. On a CPU one that stays in the cache is
# not slower, and no peak of memory; a GPU wants much work in one call.
_WORK_BYTES, _WORK_BYTES_CUDA = 2**24, 2**26


class Divisible(Protocol):
    """A gradient of which a few examples can be looked at, on the same memory."""

    shape: torch.Size
    batch_size: int

    def held(self) -> tuple[Tensor, ...]: ...
    def dense(self) -> Tensor: ...
    def part(self, start: int, stop: int) -> Self: ...


F = TypeVar("F", bound=Divisible)


def in_parts(form: F, bytes_each: float, norm: Callable[[F], Tensor]) -> Tensor:
    """`norm` of a few examples at a time, so that its intermediates stay small, [B].

    Args:
        form: the gradients of all examples.
        bytes_each: size of the intermediate of one example.
        norm: squared norms of a part.
    """
    b = form.batch_size
    limit = _WORK_BYTES_CUDA if form.held()[0].is_cuda else _WORK_BYTES
    step = max(1, int(limit // max(1, bytes_each)))
    if step >= b:
        return norm(form)
    return torch.cat([norm(form.part(i, min(i + step, b))) for i in range(0, b, step)])


def formed_norm(form: Divisible) -> Tensor:
    """Squared norms from gradients that are formed and dropped, [B]."""
    return in_parts(form, 4 * math.prod(form.shape), lambda part: square_sum(part.dense()))


# Entries whose squares are added up by themselves first: torch adds them one after the other, and of
# 16 million equal ones a hundredth is lost to rounding.
_RUN = 2**16


def square_sum(dense: Tensor) -> Tensor:
    """Squared L2 norms of the rows of [B, ...], at least in float32."""
    # Not square().sum(): that would write a second [B, ...] to memory.
    flat = at_least_float32(dense).reshape(dense.shape[0], -1)
    whole = flat.shape[1] - flat.shape[1] % _RUN
    if whole:
        runs = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (-1, _RUN)), dim=2)
        rest = torch.linalg.vector_norm(flat[:, whole:], dim=1, keepdim=True)
        flat = torch.cat([runs, rest], 1)
    return torch.linalg.vector_norm(flat, dim=1).square()


def at_least_float32(t: Tensor) -> Tensor:
    """bfloat16 and float16 are too coarse for norms and sums; complex numbers stay what they are."""
    return t if t.dtype in (torch.float32, torch.float64) or t.is_complex() else t.float()


def weigh(t: Tensor, weights: Tensor) -> Tensor:
    """``weights[b] * t[b]`` for t [B, ...] and weights [B]."""
    return t * weights.to(t.dtype).view([-1] + [1] * (t.dim() - 1))
