"""Small models, data and private runs for the tests of `dptorch.compat.opacus`."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dptorch.compat.opacus import PrivacyEngine
from dptorch.errors import PrivacyWarning

SIZE, BATCH = 24, 8
Model = Callable[[], nn.Module]


class Recurrent(nn.Module):
    """An embedding, a recurrent layer, and a head on its last output."""

    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.rnn = kind(6, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(ids))[0][:, -1])


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def cnn() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 3),
    )


def lstm() -> nn.Module:
    torch.manual_seed(1)
    return Recurrent()


def data_for(model: Model) -> TensorDataset:
    draw = torch.Generator().manual_seed(2)
    inputs = {
        mlp: lambda: torch.randn(SIZE, 6, generator=draw),
        cnn: lambda: torch.randn(SIZE, 1, 6, 6, generator=draw),
        lstm: lambda: torch.randint(0, 11, (SIZE, 4), generator=draw),
    }[model]()
    return TensorDataset(inputs, torch.randint(0, 3, (SIZE,), generator=draw))


def weights(model: nn.Module) -> Tensor:
    """By name: Opacus' DPLSTM has the names of nn.LSTM, in another order, and its own beside them."""
    state = {name: p for name, p in model.state_dict().items() if ".l0." not in name}
    return torch.cat([state[name].flatten() for name in sorted(state)]).detach().clone()


def train(model: nn.Module, optimizer: Any, loader: Any, epochs: int = 1) -> Tensor:
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return weights(model)


def private(model: Model = mlp, batch: int = BATCH, **changes: Any) -> tuple[Any, ...]:
    """(privacy engine, model, optimizer, loader) without noise or clipping that matters, over the
    batches of a sequential loader, unless told otherwise."""
    settings: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 1e6,
        "poisson_sampling": False,
    }
    settings |= changes
    engine = settings.pop("engine", None) or PrivacyEngine()
    make = engine.make_private_with_epsilon if "epochs" in settings else engine.make_private
    if "epochs" in settings:
        del settings["noise_multiplier"]
    module = settings.pop("module", None) or model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PrivacyWarning)
        made = make(
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9),
            data_loader=DataLoader(data_for(model), batch_size=batch),
            **settings,
        )
    return engine, *made
