"""Find a model that looks at the place of an example in its batch, or at the number of examples.

What is computed for an example then depends on others: on who stands before it, and how many there
are. No tag shows it, as ``torch.arange(len(x))`` is a constant. So the model runs on the real batch, on
its rows in another order, on one row less and on a few, and each row is compared with itself.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dptorch.tape.provenance.tags import Tag, owners
from dptorch.tape.recording.batch_dims import BatchDims, map_batched, tag_inputs
from dptorch.tape.recording.compiled import uncompiled
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording
from dptorch.validation.chance import no_chance
from dptorch.validation.reruns import is_plain, preserving_state, sampling_modules, unwrapped

__all__ = [
    "Rounding",
    "far",
    "find_place_dependence",
    "random_states",
    "relative_error",
    "repeatable",
    "speaks_of_rows",
]

_FEW = 3
_SAMPLES = 64  # values of each row that are compared
_STRIDE = 1_000_003
# Other places and numbers of rows go through other kernels, so rounding moves more than in `mixing`.
_RELATIVE = {torch.float64: 1e-7, torch.float32: 2e-3}
_RELATIVE_HALF = 1e-1


def find_place_dependence(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch_dims: BatchDims
) -> str | None:
    """What in a batch beside an example's own row moves what the model computes for it: "" if nothing
    does, None if the batch has too few rows to tell.

    Four forward passes without gradients: on the batch, on its rows in another order, without its last
    row, and on its first three. Random functions draw the same number everywhere. Where a run fails, or
    the model draws random numbers in ways that are not held fixed, nothing is found.

    Guarantees:
        As `dptorch.validation.mixing.find_mixing`.
        Held by `test_state_and_random_numbers_are_restored_and_raise_no_alarm`.
    """
    model = unwrapped(model)
    sizes: set[int] = set()
    map_batched(lambda t, d: sizes.add(t.shape[d]), model, args, kwargs, batch_dims)
    if len(sizes) != 1:
        return ""
    size = sizes.pop()
    if size < 2:
        return None
    if speaks_of_rows((args, dict(kwargs)), size):
        return ""  # a list with an entry for each row, which is not put in another order

    def run(rows: Sequence[int], seed: int = 0) -> tuple[_Rows, bool] | None:
        index = torch.tensor(rows)

        def pick(t: Tensor, dim: int) -> Tensor:
            with torch._C.DisableTorchFunction():
                return t.detach().index_select(dim, index.to(t.device))

        inputs = map_batched(pick, model, args, kwargs, batch_dims)
        try:
            return _run(model, *inputs, batch_dims, seed)
        except Exception:
            return None

    order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()
    if order == sorted(order):
        order = order[1:] + order[:1]
    whole = run(range(size))
    if whole is None or whole[1]:
        return ""
    variants = [("its place in the batch", order)]
    if size > 2:
        variants.append(("the number of examples", list(range(size - 1))))
    if size > _FEW + 1:
        variants.append(("the number of examples", list(range(_FEW))))
    for what, rows in variants:
        other = run(rows)
        where = None if other is None else _first_moved(whole[0], other[0], rows)
        if where is not None:
            again = run(range(size), seed=1)
            steady = again is not None and _first_moved(whole[0], again[0], range(size)) is None
            return f"{where}: what is computed for an example depends on {what}." if steady else ""
    return ""


_Rows = list[tuple[str, Tensor, float]]


def speaks_of_rows(value: Any, size: int) -> bool:
    """Whether `value` holds a list with an entry, no tensor, for each of `size` rows."""
    if isinstance(value, (list, tuple)):
        here = len(value) == size and not any(isinstance(v, Tensor) for v in tree_leaves(value))
        return (here and size > 1) or any(speaks_of_rows(v, size) for v in value)
    if isinstance(value, Mapping):
        return any(speaks_of_rows(v, size) for v in value.values())
    return isinstance(value, np.ndarray) and bool(value.ndim) and value.shape[0] == size


@contextmanager
def repeatable(model: nn.Module, seed: int) -> Iterator[None]:
    """Run `model` without gradients, warnings and traces; random functions draw the same everywhere."""
    with preserving_state(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        with no_chance(model):
            yield


def _run(
    model: nn.Module, args: Any, kwargs: Any, batch_dims: BatchDims, seed: int
) -> tuple[_Rows, bool]:
    """Samples of each row in what goes in and out of modules; whether Python or numpy drew numbers."""
    seen: _Rows = []
    with ExitStack() as stack:
        stack.enter_context(repeatable(model, seed))
        recording = Recording(model, {})
        args, kwargs = tag_inputs(recording, recording.tag_batch, model, args, kwargs, batch_dims)

        def sample(value: Any, blame: str) -> None:
            for t in tree_leaves(value):
                if isinstance(t, Tensor) and is_plain(t) and t.is_floating_point():
                    rows = _rows(t, recording)
                    if rows is not None:
                        before = seen[-1][2] if seen else 0.0  # rounding stays in what comes later
                        seen.append((blame, rows, max(before, relative_error(t))))

        python, numpy = random_states()
        with sampling_modules(model, sample), uncompiled(), patched(), recording:
            model(*args, **kwargs)
        drew = (python, numpy) != random_states()
    return seen, drew


def random_states() -> tuple[int, int]:
    """The states of Python's and numpy's generators, which `no_chance` does not hold fixed."""
    state: Any = np.random.get_state()  # noqa: NPY002
    return hash(random.getstate()), hash((state[1].tobytes(), *state[2:]))


def _rows(t: Tensor, recording: Recording) -> Tensor | None:
    """Values of each example, float64 [B, samples]; None where they are not apart in equal numbers."""
    state, size = recording.state(t), recording.batch_size
    with torch._C.DisableTorchFunction():
        if not t.numel():
            return None
        if isinstance(state, Tag) and state.dim is None:
            flat = t.detach().reshape(1, -1) if size == 1 else None
        elif isinstance(state, Tag) and state.regular:
            assert state.dim is not None
            owner = owners(state, t.shape[state.dim], size, t.device)
            moved = t.detach().movedim(state.dim, 0)
            flat = moved[owner.argsort(stable=True)].reshape(size, -1)
        else:
            flat = None
        if flat is None:
            return None
        n = flat.shape[1]
        index = torch.arange(min(n, _SAMPLES), device=t.device)
        return flat[:, index * _STRIDE % n].double().cpu()


def _first_moved(whole: _Rows, other: _Rows, rows: Sequence[int]) -> str | None:
    """The first module whose rows differ from those of the whole batch; None if none does."""
    pairs = list(zip(whole, other, strict=False))
    for i, ((label, a, _), (label_b, b, _)) in enumerate(pairs):
        if label != label_b or a.shape[1:] != b.shape[1:] or len(b) != len(rows):
            # Another path: what follows cannot be compared, but for what comes out in the end.
            pairs = [*pairs[:i], *([(whole[-1], other[-1])] if i else [])]
            break
    for (label, a, relative), (_, b, _) in pairs:
        if a.shape[1:] == b.shape[1:] and len(b) == len(rows) and far(a[list(rows)], b, relative):
            return label
    return None


def relative_error(t: Tensor) -> float:
    """What other kernels may move in `t` by rounding, relative to its largest value.

    Under autocast what is in float32 is computed from products in half precision.
    """
    if torch.is_autocast_enabled(t.device.type):
        return _RELATIVE_HALF
    return _RELATIVE.get(t.dtype, _RELATIVE_HALF)


class Rounding(TorchDispatchMode):
    """Notes whether anything is computed in half precision, whatever is made of it later.

    Attributes:
        error: what this may move, as `relative_error`; 0 if nothing was.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_floating_point() and t.dtype not in _RELATIVE:
                self.error = _RELATIVE_HALF
        return out


def far(a: Tensor, b: Tensor, relative: float) -> bool:
    """Whether a value differs by more than `relative` times the largest; others than finite do not."""
    usual = a.isfinite() & b.isfinite() & (a.abs() < 1e30)
    if not usual.any():
        return False
    return bool((a - b).abs()[usual].max() > relative * a[usual].abs().max().clamp(min=1e-12))
