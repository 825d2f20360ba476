"""FSDP2: what `fully_shard` has spread over ranks trains like the whole on one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import dptorch
from dptorch.distributed.sharded import ShardedParameters
from dptorch.engine import load_shards, save_shards
from dptorch.errors import ConfigurationError, DataError, PrivacyError
from tests.distributed.processes import on_ranks
from tests.distributed.scenarios import (
    MODELS,
    Trained,
    close,
    in_place,
    loss_of,
    same_as_one,
    settings_of,
    train,
)
from tests.engine.setup import make_data, make_model

pytestmark = pytest.mark.slow


def sharded(**options: Any) -> Callable[[nn.Module], nn.Module]:
    """Wraps layers, or blocks of a transformer, and then the rest."""

    def wrap(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if type(module).__name__ == "GPT2Block":
                fully_shard(module, **options)
        for child in model.children():
            if isinstance(child, nn.Linear | nn.Conv2d):
                fully_shard(child, **options)
        return fully_shard(model, **options)

    return wrap


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "MLP": ("MLP", {}),
    "layer-wise": ("MLP", {"clipping_style": "layer-wise"}),
    "GroupNorm": ("convolutions with GroupNorm", {}),
    "tied GPT-2": ("tied GPT-2", {}),
    "layer-wise GPT-2": ("tied GPT-2", {"clipping_style": "layer-wise"}),
    "LoRA": ("LoRA", {}),
    "checkpointed GPT-2": ("checkpointed GPT-2", {}),
    "parts": ("MLP", {"limit": 2, "sample_rate": 0.5}),
    "empty shares": ("MLP", {"sample_rate": 2 / 24, "steps": 20}),
    "adaptive": ("MLP", {"adaptive_clipping": {"count_stddev": 4.0}}),
    "discrete": ("MLP", {"mechanism": "discrete_gaussian", "accountant": "rdp"}),
    "banded": ("MLP", {"mechanism": "banded", "bands": 3, "steps": 6}),
    "inverse-banded": ("MLP", {"mechanism": "inverse-banded", "sample_rate": 0.25, "steps": 6}),
    "buffered": ("MLP", {"mechanism": "buffered-toeplitz", "sample_rate": 0.25, "steps": 6}),
    "two passes": ("MLP", {"clipping_mode": "ghost"}),
}


@pytest.mark.parametrize("size", [2, 4])
def test_fully_sharded_ranks_take_the_step_of_one_process(size: int) -> None:
    """With parameters freed after the forward and kept; the noise of each shard is its slice."""
    names = CASES if size == 2 else ["MLP", "tied GPT-2"]

    def work(rank: int) -> list[Trained]:
        return [
            train(CASES[case][0], wrap=sharded(reshard_after_forward=free), **CASES[case][1])
            for case in names
            for free in ((True, False) if case == "MLP" else (True,))
        ]

    by_rank = on_ranks(size, work)
    cases = [case for case in names for _ in range(2 if case == "MLP" else 1)]
    alone = {case: train(CASES[case][0], **CASES[case][1]) for case in names}
    for i, case in enumerate(cases):
        same_as_one([found[i] for found in by_rank], alone[case])


def test_no_rank_has_the_whole_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are formed one parameter at a time where more would not fit in a message."""
    monkeypatch.setattr("dptorch.distributed.sharded.BUCKET", 200)
    formed: list[int] = []
    plain = ShardedParameters.summed

    def summed(self: ShardedParameters, whole: dict[str, torch.Tensor]) -> Any:
        formed.append(sum(t.numel() for t in whole.values()))
        return plain(self, whole)

    monkeypatch.setattr(ShardedParameters, "summed", summed)

    def work(rank: int) -> tuple[Trained, list[int]]:
        return train("tied GPT-2", wrap=sharded()), formed

    by_rank = on_ranks(2, work)
    alone = train("tied GPT-2")
    same_as_one([trained for trained, _ in by_rank], alone)
    largest = max(p.numel() for p in MODELS["tied GPT-2"][0]().parameters())
    for _, sizes in by_rank:  # in all three steps
        assert max(sizes) == largest
        assert 4 * largest < alone.values.numel()
        assert sum(sizes) == 3 * alone.values.numel()


def test_the_comparison_sees_noise_that_is_not_the_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: every rank takes the noise of the first shard."""
    monkeypatch.setattr(ShardedParameters, "first_coordinate", lambda self, name: 0)
    ranks = on_ranks(2, lambda rank: train(wrap=sharded()))
    with pytest.raises(AssertionError):
        same_as_one(ranks, train())


def test_ranks_make_as_many_passes_as_one_of_them_needs() -> None:
    """A backward of shards sends messages: one rank alone in a second pass would wait for ever."""

    def work(rank: int) -> Trained:
        return train(wrap=sharded(), memory_budget=(0.0, 1e9)[rank])

    same_as_one(on_ranks(2, work), train())


# -- precision -------------------------------------------------------------------------------------


def test_bfloat16_is_summed_and_noised_in_float32() -> None:
    """Against one process whose whole model is in bfloat16: the same rounded gradients of examples,
    whose norms, sums and noise have more digits than bfloat16 has."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def in_half(model: nn.Module) -> nn.Module:
        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model.bfloat16()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(x.bfloat16())

        return Half()

    one_step = {"steps": 1}
    alone = train(wrap=in_half, **one_step)
    ranks = on_ranks(2, lambda rank: train(wrap=sharded(mp_policy=policy), **one_step))
    assert not any(isinstance(found, Exception) for found in ranks), ranks
    sums = in_place(ranks, "sums", 0)
    assert sums.dtype == torch.float32
    assert not torch.equal(sums, sums.bfloat16().float())
    # Its parameters are rounded to bfloat16 once, and those of one process were before.
    assert close(sums, alone.sums[0], 1e-5)
    assert torch.equal(in_place(ranks, "noise", 0), alone.noise[0])
    # What one example adds is no longer than the clipping norm, in float32.
    assert sums.norm() <= 0.2 * sum(found.local[0] for found in ranks) * (1 + 1e-6)


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 2)])
def test_a_sharded_checkpoint_goes_on_on_another_number_of_ranks(before, after, tmp_path) -> None:
    """Of Adam, whose moments are sharded too; one process has the whole model, not sharded. In one
    file, put together on rank 0, and in a folder, to which each rank writes its shards."""
    path, folder = tmp_path / "run.pt", tmp_path / "run"

    def run(size: int, *, load: str | None) -> tuple[torch.Tensor, float]:
        model = make_model()
        if size > 1:
            model = sharded()(model)
        engine = dptorch.PrivacyEngine(model, **settings_of(steps=4))
        optimizer = engine.attach(torch.optim.Adam(model.parameters(), 0.01))
        if load == "file":
            engine.load_checkpoint(path)
        elif load == "folder":
            assert load_shards(folder, engine) == {"told": 1}
        for x, y in engine.loader(make_data()):
            loss_of(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if load is None and engine.steps_done in (1, 2):
                engine.save_checkpoint(path)
                save_shards(folder, engine, extra={"told": 1})  # the second replaces the first
        values = [p.detach() for p in model.parameters()]
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in values]
        return torch.cat([p.flatten() for p in whole]), engine.get_privacy_spent().epsilon

    def on(size: int, *ways: str | None) -> list[Any]:
        def work(rank: int) -> list[Any]:
            return [run(size, load=way) for way in ways]

        found = [work(0)] if size == 1 else on_ranks(size, work)
        assert not any(isinstance(each, Exception) for each in found), found
        return [each for of_rank in found for each in of_rank]

    values, epsilon = on(before, None)[0]
    assert {p.name for p in tmp_path.iterdir()} == {"run.pt", "run"}
    for later, told in on(after, "file", "folder"):
        torch.testing.assert_close(later, values, rtol=1e-5, atol=1e-6)
        assert told == epsilon


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "engine.pt"])
@pytest.mark.parametrize("damage", [_cut, _flip_a_bit, Path.unlink])
def test_a_damaged_folder_is_refused_and_changes_nothing(damage, file, tmp_path) -> None:
    """torch would load a shard with one bit changed, and run what is in .metadata."""

    def begun(steps: int) -> dptorch.PrivacyEngine:
        model = make_model()
        engine = dptorch.PrivacyEngine(model, **settings_of(steps=4))
        optimizer = engine.attach(torch.optim.Adam(model.parameters(), 0.01))
        for x, y in islice(engine.loader(make_data()), steps) if steps else ():
            loss_of(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return engine

    save_shards(tmp_path / "run", begun(2))
    whole, engine = begun(0), begun(0)
    load_shards(tmp_path / "run", whole)
    assert whole.steps_done == 2
    damage(tmp_path / "run" / file)
    before = [p.detach().clone() for p in engine.model.parameters()]
    with pytest.raises(DataError, match=rf"{file}|not a readable|damaged"):
        load_shards(tmp_path / "run", engine)
    assert engine.steps_done == 0
    assert all(map(torch.equal, before, engine.model.parameters()))


# -- bad input -------------------------------------------------------------------------------------


class Derived(nn.Module):
    """Its weight is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.ones(3, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.raw.sin())


def step_on(
    engine: dptorch.PrivacyEngine, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    for x, y in engine.loader(make_data()):
        loss_of(model(x), y).backward()
        optimizer.step()


def test_other_ways_of_spreading_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    def refused(make: Callable[[], nn.Module]) -> str:
        with pytest.raises(ConfigurationError) as error:
            dptorch.PrivacyEngine(make(), **settings_of())
        return str(error.value)

    def work(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicas", "shards"))
        found = [
            refused(lambda: fully_shard(make_model(), mesh=mesh)),
            refused(lambda: fully_shard(make_model(), offload_policy=CPUOffloadPolicy(False))),
            refused(
                lambda: fully_shard(
                    make_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16)
                )
            ),
        ]

        def old() -> nn.Module:
            """As torch 2.8 keeps it."""
            model: Any = fully_shard(make_model())
            state = model._get_fsdp_state()
            model._get_fsdp_state = lambda: SimpleNamespace(
                _fsdp_param_group=state._fsdp_param_groups[0]
            )
            return model  # type: ignore[no-any-return]

        found.append(refused(old))
        model = make_model()
        late = dptorch.PrivacyEngine(model, **settings_of())
        optimizer = late.attach(torch.optim.SGD(model.parameters(), 0.1))
        fully_shard(model)
        derived = fully_shard(Derived())
        engine = dptorch.PrivacyEngine(derived, **settings_of())
        optimizers = [optimizer, engine.attach(torch.optim.SGD(derived.parameters(), 0.1))]
        for private, net, of_it in ((late, model, optimizers[0]), (engine, derived, optimizers[1])):
            with pytest.raises((PrivacyError, ConfigurationError)) as error:
                step_on(private, net, of_it)
            found.append(str(error.value))
            assert private.steps_done == 0
        return found

    for found in on_ranks(2, work):
        assert not isinstance(found, Exception), found
        assert "not HSDP" in found[0]
        assert "Leave offload_policy out" in found[1]
        assert "underflow" in found[2]
        assert f"fully_shard of torch {torch.__version__} is not known" in found[3]
        assert "trainable parameter" in found[4], found[4]
        assert "computed from parameters" in found[5]
