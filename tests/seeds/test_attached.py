"""The quick starts of fastDP, private-transformers and private_vision, run as they stand."""

import runpy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.compat import fastdp
from dptorch.errors import PrivacyWarning

DOCUMENTS = Path(__file__).parent / "documents"


def images(n: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, 16, 16, generator=draw)
    return x, torch.randint(0, 10, (n,), generator=draw)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def run(document: str, **given: Any) -> dict[str, Any]:
    """What a document's code defines. Its batches are not the engine's: it is told so, once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = runpy.run_path(str(DOCUMENTS / f"{document}.py"), init_globals=given)
    private = [w for w in caught if issubclass(w.category, PrivacyWarning)]
    steps = names["privacy_engine"].steps
    assert len(private) == (steps > 0)
    if steps:
        assert "without amplification" in str(private[0].message)
        assert names["privacy_engine"].get_privacy_spent()["eps_rdp"] > 0
    return names


def moved(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(bool((p != before[n]).any()) for n, p in model.named_parameters())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_fastdp() -> None:
    batch, labels = images(256)
    model = network()
    before = state(model)
    names = run("fastdp", model=model, batch=batch, labels=labels, F=F, SGD=torch.optim.SGD)
    assert names["privacy_engine"].steps == 1
    assert moved(model, before)


def test_fastdp_accumulates() -> None:
    batch, labels = images(32)
    model = network()
    before = state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = fastdp.PrivacyEngine(
        model, batch_size=128, sample_size=288, epochs=1, target_epsilon=2, seed=1
    )
    engine.attach(optimizer)
    run(
        "fastdp_accumulation",
        model=model,
        optimizer=optimizer,
        privacy_engine=engine,
        dataloader=[batch] * 9,
        labels=labels,
        gradient_accumulation_steps=4,
        F=F,
    )
    assert engine.steps == 3  # after batches 0, 4 and 8: what the plan of one epoch has
    assert moved(model, before)
