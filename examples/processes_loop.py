"""A loop on several processes: the model whole on each, or in shards (FSDP2).

Run: torchrun --nproc_per_node=2 examples/processes_loop.py            (pip install 'dptorch[report]')
     torchrun --nproc_per_node=2 examples/processes_loop.py --shard
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from dptorch import PrivacyEngine


def train(epochs: int = 20, size: int = 1437, *, shard: bool = False) -> tuple[float, float]:
    """Return (accuracy on digits that were not trained on, epsilon); on all processes alike."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 8 - 1
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    if shard:
        for layer in (model[0], model[2]):  # type: ignore[index]
            fully_shard(layer)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    # After init_process_group and sharding: the batch size is that of all processes together.
    engine = PrivacyEngine(
        model,
        sample_size=size,
        batch_size=64,
        epochs=epochs,
        target_epsilon=3.0,
        target_delta=1e-4,
    )
    optimizer = engine.attach(torch.optim.Adam(model.parameters(), lr=0.01))
    loader = engine.loader(TensorDataset(x[:size], y[:size]))
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    with torch.no_grad():
        right = (model(x[size:]).argmax(1) == y[size:]).float().mean()
    return float(right), engine.get_privacy_spent().epsilon


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" on GPUs
    found = train(shard="--shard" in sys.argv)
    if dist.get_rank() == 0:
        print("accuracy {:.3f}, epsilon {:.2f}".format(*found), flush=True)
    dist.destroy_process_group()
