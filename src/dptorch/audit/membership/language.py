"""Membership inference against a language model, by a classifier on its losses of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dptorch.audit.evidence import Array, Evidence
from dptorch.audit.membership import plots
from dptorch.audit.membership.classifier import MODELS, attack_features, blind_auc
from dptorch.audit.membership.records import DIFFERENT_SETS, concerns, texts_of, without_overlap
from dptorch.audit.scores import (
    TokenStatistics,
    min_k,
    min_k_plus_plus,
    text_loss,
    token_statistics,
    tokenize,
    zlib_ratio,
)
from dptorch.audit.scores.gradient_norm import text_parameter_norms
from dptorch.errors import DataError, NotCoveredError, PrivacyError

__all__ = ["LanguageMIA"]

_DROPPED_WORDS = 0.1


class LanguageMIA:
    """A membership inference attack on a causal language model.

    Args:
        max_length: tokens of a text that are looked at.
        batch_size: texts that go through the model together.
        gradients: use the norm of each text's gradient, in total and by parameter; a backward pass a
            text.
        models: which attack models to choose from.
        permutations: how often the attack is repeated on permuted labels.
        text_column: where data sets are of mappings.
        seed: of the split, the models and the words that are dropped.
        progress: show bars.

    What it is: a risk indicator for these records. It is no bound on ε; planted canaries give one,
    see `dptorch.audit.audit`.

    Example:
        results = LanguageMIA().attack(train_dataset, test_dataset, model, tokenizer)
        print(f"ROC AUC: {results['roc_auc']:.4f}, 95 % {results['roc_auc_ci']}")
    """

    def __init__(
        self,
        *,
        max_length: int = 512,
        batch_size: int = 16,
        gradients: bool = True,
        models: Sequence[str] = MODELS,
        permutations: int = 20,
        text_column: str = "text",
        seed: int = 42,
        progress: bool = False,
    ) -> None:
        self.max_length = max_length
        self.batch_size = batch_size
        self.gradients = gradients
        self.models = tuple(models)
        self.permutations = permutations
        self.text_column = text_column
        self.seed = seed
        self.progress = progress

    def attack(
        self,
        train_dataset: Any,
        test_dataset: Any,
        model: nn.Module,
        tokenizer: Any,
        *,
        plot_dir: str | Path | None = None,
    ) -> dict[str, Any]:
        """Tell texts that the model was trained on from texts that it was not.

        Args:
            train_dataset, test_dataset: members and non-members, of one distribution: lists of
                strings, or data sets with a text column.
            model: returns logits [B, T, V]; its mode and gradients are left as they were.
            tokenizer: of the model.
            plot_dir: a folder for pictures; without it no file is written.

        Returns:
            measured on a part of the records that nothing was chosen on:

            - roc_auc, precision_recall_auc (average precision), brier_score
            - best_model, optimal_threshold: chosen by nested cross-validation on the other part
            - feature_importance: AUC lost when a feature is shuffled
            - accuracy_, precision_, recall_, f1_standard (threshold 0.5) and _optimal
            - n_samples, n_positive, n_negative: of the measured part
            - roc_auc_ci: 95 % interval; tpr_at_fpr: at 1 %, 0.1 % and 0 %
            - null_auc: mean AUC of the same attack on permuted labels; p_value
            - blind_baseline_auc: of a classifier that never sees the model
            - warnings: what makes the numbers mean less than they seem to

        Raises:
            DataError: sets that are empty, equal, too small, or hold no texts.
            ConfigurationError: the model returns no logits, or scikit-learn is missing.
        """
        warnings: list[str] = []
        members, others = without_overlap(
            texts_of(train_dataset, self.text_column),
            texts_of(test_dataset, self.text_column),
            str,
            warnings,
        )
        members, dropped = self._long_enough(members, tokenizer)
        others, dropped_others = self._long_enough(others, tokenizer)
        if dropped + dropped_others:
            warnings.append(
                f"{dropped + dropped_others} texts have fewer than two tokens, so there is no next "
                "token to predict; they were left out."
            )
        if min(len(members), len(others)) == 0:
            raise DataError(
                "no text of two or more tokens is left on one side, so there is nothing to compare."
            )
        warnings += concerns(len(members), len(others))
        texts = [*members, *others]
        labels = np.array([1] * len(members) + [0] * len(others))
        names, features = self.features(texts, model, tokenizer, warnings)
        result, evidence = attack_features(
            features,
            labels,
            names=names,
            models=self.models,
            permutations=self.permutations,
            seed=self.seed,
        )
        blind, interval = blind_text_auc(texts, labels)
        # The lower end: chance alone takes the AUC of few records above one half.
        if interval[0] > 0.5:
            warnings.append(DIFFERENT_SETS.format(auc=blind))
        result |= {"blind_baseline_auc": blind, "warnings": warnings}
        self.evidence: Evidence = evidence
        if plot_dir is not None:
            plots.save(Path(plot_dir), result, evidence)
        return result

    def features(
        self, texts: Sequence[str], model: nn.Module, tokenizer: Any, warnings: list[str]
    ) -> tuple[list[str], Array]:
        """(names, [N, D]): what the model says of each text."""
        ids = tokenize(texts, tokenizer, max_length=self.max_length)
        # A text that is remembered word for word loses more by a missing word than one that is easy.
        rng = np.random.default_rng(self.seed)
        shortened = tokenize(
            [_drop_words(text, rng) for text in texts], tokenizer, max_length=self.max_length
        )
        # A neighbour without a next token has no loss; the
        # text itself stands in, and their difference is 0.
        shortened = [s if len(s) > 1 else row for s, row in zip(shortened, ids, strict=True)]
        settings = {"batch_size": self.batch_size, "progress": self.progress}
        said = token_statistics(model, ids, **settings)  # type: ignore[arg-type]
        neighbour = text_loss(token_statistics(model, shortened, **settings))  # type: ignore[arg-type]
        loss = text_loss(said)
        columns: dict[str, Array] = {
            "loss": loss,
            "zlib_ratio": zlib_ratio(np.array([s.loss * len(s) for s in said]), texts),
            "min_k_10": min_k(said, 0.1),
            "min_k_20": min_k(said, 0.2),
            "min_k_plus_plus_20": min_k_plus_plus(said, 0.2),
            "mem_score": loss - neighbour,
            "aug_consistency": -np.abs(loss - neighbour),
            **{name: np.array([f(s) for s in said]) for name, f in _OF_TOKENS.items()},
        }
        if self.gradients:
            try:
                parameters, norms = text_parameter_norms(model, ids, progress=self.progress)
                columns["gradient_norm"] = -np.sqrt((norms**2).sum(1))
                columns |= {f"gradient_norm {p}": -norms[:, j] for j, p in enumerate(parameters)}
            except (NotCoveredError, PrivacyError) as error:
                warnings.append(f"gradient norms were left out: {error}")
        return list(columns), np.stack(list(columns.values()), axis=1)

    def _long_enough(self, texts: list[str], tokenizer: Any) -> tuple[list[str], int]:
        lengths = [len(row) for row in tokenize(texts, tokenizer, max_length=self.max_length)]
        kept = [text for text, n in zip(texts, lengths, strict=True) if n >= 2]
        return kept, len(texts) - len(kept)


def _correlation(s: TokenStatistics) -> float:
    """Between the model's confidence and its being right."""
    # Nearly, as the two probabilities were rounded apart.
    right = (np.exp(s.log_p) >= s.top * (1 - 1e-6)).astype(float)
    if right.std() == 0 or s.top.std() == 0:
        return 0.0
    return float(np.corrcoef(s.top, right)[0, 1])


_OF_TOKENS = {
    "max_prob": lambda s: float(s.top.mean()),
    "entropy": lambda s: float(-s.mean.mean()),
    "perplexity": lambda s: float(np.exp(min(-s.mean.mean(), 50.0))),
    "std_prob": lambda s: float(s.variance_p.mean()),
    "top_k_entropy": lambda s: float(s.top_entropy.mean()),
    "logit_margin": lambda s: float(s.margin.mean()),
    "uncertainty": lambda s: float(s.log_p.std()),
    "prob_percentiles": lambda s: float(np.quantile(np.exp(s.log_p), (0.25, 0.5, 0.75)).mean()),
    "conf_error_corr": _correlation,
}


def blind_text_auc(texts: Sequence[str], labels: Array) -> tuple[float, tuple[float, float]]:
    """How well words and length alone tell the sets apart."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline, make_union

    words = make_union(
        TfidfVectorizer(token_pattern=r"\S+", max_features=5000),
        TfidfVectorizer(analyzer="char", ngram_range=(1, 3), max_features=5000),
    )
    return blind_auc(make_pipeline(words, LogisticRegression(max_iter=1000)), list(texts), labels)


def _drop_words(text: str, rng: np.random.Generator) -> str:
    """A neighbour of the text: a tenth of its words left out, at least one."""
    words = text.split()
    if len(words) < 2:
        return text
    gone = rng.choice(len(words), max(1, round(_DROPPED_WORDS * len(words))), replace=False)
    return " ".join(word for i, word in enumerate(words) if i not in set(gone.tolist()))
