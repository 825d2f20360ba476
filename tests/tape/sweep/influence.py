"""The oracle of provenance: change one example, and see which elements of the result change.

A call is run plain, and inside a recording with some operands tagged. What the recording says of the
results is held against what replacing one example's slice by another's does to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.tape.provenance.aliases import owner_of_each
from dptorch.tape.provenance.tags import Mixed, Order, Reduced, State, Tag
from dptorch.tape.recording.recording import Recording


class Verdict(NamedTuple):
    """What came of one call with one choice of tagged operands.

    Attributes:
        kind: "handled"; "mixes": refused, and an element does depend on several examples;
            "refused": refused, and no element was seen to; "wrong": the recording is contradicted;
            "crash": an error that is not ours.
        detail: the reason or the error.
    """

    kind: str
    detail: str = ""


class Example(NamedTuple):
    """A call, its operands flattened, and which of them (position -> dimension) hold the examples."""

    func: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    tagged: dict[int, int]

    @property
    def batch_size(self) -> int:
        position, dim = next(iter(self.tagged.items()))
        return int(self.leaves[position].shape[dim])


def choices(
    func: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    most: int = 24,
    more_rows: bool = True,
) -> Iterator[Example]:
    """Ways to tag the operands of a call.

    All operands together along each dimension that has one size in all of them; every operand along
    every dimension by itself; and the same operands with more rows: a batch of one repeated, and a new
    dimension in front of each.
    """
    leaves, spec = tree_flatten((list(args), dict(kwargs)))
    tensors = {i: t for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.numel()}
    if len(tensors) > 1:
        for dim in range(3):
            sizes = {t.shape[dim] for t in tensors.values() if t.dim() > dim}
            if len(sizes) == 1 and 2 <= next(iter(sizes)) <= most:
                together = {i: dim for i, t in tensors.items() if t.dim() > dim}
                if len(together) > 1:
                    yield Example(func, leaves, spec, together)
    for changed in (_repeated(leaves), _stacked(leaves)) if more_rows else ():
        if changed is not None:
            yield Example(func, changed[0], spec, changed[1])
    for i, t in tensors.items():
        for dim, size in enumerate(t.shape):
            if 2 <= size <= most:
                yield Example(func, leaves, spec, {i: dim})


def _rows(t: Tensor) -> Tensor:
    """Three versions of a tensor, in a new dimension."""
    return torch.stack([t, t.flip(-1), t.roll(1, -1)] if t.dim() else [t, t, t])


def _repeated(leaves: list[Any]) -> tuple[list[Any], dict[int, int]] | None:
    """The first operand, a batch of one, with three rows."""
    for i, t in enumerate(leaves):
        if isinstance(t, Tensor):
            if t.dim() < 2 or t.shape[0] != 1:
                return None
            return [*leaves[:i], _rows(t[0]), *leaves[i + 1 :]], {i: 0}
    return None


def _stacked(leaves: list[Any]) -> tuple[list[Any], dict[int, int]] | None:
    """Every operand of two or more dimensions with three rows in front."""
    many = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.dim() > 1 and t.numel()]
    if not many or any(
        leaves[i].element_size() == 1 and leaves[i].is_floating_point() for i in many
    ):
        return None
    return [_rows(t) if i in many else t for i, t in enumerate(leaves)], dict.fromkeys(many, 0)


def _run(example: Example, leaves: list[Any]) -> list[Any]:
    args, kwargs = tree_unflatten(leaves, example.spec)
    torch.manual_seed(0)
    out = example.func(*args, **kwargs)
    results = list(out) if isinstance(out, (tuple, list)) else [out]
    return [
        o.to_dense() if isinstance(o, Tensor) and o.layout != torch.strided else o for o in results
    ]


def _fresh(leaves: Sequence[Any]) -> list[Any]:
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]


def recorded(example: Example, leaves: list[Any]) -> tuple[list[Any], list[State | None]]:
    """The results of the call inside a recording, and what is known of them.

    Tagged operands need a gradient, as activations do; where torch has none for all of them, the first
    does, and where it has none at all, none.
    """
    positions = list(example.tagged)
    for with_grad in (positions, positions[:1], []):
        try:
            return _recorded(example, leaves, with_grad)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, PrivacyError) or not with_grad or "deriva" not in _words(error):
                raise
    raise AssertionError


def _words(error: Exception) -> str:
    said = str(error).lower().replace("differenti", "deriva").replace("requires_grad", "deriva")
    return said.replace("requires grad", "deriva").replace("autograd", "deriva")


def _recorded(
    example: Example, leaves: list[Any], with_grad: Sequence[int]
) -> tuple[list[Any], list[State | None]]:
    recording = Recording(nn.Module(), {})
    leaves = _fresh(leaves)
    for i, dim in example.tagged.items():
        t = leaves[i]
        if i in with_grad and (t.is_floating_point() or t.is_complex()):
            t = t.requires_grad_().clone()  # no leaf, so that it may be written to
        leaves[i] = recording.tag_batch(t, dim)
    with recording:
        out = _run(example, leaves)
    states = [recording.state(o) if isinstance(o, Tensor) else None for o in out]
    return [o.detach() if isinstance(o, Tensor) else o for o in out], states


def changed(example: Example, i: int, j: int) -> list[Any]:
    """The operands with example i replaced by example j."""
    leaves = _fresh(example.leaves)
    for position, dim in example.tagged.items():
        t = leaves[position]
        t.select(dim, i).copy_(t.select(dim, j).clone())
    return leaves


def _differs(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() and a.element_size() == 1:
        a, b = a.double(), b.double()
    if not (a.is_floating_point() or a.is_complex()):
        return a != b
    return ~torch.isclose(a, b, rtol=1e-9, atol=1e-11, equal_nan=True)


def judge(example: Example) -> Verdict:
    """Hold a recording of the call against the influences that are seen."""
    try:
        base = _run(example, _fresh(example.leaves))
    except Exception as error:  # torch does not take these operands
        return Verdict("skipped", str(error))
    if not any(isinstance(o, Tensor) for o in base):
        return Verdict("handled", "no tensor")
    again = _run(example, _fresh(example.leaves))
    if any(
        isinstance(o, Tensor) and bool(_differs(o, a).any())
        for o, a in zip(base, again, strict=True)
    ):
        return Verdict("skipped", "it reads memory that nobody wrote")
    reason = ""
    states: list[State | None] = []
    try:
        out, states = recorded(example, example.leaves)
    except (PrivacyError, ConfigurationError) as error:
        reason = str(error)
    except Exception as error:  # any error of ours is a finding
        return Verdict("crash", f"{type(error).__name__}: {error}")
    else:
        for o, b in zip(out, base, strict=True):
            if isinstance(o, Tensor) and (o.shape != b.shape or bool(_differs(o, b).any())):
                return Verdict("wrong", "the recorded result is another")
    reason = reason or next((s.reason for s in states if isinstance(s, Mixed)), "")
    n = example.batch_size
    some = sorted({0, 1, n // 2, n - 1} & set(range(n)))
    pairs = [(i, (i + step) % n) for i, step in itertools.product(some, (1, 2)) if step % n]
    influenced = [None if not isinstance(o, Tensor) else torch.zeros((n, *o.shape)) for o in base]
    reshaped = False
    for i, j in pairs:
        leaves = changed(example, i, j)
        try:
            after = _run(example, leaves)
        except Exception:  # such values are not allowed
            continue
        for k, (before, now) in enumerate(zip(base, after, strict=False)):
            if not isinstance(before, Tensor):
                continue
            if now.shape != before.shape:
                reshaped = True
                if not reason and isinstance(states[k], (Reduced, Order)):
                    return Verdict("wrong", "the shape depends on the values")
                if not reason:
                    found = _other_rows(example, leaves, k, i, before, states[k])
                    if found:
                        return Verdict("wrong", found)
                continue
            different = _differs(before, now)
            mask = influenced[k]
            assert mask is not None
            mask[i] += different
            state = None if not states else states[k]
            if reason or isinstance(state, (Reduced, Order)):
                continue
            if isinstance(state, Tag) and state.dim is not None and state.dim >= before.dim():
                return Verdict("wrong", f"output {k} of shape {tuple(before.shape)} is {state}")
            owner = owner_of_each(before, state, n)
            if bool((different & (owner != i)).any()):
                found = _other_rows(example, leaves, k, i, before, state)
                if found:
                    return Verdict("wrong", f"output {k} is {state}: {found}")
    if not reason:
        return _linear(example, base, states)
    several = any(m is not None and bool(((m > 0).sum(0) > 1).any()) for m in influenced)
    return Verdict("mixes" if several or reshaped else "refused", reason)


def _other_rows(
    example: Example, leaves: list[Any], k: int, i: int, before: Tensor, state: State | None
) -> str:
    """Rows may move, where how many there are depends on the values; what belongs to other examples
    must still be the same."""
    try:
        out, states = recorded(example, leaves)
    except (PrivacyError, ConfigurationError):
        return ""
    if isinstance(states[k], Mixed):
        return ""
    n = example.batch_size
    old, new = owner_of_each(before, state, n), owner_of_each(out[k], states[k], n)
    for other in range(-1, n):
        a, b = before[old == other], out[k][new == other]
        if other != i and (a.shape != b.shape or bool(_differs(a, b).any())):
            return f"example {i} changes the rows of {other}"
    return ""


def _linear(example: Example, base: list[Any], states: list[State | None]) -> Verdict:
    """A reduced loss is a sum of one term for each example: changes of two add up."""
    for k, state in enumerate(states):
        if not isinstance(state, Reduced) or example.batch_size < 3:
            continue
        one, two = changed(example, 0, 1), changed(example, 2, 1)
        both = changed(example, 0, 1)
        for position, dim in example.tagged.items():
            both[position].select(dim, 2).copy_(two[position].select(dim, 2))
        a, b, c = (_run(example, leaves)[k] for leaves in (one, two, both))
        together, apart = c - base[k], (a - base[k]) + (b - base[k])
        if bool(_differs(together, apart).any()):
            return Verdict("wrong", f"output {k} is {state}; two changes do not add up")
    return Verdict("handled")
