"""The quick starts of fastDP, private-transformers and private_vision, run as they stand."""

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.compat import fastdp, private_vision
from dptorch.errors import PrivacyWarning

pytestmark = pytest.mark.slow

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
        assert max(names["privacy_engine"].get_privacy_spent().values()) > 0
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
    batches, labels = images(9 * 32)
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
        dataloader=batches.split(32),
        labels=labels[:32],
        gradient_accumulation_steps=4,
        F=F,
    )
    assert engine.steps == 3  # after batches 0, 4 and 8: what the plan of one epoch has
    assert moved(model, before)


@pytest.fixture
def small_gpt2(monkeypatch: pytest.MonkeyPatch) -> None:
    """distilgpt2 as its configuration says, but with two layers of 16 units and random weights."""
    import transformers

    def small(cls: Any, name: str) -> nn.Module:
        assert name == "distilgpt2"
        torch.manual_seed(0)
        return cls(transformers.GPT2Config(vocab_size=128, n_embd=16, n_layer=2, n_head=2))

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", classmethod(small))


@pytest.mark.usefixtures("small_gpt2")
def test_private_transformers() -> None:
    names = run("private_transformers")
    engine = names["privacy_engine"]
    assert engine.steps == 1
    assert engine.target_delta == 50000**-1.1
    assert names["optimizer"].get_privacy_spent() == engine.get_privacy_spent()
    model = names["model"]
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


@pytest.mark.usefixtures("small_gpt2")
def test_private_transformers_with_ghost_clipping() -> None:
    """The document goes on as in its first example."""
    names = run("private_transformers_ghost")
    model, optimizer = names["model"], names["optimizer"]
    before = state(model)
    ids = torch.randint(0, 100, (10, 20))
    logits = model(input_ids=ids).logits[:, :-1].permute(0, 2, 1)
    with pytest.warns(PrivacyWarning, match="without amplification"):
        optimizer.step(loss=F.cross_entropy(logits, ids[:, 1:], reduction="none").mean(dim=1))
    assert "two backward passes" in str(names["privacy_engine"].engine.explain())
    assert moved(model, before)


def test_private_vision() -> None:
    batch, labels = images(4)
    names = run("private_vision", batch=batch.repeat(1, 1, 2, 2), labels=labels, F=F)
    model, engine = names["model"], names["privacy_engine"]
    assert engine.steps == 1
    assert engine.clipping_mode == "MixGhostClip"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_private_vision_accumulates() -> None:
    batches, labels = images(7 * 8)
    model = network()
    before = state(model)
    optimizer = torch.optim.Adam(model.parameters())
    engine = private_vision.PrivacyEngine(
        model, batch_size=24, sample_size=56, epochs=1, max_grad_norm=0.1, target_epsilon=3
    )
    engine.attach(optimizer)
    run(
        "private_vision_accumulation",
        model=model,
        optimizer=optimizer,
        privacy_engine=engine,
        dataloader=batches.split(8),
        labels=labels[:8],
        gradient_accumulation_steps=3,
        F=F,
    )
    assert engine.steps == 3  # after batches 0, 3 and 6
    assert moved(model, before)
