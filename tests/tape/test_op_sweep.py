"""Every op of torch: handled, or refused for a stated mathematical reason, and none crashes.

The calls are torch's own samples for its own tests (OpInfo). Each is run with every choice of operands
and dimensions that carry the examples, and what the recording says of the result is held against what
changing one example does to it (`tests.tape.sweep.influence`). A refusal must give one of the reasons
in `tests.tape.sweep.reasons`.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.tape.sweep.influence import Example, Verdict, choices, judge
from tests.tape.sweep.reasons import NOT_FOLLOWED, OUTSIDE, REASONS
from torch import Tensor

from dptorch.tape.propagation import FAMILIES
from dptorch.tape.propagation.table import find
from dptorch.tape.provenance.calls import info
from dptorch.tape.provenance.ordering import KEEP_ORDER
from dptorch.tape.provenance.tags import Tag
from dptorch.tape.recording.composites import is_composite
from dptorch.tape.recording.handlers import SPECIAL
from dptorch.tape.rules import LOSSES, RULES

PARTS = 16
SAMPLES, CHOICES, CALLS = 5, 4, 10  # of each op, of each sample, of each op in all
# Results without meaning; and rrelu, which draws a number for each negative element: independent ones
# for each example, but where others' are in the stream depends on how many there were before.
_LEFT_OUT = (
    "jiterator",
    "empty",
    "new_empty",
    "sparse.",
    "resize",
    "signal.",
    "nn.functional.rrelu",
)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def ops() -> list[Any]:
    """Torch's database of ops and their samples; loading it may not freeze torch's settings."""
    freeze, torch.backends.disable_global_flags = torch.backends.disable_global_flags, lambda: None
    try:
        from torch.testing._internal import common_utils
        from torch.testing._internal.common_methods_invocations import op_db
        from torch.testing._internal.opinfo import core
    finally:
        torch.backends.disable_global_flags = freeze
    # Each look at the samples of an op walks the stack for a unittest.TestCase, which takes four times
    # as long as all calls together. Under pytest there is none: the samples stay the same.
    for module in (common_utils, core):
        module.extract_test_fn = lambda: None
    return [op for op in op_db if not op.name.startswith(_LEFT_OUT)]


def examples_of(op: Any) -> Iterator[Example]:
    wanted = (torch.float64, torch.int64, torch.bool, torch.float32, torch.complex128)
    every = op.supported_dtypes("cpu")
    if not every:  # a kernel of another device
        return
    dtype = next((d for d in wanted if d in every), None) or min(every, key=str)
    for sample in itertools.islice(op.sample_inputs("cpu", dtype), SAMPLES):
        # the operators of BatchNorm read past their statistics where there are more channels
        more = "batch_norm" not in op.name
        found = choices(op.op, (sample.input, *sample.args), sample.kwargs, more_rows=more)
        yield from itertools.islice(found, CHOICES)


def stated(op: str, verdict: Verdict) -> bool:
    if any(r in verdict.detail for r in REASONS):
        return True
    return "no provenance rule" in verdict.detail and any(n in op for n in NOT_FOLLOWED)


def sweep(part: int) -> tuple[Counter[str], list[str]]:
    """How many calls of a part of the ops came out how; what is wrong."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for op in ops()[part::PARTS]:
        for example in itertools.islice(examples_of(op), CALLS):
            verdict = judge(example)
            counts[verdict.kind] += 1
            unstated = verdict.kind in ("mixes", "refused") and not stated(op.name, verdict)
            if verdict.kind in ("wrong", "crash") or unstated:
                shapes = [tuple(t.shape) if isinstance(t, Tensor) else t for t in example.leaves]
                wrong.append(f"{op.name} {shapes} tagged {example.tagged}: {verdict}")
    return counts, wrong


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_op_is_handled_or_refused_for_a_stated_reason(part: int) -> None:
    counts, wrong = sweep(part)
    assert not wrong, "\n".join(wrong)
    assert counts["handled"] > 30, counts


TWINS: dict[str, tuple[str, Callable[..., Any], tuple[Any, ...]]] = {
    "a scan along the batch": ("cumsum", torch.cumsum, (torch.randn(4, 3), 0)),
    "a decomposition of rows": ("linalg_qr", torch.linalg.qr, (torch.randn(4, 3),)),
    "writes to one place": (
        "index_add",
        torch.index_add,
        (torch.zeros(4, 2), 0, torch.zeros(4, dtype=torch.long), torch.randn(4, 2)),
    ),
    "elements of a constant": (
        "masked_scatter",
        torch.masked_scatter,
        (torch.zeros(4, 2), torch.rand(4, 2) > 0.3, torch.randn(4, 2)),
    ),
    "a row of triplets": (
        "triplet_margin_loss",
        F.triplet_margin_loss,
        (torch.randn(4), torch.randn(4), torch.randn(4)),
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_table_that_took_it_for_rowwise_would_be_caught(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, func, args = TWINS[name]
    kinds = {judge(e).kind for e in choices(func, args, {})}
    assert "wrong" not in kinds
    assert kinds & {"mixes", "refused"}
    monkeypatch.setitem(FAMILIES, op, lambda call, outputs: Tag(0))
    assert "wrong" in {judge(e).kind for e in choices(func, args, {})}


# Python functions of torch that a mode does not see as such: the ops inside them are.
def as_torch_has_it(f: Callable[..., Any]) -> Callable[..., Any]:
    """What the engine has put something in front of, itself."""
    own = getattr(f, "__globals__", {}).get("__package__") == "dptorch.tape.recording"
    return inspect.unwrap(f) if own else f


def public_functions() -> set[Callable[..., Any]]:
    found = {as_torch_has_it(f) for f in torch.overrides.get_testing_overrides()}
    for space in (torch, torch.special, torch.linalg, F, torch.fft, Tensor):
        for name, f in inspect.getmembers(space, callable):
            if not (name.startswith("_") or inspect.isclass(f) or inspect.ismodule(f)):
                found.add(inspect.unwrap(f))  # what the engine has put in front of it
    return found


def is_opened(name: str) -> bool:
    """Whether torch takes the op apart for a dispatch mode, whatever its overload."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    apart = []
    for overload in packet.overloads() if packet is not None else ():
        op = getattr(packet, overload)
        tensors = any("Tensor" in str(a.type) for a in op._schema.arguments)
        if tensors and not any(a.is_out for a in op._schema.arguments):
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            apart.append(op.name() in _REGISTERED and has(op.name(), "CompositeImplicitAutograd"))
    return any(apart)


_REGISTERED = frozenset(torch._C._dispatch_get_all_op_names())


def place_of(f: Callable[..., Any]) -> str:
    """Where a function of torch is looked up: a table, or what it is opened into."""
    known = info(f)
    name = known.name
    if known.passive:
        return "passive"
    if name in SPECIAL or name in ("__setitem__", "set"):
        return "handler"
    if find(name) is not None or name in RULES or name in LOSSES or name in KEEP_ORDER:
        return "table"
    if is_composite(f) or is_opened(name):
        return "opened"
    if name.startswith("torch.") or isinstance(f, torch.jit.ScriptFunction):
        return "opened"
    return "outside" if any(_named(name, words) for words in OUTSIDE.values()) else "nowhere"


def _named(name: str, words: str) -> bool:
    name = name.removesuffix("_copy")
    return any(name == w or (w[-1] == "_" and name.startswith(w)) for w in words.split())


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="older torch lacks names that are sorted")
def test_every_public_function_of_torch_has_its_place() -> None:
    places: Counter[str] = Counter()
    nowhere = set()
    for f in public_functions():
        place = place_of(f)
        places[place] += 1
        if place == "nowhere":
            nowhere.add(info(f).name)
    assert not nowhere, sorted(nowhere)
    assert places["table"] > 900
    assert places["opened"] > 150


def test_a_function_without_a_place_would_be_found() -> None:
    def new_function_of_torch(x: Tensor) -> Tensor:
        return x

    new_function_of_torch.__module__ = "torch.functional"
    assert place_of(new_function_of_torch) == "nowhere"
