"""`dptorch.compat.fastdp`: the arguments of fastDP, each against a loop over single examples."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from dptorch import accounting
from dptorch.accounting import SampledGaussian
from dptorch.compat import fastdp
from dptorch.compat.fastdp import PrivacyEngine
from dptorch.errors import BudgetExhausted, ConfigurationError, PrivacyError, PrivacyWarning
from tests.distributed.processes import on_ranks
from tests.distributed.scenarios import values_of

SIZE, BATCH = 64, 16
pytestmark = pytest.mark.filterwarnings("ignore::dptorch.errors.PrivacyWarning")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)
    ).double()


def batch(n: int = BATCH) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(n, 1, 6, 6, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 5, (n,), generator=draw)


def engine_on(model: nn.Module, **changes: Any) -> PrivacyEngine:
    settings = {"batch_size": BATCH, "sample_size": SIZE, "epochs": 2, "noise_multiplier": 0.0}
    return PrivacyEngine(model, **(settings | changes))


def one_step(parts: int = 1, **changes: Any) -> list[Tensor]:
    """The gradients that the optimizer steps on, after one batch in `parts` backwards."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine_on(model, **changes).attach(optimizer)
    x, y = batch()
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        F.cross_entropy(model(xs), ys, reduction=changes.get("loss_reduction", "mean")).backward()
    optimizer.step()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def by_loop(coefficient: Callable[[float], float], groups: list[list[int]]) -> list[Tensor]:
    """The same by hand: clip each group of each example's gradient, add up, divide by the batch."""
    model = network()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x, y in zip(*batch(), strict=True):
        model.zero_grad()
        F.cross_entropy(model(x[None]), y[None]).backward()
        gradient = [p.grad for p in model.parameters() if p.grad is not None]
        for group in groups:
            norm = math.sqrt(sum(float(gradient[i].square().sum()) for i in group))
            for i in group:
                total[i] += coefficient(norm) * gradient[i]
    return [t / BATCH for t in total]


ALL = [[0, 1, 2, 3, 4, 5]]
LAYERS = [[0, 1], [2, 3], [4, 5]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["MixOpt", "MixGhostClip", "ghost", "BK-ghost", "default"])
@pytest.mark.parametrize("parts", [1, 4])
def test_every_mode_is_the_loop(mode: str, parts: int) -> None:
    expected = by_loop(lambda n: 1 / (n + 0.01), ALL)
    torch.testing.assert_close(one_step(parts, clipping_mode=mode), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "coefficient"),
    [
        ({"clipping_fn": "Abadi", "max_grad_norm": 0.3}, lambda n: min(1.0, 0.3 / n)),
        ({"clipping_fn": "global", "max_grad_norm": 2.0}, lambda n: float(n <= 2.0)),
        ({"max_grad_norm": 7.0}, lambda n: 1 / (n + 0.01)),  # has no effect under "automatic"
        ({"max_grad_norm": 7.0, "numerical_stability_constant": 0.01}, lambda n: 7 / (n + 0.01)),
        ({"max_grad_norm": 7.0, "numerical_stability_constant": 0.0}, lambda n: 7 / n),
    ],
)
def test_clipping_functions(changes: dict[str, Any], coefficient: Callable[[float], float]) -> None:
    torch.testing.assert_close(
        one_step(**changes), by_loop(coefficient, ALL), rtol=1e-9, atol=1e-12
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "groups"),
    [
        ("layer-wise", LAYERS),
        ("param-wise", [[i] for i in range(6)]),
        (["0", "1"], [[0, 1], [2, 3, 4, 5]]),
        (["4", "1"], [[0, 1, 2, 3], [4, 5]]),  # what comes before the first head is not lost
    ],
)
def test_clipping_styles(style: Any, groups: list[list[int]]) -> None:
    bound = 0.5 / math.sqrt(len(groups))
    found = one_step(clipping_style=style, clipping_fn="Abadi", max_grad_norm=0.5)
    torch.testing.assert_close(
        found, by_loop(lambda n: min(1.0, bound / n), groups), rtol=1e-9, atol=1e-12
    )
    flat = one_step(clipping_fn="Abadi", max_grad_norm=0.5)
    assert max(float((a - b).abs().max()) for a, b in zip(found, flat, strict=True)) > 1e-4


def test_a_sum_is_not_divided() -> None:
    mean, total = one_step(), one_step(loss_reduction="sum")
    torch.testing.assert_close(total, [g * BATCH for g in mean])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"epochs": 2}, {"epochs": None, "num_steps": 8}])
def test_target_epsilon_is_met_and_kept(changes: dict[str, Any]) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    engine = engine_on(model, noise_multiplier=None, target_epsilon=2.0, seed=3, **changes)
    engine.attach(optimizer)
    loader = engine.loader(TensorDataset(*batch(SIZE)))
    for _ in range(2):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    spent = engine.get_privacy_spent()["eps_rdp"]
    assert engine.steps == 8
    assert 1.99 < spent <= 2.0
    assert engine.target_delta == 1 / (2 * SIZE)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(BudgetExhausted):
        optimizer.step()
    found = engine.get_privacy_spent(accounting_mode="all")
    assert found["eps_low"] <= found["eps_upper"] < found["eps_rdp"] == spent
    assert engine.get_privacy_spent(steps=4)["eps_rdp"] < spent
    assert engine.get_privacy_spent(steps=0)["eps_rdp"] == 0


def test_a_loader_of_ones_own_is_charged_without_amplification() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = engine_on(model, noise_multiplier=2.0)
    engine.attach(optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in DataLoader(TensorDataset(*batch(SIZE)), batch_size=BATCH, shuffle=True):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [w.category for w in caught] == [PrivacyWarning]
    spent = engine.get_privacy_spent()["eps_rdp"]
    whole, amplified = (
        accounting.get_accountant("rdp").epsilon(
            [SampledGaussian(2.0, rate, 4)], engine.target_delta, adjacency="zero-out"
        )
        for rate in (1.0, BATCH / SIZE)
    )
    assert spent == whole > 2 * amplified


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)).transpose(1, 2)


@pytest.mark.parametrize("mode", ["MixOpt", "MixGhostClip", "ghost"])
def test_tied_weights_contribute_no_more_than_the_bound(mode: str) -> None:
    model = Tied().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine_on(model, clipping_fn="Abadi", max_grad_norm=0.1, clipping_mode=mode).attach(optimizer)
    ids = torch.randint(0, 7, (1, 6), generator=torch.Generator().manual_seed(5))
    F.cross_entropy(model(ids), ids).backward()
    optimizer.step()
    (gradient,) = [p.grad for p in model.parameters()]
    assert float(gradient.norm()) * BATCH == pytest.approx(0.1, rel=1e-9)


def test_biases_alone() -> None:
    model = network()
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = engine_on(model, origin_params=["0.bias"], noise_multiplier=1.0)
    engine.attach(optimizer)
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    optimizer.step()
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert engine.bias_only
    assert moved == {"0.bias", "1.bias", "4.bias"}


def test_training_stats() -> None:
    model = network().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = engine_on(model, noise_multiplier=1e-3, record_snr=True, seed=1)
    assert engine.get_training_stats()["med_clip"] is None
    engine.attach(optimizer)
    F.cross_entropy(model(batch()[0].float()), batch()[1]).backward()
    optimizer.step()
    stats = engine.get_training_stats()
    expected = by_loop(lambda n: 1 / (n + 0.01), ALL)
    signal = BATCH * math.sqrt(sum(float(g.square().sum()) for g in expected))
    assert stats["signal"] == pytest.approx(signal, rel=1e-2)
    assert stats["noise"] == pytest.approx(1e-3 * math.sqrt(engine.num_params))
    assert stats["snr"] == pytest.approx(stats["signal"] / stats["noise"])
    assert 0 < stats["min_clip"] <= stats["med_clip"] <= stats["max_clip"]
    assert optimizer.get_training_stats() == stats


def test_an_optimizer_that_makes_its_gradients_later() -> None:
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1, lr=0.1)
    engine = engine_on(model, noise_multiplier=1.0, record_snr=True)
    engine.attach(optimizer)

    def closure() -> Tensor:
        loss = F.cross_entropy(model(batch()[0]), batch()[1])
        loss.backward()
        return loss

    optimizer.step(closure)
    assert engine.steps == 1


def test_schedulers_locks_and_detaching() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = engine_on(model)
    engine.attach(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    x, y = batch()
    engine.lock()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="unlock"):
        optimizer.step()
    engine.unlock()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", PrivacyWarning)
        loss = optimizer.step(lambda: None)  # a closure, by position
        scheduler.step()
    assert loss is None
    assert engine.steps == 1
    engine.detach()
    optimizer.zero_grad()
    plain = copy.deepcopy(model)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    F.cross_entropy(plain(x), y).backward()
    torch.testing.assert_close(
        [p.grad for p in model.parameters()], [p.grad for p in plain.parameters()]
    )
    assert not hasattr(optimizer, "virtual_step")
    assert not hasattr(optimizer, "get_privacy_spent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_gradnorm": 1.0}, "Did you mean 'max_grad_norm'"),
        ({"clipping_mode": "mixopt"}, "Did you mean 'MixOpt'"),
        ({"clipping_style": "layerwise"}, "Did you mean 'layer-wise'"),
        ({"clipping_style": ["9"]}, "is not known"),
        ({"clipping_style": ["2", "3", "4"]}, "nothing is trained in the block of '3'"),
        ({"clipping_fn": "abadi"}, "Did you mean 'Abadi'"),
        ({"accounting_mode": "gdp"}, "is not known"),
        ({"num_GPUs": 2}, "has 1 processes"),
        ({"origin_params": ["wte"]}, "'wte'"),
        ({"numerical_stability_constant": 0.5}, "0.01"),
        ({"epochs": None, "noise_multiplier": None, "target_epsilon": 1.0}, "epochs"),
        ({"noise_multiplier": None}, "target_epsilon"),
        ({"sample_size": 0}, "sample_size=0"),
        ({"batch_size": 0, "noise_multiplier": None, "target_epsilon": 1.0}, "batch_size=0"),
        ({"named_params": [("x", nn.Parameter(torch.zeros(1)))]}, "named_params"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        engine_on(network(), **changes)


def trained_on(
    model: nn.Module, make: Callable[..., PrivacyEngine] = PrivacyEngine, **settings: Any
) -> tuple[list[Tensor], float, int]:
    """Parameters, ε and processes after a run with noise."""
    engine = make(
        model,
        batch_size=BATCH,
        sample_size=SIZE,
        num_steps=2,
        noise_multiplier=0.5,
        seed=0,
        **settings,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine.attach(optimizer)
    for x, y in itertools.islice(engine.loader(TensorDataset(*batch(SIZE))), 2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    values = [values_of(p) for p in model.parameters()]
    return values, engine.get_privacy_spent()["eps_rdp"], engine.engine.ranks.size


@pytest.mark.slow
def test_engines_for_shards_train_the_model_of_one_process() -> None:
    """`num_GPUs` and fastDP's engines for several processes: in shards, and whole on each."""
    shards = fastdp.PrivacyEngine_Distributed_Stage_2_and_3
    extending = fastdp.PrivacyEngine_Distributed_extending

    def work(rank: int) -> list[Any]:
        return [
            trained_on(network(), num_GPUs=2),
            trained_on(fully_shard(network()), shards, num_GPUs=2, torch_seed_is_fixed=True),
            trained_on(network(), extending, num_GPUs=2, grad_accum_steps=2),
        ]

    by_rank = on_ranks(2, work)
    for i, style in enumerate(("all-layer", "layer-wise", "param-wise")):
        values, epsilon, _ = trained_on(network(), clipping_style=style)
        for theirs, told, size in (found[i] for found in by_rank):
            torch.testing.assert_close(theirs, values, rtol=1e-9, atol=1e-9)
            assert (told, size) == (epsilon, 2)


def test_several_examples_are_not_clipped_as_one() -> None:
    with pytest.raises(ConfigurationError, match="each example is clipped by itself"):
        fastdp.PrivacyEngine_Distributed_extending(network(), per_sample_clip=False)
