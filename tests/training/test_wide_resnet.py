"""The wide residual network: weight standardisation by its definition, and exact under the tape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.training.wide_resnet import StandardisedConv2d, WideResNet


def test_weights_are_standardised_in_each_output_channel() -> None:
    torch.manual_seed(0)
    layer = StandardisedConv2d(3, 4, 3, padding=1)
    x = torch.randn(2, 3, 8, 8)
    weight = torch.zeros_like(layer.weight)
    for channel in range(4):
        own = layer.weight[channel]
        weight[channel] = (own - own.mean()) / own.var(correction=0).sqrt() / 27**0.5
    assert torch.allclose(layer(x), F.conv2d(x, weight, layer.bias, padding=1), atol=1e-5)
    with torch.no_grad():
        layer.weight.mul_(3.0).add_(1.0)  # neither scale nor mean of a weight matters
    assert torch.allclose(layer(x), F.conv2d(x, weight, layer.bias, padding=1), atol=1e-4)


def test_its_size_is_the_published_one() -> None:
    with torch.device("meta"):
        network = WideResNet((3, 32, 32), 10)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(2.75e6, rel=0.01)


@pytest.mark.slow
def test_its_gradients_are_those_of_a_loop_over_examples() -> None:
    torch.manual_seed(0)
    network = WideResNet((3, 16, 16), 4, depth=10, width=1)
    batch = (torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    report = dptorch.check(network, batch, lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert report.ok, str(report)


def test_a_depth_of_another_form_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a depth of 10, 16, 22"):
        WideResNet((3, 32, 32), 10, depth=18)
