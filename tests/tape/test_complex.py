"""Complex numbers inside a model: norms and sums are those of a loop over examples, in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.tape.gradients import dense
from dptorch.tape.gradients.clipping_modes import MODES

B, D = 6, 6
Use = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """`use` of real parameters and a complex input, then a real layer."""

    def __init__(self, use: Use, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.use = use
        for name, shape in shapes.items():
            dtype = torch.complex128 if name == "z" else torch.float64
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, dtype=dtype)))
        self.head = nn.Linear(D, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.use(self, torch.complex(x, x.roll(1, 1)))
        out: Tensor = self.head(h.real.reshape(len(x), -1)[:, :D])
        return out


def c(w: Tensor) -> Tensor:
    return torch.view_as_complex(w)


USES: dict[str, tuple[Use, dict[str, tuple[int, ...]]]] = {
    "real factor": (lambda m, x: x * m.w, {"w": (D,)}),
    "real term, squared": (lambda m, x: (x + m.w) ** 2, {"w": (D,)}),
    "factor": (lambda m, x: x * c(m.w), {"w": (D, 2)}),
    "factor of real numbers": (lambda m, x: x.real * c(m.w) * (1 + 2j), {"w": (D, 2)}),
    "complex leaf": (lambda m, x: x * m.z, {"z": (D,)}),
    "leaf in a linear layer": (lambda m, x: F.linear(x, m.z), {"z": (D, D)}),
    "linear": (lambda m, x: F.linear(x, c(m.w)), {"w": (D, D, 2)}),
    "linear of real weights": (lambda m, x: F.linear(x, m.w + 0j), {"w": (D, D)}),
    "matmul": (lambda m, x: x @ c(m.w) * (1 - 1j), {"w": (D, D, 2)}),
    "einsum": (lambda m, x: torch.einsum("bi,ij->bj", x, c(m.w)) * 1j, {"w": (D, D, 2)}),
    "spectral layer": (
        lambda m, x: torch.fft.irfft(
            torch.einsum("bik,iok->bok", torch.fft.rfft(x.real.reshape(len(x), 2, 3)), c(m.w)), n=3
        ),
        {"w": (2, 2, 2, 2)},
    ),
    "convolution": (lambda m, x: F.conv1d(x[:, None], c(m.w)), {"w": (2, 1, 3, 2)}),
    "conjugate": (lambda m, x: x * c(m.w).conj(), {"w": (D, 2)}),
    "modulus and angle": (lambda m, x: x * c(m.w).abs() + c(m.w).angle(), {"w": (D, 2)}),
    "polar": (lambda m, x: x * torch.polar(m.w, m.v), {"w": (D,), "v": (D,)}),
    "exponential": (lambda m, x: x * torch.exp(1j * m.w), {"w": (D,)}),
    "of two parts": (lambda m, x: x * torch.complex(m.w, m.v), {"w": (D,), "v": (D,)}),
    "transformed": (
        lambda m, x: torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(m.w)),
        {"w": (D,)},
    ),
}


def errors(name: str, mode: str) -> tuple[float, float]:
    """The errors of norms and of a weighted sum, relative to the largest of a loop."""
    torch.manual_seed(0)
    model = Model(*USES[name])
    x, y = 2 * torch.randn(B, D, dtype=torch.float64), torch.randint(0, 2, (B,))
    parameters = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), parameters.values())
        for i in range(B)
    ]
    truth = {n: torch.stack(g) for n, g in zip(parameters, zip(*rows, strict=True), strict=True)}
    norms = sum(g.abs().square().flatten(1).sum(1) for g in truth.values()).sqrt()
    weights = torch.linspace(0.1, 1, B, dtype=torch.float64)
    with dptorch.record(model, mode=mode) as tape:
        loss = F.cross_entropy(model(x), y, reduction="sum")
    loss.backward()
    found = tape.norms()
    total = tape.clipped_sum(weights)
    sums = [
        (torch.tensordot(weights.to(g.dtype), g, 1) - total[n]).abs().max()
        for n, g in truth.items()
    ]
    return float((found - norms).abs().max() / norms.max()), float(max(sums) / norms.max())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "non-private"])
@pytest.mark.parametrize("name", USES)
def test_complex_numbers_are_exact(name: str, mode: str) -> None:
    assert max(errors(name, mode)) < 1e-13


def test_dropping_imaginary_parts_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken twin: forms of real numbers, whatever comes in."""
    monkeypatch.setattr(dense, "at_least_float32", lambda t: t.real if t.is_complex() else t)
    assert max(errors("factor", "auto")) > 0.05


def test_products_without_conjugates_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken twin: the rule of real matrices. Norms hide it, sums do not."""
    plain = Tensor.is_complex
    monkeypatch.setattr(Tensor, "is_complex", lambda t: t.dim() > 2 and plain(t))
    norm, total = errors("linear", "auto")
    assert norm < 1e-13
    assert total > 0.05
