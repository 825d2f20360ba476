"""ForgetNet's engine on real digits: the block shuffle, then noise with a proof, under one call.

Run: python examples/blogs.py    (pip install 'dptorch[report]', for scikit-learn's digits)
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dptorch.blogs import BloGSPrivacyEngine

EPOCHS, BATCH_SIZE = 10, 64


def train(mechanism: str) -> None:
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(digits.target)
    data = TensorDataset(x[:1437], y[:1437])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    loader = DataLoader(data, BATCH_SIZE, shuffle=True)
    engine = BloGSPrivacyEngine(
        optimizer=optimizer,
        model=model,
        target_epsilon=3.0,
        delta=1e-5,
        clip_value=1.0,
        steps=EPOCHS * len(loader),
        batch_size=BATCH_SIZE,
        dataset_size=len(data),
        mechanism=mechanism,
    )
    # Any loader serves the shuffle; noise is accounted for Poisson batches, which the engine draws.
    batches = loader if mechanism == "shuffle" else engine.loader(data)
    while not engine.exhausted:
        for inputs, labels in batches:
            engine.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            epsilon, delta = engine.step()
            if engine.exhausted:
                break
    accuracy = (model(x[1437:]).argmax(1) == y[1437:]).double().mean()
    print(
        f"{mechanism}: accuracy {100 * accuracy:.1f} %, reported {epsilon:.4f} at delta {delta:g}"
    )
    print(engine.statement())


if __name__ == "__main__":
    train("shuffle")
    train("gaussian")
