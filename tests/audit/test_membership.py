"""Trained membership attacks: honest on noise, strong on what is known by heart, loud on bad data."""

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.audit.language import fit, make_model, make_texts, make_tokenizer
from torch import nn
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from dptorch import PrivacyEngine
from dptorch.audit import ImageMIA, LanguageMIA, judge
from dptorch.audit.evidence import Evidence
from dptorch.audit.games import new_token_canaries
from dptorch.audit.membership import attack_features, classifier
from dptorch.audit.membership.classifier import _best_f1_threshold
from dptorch.audit.membership.plots import precision_recall
from dptorch.audit.scores import text_gradient_norm, token_statistics, tokenize
from dptorch.errors import ConfigurationError, DataError
from dptorch.integrations.membership import MembershipCallback

KEYS = {
    "roc_auc", "precision_recall_auc", "brier_score", "best_model", "optimal_threshold",
    "feature_importance", "accuracy_standard", "precision_standard", "recall_standard",
    "f1_standard", "accuracy_optimal", "precision_optimal", "recall_optimal", "f1_optimal",
    "n_samples", "n_positive", "n_negative",
}  # fmt: skip
ADDED = {"roc_auc_ci", "tpr_at_fpr", "null_auc", "blind_baseline_auc", "warnings"}
QUICK: dict[str, Any] = {"models": ("Logistic Regression",), "permutations": 3}


@pytest.fixture(autouse=True)
def nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    yield
    assert set(os.listdir()) <= {"plots", "out"}


@pytest.fixture(scope="module")
def known() -> tuple[list[str], list[str], nn.Module, Any]:
    tokenizer = make_tokenizer()
    members, others = make_texts(60, 1), make_texts(60, 2)
    model = make_model()
    fit(model, tokenize(members, tokenizer), 120)
    return members, others, model, tokenizer


@pytest.fixture
def small_forests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forests of 15 trees: what is asked of them does not hang on how many there are."""
    monkeypatch.setattr(classifier, "_TREES", 15)


@pytest.mark.slow
@pytest.mark.usefixtures("small_forests")
def test_noise_is_reported_as_noise() -> None:
    # Twelve attacks on features that know nothing: the mean AUC has a standard error of 0.01.
    rng = np.random.default_rng(0)
    labels = np.arange(840) % 2
    found = []
    for seed in range(12):
        models = ("Logistic Regression", "Random Forest") if seed == 0 else QUICK["models"]
        features = rng.normal(size=(840, 3))
        result, _ = attack_features(features, labels, models=models, permutations=0, seed=seed)
        found.append(result["roc_auc"])
    assert abs(np.mean(found) - 0.5) <= 0.03


@pytest.mark.slow
@pytest.mark.usefixtures("small_forests")
def test_every_kind_of_attack_model_works() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 2
    features = rng.normal(size=(90, 22)) + 1.5 * labels[:, None] * (np.arange(22) < 3)
    features[rng.random(features.shape) < 0.02] = np.nan
    result, evidence = attack_features(features, labels, permutations=1)
    assert result["roc_auc"] > 0.8
    assert set(list(result["feature_importance"])[:3]) & {"feature_0", "feature_1", "feature_2"}
    assert result["n_samples"] == len(evidence) == 27
    assert result["n_positive"] + result["n_negative"] == 27


def test_the_threshold_of_the_best_f1() -> None:
    labels = np.array([0, 0, 0, 1, 1, 0, 1, 1])
    scores = np.array([0.1, 0.2, 0.3, 0.3, 0.4, 0.4, 0.6, 0.9])
    by_hand = {
        t: 2 * labels[scores >= t].sum() / ((scores >= t).sum() + labels.sum()) for t in set(scores)
    }
    assert by_hand[_best_f1_threshold(scores, labels)] == max(by_hand.values())
    assert _best_f1_threshold(np.zeros(4), np.array([0, 1, 0, 1])) == 0.0


def test_precision_and_recall_at_every_threshold() -> None:
    """Both thresholds' precision and recall are points of the curve, ties included."""
    rng = np.random.default_rng(0)
    scores, member = rng.random(50).round(1), rng.random(50) < 0.5
    found = precision_recall(Evidence(scores, member))
    assert list(found[0]) == sorted(set(scores), reverse=True)
    for threshold, precision, recall in zip(*found, strict=True):
        said = scores >= threshold
        assert precision == (said & member).sum() / said.sum()
        assert recall == (said & member).sum() / member.sum()


@pytest.mark.slow
def test_the_quick_start(known: Any) -> None:
    members, others, model, tokenizer = known
    model.train()
    mia = LanguageMIA(**QUICK)
    results = mia.attack(members, others, model, tokenizer, plot_dir="plots")
    assert results.keys() >= KEYS | ADDED
    assert results["roc_auc"] > 0.95
    low, high = results["roc_auc_ci"]
    assert low <= results["roc_auc"] <= high
    assert results["tpr_at_fpr"].keys() == {0.01, 0.001, 0.0}
    assert abs(results["null_auc"] - 0.5) < 0.3
    assert 0.3 < results["blind_baseline_auc"] < 0.7
    assert model.training
    assert all(p.grad is None or not p.grad.isnan().any() for p in model.parameters())
    assert {p.name for p in Path("plots").iterdir()} == {
        "roc_curve.png", "precision_recall.png", "scores.png", "feature_importance.png",
    }  # fmt: skip
    # The way the README of the original prints it.
    assert f"{results['roc_auc']:.4f} {results['optimal_threshold']:.4f} {results['best_model']}"
    signature = list(inspect.signature(LanguageMIA.attack).parameters)
    assert signature[1:5] == ["train_dataset", "test_dataset", "model", "tokenizer"]


@pytest.mark.slow
def test_a_model_that_has_seen_neither_set_does_not_leak(known: Any) -> None:
    members, others, _, tokenizer = known
    results = LanguageMIA(**QUICK, gradients=False).attack(
        [{"text": t} for t in members], [{"text": t} for t in others], make_model(), tokenizer
    )
    low, high = results["roc_auc_ci"]
    assert low < 0.5 < high or abs(results["roc_auc"] - 0.5) < 0.2


@pytest.mark.slow
def test_features_are_live_and_the_loss_is_the_next_tokens(known: Any) -> None:
    members, _, model, tokenizer = known
    names, features = LanguageMIA().features(members[:12], model, tokenizer, [])
    # Every feature moves between texts, but for parameters whose gradient is always zero.
    assert (features.std(0) > 0).mean() > 0.95
    model.eval()
    for text, loss in zip(members[:3], features[:3, names.index("loss")], strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            expected = model(input_ids=ids, labels=ids).loss.item()
        assert -loss == pytest.approx(expected, rel=1e-4)
    total = text_gradient_norm(model, tokenize(members[:3], tokenizer))
    for text, norm in zip(members[:3], total, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        grads = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, list(model.parameters()))
        assert -norm == pytest.approx(sum(float(g.square().sum()) for g in grads) ** 0.5, rel=1e-3)


@pytest.mark.slow
def test_sets_of_other_distributions_are_said_to_be(known: Any) -> None:
    members, _, model, tokenizer = known
    shifted = make_texts(60, 3, words=12)
    results = LanguageMIA(**QUICK, gradients=False).attack(members, shifted, model, tokenizer)
    assert results["blind_baseline_auc"] > 0.9
    assert any("differ by themselves" in w for w in results["warnings"])


@pytest.mark.slow
def test_bad_texts(known: Any) -> None:
    members, others, model, tokenizer = known
    mia = LanguageMIA(**QUICK, gradients=False)
    with pytest.raises(DataError, match="every record of test_dataset"):
        mia.attack(members, members, model, tokenizer)
    half = mia.attack(members, others[:40] + members[:5], model, tokenizer)
    assert any("5 records of test_dataset are in train_dataset" in w for w in half["warnings"])
    assert any("members and 40 non-members" in w for w in half["warnings"])
    short = mia.attack([*members, "w1"], [*others, "", "w2"], model, tokenizer)
    assert any("1 texts have fewer than two tokens" in w for w in short["warnings"])
    with pytest.raises(DataError, match="At least 10"):
        mia.attack(members[:9], others, model, tokenizer)
    with pytest.raises(DataError, match="nothing to compare"):
        mia.attack(["", " "], others, model, tokenizer)
    with pytest.raises(DataError, match="no column 'text'"):
        mia.attack([{"body": "w1 w2"}], others, model, tokenizer)
    with pytest.raises(DataError, match="single string"):
        mia.attack("w1 w2", others, model, tokenizer)
    with pytest.raises(DataError, match="Expected a text"):
        mia.attack([3, 4], others, model, tokenizer)
    with pytest.raises(ConfigurationError, match="without logits"):
        mia.attack(members, others, Silent(), tokenizer)
    with pytest.raises(ConfigurationError, match="Did you mean 'Random Forest'"):
        LanguageMIA(models=("Random Forrest",)).attack(members, others, model, tokenizer)


class Silent(nn.Module):
    """Returns no logits."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, float]:
        return {"hidden": 0.0}


@pytest.mark.slow
def test_images_and_rows() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(120, 1, 6, 6), torch.randint(0, 4, (120,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.ReLU(), nn.Linear(64, 4))
    fresh = ImageMIA(**QUICK).attack((x[:60], y[:60]), TensorDataset(x[60:], y[60:]), model)
    assert fresh["roc_auc_ci"][0] < 0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:60]), y[:60]).backward()
        optimizer.step()
    optimizer.zero_grad()
    found = ImageMIA(**QUICK).attack((x[:60], y[:60]), (x[60:], y[60:]), model, None)
    assert found.keys() >= KEYS | ADDED
    assert found["roc_auc"] > 0.85
    rows = ImageMIA(**QUICK).attack((x[:60].flatten(1), y[:60]), (x[60:].flatten(1), y[60:]), model)
    assert rows["roc_auc"] > 0.85
    other = ImageMIA(**QUICK).attack((x[:60], y[:60]), (3 * x[60:] + 1, y[60:]), model)
    assert any("differ by themselves" in w for w in other["warnings"])
    with pytest.raises(DataError, match="every record"):
        ImageMIA().attack((x, y), (x, y), model)
    with pytest.raises(DataError, match="true label"):
        ImageMIA().attack(list(x), list(x), model)
    x[3, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="no finite number for some records"):
        ImageMIA(**QUICK).attack((x[:60], y[:60]), (x[60:], y[60:]), model)


@pytest.mark.slow
def test_new_tokens_tell_a_model_that_learned_them_by_heart() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    canaries = new_token_canaries(model, tokenizer, 200, length=6, seed=1)
    assert canaries.ids[:, -1].unique().numel() == 200
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 262
    claim = {"epsilon": 1.0, "delta": 1e-5, "adversary": "sees the model; new tokens"}
    assert not judge(canaries.evidence(model), **claim).refuted
    fit(model, canaries.inside.tolist(), 60)
    result = judge(canaries.evidence(model), **claim)
    assert result.refuted
    assert result.epsilon_lower > 3
    engine = PrivacyEngine(
        model, sample_rate=0.5, sample_size=10, steps=1, noise_multiplier=1.0, target_delta=1e-3
    )
    with pytest.raises(ConfigurationError, match="already has a privacy engine"):
        new_token_canaries(model, tokenizer, 20)
    engine.detach()
    with pytest.raises(ConfigurationError, match="at least 20"):
        new_token_canaries(model, tokenizer, 19)
    public = new_token_canaries(model, tokenizer, 20, prefixes=make_texts(3, 5), length=5, seed=2)
    assert public.ids.shape == (20, 5)


@pytest.mark.slow
def test_inside_a_hugging_face_evaluation(known: Any) -> None:
    members, others, _, tokenizer = known
    rows = [{"input_ids": r[:6], "labels": r[:6]} for r in tokenize(members[:8], tokenizer)]
    mia = LanguageMIA(**QUICK, gradients=False)
    callback = MembershipCallback(members[:30], others[:30], tokenizer, mia=mia)
    trainer = Trainer(
        make_model(),
        TrainingArguments(
            output_dir="out", report_to=[], max_steps=2, eval_strategy="steps", eval_steps=1,
            per_device_train_batch_size=4, use_cpu=True, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert [step for step, _ in callback.results] == [1, 2]
    logged = [e for e in trainer.state.log_history if "not_private_mia_roc_auc" in e]
    assert [e["step"] for e in logged] == [1, 2]
    metrics = trainer.evaluate()
    assert 0 <= metrics["not_private_mia_roc_auc"] <= 1


@pytest.mark.slow
def test_statistics_do_not_depend_on_the_batch(known: Any) -> None:
    members, _, model, tokenizer = known
    ids = tokenize(members[:9], tokenizer)
    alone = [token_statistics(model, [row])[0] for row in ids]
    together = token_statistics(model, ids, batch_size=4)
    for a, b in zip(alone, together, strict=True):
        assert np.allclose(a.log_p, b.log_p, atol=1e-5)
        assert np.allclose(a.std, b.std, atol=1e-4)
