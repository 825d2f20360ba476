"""Probing the backward leaves the model as it was."""

import pytest
import torch
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
