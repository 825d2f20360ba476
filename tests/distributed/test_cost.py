"""What a step on ranks sends and keeps, counted, against the cost model; and `dptorch scale`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import TensorDataset

import dptorch
from dptorch.bench.memory import allocator_peak
from dptorch.distributed.cost import Sizes, cost, sizes_of
from tests.cli.commands import refused, run
from tests.distributed.processes import on_ranks

ROWS, WIDTH, DEPTH = 64, 192, 6
MANY = 1024  # rows whose activations are more than the parameters
REPEATS = 8
CPU = torch.device("cpu")

#: Collective -> (which argument holds the whole vector, how often a ring sends its parts).
COLLECTIVES = {
    "all_reduce": (0, 2), "reduce_scatter_tensor": (1, 1), "all_gather_into_tensor": (0, 1),
    "all_gather_single": (0, 1), "reduce_scatter_single": (1, 1),
}  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for _ in range(DEPTH) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers)


def data(rows: int = ROWS) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, WIDTH, generator=generator)
    return TensorDataset(x, torch.randint(0, WIDTH, (rows,), generator=generator))


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    for layer in model:  # type: ignore[attr-defined]
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def by_turns(model: nn.Module) -> nn.Module:
    """Layers are divided by columns and by rows."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    linear = [name for name, m in model.named_children() if isinstance(m, nn.Linear)]
    plan = {n: RowwiseParallel() if i % 2 else ColwiseParallel() for i, n in enumerate(linear)}
    return parallelize_module(model, mesh, plan)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that this rank sends in collectives of tensors, in a ring."""
    found = [0]
    plain = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counting(name: str) -> Callable[..., Any]:
        place, times = COLLECTIVES[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            named = list(kwargs.values())
            whole = args[place] if len(args) > place else named[place - len(args)]
            size = dist.get_world_size()
            if whole.is_floating_point():
                found[0] += times * whole.nbytes * (size - 1) // size
            return plain[name](*args, **kwargs)

        return call

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def counts(step: Callable[[], None]) -> list[int]:
    """(bytes sent in a step, its peak of memory), after two steps that make what is kept.

    The threads of gloo drop the tensors of a collective a while after it returned, later on a busy
    machine, and a peak may have one message more. It never has less than the step needs, so the least
    of eight steps is what the step needs.
    """
    step(), step()
    with counted() as sent:
        peaks = [allocator_peak(step, CPU) for _ in range(REPEATS)]
    assert sent[0] % REPEATS == 0
    return [sent[0] // REPEATS, min(peaks)]


def private_step(
    wrap: Callable[[nn.Module], nn.Module], parts: int = 1, rows: int = ROWS, **more: Any
) -> list[int]:
    model = wrap(net())
    engine = dptorch.PrivacyEngine(
        model, sample_rate=1.0, sample_size=rows, steps=2 + REPEATS, noise_multiplier=1.0,
        target_delta=1e-3, seed=0, self_check=False, **more,
    )  # fmt: skip
    optimizer = engine.attach(torch.optim.Adam(model.parameters(), 1e-3))
    loader = engine.loader(data(rows), max_physical_batch_size=rows // 2 // parts)

    def step() -> None:
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    found = counts(step)
    assert engine.steps_done == 2 + REPEATS
    return found


def ordinary_step(wrap: Callable[[nn.Module], nn.Module], rows: int = ROWS) -> list[int]:
    model = wrap(net())
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    tensors = data(rows).tensors

    def step() -> None:
        x, y = (t[: rows // 2].clone() for t in tensors)  # as a loader hands it out
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return counts(step)


@pytest.fixture(scope="module")
def measured() -> dict[str, list[int]]:
    """Bytes that a step sends, and its peak of memory, on either of two ranks."""

    def work(rank: int) -> dict[str, list[int]]:
        style = {"clipping_style": "layer-wise"}
        return {
            "ddp": private_step(lambda m: m),
            "fsdp2": private_step(sharded),
            "fsdp2, 2 parts": private_step(sharded, 2),
            "fsdp2, kept": private_step(lambda m: sharded(m, reshard_after_forward=False)),
            "fsdp2, layer-wise": private_step(sharded, **style),
            "tensor": private_step(by_turns),
            "fsdp2, ordinary": ordinary_step(sharded),
            "fsdp2, layer-wise, many": private_step(sharded, rows=MANY, **style),
            "fsdp2, ordinary, many": ordinary_step(sharded, MANY),
        }

    first, second = on_ranks(2, work)
    assert not isinstance(first, Exception), first
    assert {k: v[0] for k, v in first.items()} == {k: v[0] for k, v in second.items()}
    return {k: [v[0], min(v[1], second[k][1])] for k, v in first.items()}


SIZES = sizes_of(net(), lambda model: model(torch.zeros(1, WIDTH)))
OF_TWO: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2, 2 parts": ("fsdp2", {"physical_batches": 2}),
    "fsdp2, kept": ("fsdp2", {"reshard_after_forward": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", list(OF_TWO))
def test_what_is_sent_is_what_the_model_says(case: str, measured: dict[str, list[int]]) -> None:
    strategy, more = OF_TWO[case]
    assert measured[case][0] == pytest.approx(cost(SIZES, strategy, 2, **more).sent, rel=1e-3)


@pytest.mark.slow
def test_what_divided_layers_send_is_what_the_model_says(measured: dict[str, list[int]]) -> None:
    """But for the gradients of the first layer's input, which are not asked for."""
    parts = {"physical_batch_size": ROWS // 2, "physical_batches": 2}  # each rank has all rows
    said = cost(SIZES, "tensor", 2, **parts).sent  # type: ignore[arg-type]
    assert measured["tensor"][0] == said - 4 * WIDTH * ROWS


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp", "fsdp2", "tensor"])
def test_the_peak_of_a_step_is_what_the_model_says(
    case: str, measured: dict[str, list[int]]
) -> None:
    """Above what lives between steps; activations are left out, of which small batches have few."""
    said = cost(SIZES, case, 2, physical_batch_size=ROWS // 2)
    assert said.total - said.parameters - said.optimizer == pytest.approx(
        measured[case][1], rel=0.1
    )


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["", ", many"])
def test_layer_wise_shards_take_little_more_than_ordinary_ones(
    rows: str, measured: dict[str, list[int]]
) -> None:
    """FSDP2 with an engine against FSDP2 without one, on as many examples."""
    sent, peak = measured[f"fsdp2, layer-wise{rows}"]
    ordinary_sent, ordinary_peak = measured[f"fsdp2, ordinary{rows}"]
    assert sent <= 1.05 * ordinary_sent
    assert peak <= 1.1 * ordinary_peak


@pytest.mark.slow
def test_a_model_that_is_larger_than_the_machine_is_counted(tmp_path, monkeypatch) -> None:
    """10 billion parameters on the meta device, by the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def block(): return nn.Sequential(nn.Linear(9000, 9000), nn.ReLU())\n"
        "def large(): return nn.Sequential(*[block() for _ in range(124)])\n"
    )
    command = ["scale", "nets:large", "--input-shape", "9000", "--ranks", "64", "--bf16"]
    told = json.loads(run(*command, "--batch-size", "500000", "--json").stdout)
    assert told["sizes"]["trainable"] == 124 * (9000**2 + 9000)
    assert told["sizes"]["block"] == 9000**2 + 9000
    assert told["fsdp2"]["total"] < told["zero2"]["total"] < told["ddp"]["total"]
    assert told["physical_batches"] == 489
    assert told["tensor"]["parameters"] == told["zero3"]["parameters"]
    assert "fsdp2" in run(*command).stdout
    assert "expected numbers" in refused(run("scale", "mlp", "--input-shape", "3x4"))


def test_a_share_of_every_part_grows_smaller_with_ranks() -> None:
    few, many = (cost(replace(SIZES, factors=0), "fsdp2", n) for n in (2, 8))
    assert many.parameters == pytest.approx(few.parameters / 4, abs=8)
    assert many.optimizer == pytest.approx(few.optimizer / 4, abs=8)
    assert cost(Sizes(100, 0, 100, 100), "ddp", 1).sent == 0
