"""Find a model whose result for an example depends on how far its batch is padded.

A batch that is padded to its longest example shows the length of that example to all others. The last
output of a recurrent layer, or a mean over all positions, then depends on it, and no tag shows that.
So where the width of a batch follows its examples, the model runs on some short rows with and without
the columns in which they hold nothing but padding, and each row is compared with itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dptorch.errors import ExamplesMixError, warn
from dptorch.tape.provenance.tags import Tag
from dptorch.tape.recording.batch_dims import (
    BatchDims,
    argument_names,
    is_ragged,
    map_batched,
    tag_inputs,
)
from dptorch.tape.recording.batches import latest_batch
from dptorch.tape.recording.compiled import uncompiled
from dptorch.tape.recording.patches import patched
from dptorch.tape.recording.recording import Recording
from dptorch.tape.recording.tensor_states import batch_of
from dptorch.validation.placing import (
    Rounding,
    far,
    random_states,
    relative_error,
    repeatable,
    speaks_of_rows,
)
from dptorch.validation.reruns import is_plain, unwrapped

__all__ = ["WidthCheck"]

_FEW = 4  # rows that are compared, the shortest
_TRIES = 4  # batches on which a comparison may fail before it is given up
_CANDIDATES = 32  # rows whose last column may be padding

Place = tuple[str, int]  # an input by its name and number, and a dimension of it


class _Input(NamedTuple):
    """A batched tensor of a call: its name, its values, and which dimension holds the examples."""

    name: str
    tensor: Tensor
    dim: int


class WidthCheck:
    """Called with the arguments of each forward pass, as `mixing.first_batch_checks` are.

    Args:
        model: is left as it was; see `dptorch.validation.mixing.find_mixing`.
        batch_dims: see `dptorch.tape.recording.batch_dims.BatchDims`.

    Guarantees:
        - A width that is the same in all batches, and for one example alone, is never tested.
          Held by `test_a_fixed_width_is_not_tested`.
        - Random states, buffers and attributes are as before.
          Held by `test_the_test_leaves_no_trace`.
    """

    def __init__(self, model: nn.Module, batch_dims: BatchDims) -> None:
        self._model, self._batch_dims = model, batch_dims
        self._sizes: dict[Place, int] = {}
        self._varying: set[Place] = set()
        self._tested: set[Place] = set()
        self._failed = 0

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Test a batch with short rows once its widths are seen to follow its examples.

        Two forward passes without gradients on at most four rows, a third before an error.

        Returns:
            True if there is nothing left to test.

        Raises:
            ExamplesMixError: if what the model computes for a row depends on the width.
        """
        if is_ragged(args, kwargs, self._batch_dims):
            return True
        inputs = self._inputs(args, kwargs)
        widths = self._note(inputs)
        rows = {i.tensor.shape[i.dim] for i in inputs}
        if not widths or len(rows) != 1 or speaks_of_rows((args, dict(kwargs)), *rows):
            return False
        for width in widths:
            found = self._find(args, kwargs, inputs, width)
            if found:
                raise ExamplesMixError(
                    "what the model computes for an example depends on how far its batch is padded "
                    f"({found}), so on the longest of the other examples, and no gradient shows it. "
                    "Pad all examples to one fixed length (padding='max_length'), give the model an "
                    "attention mask that it uses, or pack the rows (pack_padded_sequence). If this "
                    "finding is wrong, pass self_check=False."
                )
        if self._failed >= _TRIES:
            warn(
                "the model could not be tested for what it makes of padding: it draws numbers of "
                "Python or NumPy, or returns nothing to compare for fewer columns. That no result "
                "depends on how far a batch is padded is your word. Pad to one fixed length instead."
            )
        return self._failed >= _TRIES or not self._varying - self._tested

    def _inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[_Input]:
        names: dict[int, str] = {}
        for name, value in [
            *zip(argument_names(unwrapped(self._model), len(args)), args, strict=True),
            *kwargs.items(),
        ]:
            for i, leaf in enumerate(tree_leaves(value)):
                names.setdefault(id(leaf), f"{name} {i}")
        inputs: list[_Input] = []

        def note(t: Tensor, dim: int) -> Tensor:
            inputs.append(_Input(names.get(id(t), ""), t, dim % t.dim()))
            return t

        map_batched(note, self._model, args, kwargs, self._batch_dims)
        return inputs

    def _note(self, inputs: list[_Input]) -> set[int]:
        """Widths of this batch, still to be tested, that follow its examples."""
        batches = [b for i in inputs if (b := batch_of(i.tensor)) is not None]
        batch = batches[0] if batches else latest_batch()
        padding = None if batch is None else batch.padding
        known = frozenset() if padding is None else padding.widths
        found: set[int] = set()
        for name, t, batch_dim in inputs:
            for dim, size in enumerate(t.shape):
                place = name, dim
                if dim == batch_dim or place in self._tested:
                    continue
                if (dim, size) in known or self._sizes.setdefault(place, size) != size:
                    self._varying.add(place)
                if place in self._varying:
                    found.add(size)
        return found

    def _find(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], inputs: list[_Input], width: int
    ) -> str:
        """What moved, "" if nothing did or nothing could be compared."""
        dims = {
            id(t): [d for d, n in enumerate(t.shape) if n == width and (name, d) in self._varying]
            for name, t, _ in inputs
        }
        wide = [i for i in inputs if dims[id(i.tensor)]]
        cut = _short_rows(self._model, [(i, dims[id(i.tensor)][0]) for i in wide])
        if cut is None:
            return ""
        rows, first, last, real = cut

        def run(columns: slice, seed: int = 0) -> tuple[list[Tensor], bool]:
            def pick(t: Tensor, dim: int) -> Tensor:
                with torch._C.DisableTorchFunction():
                    part = t.detach().index_select(dim, rows.to(t.device))
                    for d in dims[id(t)]:
                        part = part[(slice(None),) * d + (columns,)]
                    return part.clone()

            model = unwrapped(self._model)
            picked = map_batched(pick, model, args, kwargs, self._batch_dims)
            return _outputs(model, *picked, self._batch_dims, seed)

        try:
            whole, drew = run(slice(0, width))
            trimmed, _ = run(slice(first, last))
        except Exception:  # it may not run on fewer rows or columns
            self._failed += 1
            return ""
        compared, moved = _compare(whole, trimmed, width, first, last, real)
        if drew or not compared:
            self._failed += 1
            return ""
        if moved:
            with Rounding() as rounding:
                again, _ = run(slice(0, width), seed=1)
            error = rounding.error
            moved = _compare(whole, trimmed, width, first, last, real, error)[1]
            if moved and not _compare(whole, again, width, 0, width, real, error)[1]:
                return f"{width} columns or {last - first}"
        self._tested |= {(i.name, d) for i in wide for d in dims[id(i.tensor)]}
        return ""


def _short_rows(
    model: nn.Module, wide: list[tuple[_Input, int]]
) -> tuple[Tensor, int, int, Tensor] | None:
    """Rows that are padded, and how far: (rows, first column, one past the last, which of the
    columns of these rows hold more than padding, bool [rows, columns]); None if there are none.

    A column of padding holds in each input the one value that a shorter row ends with. Padding is
    known by a mask, whose value there is nowhere else before the end of a row; without a mask it is
    0, or the `padding_idx` of an embedding.
    """
    values: list[Tensor] = []
    telling: list[int] = []
    masked = any("mask" in i.name and i.tensor.dim() == 2 for i, _ in wide)
    for i, dim in wide:
        with torch._C.DisableTorchFunction():
            v = i.tensor.detach().movedim((i.dim, dim), (0, 1)).unsqueeze(-1).flatten(2)
        is_mask = "mask" in i.name and i.tensor.dim() == 2
        same = bool((v == v[:1]).all())
        if same:
            continue  # positions, types: they say nothing of lengths
        if is_mask or not masked:
            telling.append(len(values))
        values.append(v)
    if not telling:
        return None
    padding = {0} | {
        m.padding_idx
        for m in model.modules()
        if isinstance(m, nn.Embedding) and m.padding_idx is not None
    }
    for at_start in (False, True):
        found = _longest_padding(values, telling, masked, padding, at_start)
        if found is not None:
            return found
    return None


def _longest_padding(
    values: list[Tensor], telling: list[int], masked: bool, padding: set[int], at_start: bool
) -> tuple[Tensor, int, int, Tensor] | None:
    """`_short_rows` for padding at one side, of inputs [B, columns, values]."""
    turned = [v.flip(1) for v in values] if at_start else values
    size, width = turned[0].shape[:2]
    best: Tensor | None = None
    for row in range(min(size, _CANDIDATES)):
        padded: list[Tensor] = []
        clean: list[bool] = []
        for k, v in enumerate(turned):
            pad = v[row, -1]
            is_pad = (v == pad).all(2)
            tail = is_pad.flip(1).long().cumprod(1).flip(1).bool()
            padded.append(tail.cpu())
            if k in telling:
                usual = masked or any(bool((pad == p).all()) for p in padding)
                clean.append(usual and not bool((is_pad & ~tail).any()))
        if not any(clean):
            continue
        lengths = width - torch.stack(padded).all(0).sum(1)
        if best is None or int(lengths.sum()) < int(best.sum()):
            best = lengths
    if best is None:
        return None
    rows = best.argsort(stable=True)
    rows = rows[(best[rows] > 0) & (best[rows] < best.max())][:_FEW]  # 0: it stands for no example
    if not len(rows):
        return None
    last = int(best[rows].max())
    real = torch.arange(width) < best[rows][:, None]
    if at_start:
        return rows, width - last, width, real.flip(1)
    return rows, 0, last, real


def _outputs(
    model: nn.Module, args: Any, kwargs: Any, batch_dims: BatchDims, seed: int
) -> tuple[list[Tensor], bool]:
    """What the model returns for each row, [B, ...]; whether Python or numpy drew numbers."""
    with repeatable(model, seed):
        recording = Recording(model, {})
        args, kwargs = tag_inputs(recording, recording.tag_batch, model, args, kwargs, batch_dims)
        before = random_states()
        with uncompiled(), patched(), recording:
            out = model(*args, **kwargs)
        drew = before != random_states()
        found: list[Tensor] = []
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and is_plain(t) and t.is_floating_point():
                state = recording.state(t)
                with torch._C.DisableTorchFunction():
                    if isinstance(state, Tag) and state.dim is None:
                        found.append(t.detach()[None])
                    elif isinstance(state, Tag) and state.step == 1 and state.regular:
                        assert state.dim is not None
                        if t.shape[state.dim] == recording.batch_size:
                            found.append(t.detach().movedim(state.dim, 0))
    return found, drew


def _compare(
    whole: list[Tensor],
    other: list[Tensor],
    width: int,
    first: int,
    last: int,
    real: Tensor,
    error: float = 0.0,
) -> tuple[bool, bool]:
    """Whether outputs with all columns and with those from `first` to `last` could be compared, and
    whether one moved, by more than `error` too. Where an output has columns, those that hold padding
    are left out."""
    compared = moved = False
    for a, b in zip(whole, other, strict=False):
        if a.dim() != b.dim() or a.dtype != b.dtype:
            continue
        kept = torch.ones(a.shape[:1], dtype=torch.bool)
        kept = kept.reshape(-1, *[1] * (a.dim() - 1)).expand(b.shape)
        for d in range(1, a.dim()):
            if a.shape[d] == width and b.shape[d] == last - first:
                a = a.narrow(d, first, last - first)
                shape = [1] * a.dim()
                shape[0], shape[d] = len(real), last - first
                kept = kept & real[:, first:last].reshape(shape)
        if a.shape != b.shape or not bool(kept.any()):
            continue
        compared = True
        chosen = kept.to(a.device)
        moved = moved or far(a[chosen].double(), b[chosen].double(), max(error, relative_error(a)))
    return compared, moved
