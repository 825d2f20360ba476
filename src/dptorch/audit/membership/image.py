"""Membership inference against a classifier of images or rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dptorch.audit.evidence import Array, Evidence
from dptorch.audit.membership import plots
from dptorch.audit.membership.classifier import MODELS, attack_features, blind_auc
from dptorch.audit.membership.records import DIFFERENT_SETS, concerns, without_overlap
from dptorch.audit.scores import (
    class_gradient_norm,
    class_log_probabilities,
    class_loss,
    logit_confidence,
    zlib_ratio,
)
from dptorch.audit.scores.signals import labelled, split_item
from dptorch.errors import DataError, NotCoveredError, PrivacyError

__all__ = ["ImageMIA"]

_BLIND_DIMENSIONS = 256


class ImageMIA:
    """A membership inference attack on a classifier, with the *true* labels of the records.

    Images [C, H, W] are looked at in two more views each, mirrored and shifted; rows of a table [D]
    as they are.

    Args:
        batch_size: records that go through the model together.
        gradients: use the norm of each record's gradient.
        models, permutations, seed, progress: as for `LanguageMIA`.

    Example:
        results = ImageMIA().attack(train_dataset, test_dataset, model)
        print(results["roc_auc"], results["warnings"])
    """

    def __init__(
        self,
        *,
        batch_size: int = 256,
        gradients: bool = True,
        models: Sequence[str] = MODELS,
        permutations: int = 20,
        seed: int = 42,
        progress: bool = False,
    ) -> None:
        self.batch_size = batch_size
        self.gradients = gradients
        self.models = tuple(models)
        self.permutations = permutations
        self.seed = seed
        self.progress = progress

    def attack(
        self,
        train_dataset: Any,
        test_dataset: Any,
        model: nn.Module,
        _: Any = None,
        *,
        plot_dir: str | Path | None = None,
    ) -> dict[str, Any]:
        """Tell records that the model was trained on from records that it was not.

        Args:
            train_dataset, test_dataset: members and non-members, of one distribution: data sets of
                (input, label), or pairs of tensors.
            model: returns logits [B, K]; it is left as it was.
            _: ignored; where `LanguageMIA` takes the tokenizer.
            plot_dir: a folder for pictures; without it no file is written.

        Returns:
            see `LanguageMIA.attack`.

        Raises:
            DataError: sets that are empty, equal, too small, or without labels; records for which the
                model gives no finite number.
            ConfigurationError: the model returns no logits, or scikit-learn is missing.
        """
        warnings: list[str] = []
        members, others = without_overlap(
            _records(train_dataset), _records(test_dataset), _content, warnings
        )
        warnings += concerns(len(members), len(others))
        labels = np.array([1] * len(members) + [0] * len(others))
        x = torch.stack([record[0] for record in (*members, *others)])
        y = torch.tensor([record[1] for record in (*members, *others)])
        names, features = self.features(x, y, model, warnings)
        if bad := [n for n, c in zip(names, features.T, strict=True) if not np.isfinite(c).all()]:
            raise DataError(
                f"{', '.join(bad)}: the model gives no finite number for some records. Leave out "
                "records that hold NaN or infinity, and look whether the model's parameters do."
            )
        result, evidence = attack_features(
            features,
            labels,
            names=names,
            models=self.models,
            permutations=self.permutations,
            seed=self.seed,
        )
        blind, interval = blind_input_auc(x, y, labels)
        # The lower end: chance alone takes the AUC of few records above one half.
        if interval[0] > 0.5:
            warnings.append(DIFFERENT_SETS.format(auc=blind))
        result |= {"blind_baseline_auc": blind, "warnings": warnings}
        self.evidence: Evidence = evidence
        if plot_dir is not None:
            plots.save(Path(plot_dir), result, evidence)
        return result

    def features(
        self, x: Tensor, y: Tensor, model: nn.Module, warnings: list[str]
    ) -> tuple[list[str], Array]:
        """(names, [N, D]): what the model says of each record."""
        log_p, labels = self._ask(model, x, y)
        p = np.exp(log_p)
        ordered = np.sort(log_p, axis=1)
        loss = class_loss(log_p, labels)
        columns: dict[str, Array] = {
            "loss": loss,
            "logit_confidence": logit_confidence(log_p, labels),
            "correct": (log_p.argmax(1) == labels).astype(float),
            "max_prob": p.max(1),
            "entropy": -(p * log_p).sum(1),
            "logit_margin": ordered[:, -1] - ordered[:, -2],
            "std_prob": p.std(1),
            "zlib_ratio": zlib_ratio(-loss, [row.numpy().tobytes() for row in x.float()]),
        }
        if x.dim() == 4:
            views = {"mirrored": x.flip(-1), "shifted": x.roll(1, -1)}
            for name, view in views.items():
                columns[f"loss {name}"] = class_loss(*self._ask(model, view, y))
        if self.gradients and any(q.requires_grad for q in model.parameters()):
            try:
                columns["gradient_norm"] = class_gradient_norm(
                    model, (x, y), batch_size=min(64, self.batch_size), progress=self.progress
                )
            except (NotCoveredError, PrivacyError) as error:
                warnings.append(f"gradient norms were left out: {error}")
        return list(columns), np.stack(list(columns.values()), axis=1)

    def _ask(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Array, Array]:
        return class_log_probabilities(
            model, (x, y), batch_size=self.batch_size, progress=self.progress
        )


def blind_input_auc(x: Tensor, y: Tensor, labels: Array) -> tuple[float, tuple[float, float]]:
    """How well inputs and labels alone tell the sets apart."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.random_projection import GaussianRandomProjection

    flat = x.flatten(1).double().numpy()
    if flat.shape[1] > _BLIND_DIMENSIONS:
        # A random projection looks at no record, so it needs no folds.
        flat = GaussianRandomProjection(_BLIND_DIMENSIONS, random_state=0).fit_transform(flat)
    # Squares, so that a linear model sees sets that differ in spread alone.
    flat = np.concatenate([flat, flat**2, np.eye(int(y.max()) + 1)[y.numpy()]], axis=1)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return blind_auc(model, flat, labels)


def _records(data: Any) -> list[tuple[Tensor, int]]:
    dataset = labelled(data)
    found = []
    for i in range(len(dataset)):  # type: ignore[arg-type]
        x, y = split_item(dataset[i])
        if isinstance(x, dict) and len(x) == 1:
            (x,) = x.values()
        if not isinstance(x, Tensor):
            x = torch.as_tensor(np.asarray(x))
        if x.is_complex() or x.dim() == 0:
            raise DataError(
                f"record {i} is a {tuple(x.shape)} {x.dtype}. Expected an image or row."
            )
        found.append((x if x.is_floating_point() else x.float(), int(y)))
    return found


def _content(record: tuple[Tensor, int]) -> bytes:
    return record[0].numpy().tobytes() + str(record[1]).encode()
