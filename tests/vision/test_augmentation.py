"""Augmentation multiplicity: one record is its views, and the views are what they are said to be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.randomness import RootKey
from dptorch.vision.augmentation import Augmentation, Views
from tests.oracles.loop import norms_of, one_example_loop, relative_error

K, ROWS, C = 3, 6, 0.05


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3)
    )


def drawing() -> Augmentation:
    return Augmentation("flip-crop", K, RootKey.from_seed(4))


def losses_of(outputs_BKL: Tensor, y: Tensor) -> Tensor:
    return torch.stack(
        [F.cross_entropy(outputs_BKL[:, k], y, reduction="none") for k in range(K)], 1
    ).mean(1)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 1, 8, 8, generator=drawn)
    return x, torch.randint(0, 3, (ROWS,), generator=drawn)


def clipped_mean(gradients: dict[str, Tensor], rows: int) -> Tensor:
    shares = (C / norms_of(gradients)).clamp(max=1)
    return torch.cat([torch.tensordot(shares, g, 1).flatten() / rows for g in gradients.values()])


def stepped(data: tuple[Tensor, Tensor], loss: Any) -> Tensor:
    """The gradient of one step over all rows without noise, through the engine."""
    model = Views(network())
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=ROWS, steps=1, noise_multiplier=0.0, target_delta=1e-3,
        max_grad_norm=C, seed=0,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=0.0))
    for x, y in engine.loader(torch.utils.data.TensorDataset(*data)):
        loss(model, x, y).backward()
        optimizer.step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_step_is_the_clipped_mean_over_the_views_of_each_example(
    data: tuple[Tensor, Tensor],
) -> None:
    draw = drawing()
    found = stepped(data, lambda model, x, y: losses_of(model(draw(x, 0)), y).mean())
    views = drawing()(data[0], 0)
    truth = one_example_loop(
        Views(network()), (views, data[1]), lambda model, v, y: losses_of(model(v), y)
    )
    assert float(norms_of(truth).min()) > C  # every one is clipped
    assert relative_error(found, clipped_mean(truth, ROWS)) < 1e-5
    # The broken twin clips each view by itself, as if it were a record of its own.
    single = one_example_loop(
        network(),
        (views.flatten(0, 1), data[1].repeat_interleave(K)),
        lambda model, v, y: F.cross_entropy(model(v), y, reduction="none"),
    )
    assert relative_error(clipped_mean(single, ROWS * K), clipped_mean(truth, ROWS)) > 0.05


def test_views_as_rows_of_their_own_are_refused(data: tuple[Tensor, Tensor]) -> None:
    draw = drawing()
    with pytest.raises(PrivacyError, match="augmented views of an example go on an axis"):
        stepped(
            data,
            lambda model, x, y: F.cross_entropy(
                model(draw(x, 0).flatten(0, 1)), y.repeat_interleave(K)
            ),
        )


def test_a_view_is_a_piece_of_its_own_picture(data: tuple[Tensor, Tensor]) -> None:
    x = data[0]
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    pieces = [padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    pieces += [piece.flip(-1) for piece in pieces]
    views = drawing()(x, 0)
    for b in range(ROWS):
        for k in range(K):
            assert any(torch.equal(views[b, k], piece[b]) for piece in pieces)
    assert len({views[0, k].numpy().tobytes() for k in range(K)}) > 1
    flips = Augmentation("flip", 8, RootKey.from_seed(0))(x, 0)
    assert {bool(torch.equal(flips[b, k], x[b])) for b in range(ROWS) for k in range(8)} == {
        True, False
    }  # fmt: skip


def test_draws_are_of_the_key_the_step_and_the_part(data: tuple[Tensor, Tensor]) -> None:
    x = data[0]
    draw = drawing()
    first, second, later = draw(x, 0), draw(x, 0), draw(x, 1)
    assert not torch.equal(first, second)
    assert not torch.equal(first, later)
    resumed = Augmentation("flip-crop", K)
    assert not torch.equal(resumed(x, 0), first)  # a key of its own, from the system
    resumed.load_state_dict(draw.state_dict())
    assert torch.equal(resumed(x, 1), later)


@pytest.mark.parametrize(
    ("kind", "views", "message"),
    [
        ("none", 2, "2 times the same"),
        ("flip", 0, "expected 1 or more"),
        ("flop", 1, "mean 'flip'"),
    ],
)
def test_what_makes_no_sense_is_refused(kind: str, views: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Augmentation(kind, views)
