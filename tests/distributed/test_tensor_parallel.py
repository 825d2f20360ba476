"""Tensor parallelism: layers that `parallelize_module` has divided train like whole ones.

All cases run in one start of two ranks; each test looks at some of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import dptorch
from dptorch.clipping.sums import ClippedSum
from dptorch.distributed.tensor_parallel import TensorParallel
from dptorch.errors import ConfigurationError, ExamplesMixError, PrivacyError
from tests.distributed.divided_models import (
    Transformer,
    adam,
    by_columns,
    by_rows,
    columns,
    divided,
    gathered,
    mlp,
    tied,
)
from tests.distributed.processes import found_on_ranks
from tests.distributed.scenarios import (
    Trained,
    loss_of,
    same_as_one,
    settings_of,
    train,
)
from tests.engine.setup import make_data, make_model

pytestmark = pytest.mark.slow

#: Case -> model, plan of parallelize_module, settings.
CASES: dict[str, tuple[str, Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "MLP": ("MLP", mlp, {}),
    "gathered": ("MLP", gathered, {}),
    "columns": ("MLP", columns, {}),
    "layer-wise": ("MLP", mlp, {"clipping_style": "layer-wise"}),
    "parts": ("MLP", mlp, {"limit": 2, "sample_rate": 0.5}),
    "empty batches": ("MLP", mlp, {"sample_rate": 1 / 24, "steps": 8}),
    "adaptive": ("MLP", mlp, {"adaptive_clipping": {"count_stddev": 4.0}}),
    "two passes": ("MLP", mlp, {"clipping_mode": "ghost"}),
    "transformer": ("transformer", by_rows, {}),
    "transformer by columns": ("transformer", by_columns, {}),
    "layer-wise transformer": ("transformer", by_rows, {"clipping_style": "layer-wise"}),
    "tied transformer": ("tied transformer", tied, {}),
    "checkpointed transformer": ("checkpointed transformer", by_rows, {}),
}


# -- what the ranks do -----------------------------------------------------------------------------


def broken(name: str, method: Any, **settings: Any) -> Trained:
    plain = getattr(TensorParallel, name)
    setattr(TensorParallel, name, method)
    try:
        return train(wrap=divided(mlp), **settings)
    finally:
        setattr(TensorParallel, name, plain)


def own_norms() -> Trained:
    """The broken twin: each rank clips by the norm of its own part."""
    return broken("norms", lambda self, tape, names: tape.norms(names))


def counted_twice() -> Trained:
    """The broken twin: what every rank has counts on each of them."""

    def norms(self: TensorParallel, tape: Any, names: Any) -> Tensor:
        return self._ranks.gather_rows(tape.norms(names).square()).sum(0).sqrt()

    return broken("norms", norms)


def noise_of_the_first() -> Trained:
    """The broken twin: every rank takes the noise of the beginning of each parameter."""
    return broken("_place", lambda self, p, at: at)


TWINS = {"own norms": own_norms, "counted twice": counted_twice, "noise": noise_of_the_first}


def of_each_example() -> list[Tensor]:
    """What each example of a batch moves the sum by: the parts of a clipped gradient, on this rank."""
    engine = dptorch.PrivacyEngine(divided(mlp)(make_model()), **settings_of(sample_rate=1.0))
    engine.attach(torch.optim.SGD(engine.model.parameters(), 0.1))
    found: list[Tensor] = []
    x, y = make_data()[:6]
    for i in range(6):
        loss_of(engine.model(x[i : i + 1]), y[i : i + 1]).backward()
        engine._batch._collect()
        assert engine._batch._pending.sums is not None
        clipped = ClippedSum(engine._batch._pending.sums, 0.2)
        parts = engine._placement.add_up(clipped).values
        mine = [n in engine._placement._divided or engine.ranks.is_first for n in parts]
        own = [v.flatten() for v, m in zip(parts.values(), mine, strict=True) if m]
        found.append(torch.cat(own))
        engine.drop_batch()
    engine.detach()
    return found


def resumed(folder: str) -> dict[str, tuple[Tensor, float]]:
    """Parameters and ε of a run of Adam, and of those that go on from what it saved."""

    def run(wrap: Callable[[nn.Module], nn.Module], load: str | None) -> tuple[Tensor, float]:
        return adam(wrap(make_model()), folder, load)

    def sharded(model: nn.Module) -> nn.Module:
        return fully_shard(model)

    wrap = divided(mlp)
    return {
        "first": run(wrap, None),
        "tensor parallel, file": run(wrap, "file"),
        "tensor parallel, folder": run(wrap, "folder"),
        "sharded, file": run(sharded, "file"),
        "sharded, folder": run(sharded, "folder"),
    }


class Scaled(nn.Module):
    """A parameter of its own on activations that are divided."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.scale)  # type: ignore[no-any-return]


def refused() -> dict[str, str]:
    """Errors on what is not covered; nothing was spent."""
    line = init_device_mesh("cpu", (2,))

    def error_of(plan: dict[str, Any], model: nn.Module | None = None, **settings: Any) -> str:
        model = parallelize_module(make_model() if model is None else model, line, plan)
        hooks = [len(m._forward_pre_hooks) for m in model.modules()]
        with pytest.raises((ConfigurationError, PrivacyError)) as error:
            dptorch.PrivacyEngine(model, **settings_of(**settings))
        assert hooks == [len(m._forward_pre_hooks) for m in model.modules()]
        return str(error.value)

    def of_step() -> str:
        model = parallelize_module(
            Scaled(), line, {"up": ColwiseParallel(), "down": RowwiseParallel()}
        )
        engine = dptorch.PrivacyEngine(model, **settings_of())
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        x, y = next(iter(engine.loader(make_data())))
        loss = loss_of(model(x), y)
        with pytest.raises(PrivacyError) as error:
            loss.backward()
        assert engine.steps_done == 0
        return str(error.value)

    def in_context() -> str:
        class Positions(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = make_model()

            def forward(self, x: Tensor) -> Tensor:
                part = DTensor.from_local(x, line, [Shard(1)])
                return self.inner(part.redistribute(line, [Replicate()]).to_local())  # type: ignore[no-any-return]

        model = Positions()
        engine = dptorch.PrivacyEngine(model, **settings_of())
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
        x, y = next(iter(engine.loader(make_data())))
        with pytest.raises(ExamplesMixError) as error:
            loss_of(model(x[:, :0]), y)
        return str(error.value)

    def in_pipeline() -> str:
        from torch.distributed.pipelining import PipelineStage

        stage: Any = PipelineStage(make_model(), line.get_local_rank(), 2, torch.device("cpu"))
        with pytest.raises(ConfigurationError) as error:
            dptorch.PrivacyEngine(stage, **settings_of())
        return str(error.value)

    def with_shards() -> str:
        square = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "features"))
        model = parallelize_module(make_model(), square["features"], mlp())
        with pytest.raises(ConfigurationError) as error:
            dptorch.PrivacyEngine(fully_shard(model, mesh=square["data"]), **settings_of())
        return str(error.value)

    return {
        "sequence": error_of({"block.first": SequenceParallel()}, Transformer()),
        "inputs": error_of(
            {
                "block": PrepareModuleInput(
                    input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),)
                )
            },
            Transformer(),
        ),
        "dtensor": error_of({"0": ColwiseParallel(use_local_output=False)}),
        "positions": error_of({"2": RowwiseParallel(output_layouts=Shard(1))}),
        "scattered": error_of({"2": RowwiseParallel(output_layouts=Shard(-1))}),
        "ids": error_of({"tokens": RowwiseParallel()}, Transformer()),
        "narrow": error_of({"0": ColwiseParallel()}, nn.Sequential(nn.Linear(5, 1))),
        "discrete": error_of(mlp(), mechanism="discrete_gaussian", accountant="rdp"),
        "step": of_step(),
        "context": in_context(),
        "pipeline": in_pipeline(),
        "with shards": with_shards(),
    }


def even() -> nn.Module:
    """torch itself divides evenly only."""
    torch.manual_seed(3)
    return divided(mlp)(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))


def in_public() -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of an ordinary pass on public data, and those of the same without an engine."""
    x, y = make_data()[:4]

    def gradients(model: nn.Module) -> list[Tensor]:
        loss_of(model(x), y).backward()
        found: list[Any] = [p.grad for p in model.parameters()]
        return [g.full_tensor() for g in found]

    model = even()
    engine = dptorch.PrivacyEngine(model, **settings_of())
    with engine.public():
        inside = gradients(model)
    return inside, gradients(even())


def copied() -> bool:
    """Whether a copy, and the model once the engine is off it, run as torch divides them."""
    x, _ = make_data()[:4]
    model = even()
    expected = model(x)
    engine = dptorch.PrivacyEngine(model, **settings_of())
    with torch.no_grad():
        same = torch.allclose(model(x), expected)
        same &= torch.equal(copy.deepcopy(model)(x), expected)
    engine.detach()
    return same and torch.equal(model(x), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def world(folder: str) -> list[dict[str, Any]]:
    """What each of two ranks found, by the name of what it did."""

    def work(rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            case: train(name, wrap=divided(plan), **settings)
            for case, (name, plan, settings) in CASES.items()
        }
        found |= {name: twin() for name, twin in TWINS.items()}
        found["each example"] = of_each_example()
        found["resumed"] = resumed(folder)
        found["refused"] = refused()
        found["public"] = in_public()
        found["copied"] = copied()
        return found

    return found_on_ranks(2, work)


# -- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone_mlp() -> Trained:
    """The run of one process that several of the runs on ranks are to be."""
    return train()


@pytest.mark.parametrize("case", list(CASES))
def test_tensor_parallel_ranks_take_the_step_of_one_process(
    case: str, world: list[dict[str, Any]], alone_mlp: Trained
) -> None:
    """The same ε, parameters and sums to 1e-6, the noise to the bit; all ranks have all examples."""
    name, _, settings = CASES[case]
    alone = alone_mlp if (name, settings) == ("MLP", {}) else train(name, **settings)
    same_as_one([found[case] for found in world], alone)
    assert all(found[case].local == alone.local for found in world)


@pytest.mark.parametrize("twin", list(TWINS))
def test_norms_that_are_not_added_up_or_counted_twice_are_seen(
    twin: str, world: list[dict[str, Any]], alone_mlp: Trained
) -> None:
    with pytest.raises(AssertionError):
        same_as_one([found[twin] for found in world], alone_mlp)


def test_one_example_moves_the_sum_of_all_ranks_by_at_most_the_norm(
    world: list[dict[str, Any]],
) -> None:
    norms = [
        torch.cat(parts).norm()
        for parts in zip(*(found["each example"] for found in world), strict=True)
    ]
    assert all(abs(norm / 0.2 - 1) < 1e-5 for norm in norms)  # all are clipped


def test_no_rank_has_the_whole_of_a_divided_parameter(world: list[dict[str, Any]]) -> None:
    places = [set(found["MLP"].places[0].tolist()) for found in world]
    whole = sum(p.numel() for p in make_model().parameters())
    bias = make_model()[2].bias.numel()  # type: ignore[index, union-attr, operator]
    assert len(places[0] | places[1]) == whole
    assert len(places[0] & places[1]) == bias


def test_a_run_goes_on_from_its_checkpoint_on_other_ranks(
    folder: str, world: list[dict[str, Any]]
) -> None:
    """Divided, in shards of FSDP2, and whole on one process; from one file and from each rank's."""
    values, epsilon = world[0]["resumed"]["first"]
    alone = {f"alone, {way}": adam(make_model(), folder, way) for way in ("file", "folder")}
    for found in (world[0]["resumed"], world[1]["resumed"], alone):
        for later, told in found.values():
            torch.testing.assert_close(later, values, rtol=1e-5, atol=1e-6)
            assert told == epsilon


def test_what_is_not_covered_says_so(world: list[dict[str, Any]]) -> None:
    for found in (found["refused"] for found in world):
        assert "block.first (LayerNorm)" in found["sequence"]
        assert "not sequence, pipeline or context parallelism" in found["sequence"]
        assert "PrepareModuleInput is not needed" in found["inputs"]
        assert "Leave use_local_output out" in found["dtensor"]
        assert "sequence, pipeline or context" in found["positions"]
        assert "output_layouts=Replicate()" in found["scattered"]
        assert "input_layouts=Replicate()" in found["ids"]
        assert "leave the last of 2 ranks without any" in found["narrow"]
        assert "mechanism='gaussian'" in found["discrete"]
        assert "used on activations that are divided" in found["step"]
        assert "fully_shard" in found["with shards"]
        assert "Sequence and context parallelism are not covered" in found["context"]
        assert "pipeline parallelism is not covered" in found["pipeline"]


def test_passes_on_public_data_are_those_of_torch(world: list[dict[str, Any]]) -> None:
    for inside, plain in (found["public"] for found in world):
        torch.testing.assert_close(inside, plain)


def test_copies_and_detached_models_run_as_torch_divides_them(world: list[dict[str, Any]]) -> None:
    assert all(found["copied"] for found in world)
