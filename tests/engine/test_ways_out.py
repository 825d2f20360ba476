"""Programs that are refused name a way out, and it runs."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dptorch
from dptorch.errors import (
    BudgetExhausted,
    ConfigurationError,
    ExamplesMixError,
    PrivacyError,
)
from dptorch.validation.all_experts import AllExperts
from tests.engine.legitimate.models import mixtral, switch
from tests.engine.setup import SIZE, Loss, make_data, make_engine, make_model, steps_with

pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


class Logging(nn.Module):
    """Keeps the norm of its outputs for a log."""

    def __init__(self, read: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)
        self.read = read
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(x)
        self.log.append(self.read(h))
        return h


def _trusted(h: Tensor) -> float:
    with dptorch.tape.trusted_reads():
        return h.norm().item()


def _plain(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(m(x), y)


def test_a_log_inside_the_model() -> None:
    with pytest.raises(ExamplesMixError, match=r"only logged.*trusted_reads\(\)"):
        steps_with(_plain, Logging(lambda h: h.norm().item()))
    model = Logging(_trusted)
    assert steps_with(_plain, model) == 2
    assert len(model.log) >= 2


def _masked(mean: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda m, x, y: mean((m(x) - x[:, :3]).abs(), (x[:, 2:] > 0).float())


def test_a_mean_over_masked_values() -> None:
    with pytest.raises(ExamplesMixError, match=r"\(l \* mask\).sum\(1\) / mask.sum\(1\)"):
        steps_with(_masked(lambda each, mask: (each * mask).sum() / mask.sum()), make_model())
    own = _masked(lambda each, mask: ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean())
    assert steps_with(own, make_model()) == 2


def test_noise_that_is_drawn_once_for_pictures() -> None:
    def pictures(public: bool) -> list[Tensor]:
        model = make_model()
        engine = make_engine(model, steps=2, self_check=True)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        noise, made = torch.randn(SIZE, 5), []
        for _ in range(2):
            for x, y in engine.loader(make_data()):
                _plain(model, x, y).backward()
                optimizer.step()
                with engine.public() if public else nullcontext():
                    made.append(model(noise))
        return made

    with pytest.raises(PrivacyError, match=r"noise that is drawn once.*engine\.public\(\)"):
        pictures(public=False)
    assert len(pictures(public=True)) == 2


@pytest.mark.parametrize("own", [False, True])
def test_outputs_for_public_data(own: bool) -> None:
    def steps(public: bool) -> int:
        model, rows = make_model(), torch.randn(4, 5)
        engine = make_engine(model, steps=2, self_check=True)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        for _ in range(2):
            loader = DataLoader(make_data(), batch_size=24) if own else engine.loader(make_data())
            for x, _y in loader:
                with engine.public() if public else nullcontext():
                    center = model(rows).detach().mean(0)
                (model(x) - center).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return engine.steps_done

    with pytest.raises(ExamplesMixError, match=r"of public data .*with engine\.public\(\):"):
        steps(public=False)
    assert steps(public=True) == 2


def test_lbfgs_with_many_evaluations() -> None:
    def steps(**settings: Any) -> int:
        model = make_model()
        engine = make_engine(
            model, steps=3, self_check=True, noise_multiplier=1.0, target_delta=1e-5
        )
        optimizer = engine.attach(torch.optim.LBFGS(model.parameters(), lr=0.1, **settings))
        for _ in range(3):
            for x, y in engine.loader(make_data()):

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    optimizer.zero_grad()
                    loss = _plain(model, x, y)
                    loss.backward()
                    return loss

                optimizer.step(closure)
        return engine.steps_done

    with pytest.raises(BudgetExhausted, match=r"max_eval=25 times.*pass max_iter=1"):
        steps()
    assert steps(max_iter=1) == 3


@pytest.mark.slow
def test_models_of_transformers_that_mix_and_need_not() -> None:
    """The legitimate programs "Switch Transformer" and "Longformer" take the ways out."""
    from transformers import LongformerConfig, LongformerForSequenceClassification
    from transformers.models.switch_transformers import modeling_switch_transformers as switches

    words = torch.randint(1, 30, (SIZE, 6))
    prepared = switch()
    experts = [m for m in prepared.modules() if isinstance(m, AllExperts)]
    assert len(experts) == 2
    outputs = []
    for forward in (AllExperts.forward, switches.SwitchTransformersExperts.forward):
        for layer in experts:
            layer.num_experts, layer.forward = 3, types.MethodType(forward, layer)  # type: ignore
        outputs.append(prepared(input_ids=words, labels=words).logits)
    torch.testing.assert_close(outputs[0], outputs[1])
    loss: Loss = lambda m, x, y: m(input_ids=words[: len(x)], labels=words[: len(x)]).loss
    with pytest.raises(ExamplesMixError, match=r"dptorch\.prepare\(model\) lets every expert run"):
        steps_with(loss, switch(prepare=False), self_check=False)
    config = LongformerConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        attention_window=[4],
    )
    loss = lambda m, x, y: m(input_ids=words[: len(x)], labels=y % 2).loss
    with pytest.raises(PrivacyError, match=r"LongformerModel\(config, add_pooling_layer=False\)"):
        steps_with(loss, LongformerForSequenceClassification(config), self_check=False)


@pytest.mark.slow
def test_a_mixture_of_experts_of_transformers() -> None:
    words = torch.randint(0, 30, (SIZE, 5))
    loss: Loss = lambda m, x, y: m(input_ids=words[: len(x)], labels=words[: len(x)]).loss
    assert steps_with(loss, mixtral()) == 2
    model = mixtral()
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    with pytest.raises(ExamplesMixError, match=r"set_experts_implementation\('batched_mm'\)"):
        steps_with(loss, model)


class Filter(nn.Module):
    """Multiplies spectra by a complex parameter, kept as it is or as real numbers."""

    def __init__(self, *, real: bool) -> None:
        super().__init__()
        w = torch.randn(3, dtype=torch.complex64)
        self.w = nn.Parameter(torch.view_as_real(w) if real else w)
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = torch.view_as_complex(self.w) if self.w.is_floating_point() else self.w
        out: Tensor = self.layer(torch.fft.irfft(torch.fft.rfft(x) * w, n=5))
        return out


def test_a_complex_parameter() -> None:
    """Noise has no imaginary part; what is computed of such numbers: `tape/test_complex.py`."""
    with pytest.raises(ConfigurationError, match=r"'w' is complex.*view_as_real"):
        make_engine(Filter(real=False))
    assert steps_with(_plain, Filter(real=True)) == 2


def test_a_scripted_model() -> None:
    with pytest.raises(ConfigurationError, match=r"Give the nn\.Module that it was made of"):
        make_engine(torch.jit.script(nn.Linear(5, 3)))
    engine = make_engine(model := nn.Linear(5, 3))
    engine.detach()
    assert torch.jit.script(model)(torch.ones(2, 5)).shape == (2, 3)
