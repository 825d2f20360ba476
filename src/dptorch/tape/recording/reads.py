"""Refuse reads into Python that could carry values of several examples to others.

A number, a truth value or an index that a model reads off a statistic of the batch decides what is
computed for every example, and nothing follows it there. Some code reads only to choose between
computations that give the same result: whether a mask hides anything, which experts got a token.
Code of `TRUSTED` packages is taken to do so and is warned of. Other code says so with `trusted_reads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dptorch.errors import ExamplesMixError
from dptorch.tape.recording.places import reading_module, user_line
from dptorch.tape.rules.recorder import Recorder

__all__ = ["TRUSTED", "refuse_read", "trusted_reads"]

#: Packages whose models read statistics of a batch only to choose between equal computations:
#: torch's validation of arguments and lengths of packed sequences, masks and experts of transformers.
TRUSTED = ("torch", "transformers", "timm", "torchvision", "peft", "numpy")

_trusted = 0


@contextmanager
def trusted_reads() -> Iterator[None]:
    """Let a model read statistics of the batch into Python.

    This is a promise: what is read inside decides only between computations that give every example
    the same result. A wrong one voids the privacy guarantee.

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


def refuse_read(recording: Recorder, name: str) -> None:
    """Raise if the read that happens now is not trusted.

    Raises:
        ExamplesMixError: naming the line of the user's code.
    """
    if not recording.refuses_reads or _trusted:
        return
    if reading_module().partition(".")[0] in TRUSTED:
        return
    where, line = recording.module_path(), user_line()
    if line not in where:
        where = f"{where}, {line}"
    raise ExamplesMixError(
        f"{where}: '{name}' reads a value that several examples went into. What the model computes "
        "for one example then depends on the others, where no gradient shows it. Decide for each "
        "example by itself (torch.where), or use a public constant. If the value only chooses "
        "between computations that give the same result, read it inside "
        "dptorch.tape.trusted_reads()."
    )
