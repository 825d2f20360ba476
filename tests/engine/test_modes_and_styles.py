"""Every clipping mode and style gives the sum that a loop over single examples gives."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.clipping import FUNCTIONS, STYLES, ClippingGroup, coefficients, groups_of, read_style
from dptorch.errors import ConfigurationError, PrivacyError, PrivacyWarning
from dptorch.tape.gradients.clipping_modes import MODES

# The batches here do not come from the engine's loader, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:a batch did not come from")
B, BOUND = 6, 0.7
PRIVATE_MODES = [name for name in MODES if name != "non-private"]


class Everything(nn.Module):
    """Convolutions, a norm, a token table tied to the head, a class token, a derived weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh())
        self.patch = nn.Conv2d(4, 8, 2, 2)
        self.cls = nn.Parameter(torch.randn(8))
        self.table = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.scale = nn.Parameter(torch.rand(8) + 0.5)
        self.unused = nn.Linear(3, 3)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        h = self.patch(self.stem(image)).flatten(2).transpose(1, 2)
        h = torch.cat([h, self.table(ids), self.cls.expand(len(ids), 1, -1)], 1)
        for block in self.blocks:
            h = h + torch.tanh(block(h))
        return F.linear(h, self.table.weight * self.scale.exp())


def case() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    model = Everything().double()
    image = torch.randn(B, 2, 6, 6, dtype=torch.float64)
    return model, (image, torch.randint(0, 11, (B, 5)), torch.randint(0, 11, (B, 15)))


def loss_of(model: nn.Module, image: Tensor, ids: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(model(image, ids).transpose(1, 2), target)


def engine_on(model: nn.Module, **overrides: Any) -> dptorch.PrivacyEngine:
    settings: dict[str, Any] = {
        "sample_rate": 1.0, "sample_size": B, "steps": 10, "noise_multiplier": 0.0,
        "target_delta": 1e-3, "max_grad_norm": BOUND, "seed": 0, "self_check": False,
    }  # fmt: skip
    return dptorch.PrivacyEngine(model, **settings | overrides)


def by_loop(
    model: nn.Module, batch: tuple[Tensor, ...], groups: tuple[ClippingGroup, ...], fn: str
) -> dict[str, Tensor]:
    """What the engine should put into ``.grad``: clip each group of each example, add, divide."""
    names = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in names.items()}
    for i in range(B):
        loss = loss_of(model, *(t[i : i + 1] for t in batch))
        found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
        gradients = {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(names.items(), found, strict=True)
        }
        for group in groups:
            norm = torch.stack([gradients[n].square().sum() for n in group.parameters]).sum().sqrt()
            c = coefficients(norm[None], group.max_grad_norm, fn)[0]
            for n in group.parameters:
                total[n] += c * gradients[n]
    return {n: t / B for n, t in total.items()}


def stepped(model: nn.Module, batch: tuple[Tensor, ...], **settings: Any) -> dict[str, Tensor]:
    """The gradients of one step of the engine."""
    engine = engine_on(model, **settings)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    loss_of(model, *batch).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def groups_for(model: nn.Module, style: Any) -> tuple[ClippingGroup, ...]:
    name, specs = read_style(style)
    return groups_of(model, [n for n, _ in model.named_parameters()], name, specs, BOUND)


NAMED = {"stem*": 0.5, "blocks.0": (0.2), "*": 0.1}
JOINED = {"stem*|blocks.1": 0.5, "*": 0.2}
ALL_STYLES = [*STYLES, ["stem", "blocks.*"], NAMED, JOINED]


@pytest.mark.slow
@pytest.mark.parametrize("style", ALL_STYLES, ids=str)
@pytest.mark.parametrize("mode", PRIVATE_MODES)
def test_every_mode_under_every_style_equals_the_loop(mode: str, style: Any) -> None:
    model, batch = case()
    expected = by_loop(model, batch, groups_for(model, style), "abadi")
    found = stepped(model, batch, clipping_mode=mode, clipping_style=style)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["all-layer", "layer-wise"])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_clipping_functions_apply_to_each_group(fn: str, style: str) -> None:
    model, batch = case()
    expected = by_loop(model, batch, groups_for(model, style), fn)
    found = stepped(model, batch, clipping_fn=fn, clipping_style=style)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


def test_the_styles_differ_so_the_tests_above_can_fail() -> None:
    model, batch = case()
    sums = [
        by_loop(model, batch, groups_for(model, s), "abadi")["table.weight"] for s in ALL_STYLES
    ]
    for i, first in enumerate(sums):
        for second in sums[i + 1 :]:
            assert not torch.allclose(first, second, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("style", ALL_STYLES, ids=str)
def test_one_example_moves_the_sum_by_no_more_than_the_norm_in_every_style(style: Any) -> None:
    model, batch = case()
    groups = groups_for(model, style)
    with torch.no_grad():  # gradients far longer than the norm
        for p in model.parameters():
            p.mul_(5)
    whole = stepped(model, batch, clipping_style=style)
    for p in model.parameters():
        p.grad = None
    # Zero-out: the neighbour's last example has a constant output, hence no gradient.
    first = tuple(t[: B - 1] for t in batch)
    engine = engine_on_detached(model, clipping_style=style)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    loss_of(model, *first).backward()
    optimizer.step()
    total = 0.0
    for group in groups:
        moved = torch.stack(
            [
                (whole[n] - model.get_parameter(n).grad).mul(B).square().sum()
                for n in group.parameters
            ]
        )
        assert moved.sum().sqrt() <= group.max_grad_norm * (1 + 1e-9)
        total += moved.sum().item()
    joint = math.sqrt(sum(g.max_grad_norm**2 for g in groups))
    assert 0.2 * joint < math.sqrt(total) <= joint * (1 + 1e-9)


def engine_on_detached(model: nn.Module, **overrides: Any) -> dptorch.PrivacyEngine:
    from dptorch.tape.recording.model_hooks import hooks_of

    hooks = hooks_of(model)
    assert hooks is not None
    hooks.remove()
    return engine_on(model, **overrides)


@pytest.mark.parametrize("style", ["layer-wise", "param-wise"])
def test_group_wise_styles_keep_nothing_after_the_backward(style: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(4)])
    engine = engine_on(model, clipping_style=style)
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    model(torch.randn(B, 5)).square().mean(1).mean().backward(retain_graph=True)
    [batch] = engine._batch._fired
    assert not list(batch.tape._store)
    assert set(batch.sums) == {n for n, _ in model.named_parameters()}


def test_a_second_backward_through_a_clipped_group_is_refused() -> None:
    model = nn.Linear(3, 2)
    engine = engine_on(model, clipping_style="param-wise")
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(torch.randn(B, 3)).square().mean(1).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward"):
        loss.backward()


def test_a_second_backward_after_two_passes_is_refused() -> None:
    model = nn.Linear(3, 2)
    engine = engine_on(model, clipping_mode="ghost")
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    loss = model(torch.randn(B, 3)).square().mean(1).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(PrivacyError, match="second backward"):
        loss.backward()


def test_a_small_memory_budget_makes_two_passes_and_the_same_gradients() -> None:
    model, batch = case()
    expected = by_loop(model, batch, groups_for(model, "all-layer"), "abadi")
    engine = engine_on(model, memory_budget=1000)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    loss_of(model, *batch).backward()
    optimizer.step()
    assert engine.explain().two_passes
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-12)


def test_non_private_is_ordinary_training_and_says_so() -> None:
    model, batch = case()
    loss_of(model, *batch).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.warns(PrivacyWarning, match="neither clipped nor noised"):
        engine = engine_on(model, clipping_mode="non-private", noise_multiplier=1.0)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    loss_of(model, *batch).backward()
    optimizer.step()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    assert engine.steps_done == 1
    assert engine.get_privacy_spent().epsilon == math.inf
    assert engine.statement().to_dict()["epsilon"] == math.inf


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_non_private_steps_are_on_all_parts_of_a_batch(reduction: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.float64)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randint(0, 2, (5,))
    nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with pytest.warns(PrivacyWarning, match="neither clipped nor noised"):
        engine = engine_on(
            model, clipping_mode="non-private", sample_size=5, loss_reduction=reduction
        )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    data = torch.utils.data.TensorDataset(x, y)
    for part, labels in engine.loader(data, max_physical_batch_size=2):
        nn.functional.cross_entropy(model(part), labels, reduction=reduction).backward()
        optimizer.step()
        if engine.steps_done:
            break
        optimizer.zero_grad()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize(
    ("mode", "passes", "method"),
    [
        ("default", 1, "keep"), ("non-ghost", 1, "keep"), ("ghost", 2, "gram"),
        ("ghost_mixed", 2, "form"), ("MixGhostClip", 2, "form"), ("MixOpt", 1, "keep"),
        ("BK-ghost", 1, "gram"), ("BK-MixGhostClip", 1, "form"), ("BK-MixOpt", 1, "keep"),
    ],
)  # fmt: skip
def test_each_name_does_what_its_paper_says(mode: str, passes: int, method: str) -> None:
    """A layer with 2 T^2 > p d, where the mixed rules form the gradient."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    engine = engine_on(model, clipping_mode=mode)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    model(torch.randn(B, 8, 4)).square().mean((1, 2)).mean().backward()
    optimizer.step()
    explanation = engine.explain()
    assert explanation.two_passes == (passes == 2)
    assert [site.method.name for site in explanation.sites] == [method]


def test_an_unknown_mode_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="BK-MixOpt"):
        engine_on(nn.Linear(2, 2), clipping_mode="BKMixOpt")
    with pytest.raises(ConfigurationError, match="memory_budget"):
        engine_on(nn.Linear(2, 2), memory_budget=-1)
