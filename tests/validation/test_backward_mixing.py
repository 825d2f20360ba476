"""Probing the backward finds what mixes there, and leaves the model as it was."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dptorch.errors import ExamplesMixError
from dptorch.validation.backward_mixing import find_backward_mixing


class Hooked(nn.Module):
    """A counter, dropout, and a hook that scales gradients by those of all examples."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.linear, self.drop, self.mixes = nn.Linear(3, 2), nn.Dropout(), mixes
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = self.linear(x)
        h.register_hook(lambda g: g / g.norm() if self.mixes else 0.5 * g)
        return self.drop(h)


def test_probing_the_backward_leaves_everything_as_it_was() -> None:
    for mixes in (False, True):
        model = Hooked(mixes)
        parameters = dict(model.named_parameters())
        before = {name: t.clone() for name, t in model.state_dict().items()}
        state, x = torch.get_rng_state(), torch.randn(6, 3)
        after_draw = torch.get_rng_state()
        if mixes:
            with pytest.raises(ExamplesMixError):
                find_backward_mixing(model, (x,), {}, 0, parameters)
        else:
            assert find_backward_mixing(model, (x,), {}, 0, parameters) is False
        assert torch.equal(torch.get_rng_state(), after_draw)
        assert not torch.equal(state, after_draw), "the twin: a draw is seen"
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in parameters.values())
        assert model.training


class Returns(nn.Module):
    """Returns the loss over all examples, or their losses; a hook on a node of the graph, set where
    no recording sees it, scales gradients."""

    def __init__(self, returns: str, mixes: bool) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(7, 3), nn.Linear(3, 2)
        self.returns, self.mixes = returns, mixes

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
        h = self.linear(x if x.is_floating_point() else self.embed(x)) * 1.0
        with torch._C.DisableTorchFunction():
            assert h.grad_fn is not None
            hook = (lambda g: (g[0] / g[0].norm(),)) if self.mixes else (lambda g: (0.5 * g[0],))
            h.grad_fn.register_prehook(hook)
        each = F.cross_entropy(h, y, reduction="none")
        losses = {"none": each, "mean": each.mean(), "sum": each.sum()}
        return losses[self.returns] if self.returns in losses else {"loss": each.mean()}


@pytest.mark.parametrize("returns", ["none", "mean", "sum", "a dictionary"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("mixes", [False, True])
def test_losses_that_a_model_returns_are_probed(returns: str, ids: bool, mixes: bool) -> None:
    torch.manual_seed(0)
    model = Returns(returns, mixes)
    x = torch.tensor([1, 4, 2, 6]) if ids else torch.randn(4, 3)
    arguments = {"x": x, "y": torch.tensor([0, 1, 1, 0])}
    parameters = dict(model.named_parameters())
    if not ids:
        del parameters["embed.weight"]
    assert find_backward_mixing(model, (), arguments, 0, parameters) is mixes
