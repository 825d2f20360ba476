"""A small CIFAR in its own file format: images whose colours tell their class."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_cifar(root: Path, name: str, patch: pytest.MonkeyPatch, *, train: int, test: int) -> None:
    """Write the files of CIFAR10 or CIFAR100 under `root`, with fewer images; the digests that
    torchvision checks become those of these files."""
    from torchvision import datasets

    kind = getattr(datasets, name)
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    key, classes = ("labels", 10) if name == "CIFAR10" else ("fine_labels", 100)

    def write(file: str, content: Any) -> list[str]:
        raw = pickle.dumps(content)
        (folder / file).write_bytes(raw)
        return [file, hashlib.md5(raw).hexdigest()]

    def batch(file: str, size: int) -> list[str]:
        labels = draw.integers(0, classes, size)
        colours = np.stack([labels % 2, labels // 2 % 2, labels // 4 % 3], 1) * 80 + 20
        images = colours[:, :, None] + draw.integers(0, 60, (size, 3, 1024))
        data = images.reshape(size, 3072).astype(np.uint8)
        return write(file, {"data": data, key: labels.tolist()})

    patch.setattr(kind, "train_list", [batch(f"data_batch_{i}", train // 5) for i in range(1, 6)])
    patch.setattr(kind, "test_list", [batch("test_batch", test)])
    file, digest = write("batches.meta", {"label_names": [str(i) for i in range(classes)]})
    patch.setattr(kind, "meta", {"filename": file, "key": "label_names", "md5": digest})
