"""Several ranks take the step of one process: the same examples, sums, noise and ε.

The oracle is one process, with the same seed. The broken twins are what other libraries have done:
noise on each rank, and means where sums belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

import dptorch
from dptorch.distributed import Ranks
from dptorch.distributed.agreement import digest_of_examples
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.randomness import RootKey
from tests.distributed.processes import on_ranks
from tests.distributed.scenarios import MODELS, SIZE, Trained, close, loss_of, settings_of, train
from tests.engine.setup import make_data, make_model

EXACT = 1e-6

pytestmark = pytest.mark.slow


def same_run(ranks: list[Trained], alone: Trained) -> None:
    """Assert that ranks did what one process did: its noise to the bit, its sums up to rounding."""
    for mine in ranks:
        assert not isinstance(mine, Exception), mine
        assert torch.equal(mine.values, ranks[0].values)
        assert len(mine.noise) == len(alone.noise)
        for a, b in zip(mine.noise, alone.noise, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(mine.sums, alone.sums, strict=True):
            assert close(a, b, EXACT)
        assert close(mine.values, alone.values, EXACT)
        assert mine.epsilon == alone.epsilon


LAYER_WISE: dict[str, Any] = {"clipping_style": "layer-wise"}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_take_the_step_of_one_process(size: int) -> None:
    """Every model of the table, and both styles, in one start of the ranks."""
    names = list(MODELS)[:4] if size == 2 else ["MLP"]  # but for the one that is GPT-2 once more
    cases = [(name, {}) for name in names] + [(name, LAYER_WISE) for name in names[:3:2]]

    def work(rank: int = 0) -> list[Trained]:
        return [train(name, self_check=True, **settings) for name, settings in cases]

    by_rank = on_ranks(size, work)
    for i, alone in enumerate(work()):
        same_run([found[i] for found in by_rank], alone)
        local = torch.tensor([found[i].local for found in by_rank])
        assert local.sum(0).tolist() == alone.local
    assert len({tuple(found[0].local) for found in by_rank}) > 1


def test_other_settings_of_a_plan_are_the_same_on_ranks() -> None:
    cases: list[dict[str, Any]] = [
        {"limit": 2, "sample_rate": 0.5},
        {"sampling": "truncated-poisson", "limit": 3},
        {"sampling": "fixed-size"},
        {"clipping_mode": "ghost"},
        {"adaptive_clipping": {"count_stddev": 4.0}},
        {"clipping_fn": "automatic"},
        {"mechanism": "discrete_gaussian", "accountant": "rdp"},
        {"mechanism": "banded", "bands": 3, "steps": 6},
        {"mechanism": "inverse-banded", "sample_rate": 0.25, "steps": 6},
        {"mechanism": "buffered-toeplitz", "sample_rate": 0.25, "steps": 6},
    ]  # fmt: skip

    def work(rank: int = 0) -> list[Trained]:
        return [train(**case) for case in cases]

    by_rank = on_ranks(2, work)
    for i, alone in enumerate(work()):
        same_run([found[i] for found in by_rank], alone)


def test_200_steps_at_an_expected_local_batch_of_one() -> None:
    """Many ranks have no example at all, and some steps none on any rank."""
    plan = {"sample_rate": 2 / SIZE, "steps": 200, "lr": 0.05, "accountant": "rdp"}
    ranks = on_ranks(2, lambda rank: train(**plan))
    same_run(ranks, train(**plan))
    assert sum(n == 0 for n in ranks[0].local) > 20
    assert ranks[0].local != ranks[1].local
    assert any(a == b == 0 for a, b in zip(ranks[0].local, ranks[1].local, strict=True))


# -- broken twins ----------------------------------------------------------------------------------


@contextmanager
def noise_of_its_own(rank: int) -> Iterator[None]:
    """Each rank has a key of its own for the noise: two thirds of the planned standard deviation."""
    derive = RootKey.derive

    def apart(self: RootKey, purpose: str, *counters: int) -> bytes:
        return derive(self, f"{purpose} {rank}" if purpose == "noise" else purpose, *counters)

    RootKey.derive = apart  # type: ignore[method-assign]
    try:
        yield
    finally:
        RootKey.derive = derive  # type: ignore[method-assign]


@contextmanager
def means(rank: int) -> Iterator[None]:
    """Gradients are averaged, as DistributedDataParallel does."""
    add_up = Ranks.add_up_

    def mean(self: Ranks, tensors: Any) -> None:
        tensors = list(tensors)
        add_up(self, tensors)
        for t in tensors:
            t.div_(self.size)

    Ranks.add_up_ = mean  # type: ignore[method-assign]
    try:
        yield
    finally:
        Ranks.add_up_ = add_up  # type: ignore[method-assign]


@pytest.mark.parametrize("broken", [noise_of_its_own, means])
def test_the_comparison_sees_what_is_broken(broken: Any) -> None:
    def work(rank: int) -> Trained:
        with broken(rank):
            return train()

    with pytest.raises(AssertionError):
        same_run(on_ranks(2, work), train())


# -- wrappers --------------------------------------------------------------------------------------


def test_distributed_data_parallel_before_and_after_the_engine() -> None:
    """Its own reducer, which averages, neither runs nor waits."""
    wrap = DistributedDataParallel
    cases: list[dict[str, Any]] = [
        {"wrap": wrap},
        {"wrap_after": wrap},
        {"wrap": lambda m: wrap(m, find_unused_parameters=True)},
        {"wrap_after": lambda m: wrap(m, static_graph=True)},
        {"wrap": lambda m: wrap(m, gradient_as_bucket_view=True)},
        {"wrap": wrap, "name": "tied GPT-2"},
    ]
    by_rank = on_ranks(2, lambda rank: [train(**case) for case in cases])
    alone = {name: train(name) for name in ("MLP", "tied GPT-2")}
    for i, case in enumerate(cases):
        same_run([found[i] for found in by_rank], alone[case.get("name", "MLP")])


def test_models_that_are_spread_in_other_ways_are_refused() -> None:
    def work(rank: int) -> list[str]:
        found = []
        for model in (
            nn.DataParallel(make_model()),
            DistributedDataParallel(make_model(), mixed_precision=MixedPrecision()),
            make_model().to("meta"),
        ):
            with pytest.raises(ConfigurationError) as error:
                dptorch.PrivacyEngine(model, **settings_of())
            found.append(str(error.value))
        return found

    for found in on_ranks(2, work):
        assert "Give the engine model.module" in found[0]
        assert "mixed_precision" in found[1]
        assert "meta device" in found[2]


# -- what ranks must have in common ----------------------------------------------------------------


class Turned(Dataset[Any]):
    """In no tensor; on rank 1 in another order, but for the 13 examples that are always looked at."""

    def __init__(self, rank: int) -> None:
        x, y = make_data().tensors
        seen = {i * (SIZE - 1) // 12 for i in range(13)}
        others = [i for i in range(SIZE) if i not in seen]
        places = dict(zip(others, reversed(others), strict=True)) if rank else {}
        self.rows = [(x[j], y[j]) for j in (places.get(i, i) for i in range(SIZE))]

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def test_ranks_that_differ_are_told_so_on_every_rank() -> None:
    def engine(**settings: Any) -> dptorch.PrivacyEngine:
        return dptorch.PrivacyEngine(make_model(), **settings_of(**settings))

    def moved(rank: int) -> None:
        private = engine()
        with torch.no_grad():
            next(private.model.parameters()).add_(rank)
        private.loader(make_data())

    x, y = make_data().tensors
    cases: dict[str, Any] = {
        "differ in the plan's noise_multiplier: 1.0 on": lambda r: engine(noise_multiplier=1.0 + r),
        "differ in seed": lambda r: engine(seed=r),
        "differ in clipping_mode": lambda r: engine(clipping_mode=("auto", "ghost")[r]),
        "differ in the trainable parameters": lambda r: dptorch.PrivacyEngine(
            nn.Linear(5 + r, 3), **settings_of()
        ),
        "differ in the number of examples": lambda r: engine().loader(
            Subset(make_data(), range(SIZE - r))
        ),
        "differ in the examples of the data set": lambda r: engine().loader(
            TensorDataset(x.roll(r, 0), y.roll(r, 0))
        ),
        "run differ in the examples of the data set": lambda r: engine().loader(Turned(r)),
        "differ in max_physical_batch_size": lambda r: engine().loader(
            make_data(), max_physical_batch_size=r + 1
        ),
        "differ in user_ids": lambda r: engine(
            unit="user", max_examples_per_user=4, sample_size=6
        ).loader(make_data(), user_ids=[(i + r) % 6 for i in range(SIZE)]),
        "differ in the values of the model's parameters": moved,
        "rank 1 of 2 stopped": lambda r: engine(clipping_mode=("auto", "fast")[r]),
    }

    def work(rank: int) -> list[str]:
        found = []
        for act in cases.values():
            try:
                act(rank)
            except (ConfigurationError, PrivacyError) as error:
                found.append(str(error))
            else:
                found.append("nothing")
        return found

    first, second = on_ranks(2, work)
    for i, words in enumerate(cases):
        assert words in first[i]
        assert words in second[i] or "rank 1 of 2" in words


def test_examples_that_are_augmented_are_no_difference() -> None:
    class Augmented(TensorDataset):
        own = torch.Generator()

        def __getitem__(self, i: int) -> Any:
            x, y = super().__getitem__(i)
            return x + torch.randn(5), y, torch.rand(3, generator=self.own)

    data = Augmented(*make_data().tensors)
    before = torch.get_rng_state()
    assert digest_of_examples(data) == digest_of_examples(data)
    assert torch.equal(torch.get_rng_state(), before)


def test_rank_0s_model_and_a_secret_key_are_everybodys() -> None:
    def work(rank: int) -> tuple[torch.Tensor, str]:
        torch.manual_seed(rank)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        engine = dptorch.PrivacyEngine(model, **settings_of(seed=None, steps=2, sample_rate=1.0))
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        for x, y in engine.loader(make_data()):
            loss_of(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert engine.statement().private
        return nn.utils.parameters_to_vector(model.parameters()).detach(), engine.state_dict()[
            "key"
        ]

    (first, key), (second, other) = on_ranks(2, work)
    assert torch.equal(first, second)
    assert key == other


def test_an_error_on_one_rank_is_an_error_on_all() -> None:
    """Before anything is counted, and without waiting."""

    def work(rank: int) -> tuple[str, int]:
        model = make_model()
        engine = dptorch.PrivacyEngine(model, **settings_of())
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        for x, y in engine.loader(make_data()):
            loss = loss_of(model(x), y)
            if rank == 0:
                loss.backward()
            with pytest.raises(PrivacyError) as error:
                optimizer.step()
            return str(error.value), engine.steps_done
        raise AssertionError

    (first, *done), (second, *also) = on_ranks(2, work)
    assert first.startswith(
        "rank 1 of 2 stopped, and all ranks with it: PrivacyError: optimizer.step"
    )
    assert second.startswith("optimizer.step() without a backward")
    assert done == also == [0]


def test_batches_of_a_loader_of_ones_own_are_refused_on_ranks() -> None:
    """DistributedSampler fills up with examples that other ranks have."""

    def work(rank: int) -> str:
        model = make_model()
        engine = dptorch.PrivacyEngine(model, **settings_of())
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        data = make_data()
        for x, y in DataLoader(data, 4, sampler=DistributedSampler(data)):
            loss_of(model(x), y).backward()
            with pytest.raises(PrivacyError) as error:
                optimizer.step()
            assert engine.steps_done == 0
            return str(error.value)
        raise AssertionError

    assert all("they would count twice" in found for found in on_ranks(2, work))


def test_a_process_that_trains_alone_says_so() -> None:
    """Each rank has a model of its own, and none waits for another."""

    def work(rank: int) -> torch.Tensor:
        return train(seed=rank, ranks=Ranks.alone()).values

    first, second = on_ranks(2, work)
    assert torch.equal(first, train(seed=0).values)
    assert torch.equal(second, train(seed=1).values)
