"""A loop with Hugging Face's accelerate: model and optimizer are prepared, the loader is the engine's.

Run: python examples/accelerate_loop.py    (pip install 'dptorch[report,transformers]')
On two processes:
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate_loop.py
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator, PartialState
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from dptorch import PrivacyEngine


def train(epochs: int = 20, size: int = 1437, batch_size: int = 64) -> tuple[float, float]:
    """Return (accuracy on digits that were not trained on, epsilon)."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(digits.target)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, epochs // 2 or 1)
    # After Accelerator(), which starts torch.distributed; before prepare(), so that what it wraps is
    # private already.
    engine = PrivacyEngine(
        model,
        sample_size=size,
        batch_size=batch_size,
        epochs=epochs,
        target_epsilon=3.0,
        target_delta=1e-4,
    )
    engine.attach(optimizer)
    # Not the loader: accelerate would draw batches of its own. The engine's has each process's share.
    loader = engine.loader(TensorDataset(x[:size], y[:size]))
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for _ in range(epochs):
        for inputs, targets in loader:
            inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(inputs), targets))
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        right = (model(x[size:]).argmax(1) == y[size:]).float().mean()
    return float(right), engine.get_privacy_spent().epsilon


if __name__ == "__main__":
    found = train(*map(int, sys.argv[1:]))  # how many epochs, if not 20
    PartialState().print("accuracy {:.3f}, epsilon {:.2f}".format(*found), flush=True)
