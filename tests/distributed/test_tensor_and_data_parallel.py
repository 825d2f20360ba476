"""Tensor parallelism on four ranks: over all of them, and over two that two others copy.

All cases run in one start of four ranks; each test looks at some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import dptorch
from dptorch.distributed.ranks import Ranks
from dptorch.distributed.tensor_parallel import TensorParallel
from dptorch.errors import ConfigurationError, PrivacyError
from tests.distributed.divided_models import adam, by_rows, divided, mlp
from tests.distributed.processes import found_on_ranks
from tests.distributed.scenarios import Trained, same_as_one, settings_of, train
from tests.engine.setup import make_model

pytestmark = pytest.mark.slow

Wrap = Callable[[nn.Module], nn.Module]


def copied(plan: Callable[[], dict[str, Any]]) -> Wrap:
    """Divided over two ranks, and over two others, which begin with other values."""

    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "features"))
        parallelize_module(model, mesh["features"], plan())
        with torch.no_grad():
            for p in model.parameters():
                p += mesh["data"].get_local_rank()
        return model

    return wrap


#: Case -> model, how it is divided, settings.
CASES: dict[str, tuple[str, Wrap, dict[str, Any]]] = {
    "transformer over four": ("transformer", divided(by_rows), {}),
    "MLP": ("MLP", copied(mlp), {}),
    "layer-wise": ("MLP", copied(mlp), {"clipping_style": "layer-wise"}),
    "parts": ("MLP", copied(mlp), {"limit": 2, "sample_rate": 0.5}),
    "empty shares": ("MLP", copied(mlp), {"sample_rate": 1 / 24, "steps": 8}),
    "adaptive": ("MLP", copied(mlp), {"adaptive_clipping": {"count_stddev": 4.0}}),
    "two passes": ("MLP", copied(mlp), {"clipping_mode": "ghost"}),
    "transformer": ("transformer", copied(by_rows), {}),
}


# -- what the ranks do -----------------------------------------------------------------------------


def broken(owner: Any, name: str, method: Any) -> Trained | PrivacyError:
    plain = getattr(owner, name)
    setattr(owner, name, method)
    try:
        return train(wrap=copied(mlp))
    except PrivacyError as error:  # found by the ranks themselves
        return error
    finally:
        setattr(owner, name, plain)


def sums_of_one_copy() -> Trained | PrivacyError:
    """The broken twin: sums are not added up over the copies."""
    return broken(Ranks, "add_up_", lambda self, tensors: list(tensors))


def norms_of_all_ranks() -> Trained | PrivacyError:
    """The broken twin: norms are added up over ranks with other examples too."""
    plain = TensorParallel.norms

    def norms(self: TensorParallel, tape: Any, names: Any) -> Tensor:
        parts, self._parts = self._parts, self._ranks
        try:
            return plain(self, tape, names)
        finally:
            self._parts = parts

    return broken(TensorParallel, "norms", norms)


def values_of_each_copy() -> Trained | PrivacyError:
    """The broken twin: a copy begins with its own values."""
    return broken(TensorParallel, "begin_alike", lambda self: None)


TWINS = {
    "sums": sums_of_one_copy, "norms": norms_of_all_ranks, "values": values_of_each_copy,
}  # fmt: skip


def crossed() -> str:
    """The error on ranks 0 and 3 that divide one copy, and 1 and 2 that divide another."""
    mesh = torch.distributed.device_mesh.DeviceMesh(
        "cpu", [[0, 3], [1, 2]], mesh_dim_names=("data", "features")
    )
    model = parallelize_module(make_model(), mesh["features"], mlp())
    with pytest.raises(ConfigurationError) as error:
        dptorch.PrivacyEngine(model, **settings_of())
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def alone(folder: str) -> tuple[Tensor, float]:
    """Parameters and ε of one process, which saves."""
    return adam(make_model(), folder, None)


@pytest.fixture(scope="module")
def world(
    folder: str, alone: object, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of four ranks found, by the name of what it did."""
    own = str(tmp_path_factory.mktemp("of_four"))

    def work(rank: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            case: train(name, wrap=wrap, **settings)
            for case, (name, wrap, settings) in CASES.items()
        }
        found |= {name: twin() for name, twin in TWINS.items()}
        found["crossed"] = crossed()
        found["later"] = [
            adam(copied(mlp)(make_model()), folder, way) for way in ("file", "folder")
        ]
        found["saved"] = adam(copied(mlp)(make_model()), own, None)
        found["folder"] = own
        return found

    return found_on_ranks(4, work)


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_copies_of_divided_models_take_the_step_of_one_process(
    case: str, world: list[dict[str, Any]]
) -> None:
    """The same ε, parameters and sums to 1e-6, the noise to the bit. 13 tokens on four ranks are 4,
    4, 4 and 1."""
    name, _, settings = CASES[case]
    same_as_one([found[case] for found in world], train(name, **settings))


def test_each_copy_has_examples_of_its_own(world: list[dict[str, Any]]) -> None:
    first, same, second, _ = (found["MLP"].local for found in world)
    assert first == same
    assert [a + b for a, b in zip(first, second, strict=True)] == train().local


@pytest.mark.parametrize("twin", list(TWINS))
def test_sums_and_norms_over_other_ranks_are_seen(twin: str, world: list[dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        same_as_one([found[twin] for found in world], train())


def test_meshes_that_cross_are_refused(world: list[dict[str, Any]]) -> None:
    assert all("not the rows of a mesh" in found["crossed"] for found in world)


def test_a_run_goes_on_with_copies_and_without(
    alone: tuple[Tensor, float], world: list[dict[str, Any]]
) -> None:
    """On four ranks from what one process saved, and on one from what four did; one file and shards."""
    for found in world:
        for values, epsilon in [*found["later"], found["saved"]]:
            torch.testing.assert_close(values, alone[0], rtol=1e-5, atol=1e-6)
            assert epsilon == alone[1]
    for way in ("file", "folder"):
        values, epsilon = adam(make_model(), world[0]["folder"], way)
        torch.testing.assert_close(values, alone[0], rtol=1e-5, atol=1e-6)
        assert epsilon == alone[1]
