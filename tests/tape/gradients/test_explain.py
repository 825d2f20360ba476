"""What `engine.explain()` prints: every site, its method, and costs that add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import dptorch
from dptorch.errors import PrivacyError
from dptorch.tape.gradients.explain import Explanation

# The batches here do not come from the engine's loader, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:a batch did not come from")
B, T, P, D = 4, 8, 5, 3


class Net(nn.Module):
    """A layer at T positions, and one that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused = nn.Linear(D, P), nn.Linear(D, P)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def engine_on(mode: str) -> dptorch.PrivacyEngine:
    return dptorch.PrivacyEngine(
        Net(), sample_rate=1.0, sample_size=B, steps=9, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=1.0, seed=0, clipping_mode=mode, self_check=False,
    )  # fmt: skip


def explained(mode: str) -> Explanation:
    engine = engine_on(mode)
    optimizer = engine.attach(torch.optim.SGD(engine.model.parameters(), lr=0.0))
    engine.model(torch.randn(B, T, D)).square().mean((1, 2)).mean().backward()
    optimizer.step()
    return engine.explain()


def test_without_a_step_there_is_nothing_to_explain() -> None:
    with pytest.raises(PrivacyError, match="one step first"):
        engine_on("auto").explain()


def test_every_parameter_that_took_part_has_a_line() -> None:
    found = explained("BK-ghost")
    assert {s.parameter: s.method.name for s in found.sites} == {
        "layer.weight": "gram",
        "layer.bias": "formed",
    }
    text = str(found)
    for line in ("layer.weight", "layer.bias", "gram: norm from Gram", "formed: it is small"):
        assert line in text
    assert "unused" not in text
    assert "one backward pass" in text


@pytest.mark.parametrize(
    ("mode", "norm", "total"),
    [
        # Two Gram matrices of T x T for each example; the sum is one product over all positions.
        ("BK-ghost", 2 * B * T * T * (P + D), 2 * B * T * P * D),
        # The gradient formed; its weighted sum then costs a product of [B] with [B, P * D].
        ("non-ghost", 2 * B * T * P * D, 2 * B * P * D),
    ],
)
def test_costs_are_the_papers(mode: str, norm: int, total: int) -> None:
    found = explained(mode)
    method = next(s.method for s in found.sites if s.parameter == "layer.weight")
    assert (method.norm_flops, method.sum_flops) == (norm, total)
    assert found.flops == sum(s.method.norm_flops + s.method.sum_flops for s in found.sites)


def test_two_passes_keep_nothing() -> None:
    one, two = explained("BK-ghost"), explained("ghost")
    assert (one.two_passes, two.two_passes) == (False, True)
    assert one.kept_bytes > 0
    assert two.kept_bytes == 0
    assert "two backward passes" in str(two)
