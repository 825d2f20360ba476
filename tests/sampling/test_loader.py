"""The loader: exactly the drawn examples, in parts whose place is always known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from dptorch.errors import ConfigurationError, DataError, PrivacyError
from dptorch.randomness import RootKey
from dptorch.sampling import PhysicalBatch, PoissonSampler, PrivateLoader

KEY = RootKey.from_seed(4)


class Scripted:
    """A sampler whose batches are given; step t gets batch t modulo their number."""

    scheme = "scripted"

    def __init__(self, sample_size: int, batches: list[list[int]]) -> None:
        self.sample_size = sample_size
        self.batches = batches
        self.drawn: list[int] = []

    def draw(self, step: int) -> np.ndarray:
        self.drawn.append(step)
        return np.array(self.batches[step % len(self.batches)], np.int64)


def steps_of(loader: PrivateLoader) -> dict[int, list[int]]:
    """Step -> the examples handed out for it, checking on the way that the parts fit together."""
    found: dict[int, list[int]] = {}
    expected_index = 0
    for batch in loader:
        at = loader.current
        assert at is not None
        assert at.index == expected_index
        assert at.is_last == (at.index == at.count - 1)
        assert len(batch) == at.examples + at.padding
        expected_index = 0 if at.is_last else at.index + 1
        found.setdefault(at.logical_step, []).extend(batch.tolist() if at.examples else [])
    assert expected_index == 0
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [None, 1, 7, 1000])
def test_parts_together_are_the_draw(workers: int, limit: int | None) -> None:
    sampler = PoissonSampler(200, 0.05, KEY)
    loader = PrivateLoader(
        torch.arange(200),
        sampler,
        steps_per_epoch=12,
        max_physical_batch_size=limit,
        num_workers=workers,
    )
    found = steps_of(loader)
    assert list(found) == list(range(12))
    for step, examples in found.items():
        assert examples == sampler.draw(step).tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_batches_arrive_in_their_place(workers: int) -> None:
    batches: list[list[int]] = [[], [], [3, 1], [], [5], [], []]
    loader = PrivateLoader(
        torch.arange(10) + 100,
        Scripted(10, batches),
        steps_per_epoch=len(batches),
        max_physical_batch_size=1,
        num_workers=workers,
    )
    seen = [(loader.current, batch.tolist()) for batch in loader]
    assert seen == [
        (PhysicalBatch(0, 0, 1, examples=0, padding=1), [0]),
        (PhysicalBatch(1, 0, 1, examples=0, padding=1), [0]),
        (PhysicalBatch(2, 0, 2, examples=1), [103]),
        (PhysicalBatch(2, 1, 2, examples=1), [101]),
        (PhysicalBatch(3, 0, 1, examples=0, padding=1), [0]),
        (PhysicalBatch(4, 0, 1, examples=1), [105]),
        (PhysicalBatch(5, 0, 1, examples=0, padding=1), [0]),
        (PhysicalBatch(6, 0, 1, examples=0, padding=1), [0]),
    ]


def test_a_loader_that_skips_empty_batches_is_caught() -> None:
    """Negative control (a known fault of distributed samplers): steps go missing."""
    sampler = Scripted(10, [[1], [], [2]])

    def broken() -> list[int]:
        return [step for step in range(3) if len(sampler.draw(step))]

    loader = PrivateLoader(torch.arange(10), sampler, steps_per_epoch=3)
    assert broken() != [0, 1, 2]
    assert list(steps_of(loader)) == [0, 1, 2]


class Records(Dataset[Any]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "image": torch.full((3, 4), index + 1.0),
            "label": index + 1,
            "weights": (np.float32(index), torch.tensor([True])),
            "name": f"example {index}",
        }


def test_padding_has_the_structure_of_a_batch() -> None:
    loader = PrivateLoader(Records(), Scripted(5, [[], [2, 4]]), steps_per_epoch=2)
    padding, real = list(loader)
    assert set(padding) == set(real)
    assert torch.equal(padding["image"], torch.zeros(1, 3, 4))
    assert torch.equal(padding["label"], torch.zeros(1, dtype=torch.int64))
    assert padding["weights"][0].dtype == real["weights"][0].dtype
    assert torch.equal(padding["weights"][1], torch.tensor([[False]]))
    assert padding["name"] == ["example 0"]
    assert real["image"].shape == (2, 3, 4)


def test_padding_is_new_each_time() -> None:
    loader = PrivateLoader(torch.ones(5), Scripted(5, [[], []]), steps_per_epoch=2)
    for batch in loader:
        assert not batch.any()
        batch.fill_(9.0)


def test_padding_uses_the_collate_function() -> None:
    data = [torch.ones(n) for n in (3, 5, 2)]
    loader = PrivateLoader(
        data,
        Scripted(3, [[], [0, 1]]),
        steps_per_epoch=2,
        collate_fn=lambda items: torch.nn.utils.rnn.pad_sequence(items, batch_first=True),
    )
    padding, real = list(loader)
    assert torch.equal(padding, torch.zeros(1, 3))
    assert real.shape == (2, 5)


def test_a_collate_function_that_fails_on_one_example_fails_at_once() -> None:
    """Not at the first empty batch, which would tell that it was empty."""

    def pairs_only(items: list[torch.Tensor]) -> torch.Tensor:
        if len(items) < 2:
            raise ValueError("needs two")
        return torch.stack(items)

    loader = PrivateLoader(
        torch.ones(5), Scripted(5, [[0, 1]]), steps_per_epoch=3, collate_fn=pairs_only
    )
    with pytest.raises(ValueError, match="needs two"):
        next(iter(loader))


def test_getitems_is_used_for_padding_too() -> None:
    class Batched(Records):
        def __getitem__(self, index: int) -> dict[str, Any]:
            raise AssertionError("a dataset with __getitems__ may not allow single access")

        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            return [torch.tensor([float(i) + 1]) for i in indices]

    loader = PrivateLoader(Batched(), Scripted(5, [[], [1, 2]]), steps_per_epoch=2)
    assert [b.tolist() for b in loader] == [[[0.0]], [[2.0], [3.0]]]


def test_every_example_appears() -> None:
    sampler = PoissonSampler(300, 0.1, KEY)
    loader = PrivateLoader(
        torch.arange(300), sampler, steps_per_epoch=200, max_physical_batch_size=16
    )
    seen = {i for examples in steps_of(loader).values() for i in examples}
    # Each is missed with probability 0.9**200: 2 * 10**-7 for any of the 300.
    assert seen == set(range(300))


@pytest.mark.parametrize("workers", [0, 2])
def test_current_is_set_when_handed_out_not_when_prefetched(workers: int) -> None:
    sampler = Scripted(50, [[i, i + 1, i + 2] for i in range(20)])
    loader = PrivateLoader(
        torch.arange(50),
        sampler,
        steps_per_epoch=20,
        max_physical_batch_size=2,
        num_workers=workers,
    )
    announced: list[PhysicalBatch] = []
    loader.on_batch(announced.append)
    assert loader.current is None
    for number, batch in enumerate(loader):
        assert len(announced) == number + 1
        assert loader.current == announced[-1]
        assert batch[0] == announced[-1].logical_step + 2 * announced[-1].index
    assert loader.current is None
    assert len(announced) == 40


class Ledger:
    """What a loader's listeners were told."""

    def __init__(self, loader: PrivateLoader) -> None:
        self.events: list[tuple[str, object]] = []
        loader.on_start(lambda step: self.events.append(("start", step)))
        loader.on_batch(lambda part: self.events.append(("batch", part.logical_step)))
        loader.on_end(lambda complete: self.events.append(("end", complete)))


def counting_loader(
    start: Callable[[], int] | int, workers: int = 0, **options: Any
) -> PrivateLoader:
    batches = [[i, i + 1, i + 2] for i in range(20)]
    return PrivateLoader(
        torch.arange(50),
        Scripted(50, batches),
        steps_per_epoch=4,
        max_physical_batch_size=2,
        start_step=start,
        num_workers=workers,
        **options,
    )


def test_iterations_start_and_end() -> None:
    loader = counting_loader(0)
    ledger = Ledger(loader)
    list(loader)
    steps = [("batch", step) for step in range(4) for _ in range(2)]
    assert ledger.events == [("start", 0), *steps, ("end", True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"workers": 0},
        {"workers": 2},
        {"workers": 2, "persistent_workers": True},
        {"workers": 2, "prefetch_factor": 4},
    ],
)
def test_a_loop_left_inside_a_logical_batch_starts_it_again(options: dict[str, Any]) -> None:
    """The stale halves and queued boundaries of a loop left early must not reach the next one."""
    done = 0
    loader = counting_loader(lambda: done, **options)
    ledger = Ledger(loader)
    for _ in loader:
        at = loader.current
        assert at is not None
        if at.logical_step == 2:
            break  # between the two parts of step 2
        done += at.is_last
    assert ledger.events[-1] == ("end", False)
    assert loader.current is None
    resumed = [(loader.current, batch.tolist()) for batch in loader]
    assert [batch for _, batch in resumed] == [[2, 3], [4], [3, 4], [5]]
    assert [(at.logical_step, at.index) for at, _ in resumed if at] == [
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
    ]
    assert ledger.events[-1] == ("end", True)


def test_an_exception_in_the_loop_ends_the_iteration_before_the_next_starts() -> None:
    loader = counting_loader(lambda: 0)
    ledger = Ledger(loader)
    held = None
    try:
        for _ in loader:
            raise KeyError("in the loop")
    except KeyError as error:
        held = error  # its traceback keeps the iterator alive
    next(iter(loader))
    assert held is not None
    assert ledger.events[:4] == [("start", 0), ("batch", 0), ("end", False), ("start", 0)]


def test_two_loops_at_once_are_refused() -> None:
    loader = counting_loader(lambda: 0)
    ledger = Ledger(loader)
    first = iter(loader)
    next(first)
    second = iter(loader)
    assert ledger.events == [("start", 0), ("batch", 0), ("end", False), ("start", 0)]
    with pytest.raises(PrivacyError, match="newer one"):
        next(first)
    next(second)
    assert loader.current == PhysicalBatch(0, 0, 2, examples=2)


def test_errors_in_the_data_end_the_iteration() -> None:
    class Broken(Records):
        def __getitem__(self, index: int) -> dict[str, Any]:
            if index == 3:
                raise OSError("unreadable")
            return super().__getitem__(index)

    loader = PrivateLoader(Broken(), Scripted(5, [[1], [3], [1]]), steps_per_epoch=3)
    ledger = Ledger(loader)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(OSError, match="unreadable"):
        next(iterator)
    assert ledger.events == [("start", 0), ("batch", 0), ("end", False)]
    with pytest.raises(StopIteration):
        next(iterator)


def test_a_listener_can_stop_the_loop() -> None:
    loader = counting_loader(0)
    ledger = Ledger(loader)

    def stop(part: PhysicalBatch) -> None:
        if part.logical_step == 1:
            raise PrivacyError("budget spent")

    loader.on_batch(stop)
    with pytest.raises(PrivacyError, match="budget spent"):
        list(loader)
    assert ledger.events[-1] == ("end", False)


def test_epochs_follow_the_start_step() -> None:
    step = 0
    loader = counting_loader(lambda: step, total_steps=10)
    lengths = []
    for start, expected in [(0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (6, [6, 7]), (8, [8, 9])]:
        step = start
        lengths.append(loader.steps_left)
        assert list(steps_of(loader)) == expected
    assert lengths == [4, 4, 2, 2]
    step = 10
    assert len(loader) == 0
    assert list(loader) == []


@pytest.mark.parametrize("capacity", [None, 24])
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_length_is_the_number_of_batches_that_come(
    capacity: int | None, world_size: int
) -> None:
    """A trainer that counts on `len` would stop early if it were the number of steps."""
    sampler = PoissonSampler(40, 0.25, RootKey.from_seed(1))
    loader = PrivateLoader(
        torch.arange(40),
        sampler,
        steps_per_epoch=5,
        max_physical_batch_size=3,
        capacity=capacity,
        world_size=world_size,
    )
    for _ in range(3):
        assert len(loader) == len(list(loader)) > loader.steps_left == 5


def test_a_loader_with_a_fixed_start_counts_for_itself() -> None:
    loader = counting_loader(2, total_steps=11)
    assert list(steps_of(loader)) == [2, 3]
    assert list(steps_of(loader)) == [4, 5, 6, 7]
    for _ in loader:
        break
    assert list(steps_of(loader)) == [8, 9, 10]
    assert len(loader) == 0


def test_resumed_equals_uninterrupted() -> None:
    def make(start: int) -> PrivateLoader:
        return PrivateLoader(
            torch.arange(100),
            PoissonSampler(100, 0.1, KEY),
            steps_per_epoch=6,
            start_step=start,
            max_physical_batch_size=4,
        )

    whole = [batch.tolist() for loader in [make(0)] for _ in range(2) for batch in loader]
    resumed = [batch.tolist() for loader in [make(5)] for _ in range(2) for batch in loader]
    assert whole[-len(resumed) :] == resumed
    assert len(resumed) < len(whole)


def test_loading_leaves_the_global_random_states_alone() -> None:
    """Or dropout masks of a resumed run would differ from those of an uninterrupted one."""
    loader = counting_loader(lambda: 0)
    torch.manual_seed(0)
    random.seed(0)
    expected = (torch.random.get_rng_state(), random.getstate())
    list(loader)
    assert torch.equal(torch.random.get_rng_state(), expected[0])
    assert random.getstate() == expected[1]


class Draws(Dataset[torch.Tensor]):
    """Augments: each example depends on the worker's random state."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(1)


def test_worker_seeds_differ_between_iterations() -> None:
    step = 0
    loader = PrivateLoader(
        Draws(),
        Scripted(8, [[0, 1]]),
        steps_per_epoch=1,
        start_step=lambda: step,
        num_workers=1,
    )
    first = next(iter(loader))
    step = 1
    second = next(iter(loader))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", 32),
        ("shuffle", True),
        ("batch_sampler", [[0]]),
        ("drop_last", True),
        ("in_order", False),
    ],
)
def test_options_that_contradict_sampling_are_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=option):
        PrivateLoader(
            torch.arange(10),
            PoissonSampler(10, 0.5, KEY),
            steps_per_epoch=1,
            **{option: value},  # type: ignore[arg-type]
        )


def test_other_dataloader_options_pass() -> None:
    loader = PrivateLoader(
        torch.arange(10),
        PoissonSampler(10, 0.5, KEY),
        steps_per_epoch=1,
        shuffle=False,
        timeout=0,
        worker_init_fn=None,
        generator=torch.Generator().manual_seed(1),
    )
    assert list(steps_of(loader)) == [0]
    with pytest.raises(TypeError, match="nonsense"):
        PrivateLoader(torch.arange(10), PoissonSampler(10, 0.5, KEY), steps_per_epoch=1, nonsense=1)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def make_loader(dataset: Any, **options: Any) -> PrivateLoader:
    arguments: dict[str, Any] = {"steps_per_epoch": 1} | options
    return PrivateLoader(dataset, PoissonSampler(10, 0.5, KEY), **arguments)


def test_streams_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigurationError, match="map-style"):
        make_loader(Stream())
    with pytest.raises(ConfigurationError, match="map-style"):
        make_loader(i for i in range(10))


def test_datasets_without_length_are_refused() -> None:
    class Endless(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(ConfigurationError, match="__len__"):
        make_loader(Endless())


def test_empty_datasets_are_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        make_loader([])


def test_datasets_of_another_size_are_refused() -> None:
    with pytest.raises(PrivacyError, match="12 examples but the sampler draws from 10"):
        make_loader(torch.arange(12))


def test_datasets_that_change_during_a_run_are_refused() -> None:
    data = list(range(10))
    loader = make_loader(data)
    list(loader)
    data.append(10)
    with pytest.raises(PrivacyError, match="11 examples"):
        iter(loader)


def test_torch_samplers_are_refused() -> None:
    data = TensorDataset(torch.arange(10))
    with pytest.raises(ConfigurationError, match="RandomSampler"):
        PrivateLoader(
            data,
            torch.utils.data.RandomSampler(data),  # type: ignore[arg-type]
            steps_per_epoch=1,
        )


@pytest.mark.parametrize("option", ["steps_per_epoch", "max_physical_batch_size", "total_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_impossible_counts_are_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=option):
        make_loader(list(range(10)), **{option: value})


@pytest.mark.parametrize("start", [-1, 1.5, None, True])
def test_impossible_start_steps_are_refused(start: Any) -> None:
    loader = make_loader(list(range(10)), start_step=lambda: start)
    with pytest.raises(ConfigurationError, match="start_step"):
        iter(loader)


# -- constant shapes, ranks, workers ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("limit", "parts"), [(None, [8]), (8, [8]), (5, [5, 5]), (3, [3, 3, 3])])
def test_a_capacity_makes_every_step_the_same_shape(
    workers: int, limit: int | None, parts: list[int]
) -> None:
    batches: list[list[int]] = [[1, 2, 3], [], [0, 1, 2, 3, 4, 5, 6, 7], [9]]
    loader = PrivateLoader(
        torch.arange(10) + 100,
        Scripted(10, batches),
        steps_per_epoch=len(batches),
        capacity=8,
        max_physical_batch_size=limit,
        num_workers=workers,
    )
    found: dict[int, list[int]] = {}
    shapes: dict[int, list[int]] = {}
    for batch in loader:
        at = loader.current
        assert at is not None
        assert at.examples + at.padding == len(batch)
        assert batch[at.examples :].tolist() == [0] * at.padding
        found.setdefault(at.logical_step, []).extend((batch[: at.examples] - 100).tolist())
        shapes.setdefault(at.logical_step, []).append(len(batch))
    assert found == dict(enumerate(batches))
    assert list(shapes.values()) == [parts] * 4


@pytest.mark.parametrize("records", [Records(), [Records()[i] for i in range(5)]])
def test_padding_up_to_a_capacity_has_the_structure_of_an_example(records: Any) -> None:
    loader = PrivateLoader(records, Scripted(5, [[2, 4]]), steps_per_epoch=1, capacity=4)
    (batch,) = list(loader)
    assert batch["label"].tolist() == [3, 5, 0, 0]
    assert batch["image"].shape == (4, 3, 4)
    assert not batch["image"][2:].any()


class Fetched(Records):
    """With the fetch of many at once that `datasets` has."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def test_padding_beside_a_fetch_of_many() -> None:
    loader = PrivateLoader(Fetched(), Scripted(5, [[2], []]), steps_per_epoch=2, capacity=2)
    assert [batch["label"].tolist() for batch in loader] == [[3, 0], [0, 0]]


def test_a_batch_above_capacity_is_refused() -> None:
    loader = PrivateLoader(
        torch.arange(10), Scripted(10, [[1, 2, 3]]), steps_per_epoch=1, capacity=2
    )
    with pytest.raises(PrivacyError, match="more examples than capacity=2"):
        list(loader)


@pytest.mark.slow
@pytest.mark.parametrize("padded", [{}, {"capacity": 40}, {"even": True}])
@pytest.mark.parametrize("limit", [None, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_each_batch(world: int, limit: int | None, padded: dict[str, Any]) -> None:
    sampler = PoissonSampler(50, 0.08, KEY)
    seen: list[dict[int, list[list[int]]]] = []
    rows: list[list[int]] = []
    for rank in range(world):
        loader = PrivateLoader(
            torch.arange(50),
            sampler,
            steps_per_epoch=30,
            max_physical_batch_size=limit,
            rank=rank,
            world_size=world,
            **padded,
        )
        parts: dict[int, list[list[int]]] = {}
        rows.append([])
        for batch in loader:
            at = loader.current
            assert at is not None
            assert len(batch) == at.examples + at.padding > 0
            assert not batch[at.examples :].any()
            assert at.padding <= 1 or "capacity" in padded
            rows[-1].append(len(batch))
            parts.setdefault(at.logical_step, []).append(batch[: at.examples].tolist())
        seen.append(parts)
    for step in range(30):
        shares = [[i for part in parts[step] for i in part] for parts in seen]
        together = sorted(itertools.chain(*shares))
        assert together == sampler.draw(step).tolist(), "each example once, on one rank"
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert len({len(parts[step]) for parts in seen}) == 1, "all ranks in step"
    alike = all(each == rows[0] for each in rows)
    assert alike == (bool(padded) or world == 1 or limit == 1)
    if world == 7:
        assert any(len(parts[step][-1]) == 0 for parts in seen for step in range(30))


def test_a_rank_that_draws_its_own_batch_is_caught() -> None:
    """Negative control: a key of its own on each rank, as samplers that seed by rank have."""
    shares = [
        steps_of(PrivateLoader(
            torch.arange(50), PoissonSampler(50, 0.5, RootKey.from_seed(rank)), steps_per_epoch=1,
            rank=rank, world_size=2,
        ))[0]
        for rank in range(2)
    ]  # fmt: skip
    assert (
        sorted(itertools.chain(*shares))
        != PoissonSampler(50, 0.5, RootKey.from_seed(0)).draw(0).tolist()
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 2, "world_size": 2},
        {"rank": -1},
        {"rank": True, "world_size": 2},
        {"world_size": 0},
        {"capacity": 0},
        {"capacity": 2.5},
    ],
)
def test_impossible_shares_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        PrivateLoader(torch.arange(10), Scripted(10, [[1]]), steps_per_epoch=1, **arguments)


class Augmented(Dataset[Any]):
    """Each example with numbers from the three generators that augmentations use."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[int, int, int, int]:
        return (
            index,
            int(torch.randint(2**62, ())),
            random.getrandbits(62),
            int(np.random.randint(2**62)),  # noqa: NPY002
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_change_neither_batches_nor_repeat_each_others_augmentations() -> None:
    sampler = PoissonSampler(40, 0.3, KEY)
    for workers, persistent in ((0, False), (1, False), (4, False), (4, True)):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        loader = PrivateLoader(
            Augmented(),
            sampler,
            steps_per_epoch=8,
            total_steps=16,
            max_physical_batch_size=5,
            num_workers=workers,
            persistent_workers=persistent,
        )
        numbers: list[list[int]] = [[], [], []]
        for epoch in range(2):
            drawn: dict[int, list[int]] = {}
            for index, *augmentations in loader:
                assert loader.current is not None
                drawn.setdefault(loader.current.logical_step, []).extend(index.tolist())
                if loader.current.examples:
                    for found, new in zip(numbers, augmentations, strict=True):
                        found += new.tolist()
            expected = {t: sampler.draw(t).tolist() for t in range(8 * epoch, 8 * epoch + 8)}
            assert drawn == expected
        for found in numbers:
            assert len(set(found)) == len(found) > 100


def test_ranks_augment_differently() -> None:
    found = []
    for rank in range(2):
        loader = PrivateLoader(
            Augmented(), Scripted(40, [[1, 2]]), steps_per_epoch=2, num_workers=1, rank=rank,
            world_size=2,
        )  # fmt: skip
        found += [int(number) for batch in loader for number in batch[1]]
    assert len(set(found)) == len(found) == 4
