"""Values that leave a forward pass for Python: each way is refused; its twin shows what it would do.

Every program computes something else for all examples once one of them is large. Its twin is the same
program inside `trusted_reads`, the promise that nothing of the kind happens: the promise is broken, and
one example moves the step by many times the clipping norm.
"""

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.errors import PrivacyError, PrivacyWarning
from dptorch.tape.recording import batches as recorded
from dptorch.tape.recording import patches
from tests.engine.legitimate import models
from tests.engine.setup import make_engine

B, C = 12, 0.05
pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")
Program = Callable[[nn.Module, Tensor], Tensor]


class Model(nn.Module):
    """Two layers, and a program between them."""

    def __init__(self, program: Program, *, trusted: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.program, self.trusted, self.kept = program, trusted, 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        with dptorch.tape.trusted_reads() if self.trusted else nullcontext():
            h = self.program(self, h)
        return self.b(h.tanh())


def batches() -> tuple[Tensor, Tensor]:
    """Two batches of examples that are nearly alike; the first of the second is large."""
    torch.manual_seed(0)
    alike = torch.randn(1, 6).repeat(B, 1)
    large = alike.clone()
    large[0] *= 1e4
    return alike + 0.1 * torch.randn(B, 6), large


def last_sum(program: Program, *, without: bool, trusted: bool, one_by_one: bool) -> Tensor:
    """The sum of the second step, with or without its large example."""
    torch.manual_seed(1)
    model = Model(program, trusted=trusted).double()
    engine = dptorch.PrivacyEngine(
        model,
        batch_size=8,
        sample_size=1000,
        steps=5,
        noise_multiplier=1e-9,
        max_grad_norm=C,
        target_delta=1e-5,
        self_check=False,
        seed=1,
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    found = torch.zeros(0)
    for i, x in enumerate(batches()):
        rows = x[1:] if without and i else x
        parts = rows.split(1 if one_by_one else B)
        for j, part in enumerate(parts):
            labels = torch.zeros(len(part), dtype=torch.long)
            F.cross_entropy(model(part.double()), labels).backward()
            if j < len(parts) - 1:
                optimizer.virtual_step()
        optimizer.step()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        optimizer.zero_grad()
    return found * 8


def sensitivity(program: Program, *, trusted: bool = False, one_by_one: bool = False) -> float:
    """How many clipping norms the large example moves the second step by."""
    with_it, without_it = (
        last_sum(program, without=without, trusted=trusted, one_by_one=one_by_one)
        for without in (False, True)
    )
    return float((with_it - without_it).norm()) / C


def decide(test: Callable[[Tensor], Any]) -> Program:
    """Scale everything down if the test says so."""
    return lambda model, h: -h * 1e-3 if test(h) else h


def huge(h: Tensor) -> Tensor:
    return h.abs() > 1e3


def count(h: Tensor) -> Tensor:
    """0 or 1."""
    return huge(h).any().long()


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda h: h.abs().max().item() > 1e3,
    "a number of one row": lambda h: any(abs(h[i, 0].item()) > 1e3 for i in range(h.shape[0])),
    "a list of rows": lambda h: max(map(abs, h.flatten().tolist())) > 1e3,
    "numpy": lambda h: np.abs(h.detach().numpy()).max() > 1e3,
    "an array": lambda h: np.abs(np.asarray(h.detach())).max() > 1e3,
    "a text": lambda h: float(f"{h.detach().abs().max()}") > 1e3,
    "a printed tensor": lambda h: "e+" in str(h.detach()),
    "the core's read": lambda h: torch.ops.aten._local_scalar_dense(h.detach().max()) > 1e3,
    "the core's comparison": lambda h: not torch.ops.aten.equal(h, h.clamp(-1e3, 1e3)),
    "DLPack": lambda h: np.abs(np.from_dlpack(h.detach())).max() > 1e3,
    "DLPack without asking": lambda h: (
        torch.from_dlpack(torch.utils.dlpack.to_dlpack(h.detach())).numpy().max() > 1e3
    ),
    "storage": lambda h: (
        max(map(abs, h.detach().untyped_storage().tolist())) > 0
        and max(map(abs, h.detach().tolist()[0])) > 1e3
    ),
    "a copy": lambda h: copy.copy(h.detach()).abs().max() > 1e3,
    "an index of a list": lambda h: [False, True][count(h)],
    "elements picked": lambda h: h[huge(h)].numel() > 0,
    "rows picked": lambda h: h[huge(h).any(1)].shape[0] > 0,
    "rows picked, len": lambda h: len(h[huge(h).any(1)]) > 0,
    "picked and computed with": lambda h: (h[huge(h)] * 2 + 1).size(0) > 0,
    "nonzero": lambda h: huge(h).nonzero().shape[0] > 0,
    "where": lambda h: torch.where(huge(h))[0].numel() > 0,
    "masked_select": lambda h: h.masked_select(huge(h)).numel() > 0,
    "unique": lambda h: huge(h).unique().numel() > 1,
    "bincount": lambda h: huge(h).flatten().long().bincount().numel() > 1,
    "sparse": lambda h: huge(h).double().to_sparse()._nnz() > 0,
    "bytes": lambda h: h[huge(h)].nbytes > 0,
    "a shape": lambda h: h[huge(h)].shape != (0,),
    "a shape's text": lambda h: "0" not in str(h[huge(h)].shape),
    "rows one by one": lambda h: any(True for _ in huge(h).nonzero()),
    "zeros of that size": lambda h: torch.zeros(h[huge(h)].shape[0]).numel() > 0,
    "a size given by a tensor": lambda h: torch.ones(count(h)).shape[0] > 0,
    "an end given by a tensor": lambda h: torch.ones(2)[: count(h)].shape[0] > 0,
    "a new tensor's size": lambda h: h.new_ones(count(h)).shape[0] > 0,
}


@torch.jit.script
def scripted(h: Tensor) -> bool:
    return bool((h.abs().max() > 1e3).item())


@torch.library.custom_op("dptorch_tests::count_huge", mutates_args=())
def count_huge(h: Tensor) -> int:
    return int((h.abs() > 1e3).sum())


def _in_a_thread(h: Tensor) -> bool:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(bool(h.detach().abs().max() > 1e3)))
    thread.start()
    thread.join()
    return found[0]


pool = ThreadPoolExecutor(1)
OF_TORCH = (RuntimeError, IndexError)


def fails(
    function: Callable[[Tensor], Any],
    error: type[Exception] | tuple[type[Exception], ...] = OF_TORCH,
) -> Callable[[Tensor], bool]:
    """Whether a function of a tensor fails."""

    def test(h: Tensor) -> bool:
        try:
            function(h)
        except error:
            return True
        return False

    return test


READS |= {
    "TorchScript": scripted,
    "a custom op": count_huge,
    "another thread": _in_a_thread,
    "a thread of a pool": lambda h: pool.submit(lambda: bool(h.max() > 1e3)).result(),
    "a factorisation that fails": fails(
        lambda h: torch.linalg.cholesky(torch.eye(2).double() * (1e3 - h.detach().abs().max()))
    ),
    "an index that fails": fails(lambda h: torch.zeros(4)[count(h) * 7]),
    "an asynchronous assertion": fails(lambda h: torch._assert_async(~huge(h).any())),
    "a view that fails": fails(lambda h: h[huge(h)].view(0)),
}


class Own(Tensor):
    """A tensor of a class of one's own."""


def _each(h: Tensor) -> bool:
    seen: list[float] = []
    h.detach().clone().apply_(lambda v: seen.append(v) or v)  # type: ignore[func-returns-value]
    return max(map(abs, seen)) > 1e3


READS |= {
    "another class": lambda h: h.detach().as_subclass(Own).abs().max() > 1e3,
    "a function of each element": _each,
    "a distribution that refuses": fails(
        # torch.compile turns the validation off for the whole process.
        lambda h: torch.distributions.Normal(0.0, 1e3 - h.detach().abs().max(), validate_args=True),
        ValueError,
    ),
    "a norm that refuses": fails(
        lambda h: nn.utils.get_total_norm(
            [torch.where(huge(h), torch.inf, h)], error_if_nonfinite=True
        )
    ),
    "another tensor's size": lambda h: not torch.ones(0).is_same_size(h[huge(h)]),
    "a size that both broadcast to": lambda h: (
        torch.broadcast_shapes(h[huge(h)].shape, (1,))[0] > 0
    ),
    "the hash of a size": lambda h: hash(h[huge(h)].shape[0]) > 0,
    "a tensor resized": lambda h: torch.empty(0).resize_(h[huge(h)].shape[0]).numel() > 0,
    "packed sequences": lambda h: (
        nn.utils.rnn.pack_padded_sequence(
            torch.ones(len(h), 2, 1), huge(h).any(1).long() + 1, True, False
        ).data.shape[0]
        > len(h)
    ),
}


@pytest.mark.parametrize("name", READS)
def test_what_leaves_for_python_is_refused(name: str) -> None:
    with pytest.raises(PrivacyError, match=r"trusted_reads"):
        sensitivity(decide(READS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", READS)
def test_the_twin_would_break_the_promise(name: str) -> None:
    assert sensitivity(decide(READS[name]), trusted=True) > 5


def _keep(read: Callable[[Tensor], float]) -> Program:
    def program(model: nn.Module, h: Tensor) -> Tensor:
        assert isinstance(model, Model)
        before, model.kept = model.kept, max(model.kept, read(h))
        return -h * 1e-3 if before > 1e3 else h

    return program


KEPT: dict[str, Callable[[Tensor], float]] = {
    "item": lambda h: h.abs().max().item(),
    "float": lambda h: float(h.abs().max()),
    "numpy": lambda h: float(np.abs(h.detach().numpy()).max()),
    "text": lambda h: float(f"{h.detach().abs().max()}"),
    "truth": lambda h: 1e6 if h.abs().max() > 1e3 else 0.0,
    "size": lambda h: 1e4 * h[huge(h)].numel(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_what_one_row_leaves_for_the_next_is_refused(name: str) -> None:
    program = _keep(KEPT[name])
    with pytest.raises(PrivacyError, match=r"test_reads\.py, line \d+: .*trusted_reads"):
        sensitivity(program, one_by_one=True)
    assert sensitivity(program, trusted=True, one_by_one=True) > 5


VALUES: dict[str, Program] = {
    "a size as a divisor": lambda m, h: h / (1 + 1000 * h[huge(h)].shape[0]),
    "ones of that size": lambda m, h: h / (1 + 1000 * torch.ones(h[huge(h)].shape[0]).sum()),
    "a range of that size": lambda m, h: h / (1 + 1000 * torch.arange(h[huge(h)].shape[0] + 1)[-1]),
    "the first rows picked": lambda m, h: h + h[h[:, 0] > h[:, 1]][:1].sum(),
}


@pytest.mark.parametrize("name", VALUES)
def test_sizes_do_not_become_values(name: str) -> None:
    with pytest.raises(PrivacyError):
        sensitivity(VALUES[name])


def test_a_size_keeps_its_origin_through_arithmetic() -> None:
    def program(model: nn.Module, h: Tensor) -> Tensor:
        n = h[huge(h)].shape[0]
        return h * (2 * (n + 3) // 2 - n - 2)

    with pytest.raises(PrivacyError):
        sensitivity(program)


def _node(model: nn.Module, h: Tensor) -> Tensor:
    h, z = h * 1, h.detach()
    assert h.grad_fn is not None
    h.grad_fn.register_prehook(lambda g: (g[0] * 1e-3,) if (z.abs() > 1e3).any() else g)
    return h


def _node_behind(model: nn.Module, h: Tensor) -> Tensor:
    z = h * 1
    assert z.grad_fn is not None
    z.grad_fn.next_functions[0][0].register_prehook(lambda g: (g[0] / g[0].norm(),))
    return z


def _saved_hooks(model: nn.Module, h: Tensor) -> Tensor:
    def unpack(t: Tensor) -> Tensor:
        return t * 1e-3 if (t.abs() > 1e3).any() else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        return torch.sin(h) * h


@pytest.mark.parametrize("program", [_node, _node_behind, _saved_hooks])
def test_hooks_that_nothing_follows_are_refused(program: Program) -> None:
    with pytest.raises(PrivacyError, match=r"test_reads\.py, line \d+"):
        sensitivity(program)


def test_saved_tensor_hooks_around_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_latest", None)  # of an earlier refusal, whose step never ended
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        pytest.raises(PrivacyError, match="saved_tensors_hooks"),
    ):
        sensitivity(lambda m, h: h)
    with torch.autograd.graph.save_on_cpu():
        assert sensitivity(lambda m, h: h) < 1.01


@pytest.mark.parametrize("hook", [lambda g: g * 0.5, lambda g: g.mul_(0.5)])
def test_hooks_on_a_loss_may_look_and_not_change(hook: Callable[[Tensor], Any]) -> None:
    def backward(hook: Callable[[Tensor], Any]) -> list[float]:
        seen: list[float] = []
        model = Model(lambda m, h: h)
        dptorch.PrivacyEngine(
            model, batch_size=8, sample_size=100, steps=5, noise_multiplier=1.0, target_delta=1e-5
        ).attach(torch.optim.SGD(model.parameters(), 0.1))
        loss = F.cross_entropy(model(torch.randn(4, 6)), torch.zeros(4, dtype=torch.long))
        loss.register_hook(lambda g: seen.append(g.item()))
        loss.register_hook(hook)
        loss.backward()
        return seen

    with pytest.raises(PrivacyError, match="hook on a loss"):
        backward(hook)
    assert len(backward(lambda g: None)) == 1


def test_nested_tensors_are_refused() -> None:
    def program(model: nn.Module, h: Tensor) -> Tensor:
        nested = torch.nested.nested_tensor([row[row.abs() > 1e3] for row in h.detach()])
        return -h * 1e-3 if nested.numel() else h

    with pytest.raises(PrivacyError, match="nested tensor"):
        sensitivity(program)
    assert sensitivity(program, trusted=True) > 5


def test_a_swallowed_refusal_is_raised_at_the_end() -> None:
    def program(model: nn.Module, h: Tensor) -> Tensor:
        try:
            return h * h.abs().max().item()
        except Exception:
            return h

    with pytest.raises(PrivacyError, match="'item'"):
        sensitivity(program)


def _experts(model: nn.Module, h: Tensor) -> Tensor:
    """A mixture of two experts, by the size of what each gets."""
    out = torch.zeros_like(h)
    chosen = h.detach().argmax(1) % 2
    for expert in range(2):
        rows = torch.where(chosen == expert)[0]
        mine = h[rows].reshape(rows.shape[0], 2, 4)
        out = out.index_add(0, rows, mine.reshape(-1, 8) * (expert + 1))
    return out


def _tokens(model: nn.Module, h: Tensor) -> Tensor:
    """Padding left out and put back."""
    tokens = h.view(h.shape[0], 2, 4)
    real = tokens.detach().abs().sum(2) > 0.1
    packed = tokens[real]
    packed = packed.view(packed.shape[0], 1, 4).squeeze(1) * 2
    out = torch.zeros_like(tokens)
    out[real] = packed
    return out.flatten(1)


def _tries(model: nn.Module, h: Tensor) -> Tensor:
    try:
        return h.no_such_method()  # type: ignore[no-any-return,operator]
    except AttributeError:
        return h * 1


LEGITIMATE: dict[str, Program] = {
    "shapes of the batch": lambda m, h: h.reshape(h.shape[0], -1, 4).flatten(1) / h.size(1) ** 0.5,
    "descriptions": lambda m, h: h if h.dtype.is_floating_point and h.dim() == 2 else h * 0,
    "a mixture of experts": _experts,
    "tokens without padding": _tokens,
    "a missing function": _tries,
    "a constant read": lambda m, h: h * torch.arange(3).max().item(),
    "a parameter read": lambda m, h: h * (1 if m.b.weight.abs().max().item() < 1e6 else 2),  # type: ignore[union-attr,operator]
    "a node looked at": lambda m, h: h * 1 if "Add" in str(h.grad_fn) else h * 2,
    "a hook that keeps examples apart": lambda m, h: (h.register_hook(lambda g: g * 0.5), h)[1],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEGITIMATE)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_legitimate_programs_run(name: str, one_by_one: bool) -> None:
    assert sensitivity(LEGITIMATE[name], one_by_one=one_by_one) < 1.01


def test_what_is_asked_beside_the_mode_is_put_back() -> None:
    def parts() -> list[object]:
        return [
            threading.Thread.start,
            ThreadPoolExecutor.submit,
            torch.utils.dlpack.to_dlpack,
            torch.distributions.Distribution.__init__,
            torch.autograd.graph.saved_tensors_hooks.__enter__,
            vars(Tensor).get("as_subclass"),
        ]

    others = patches._depth  # of engines that earlier tests have left on their models
    for _ in range(others):
        patches.unpatch()
    before = parts()
    engine = dptorch.PrivacyEngine(
        Model(lambda m, h: h), batch_size=8, sample_size=100, steps=5, noise_multiplier=1.0,
        target_delta=1e-5,
    )  # fmt: skip
    during = parts()
    engine.detach()
    assert parts() == before
    assert all(a is not b for a, b in zip(during, before, strict=True))
    for _ in range(others):
        patches.patch()


def _read_by(module: str) -> Program:
    """A program that asks whether an example is large, in code of a module of that name."""
    names: dict[str, Any] = {"__name__": module}
    exec("def looks(h):\n    return bool((h > 1e3).any())", names)

    def program(model: nn.Module, h: Tensor) -> Tensor:
        names["looks"](h)
        return h

    return program


@pytest.mark.filterwarnings("error::dptorch.errors.PrivacyWarning")
@pytest.mark.filterwarnings("ignore:a batch did not come:dptorch.errors.PrivacyWarning")
@pytest.mark.filterwarnings("ignore:.*seed:dptorch.errors.PrivacyWarning")
def test_reads_of_library_code_are_warned_of_but_for_those_of_masks() -> None:
    sensitivity(_read_by("transformers.masking_utils"))
    sensitivity(_read_by("anybodys"), trusted=True)  # who calls it has promised
    sensitivity(lambda m, h: h + 0 * torch.distributions.Normal(h, 1.0).mean)  # it checks h
    with pytest.warns(PrivacyWarning, match=r"__bool__\(\) in transformers\.models\.x, 1 time\)"):
        sensitivity(_read_by("transformers.models.x"))
    with pytest.raises(PrivacyError, match="trusted_reads"):
        sensitivity(_read_by("transformers_of_mine"))


@pytest.mark.slow
@pytest.mark.parametrize("make", [models.bert, models.gpt2])
def test_masks_of_transformers_are_not_warned_of(make: Callable[[], nn.Module]) -> None:
    model = make()
    engine = make_engine(model, sample_size=models.N, self_check=True)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    words, mask, _ = next(iter(engine.loader(models._sentences(), max_physical_batch_size=4)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(input_ids=words, attention_mask=mask)
    assert not [w for w in seen if issubclass(w.category, PrivacyWarning)]
