"""Judge what leaves a recorded forward pass other than as a tensor, or comes in instead of a number.

Every torch function is seen. What one returns that holds anything but tensors is a read, and so is a
tensor that is given where a number is meant: a size, the end of a slice. An exception that a torch
function raises may depend on values; where the model catches it and goes on, it was a read too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dptorch.errors import ConfigurationError, NotCoveredError, PrivacyError
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import Mixed, Reduced, Tag
from dptorch.tape.recording.handlers import Args, Kwargs, handler
from dptorch.tape.recording.places import user_line
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.reads import is_trusted, note_read
from dptorch.tape.recording.tensor_states import batch_of
from dptorch.tape.rules.recorder import Recorder

__all__ = ["judge_results", "judge_slices", "note_error", "refuse_swallowed"]

# Torch's answers to what a tensor is, not to what it holds.
_DESCRIPTIONS = (str, torch.dtype, torch.device, torch.layout)
# A model that catches one of these asked what a function can do, not what a tensor holds.
_OF_CODE = (NotImplementedError, TypeError, AttributeError, ImportError)
_TRUSTED_TO_CATCH = ("transformers", "timm", "torchvision", "peft", "torch.utils.checkpoint")


def judge_results(recording: Recorder, name: str, args: Args, kwargs: Kwargs, out: Any) -> None:
    """Refuse what an op of the batch returns that is neither a tensor nor made of tensors.

    Raises:
        ExamplesMixError: see `dptorch.tape.recording.reads`.
    """
    if out is not None and not (name == "type" and isinstance(out, str)) and _holds_more(out):
        tensors = each_tensor(args, kwargs)
        note_read(recording, name, map(recording.state, tensors))
        batch = batch_of(tensors[0]) if tensors and type(out) is float else None
        if batch is not None:
            read_numbers.note(out, recording.state(tensors[0]), batch)


def _holds_more(out: Any) -> bool:
    if isinstance(out, (tuple, list)):
        return any(_holds_more(o) for o in out)
    if isinstance(out, Mapping):
        return any(_holds_more(o) for o in out.values())
    return not isinstance(out, (Tensor, type(None), Iterator, torch.Generator, *_DESCRIPTIONS[1:]))


def judge_slices(recording: Recorder, index: Any) -> None:
    """Refuse tensors of the batch as ends of slices."""
    for part in index if isinstance(index, tuple) else (index,):
        if type(part) is slice:
            ends = [e for e in (part.start, part.stop, part.step) if isinstance(e, Tensor)]
            if ends:
                note_read(recording, "a slice", map(recording.state, ends))


@handler(
    """zeros ones empty linspace logspace eye arange randint randperm rand randn new_zeros new_ones
    new_empty new_empty_strided empty_strided tril_indices triu_indices range"""
)
def create(
    recording: Recorder, func: Callable[..., Any], name: str, args: Args, kwargs: Kwargs
) -> Any:
    """A new tensor, whose sizes or ends may be given by tensors."""
    given = each_tensor(args[1:] if name.startswith("new_") else args, kwargs)
    if given:
        out = kwargs.get("out")
        note_read(recording, name, (recording.state(t) for t in given if t is not out))
    made = func(*args, **kwargs)
    recording.note_own_leaf(made)
    return made


def note_error(recording: Recorder, error: Exception, args: Args, kwargs: Kwargs) -> None:
    """Note an error inside a forward pass, which the model may catch."""
    if not recording.refuses_reads or recording.error is not None:
        return
    if isinstance(error, (PrivacyError, ConfigurationError)):
        recording.error = error
        return
    if isinstance(error, _OF_CODE) or is_trusted(_TRUSTED_TO_CATCH):
        return
    states = [recording.state(t) for t in each_tensor(args, kwargs)]
    if any(isinstance(s, (Tag, Mixed, Reduced)) for s in states):
        recording.error = NotCoveredError(
            f"{recording.module_path()}, {user_line()}: a torch function failed on values of the batch "
            f"({type(error).__name__}: {error}), and the model went on. Whether it fails may depend on "
            "the examples, and so does what is computed then for others. Test for what makes it fail "
            "beforehand, for each example by itself; or, if no value decides, do it inside "
            "dptorch.tape.trusted_reads()."
        )


def refuse_swallowed(recording: Recorder) -> None:
    """Raise the error that a forward pass met and did not end with."""
    if recording.error is not None:
        raise recording.error
