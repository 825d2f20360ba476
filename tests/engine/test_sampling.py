"""The engine under every sampling scheme and unit: what is summed, and what may be published."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dptorch
from dptorch.engine.logical_batch import LogicalBatch
from dptorch.errors import ConfigurationError, DataError, PrivacyError, PrivacyWarning
from dptorch.plan import PrivacyPlan
from dptorch.randomness import RootKey
from dptorch.sampling import SCHEMES, PrivateLoader, Users
from tests.engine.setup import SIZE, clipped_mean, make_data, make_engine, make_model, parameters

LR = 0.5


def run(
    model: nn.Module,
    data: TensorDataset,
    engine: dptorch.PrivacyEngine,
    steps: int | None = None,
    share: tuple[int, int] | None = None,
    **loader: Any,
) -> Tensor:
    """Train by plain SGD; returns how far the parameters moved.

    share: (rank, world size), to train on one rank's part of each batch.
    """
    before = parameters(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    batches = engine.loader(data, **loader) if share is None else share_of(data, engine, *share)
    while engine.steps_done < (engine.plan.steps if steps is None else steps):
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return parameters(model) - before


def share_of(
    data: TensorDataset, engine: dptorch.PrivacyEngine, rank: int, world_size: int
) -> PrivateLoader:
    """One rank's share as the engine's own batches, without the other ranks."""
    plan = engine.plan
    loader = PrivateLoader(
        data,
        plan.scheme.sampler(plan.terms, len(data), engine._run.key),
        steps_per_epoch=plan.terms.steps_per_epoch,
        start_step=lambda: engine.steps_done,
        total_steps=plan.steps,
        rank=rank,
        world_size=world_size,
    )
    loader.on_batch(engine.begin_physical_batch)
    loader.on_end(lambda complete: engine.end_epoch(complete=complete))
    return loader


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 3])
@pytest.mark.parametrize("sampling", SCHEMES)
def test_a_step_sums_what_the_scheme_drew(sampling: str, limit: int | None) -> None:
    """Against a loop over single examples."""
    settings: dict[str, Any] = {"sample_rate": 1 / 4, "sampling": sampling, "max_grad_norm": 0.1}
    model, data = make_model(), make_data()
    engine = make_engine(model, **settings, steps=4)
    run(model, data, engine, max_physical_batch_size=limit)
    plan = engine.plan
    sampler = plan.scheme.sampler(plan.terms, SIZE, RootKey.from_seed(0))
    reference = make_model()
    for step in range(4):
        drawn = TensorDataset(*data[sampler.draw(step)])
        move = clipped_mean(reference, drawn, 0.1, plan.expected_batch_size)
        with torch.no_grad():
            nn.utils.vector_to_parameters(parameters(reference) - LR * move, reference.parameters())
    torch.testing.assert_close(parameters(model), parameters(reference), atol=1e-6, rtol=1e-5)
    assert engine.sampling_run == {sampling: 4}
    assert engine.statement().sampling_holds


@pytest.mark.parametrize("limit", [None, 5])
def test_constant_shapes_train_what_poisson_batches_do(limit: int | None) -> None:
    shapes: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, x: Tensor) -> Tensor:
            shapes.append(len(x))
            # NaN on rows of zeros, in the output and in its gradient.
            return self.inner(x / x.norm(dim=1, keepdim=True))

    moves = []
    for sampling in ("poisson", "truncated-poisson"):
        model = Watched()
        engine = make_engine(model, sample_rate=0.25, sampling=sampling, steps=6, self_check=False)
        moves.append(run(model, make_data(), engine, max_physical_batch_size=limit))
        if sampling == "poisson":
            assert len(set(shapes)) > 1
            shapes.clear()
    torch.testing.assert_close(moves[0], moves[1], atol=1e-6, rtol=1e-5)
    capacity = engine.plan.capacity
    assert capacity is not None
    assert shapes == [limit or capacity] * (6 * -(-capacity // (limit or capacity)))


def test_ranks_together_make_the_step_of_one_process() -> None:
    moves = []
    for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3)):
        model = make_model()
        engine = make_engine(model, sample_rate=0.2, steps=1, max_grad_norm=0.1)
        moves.append(run(model, make_data(), engine, share=(rank, world)))
    torch.testing.assert_close(moves[0], sum(moves[1:]), atol=1e-7, rtol=1e-5)


def test_a_loader_of_more_ranks_than_the_engine_has_is_refused() -> None:
    """Each rank would take a noisy step on its own share, divided by the whole batch size."""
    engine = make_engine(make_model())
    with pytest.raises(
        ConfigurationError, match=r"world_size=2, but the engine adds up sums over 1"
    ):
        engine.loader(make_data(), rank=0, world_size=2)
    assert len(engine.loader(make_data(), rank=0, world_size=1)) > 0


# -- users -----------------------------------------------------------------------------------------

OWNERS = [0] * 9 + [1] * 5 + [2] * 4 + [3] * 4 + [4, 5]
assert len(OWNERS) == SIZE


def users_engine(model: nn.Module, **overrides: Any) -> dptorch.PrivacyEngine:
    settings: dict[str, Any] = {
        "unit": "user", "max_examples_per_user": 4, "sample_size": 6, "max_grad_norm": 1.0,
        "steps": 1,
    }  # fmt: skip
    return make_engine(model, **settings | overrides)


def changed(owner: int, scale: float) -> TensorDataset:
    """The data with every example of one user replaced by ones with huge, aligned gradients."""
    x, y = (t.clone() for t in make_data().tensors)
    mine = torch.tensor([o == owner for o in OWNERS])
    x[mine], y[mine] = scale * torch.ones(5), 1
    return TensorDataset(x, y)


def distance(owner: int, **overrides: Any) -> float:
    """How far a step's sum moves when all examples of a user are replaced."""
    sums = []
    for scale in (100.0, -100.0):
        model = make_model()
        engine = users_engine(model, **overrides)
        move = run(model, changed(owner, scale), engine, user_ids=OWNERS)
        sums.append(move * engine.plan.expected_batch_size / LR)
    return float((sums[0] - sums[1]).norm())


@pytest.mark.slow
def test_a_user_moves_a_sum_by_at_most_the_bound() -> None:
    """Replacing one user moves the sum by at most 2 C, and adversarial examples come close to it."""
    for owner in range(6):
        assert distance(owner) <= 2.0 * (1 + 1e-5)
    assert distance(0) > 1.5
    assert distance(0, sampling="fixed-size", sample_rate=1.0) <= 2.0 * (1 + 1e-5)
    for settings in (
        {"clipping_style": "layer-wise"},
        {"clipping_style": {"0": 0.6, "2": 0.8}},
        {"clipping_fn": "automatic"},
    ):
        assert distance(0, **settings) <= 2.0 * (1 + 1e-5)


def test_a_user_left_out_moves_a_sum_by_at_most_c() -> None:
    x, y = changed(0, 100.0).tensors
    rest = torch.tensor([o != 0 for o in OWNERS])
    moves = []
    for keep in (torch.ones(SIZE, dtype=torch.bool), rest):
        model = make_model()
        engine = users_engine(model, adjacency="add-remove", sample_rate=1.0, batch_size=6,
                              sample_size=None)  # fmt: skip
        owners = [o for o, kept in zip(OWNERS, keep.tolist(), strict=True) if kept]
        moves.append(run(model, TensorDataset(x[keep], y[keep]), engine, user_ids=owners))
    apart = float((moves[0] - moves[1]).norm()) * 6 / LR
    assert 0.7 < apart <= 1 + 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3, None])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parts_of_a_batch_and_mean_losses_keep_a_user_within_the_bound(
    most: int | None, reduction: str
) -> None:
    """One user's rows lie in several parts of different sizes, each with a mean of its own."""
    moves = []
    for scale in (100.0, -100.0):
        model = make_model()
        engine = users_engine(model, loss_reduction=reduction)
        loader = engine.loader(
            changed(0, scale), user_ids=OWNERS, max_physical_batch_size=most, num_workers=0
        )
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
        before = parameters(model)
        for x, y in loader:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
            optimizer.step()
            optimizer.zero_grad()
        divisor = engine.plan.expected_batch_size if reduction == "mean" else 1.0
        moves.append((parameters(model) - before) * divisor / LR)
    assert 1.5 < float((moves[0] - moves[1]).norm()) <= 2.0 * (1 + 1e-5)


def test_a_user_drawn_several_times_counts_as_often() -> None:
    """Sampling with replacement: its accounting event covers C for each time a user was drawn."""
    settings = {"sampling": "fixed-size-with-replacement", "sample_rate": 1.0}
    engine = users_engine(make_model(), **settings)
    drawn = np.array(OWNERS)[engine.loader(make_data(), user_ids=OWNERS).sampler.draw(0)]
    engine.detach()
    rows = Counter(drawn[drawn < 4].tolist())  # these users bring four rows each time
    owner, most = rows.most_common(1)[0]
    assert most >= 8, "no user was drawn twice: the test says nothing"
    assert 2.0 < distance(owner, **settings) <= 2.0 * (most // 4) * (1 + 1e-5)


def own_step_of_users() -> float:
    """How far a step on all rows of a loader of one's own moves when one user's rows change."""
    sums = []
    for scale in (100.0, -100.0):
        model = make_model()
        engine = users_engine(model)
        optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
        before = parameters(model)
        x, y = changed(0, scale).tensors
        F.cross_entropy(model(x), y).backward()
        with pytest.warns(PrivacyWarning, match="did not come"):
            optimizer.step()
        sums.append((parameters(model) - before) * engine.plan.expected_batch_size / LR)
    return float((sums[0] - sums[1]).norm())


def test_batches_of_a_loader_of_ones_own_are_refused_for_users() -> None:
    model = make_model()
    engine = users_engine(model)
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    before = parameters(model)
    x, y = make_data().tensors
    with pytest.raises(PrivacyError, match=r"whose rows.*engine.loader\(dataset, user_ids"):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="without a backward"):
        optimizer.step()
    assert engine.steps_done == 0
    assert torch.equal(parameters(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_batches_of_ones_own_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: nine rows of one user, each clipped for itself."""
    check = LogicalBatch._check

    def forgiving(self: LogicalBatch, *arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            of_examples = {"unit": "example", "max_examples_per_user": None}
            patch.setattr(self, "plan", dataclasses.replace(self.plan, **of_examples))
            return check(self, *arguments)

    monkeypatch.setattr(LogicalBatch, "_check", forgiving)
    assert own_step_of_users() > 2.0 * 2


def test_clipping_examples_alone_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: users are drawn, but each example is clipped to C as before."""
    monkeypatch.setattr(PrivacyPlan, "max_example_norm", property(lambda plan: plan.max_grad_norm))
    assert distance(0) > 2.0 * 2.5


def test_examples_without_a_bound_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: all nine examples of a user enter, where four are allowed."""
    engine = users_engine(make_model())
    loader = engine.loader(make_data(), user_ids=OWNERS)
    assert np.bincount(np.array(OWNERS)[loader.sampler.draw(0)])[0] == 4
    engine.detach()
    monkeypatch.setattr("dptorch.sampling.users.distinct_indices", lambda g, n, k: np.arange(n))
    assert distance(0) > 2.0 * 1.5


def test_the_expected_batch_counts_users() -> None:
    engine = users_engine(make_model(), sample_rate=0.5, steps=8)
    assert engine.plan.expected_batch_size == 3
    users = Users(OWNERS)
    loader = engine.loader(make_data(), user_ids=torch.tensor(OWNERS), max_physical_batch_size=2)
    assert loader.sampler.sample_size == users.examples_in_all == SIZE


def test_constant_shapes_of_users() -> None:
    model = make_model()
    engine = users_engine(model, sampling="truncated-poisson", sample_rate=0.5, steps=4)
    seen = []
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    for _ in range(2):
        for x, y in engine.loader(make_data(), user_ids=OWNERS):
            seen.append(len(x))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    assert seen == [engine.plan.capacity * 4] * 4  # type: ignore[operator]


# -- what may be published ---------------------------------------------------------------------------


def public_record(size: int, sampling: str) -> tuple[dict[str, Any], Tensor]:
    """Everything that a run on the first `size` records shows, and the first noisy step."""
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    model = make_model()
    torch.manual_seed(7)
    data = TensorDataset(*(t[:size] for t in make_data().tensors))
    engine = dptorch.PrivacyEngine(
        model, sample_rate=0.25, batch_size=6, steps=8, noise_multiplier=1.0, target_delta=1e-3,
        max_grad_norm=1.0, sampling=sampling, seed=3,
    )  # fmt: skip
    assert engine.plan.adjacency.value == "add-remove"
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    loader = engine.loader(data)
    lengths, first = [len(loader)], None
    for epoch in range(2):
        for x, y in loader:
            before = parameters(model)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            first = parameters(model) - before if first is None else first
        lengths += [epoch, len(loader), engine.steps_done]
    assert first is not None
    record = {
        "plan": engine.plan.to_json(),
        "statement": str(engine.statement()),
        "values": engine.statement().to_dict(),
        "spent": engine.get_privacy_spent(),
        "lengths": lengths,
        "steps per epoch": loader.steps_per_epoch,
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index] # noqa: NPY002
    }
    return record, first


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["poisson", "random-allocation"])
def test_nothing_published_depends_on_the_number_of_records(sampling: str) -> None:
    """Neighbouring data and the same randomness: all that is shown is equal, but for one noisy sum,
    which moves by at most C over the public divisor."""
    full, step = public_record(SIZE, sampling)
    less, step_less = public_record(SIZE - 1, sampling)
    assert full == less
    assert str(SIZE) not in full["statement"].replace(full["values"]["versions"]["torch"], "")
    if sampling == "poisson":  # where the same key draws the same of the others
        assert float((step - step_less).norm()) <= LR * 1.0 / 6 * (1 + 1e-5)


def test_a_rate_made_of_the_number_of_records_would_be_caught() -> None:
    """Negative control: what make_private does by default, which is why it states zero-out."""
    plans = []
    for size in (SIZE, SIZE - 1):
        model = make_model()
        private = dptorch.make_private(
            model, torch.optim.SGD(model.parameters(), LR),
            DataLoader(TensorDataset(*(t[:size] for t in make_data().tensors)), batch_size=6),
            epochs=1, noise_multiplier=1.0, target_delta=1e-3,
        )  # fmt: skip
        plans.append(private.engine.plan)
    assert plans[0] != plans[1]
    assert {plan.adjacency.value for plan in plans} == {"zero-out"}


def test_make_private_under_add_remove_takes_nothing_from_the_data() -> None:
    plans = []
    for size in (SIZE, SIZE - 1):
        model = make_model()
        data = TensorDataset(*(t[:size] for t in make_data().tensors))
        settings: dict[str, Any] = {
            "epochs": 1, "noise_multiplier": 1.0, "target_delta": 1e-3, "adjacency": "add-remove",
        }  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), LR)
        with pytest.raises(ConfigurationError, match="Give sample_rate"):
            dptorch.make_private(model, optimizer, DataLoader(data, batch_size=6), **settings)
        private = dptorch.make_private(
            model, optimizer, DataLoader(data, batch_size=6), sample_rate=0.25, **settings
        )
        plans.append(private.engine.plan)
    assert plans[0] == plans[1]
    assert plans[0].sample_size is None


def test_a_public_number_of_records_must_be_the_true_one() -> None:
    data = TensorDataset(*(t[:-1] for t in make_data().tensors))
    with pytest.raises(ConfigurationError, match=r"23 records.*sample_size=24"):
        make_engine(make_model()).loader(data)
    # Under add/remove the true number is nobody's business, so nothing may be said about it.
    make_engine(make_model(), adjacency="add-remove").loader(data)


# -- bad input -------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


def test_data_that_cannot_be_sampled() -> None:
    engine = make_engine(make_model())
    with pytest.raises(ConfigurationError, match=r"Stream cannot be sampled.*map-style"):
        engine.loader(Stream())
    with pytest.raises(ConfigurationError, match=r"Pass engine\.loader\(loader\.dataset"):
        engine.loader(DataLoader(make_data()))
    with pytest.raises(DataError, match="empty"):
        engine.loader(TensorDataset(torch.empty(0, 5)))
    assert len(engine.loader(make_data())) == 1, "the engine is as before"


@pytest.mark.parametrize(
    "sampler",
    [WeightedRandomSampler([0.1] * SIZE, 4), SubsetRandomSampler(range(SIZE)), range(SIZE)],
)
def test_a_sampler_that_no_accountant_covers(sampler: Any) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        make_engine(make_model()).loader(make_data(), sampler=sampler)
    assert type(sampler).__name__ in str(refusal.value)
    assert "let the engine draw" in str(refusal.value)
    assert "loader of your own" in str(refusal.value)


def test_that_other_choice_is_stated_without_amplification() -> None:
    model = make_model()
    engine = make_engine(model, sample_rate=0.25, noise_multiplier=2.0, max_grad_norm=1.0, steps=6,
                         sampling="shuffled")  # fmt: skip
    optimizer = engine.attach(torch.optim.SGD(model.parameters(), LR))
    for index, (x, y) in enumerate(DataLoader(make_data(), batch_size=4, shuffle=True)):
        F.cross_entropy(model(x), y).backward()
        if index == 0:
            with pytest.warns(PrivacyWarning, match="without amplification"):
                optimizer.step()
        else:
            optimizer.step()
    statement = engine.statement()
    assert not statement.sampling_holds
    assert statement.epsilon == statement.epsilon_unamplified > engine.plan.epsilon()


def test_users_and_ids_belong_together() -> None:
    with pytest.raises(ConfigurationError, match="needs user_ids"):
        users_engine(make_model()).loader(make_data())
    with pytest.raises(ConfigurationError, match="unit='user' and max_examples_per_user"):
        make_engine(make_model()).loader(make_data(), user_ids=OWNERS)
    with pytest.raises(DataError, match="23 ids for 24 examples"):
        users_engine(make_model()).loader(make_data(), user_ids=OWNERS[:-1])
    with pytest.raises(ConfigurationError, match=r"7 records.*sample_size=6"):
        users_engine(make_model()).loader(make_data(), user_ids=[9, *OWNERS[1:]])
    model = make_model()
    with pytest.raises(ConfigurationError, match="counts examples, not users"):
        dptorch.make_private(
            model, torch.optim.SGD(model.parameters(), LR), DataLoader(make_data(), batch_size=4),
            unit="user", max_examples_per_user=2, epochs=1, noise_multiplier=1.0,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SCHEMES)
def test_a_resumed_run_draws_the_same_batches(sampling: str) -> None:
    settings: dict[str, Any] = {"sample_rate": 1 / 4, "sampling": sampling, "steps": 8}
    straight, resumed = make_model(), make_model()
    run(straight, make_data(), make_engine(straight, **settings))
    first = make_engine(resumed, **settings)
    run(resumed, make_data(), first, steps=4)
    state = first.state_dict()
    first.detach()
    second = make_engine(resumed, **settings | {"seed": 99})
    second.load_state_dict(state)
    run(resumed, make_data(), second)
    torch.testing.assert_close(parameters(resumed), parameters(straight))
    assert second.statement().sampling_run == {sampling: 8}
