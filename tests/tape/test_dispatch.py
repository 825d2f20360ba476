"""What the recording remembers from one call for the next, and what it leaves out, changes nothing."""

import itertools
import math
import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import one_example_loop
from torch import Tensor, nn

import dptorch
from dptorch.errors import NotCoveredError
from dptorch.tape.provenance import tags as provenance
from dptorch.tape.provenance.calls import each_tensor
from dptorch.tape.provenance.tags import Lost, Tag, owners, tag_after_view
from dptorch.tape.recording.recording import Recording
from dptorch.tape.recording.taps import full_precision, tap


def factorings(n: int) -> Iterator[tuple[int, ...]]:
    """Every shape of up to three dimensions that holds n elements."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    yield (n,)
    for a in divisors:
        yield a, n // a
        yield from ((a, b, n // a // b) for b in divisors if (n // a) % b == 0)


def owner_of_elements(shape: tuple[int, ...], tag: Tag, batch_size: int) -> Tensor:
    assert tag.dim is not None
    own = owners(tag, shape[tag.dim], batch_size)
    return own.view([-1 if i == tag.dim else 1 for i in range(len(shape))]).expand(shape)


def test_views_are_told_apart_by_shape_tag_and_batch_size() -> None:
    """Shuffled, so that every call meets a memory full of its neighbours; by brute force."""
    cases = []
    for shape in factorings(24):
        for dim, step, batch_size in itertools.product(range(len(shape)), (1, 2, 3), (2, 3, 4)):
            if shape[dim] % (step * batch_size) == 0:
                cases += [(shape, Tag(dim, step), new, batch_size) for new in factorings(24)]
    random.Random(0).shuffle(cases)
    found = 0
    for shape, tag, new, batch_size in cases[:4000]:
        owner = owner_of_elements(shape, tag, batch_size).reshape(new)
        varies = [
            i for i in range(len(new)) if not torch.equal(owner, owner.narrow(i, 0, 1).expand(new))
        ]
        try:
            after = tag_after_view(torch.Size(shape), tag, torch.Size(new), batch_size)
        except Lost:
            assert len(varies) > 1, (shape, tag, new, batch_size)
            continue
        found += 1
        assert torch.equal(owner_of_elements(new, after, batch_size), owner)
    assert found > 1000


@pytest.mark.slow
def test_a_memory_of_views_without_the_tag_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: dict[object, Tag] = {}
    right = provenance._regular_after_view

    def wrong(shape: torch.Size, dim: int, step: int, new: torch.Size, n: int) -> Tag:
        return remembered.setdefault((shape, new), right(shape, dim, step, new, n))

    monkeypatch.setattr(provenance, "_regular_after_view", wrong)
    with pytest.raises(AssertionError):
        test_views_are_told_apart_by_shape_tag_and_batch_size()


def test_an_empty_tensor_has_a_place_for_nobody() -> None:
    with pytest.raises(Lost):
        tag_after_view(torch.Size([4, 0, 3]), Tag(0), torch.Size([0, 4]), 4)


class _Kinds(nn.Module):
    """One op name after another, each with a number, a constant, a parameter, an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        rows = torch.arange(1.0, 5.0)
        for _ in range(2):
            x = x * 2 * rows * self.scale * (x + 1) / (2 + rows)
            x = torch.cat([x, x.new_ones(len(x), 1), x * self.scale], 1)[:, :4]
            x = x.view(-1, 2, 2).transpose(1, 2).reshape(len(x), 4)
        return self.b(x)


@pytest.mark.parametrize("batch_sizes", [(3, 5, 1, 4), (4, 1, 5, 3)])
def test_the_same_ops_on_other_operands(batch_sizes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = _Kinds().double()
    for n in batch_sizes:
        x = torch.randn(n, 3, dtype=torch.float64)
        with dptorch.record(model) as tape:
            model(x).square().sum().backward()
        expected = one_example_loop(model, [x], lambda m, x: m(x).square())
        for name, gradient in tape.per_example_gradients().items():
            torch.testing.assert_close(gradient, expected[name])


def test_every_tensor_among_the_arguments_is_found() -> None:
    class Sub(Tensor):
        pass

    t, p, s = torch.ones(1), nn.Parameter(torch.ones(1)), torch.ones(1).as_subclass(Sub)
    args = (1, t, torch.Size([2]), [p, 2.0, (s,)], None, torch.float32, "x", True)
    assert [id(f) for f in each_tensor(args, {"dim": 0, "other": t})] == list(map(id, (t, p, s, t)))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_mean_loss_of_one_position_each_with_ignored_examples(weighted: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, -100, 3, 1, -100])
    weight = torch.rand(4, dtype=torch.float64) if weighted else None
    with dptorch.record(model) as tape:
        loss = F.cross_entropy(model(x), y, weight=weight)
    loss.backward()
    none = F.cross_entropy(model(x), y, weight=weight, reduction="none")
    torch.testing.assert_close(loss.detach(), none.detach().mean())
    expected = one_example_loop(
        model, [x, y], lambda m, x, y: F.cross_entropy(m(x), y, weight=weight, reduction="none")
    )
    for name, gradient in tape.per_example_gradients().items():
        torch.testing.assert_close(gradient * len(x), expected[name])


def test_a_tap_inside_torch_func_is_refused() -> None:
    handle = torch.zeros(0, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return tap([x * 2], [], handle, lambda grads, saved: None)[0].sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(function)(torch.ones(3))

    model = nn.Linear(3, 3)
    recording = Recording(model)
    x = recording.tag_batch(torch.randn(4, 3))
    with (
        recording,
        pytest.raises((RuntimeError, NotCoveredError), match=r"setup_context|torch\.func"),
    ):
        torch.vmap(lambda row: model(x) + row)(torch.ones(2, 3))


def test_what_a_tap_computes_builds_no_graph_and_ignores_autocast() -> None:
    handle = torch.zeros(0, requires_grad=True)
    seen: list[Tensor] = []

    def on_gradient(grads: object, saved: object) -> None:
        x = torch.ones(2, 2, requires_grad=True)
        seen.append(x @ x)

    (out,) = tap([torch.ones(2, requires_grad=True) * 2], [], handle, on_gradient)
    with torch.autocast("cpu", torch.bfloat16):
        out.sum().backward()
        with full_precision():
            seen.append(torch.ones(2, 2) @ torch.ones(2, 2))
    assert [t.requires_grad for t in seen] == [False, False]
    assert [t.dtype for t in seen] == [torch.float32] * 2
    assert math.isclose(seen[0].sum().item(), 8)
