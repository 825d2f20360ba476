"""Half precision and a mean loss: the number of rows, which is secret, is in no example's gradient.

All rows are equal, so that whatever rounding the number of rows brings adds up over all of them.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.errors import PrivacyError
from dptorch.sampling import PhysicalBatch
from dptorch.tape import Tape

ROWS = 4100
KINDS = ("bfloat16", "float16", "autocast")
LOSSES = {
    "cross_entropy": lambda out, y: F.cross_entropy(out, y),
    "mean": lambda out, y: F.cross_entropy(out, y, reduction="none").mean(),
    "mse_loss": lambda out, y: F.mse_loss(out, torch.ones_like(out)),
    "own mean": lambda out, y: out.square().mean(),
    "float sum": lambda out, y: F.cross_entropy(out.float(), y, reduction="sum") / len(out),
}


def clipped_sum(
    rows: int, kind: str, loss: str, bound: float, part: PhysicalBatch | None = None
) -> tuple[Tensor, float]:
    """The clipped sum of a step on equal rows, and the norm of one row's gradient."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 3))
    x = torch.randn(1, 32).repeat(rows, 1)
    autocast: Any = nullcontext()
    if kind == "autocast":
        autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    else:
        model, x = model.to(getattr(torch, kind)), x.to(getattr(torch, kind))
    engine = dptorch.PrivacyEngine(
        model, batch_size=4096, sample_size=100_000, steps=5, noise_multiplier=0.0,
        max_grad_norm=bound, target_delta=1e-6, seed=1, self_check=False,
    )  # fmt: skip
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    if part is not None:
        engine.begin_physical_batch(part)
    with autocast:
        value = LOSSES[loss](model(x), torch.zeros(rows, dtype=torch.long))
    value.backward()
    engine._batch.add_pending()
    values = engine._batch.pop_sum().values
    assert engine.diagnostics is not None
    return torch.cat([v.double().flatten() for v in values.values()]), engine.diagnostics.mean_norm


def sensitivity(kind: str, loss: str, *, own_loader: bool = True) -> float:
    """|S(n) - S(n - 1)| / C for the worst of some n, with a bound just above a row's norm."""
    _, norm = clipped_sum(ROWS, kind, loss, 1e9)
    bound, worst = 1.005 * norm, 0.0
    for n in (ROWS, ROWS + 7, ROWS + 20):
        more, less = (
            clipped_sum(m, kind, loss, bound, None if own_loader else PhysicalBatch(0, 0, 1, m, 0))[
                0
            ]
            for m in (n, n - 1)
        )
        worst = max(worst, float((more - less).norm()) / bound)
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_moves_the_sum_by_its_own_gradient(kind: str, loss: str) -> None:
    assert sensitivity(kind, loss) <= 1.001


def test_the_engines_own_batches_are_no_different() -> None:
    assert sensitivity("autocast", "cross_entropy", own_loader=False) <= 1.001


@pytest.mark.parametrize("kind", KINDS)
def test_dividing_by_the_rows_and_multiplying_again_is_caught(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin: gradients of the mean, multiplied by the number of rows afterwards."""
    plain = Tape.begin_backward
    monkeypatch.setattr(Tape, "begin_backward", lambda self: plain(self) * 0 + 1)
    assert sensitivity(kind, "own mean") > 1.5


def test_a_mean_that_was_taken_in_half_precision_is_refused() -> None:
    model = nn.Linear(4, 2).bfloat16()
    engine = dptorch.PrivacyEngine(
        model, batch_size=8, sample_size=100, steps=5, noise_multiplier=1.0, target_delta=1e-3
    )
    engine.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(8, 4).bfloat16()
    with pytest.raises(PrivacyError, match=r"the mean loss is a torch\.bfloat16 number"):
        (model(x).square().sum() / len(x)).backward()
    with pytest.raises(PrivacyError, match="float32"):
        F.cross_entropy(model(x), torch.zeros(8, dtype=torch.long)).bfloat16().backward()


def test_activations_of_the_model_keep_their_type() -> None:
    """Means over an example's own positions are not touched, nor is inference."""
    seen: list[torch.dtype] = []

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            pooled = self.layer(x).mean(1)
            seen.append(pooled.dtype)
            return pooled

    model = Pooled().bfloat16()
    dptorch.PrivacyEngine(
        model, batch_size=8, sample_size=100, steps=5, noise_multiplier=1.0, target_delta=1e-3
    )
    x = torch.randn(8, 3, 4).bfloat16()
    assert F.mse_loss(model(x), torch.zeros(8, 2).bfloat16()).dtype is torch.float32
    with torch.no_grad():
        assert F.mse_loss(model(x), torch.zeros(8, 2).bfloat16()).dtype is torch.bfloat16
    assert set(seen) == {torch.bfloat16}
