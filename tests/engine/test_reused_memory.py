"""The memory of a batch is written to between backward() and the step: norms and sums stay of the same
numbers. Each way to write is one that torch's version counter does not see, or does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.compat.fastdp import PrivacyEngine as FastDP
from dptorch.engine import logical_batch
from dptorch.errors import PrivacyError

B, BOUND = 16, 0.1
MODES = ("auto", "BK-ghost", "BK-MixOpt", "non-ghost", "ghost")

Write = Callable[[Tensor, Any], object]
WRITES: dict[str, Write] = {
    "in place": lambda x, _: x.mul_(1000),
    "data": lambda x, _: x.data.mul_(1000),
    "detach": lambda x, _: x.detach().mul_(1000),
    "numpy": lambda _, buffer: np.multiply(buffer, 1000, out=buffer),
    "copy_": lambda x, _: x.data.copy_(1000 * torch.randn(x.shape)),
}


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.l = nn.Conv1d(1, 4, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.l(self.c(x[:, None]).flatten(1))
        return out


def dense() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def step(
    write: Write,
    *,
    make: Callable[[], nn.Module] = dense,
    retain: bool = False,
    **settings: Any,
) -> Tensor:
    """The sum of a step between whose backward and step the batch was written to."""
    torch.manual_seed(0)
    model = make()
    engine = dptorch.PrivacyEngine(
        model, batch_size=B, sample_size=1000, steps=5, noise_multiplier=0.0, max_grad_norm=BOUND,
        target_delta=1e-5, seed=1, **settings,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    x, y = torch.randn(B, 6), torch.randint(0, 3, (B,))
    F.cross_entropy(model(x), y).backward(retain_graph=retain)
    write(x, x.numpy())
    optimizer.step()
    return torch.cat([(B * p.grad).flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", WRITES)
def test_a_sum_is_of_what_its_norms_were_taken_of(how: str, mode: str) -> None:
    found = step(WRITES[how], clipping_mode=mode)
    assert torch.equal(found, step(lambda x, _: None, clipping_mode=mode))
    assert found.norm() <= B * BOUND * (1 + 1e-5)


@pytest.mark.parametrize("style", ["layer-wise", "param-wise"])
@pytest.mark.parametrize("make", [dense, Convolution])
def test_so_it_is_for_convolutions_and_groups(make: Callable[[], nn.Module], style: str) -> None:
    found = step(WRITES["data"], make=make, clipping_style=style)
    assert torch.equal(found, step(lambda x, _: None, make=make, clipping_style=style))


@pytest.mark.slow
@pytest.mark.parametrize("how", WRITES)
def test_a_write_before_a_second_backward_is_refused(how: str) -> None:
    """A graph that was retained waits for another backward, so its sum is made later."""
    with pytest.raises(PrivacyError, match="changed in place"):
        step(WRITES[how], retain=True)
    assert step(lambda x, _: None, retain=True).norm() > 0


def test_a_permutation_of_the_rows_is_a_change() -> None:
    with pytest.raises(PrivacyError, match="changed in place"):
        step(lambda x, _: x.data.copy_(x.flip(0)), retain=True)


def test_a_write_between_two_backwards_is_refused() -> None:
    model = nn.Linear(6, 3)
    engine = dptorch.PrivacyEngine(
        model,
        batch_size=B,
        sample_size=1000,
        steps=5,
        noise_multiplier=0.0,
        target_delta=1e-5,
        seed=1,
    )
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    x = torch.randn(B, 6)
    loss = model(x).square().mean(1).mean()
    loss.backward(retain_graph=True)
    x.data.mul_(1000)
    with pytest.raises(PrivacyError, match="changed in place"):
        loss.backward()


def test_one_buffer_for_all_parts_of_a_batch() -> None:
    """fastDP's accumulation: two backwards, and the data of both in one numpy buffer."""

    def total(reuse: bool) -> Tensor:
        torch.manual_seed(0)
        data = np.random.default_rng(0).normal(size=(2, B, 6)).astype(np.float32)
        data[1] *= 1000
        buffer = np.zeros((B, 6), np.float32)
        model = dense()
        engine = FastDP(
            model, batch_size=2 * B, sample_size=640, noise_multiplier=0.0, epochs=1,
            max_grad_norm=BOUND, clipping_fn="Abadi", target_delta=1e-5, seed=1,
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        engine.attach(optimizer)
        for part in data:
            buffer[:] = part
            x = torch.from_numpy(buffer if reuse else part.copy())
            F.cross_entropy(model(x), torch.zeros(B, dtype=torch.long)).backward()
        optimizer.step()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(total(True), total(False))


@pytest.mark.parametrize("how", ["data", "numpy", "copy_"])
def test_clipping_at_the_step_adds_up_other_numbers(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: clip when the step is due, as the version counter sees no change."""
    monkeypatch.setattr(
        logical_batch._Listener, "on_backward_end", lambda self, tape, *, retained: None
    )
    assert step(WRITES[how]).norm() > 100 * B * BOUND
