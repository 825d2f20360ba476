"""Refuse reads into Python, which could carry values of one example to others.

A number, a truth value, a text, a size or a piece of memory that a model takes from values of the batch
decides what is computed for every example, and nothing follows it there: within the batch, or kept
for the next one. Whatever leaves a followed tensor for Python passes `note_read`, the one place that
judges it: torch functions that return anything but tensors, sizes that depend on values, tensors
given for numbers, and what `dptorch.tape.recording.escapes` finds.

Some code reads only to choose between computations that give the same result: whether a mask hides
anything, which experts got a token. Code of `TRUSTED` packages is taken to do so and is warned of, but
for the little of it that is known to (`EQUAL`). Other code says so with `trusted_reads`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dptorch.errors import ExamplesMixError, warn
from dptorch.tape.provenance.tags import Mixed, Order, Reduced, Tag
from dptorch.tape.recording.places import reading_modules, user_line
from dptorch.tape.rules.recorder import Recorder

__all__ = ["EQUAL", "TRUSTED", "is_trusted", "note_decision", "note_read", "trusted_reads"]

#: Packages whose models read values of a batch only to choose between equal computations: torch's
#: layers and its validation of arguments, masks and experts of transformers.
TRUSTED = (
    "torch.nn.modules",
    "torch.nn.functional",
    "torch.nn.parallel",
    "torch.nn.utils.rnn",
    "torch.distributions",
    "torch.utils.checkpoint",
    "transformers",
    "timm",
    "torchvision",
    "peft",
)

#: Modules that ask whether a mask hides anything, or a row is packed, and leave out a mask that hides
#: nothing: attention without it is the same, but for rounding. And one that asks whether arguments are
#: valid and raises an error if not, which is followed (`dptorch.tape.recording.escapes`).
EQUAL = (
    "transformers.masking_utils",
    "transformers.modeling_attn_mask_utils",
    "torch.distributions.distribution",
)

_trusted = 0


@contextmanager
def trusted_reads() -> Iterator[None]:
    """Let a model read values of the batch into Python.

    This is a promise: what is read inside is only logged, or decides only between computations that
    give every example the same result, and does not enter the next batch. A wrong one voids the
    privacy guarantee.

    Example:
        >>> import torch, dptorch
        >>> mask = torch.ones(4, 3, dtype=torch.bool)
        >>> with dptorch.tape.trusted_reads():
        ...     everything_counts = bool(mask.all())
    """
    global _trusted
    _trusted += 1
    try:
        yield
    finally:
        _trusted -= 1


def is_trusted(packages: Iterable[str] = TRUSTED) -> bool:
    """Whether the code that runs now is of one of `packages`, or inside `trusted_reads`.

    Other code of torch, numpy and the standard library runs on behalf of who calls it.
    """
    return bool(_trusted) or _reader(packages) is not None


def _reader(packages: Iterable[str]) -> str | None:
    """The module of one of `packages` whose code runs now; None if other code does."""
    for name in reading_modules():
        if any(f"{name}.".startswith(f"{package}.") for package in packages):
            return name
        if not _is_intermediate(name):
            return None
    return None


def note_read(recording: Recorder, name: str, states: Iterable[Any]) -> None:
    """Judge that `name` hands values of tensors with these states to Python.

    What examples went into is refused where a model is recorded and the code that reads is not trusted,
    and counted where it is, whether the value is of one example or of several: a part of a batch may
    have one row, and what is read from it can be kept for the next.

    Raises:
        ExamplesMixError: naming the line of the user's code.
    """
    if not any(isinstance(s, (Tag, Mixed, Reduced, Order)) for s in states):
        return
    if not recording.refuses_reads:
        return
    if _trusted:
        return
    reader = _reader(TRUSTED)
    if reader is not None:
        if reader not in EQUAL:
            recording.escaped[f"{name}() in {reader}"] += 1
        return
    where, line = recording.module_path(), user_line()
    if line not in where:
        where = f"{where}, {line}"
    raise ExamplesMixError(
        f"{where}: '{name}' reads values of examples into Python. What the model computes for one "
        "example then depends on others, in this batch or in the next, where no gradient shows it. "
        "Decide for each example by itself (torch.where), use a public constant, and log outside "
        "the model. If the value is only logged, or only chooses between computations that give the "
        "same result, read it inside dptorch.tape.trusted_reads()."
    )


_DECISION = (
    "{line}: a truth value of several examples of the batch is read. If it decides what is computed, "
    "skipped or stepped on, one example decides it for all, and no epsilon covers that. Decide for "
    "each example by itself (torch.where), or by what is public. If it is only logged, read it inside "
    "dptorch.tape.trusted_reads()."
)
_NOT_FINITE = (
    "{line}: a value of the batch that is read is not finite. If a step is skipped for that, or the "
    "run ends, one example decides it, and no epsilon covers that. Leave the check out: an example "
    "whose gradient is not finite is left out of the step by itself."
)
_warned: set[str] = set()


def note_decision(name: str, states: Iterable[Any], value: Any, *, of_finiteness: bool) -> None:
    """Warn, once for each line, of a read in the loop that decides there what is computed for all.

    A truth value is read to decide. A number may be logged, but for one that is not finite.

    Args:
        name: of the function that reads.
        states: of what it reads.
        value: what it gives.
        of_finiteness: whether the tensor says whether values are finite.
    """
    if not any(_is_of_several(s) for s in states):
        return
    not_finite = isinstance(value, float) and not math.isfinite(value)
    if is_trusted() or not (not_finite or name == "__bool__" or of_finiteness):
        return
    line = user_line()
    if line not in _warned:
        _warned.add(line)
        text = _NOT_FINITE if not_finite or of_finiteness else _DECISION
        warn(text.format(line=line))


def _is_of_several(state: Any) -> bool:
    return isinstance(state, (Mixed, Reduced)) or (isinstance(state, Tag) and state.dim is not None)


def _is_intermediate(name: str) -> bool:
    top = name.partition(".")[0]
    return top in ("torch", "numpy") or top in _STANDARD


_STANDARD = frozenset({"copy", "copyreg", "pickle", "json", "functools", "contextlib", "threading"})
