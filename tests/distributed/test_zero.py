"""DeepSpeed's ZeRO: what it has divided among ranks trains like the whole on one process.

All cases run in one start of two ranks and one of four; each test looks at some of them.
"""

from __future__ import annotations

import gc
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dptorch
from dptorch.distributed.ranks import Ranks
from dptorch.distributed.zero import ZeroParameters, held_by
from dptorch.distributed.zero3 import StandIns
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.sampling.parts import PhysicalPlan
from tests.distributed.processes import found_on_ranks
from tests.distributed.scenarios import (
    Trained,
    close,
    in_place,
    initialized,
    loss_of,
    programs,
    same_as_one,
    settings_of,
    train,
    values_of,
)
from tests.engine.setup import make_data, make_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

STYLES = ("flat", "layer-wise")
#: Case -> model, stage, settings. Every stage meets every model in one style on two ranks, and in the
#: other on four.
MODELS_BY_STAGE: dict[int, dict[str, tuple[str, int, dict[str, Any]]]] = {
    size: {
        f"{name}, stage {stage}, {style}": (name, stage, {"clipping_style": style, "steps": 2})
        for stage in (1, 2, 3)
        for i, name in enumerate(("MLP", "convolutions with GroupNorm", "tied GPT-2", "LoRA"))
        for style in [STYLES[(stage + i + size // 4) % 2]]
    }
    for size in (2, 4)
}
#: Number of ranks -> cases. On four, a rank has two rows and the others one, or one and they have none.
CASES: dict[int, dict[str, tuple[str, int, dict[str, Any]]]] = {
    2: MODELS_BY_STAGE[2]
    | {
        "parts": ("MLP", 2, {"limit": 2, "sample_rate": 0.5}),
        "empty shares": ("MLP", 3, {"sample_rate": 2 / 24, "steps": 20}),
        "adaptive": ("MLP", 2, {"adaptive_clipping": {"count_stddev": 4.0}}),
        "two passes": ("MLP", 3, {"clipping_mode": "ghost"}),
        "offloaded": ("MLP", 2, {}),
        "offloaded, stage 3": ("MLP", 3, {}),
    },
    4: MODELS_BY_STAGE[4]
    | {
        "one row or two": ("convolutions with GroupNorm", 3, {"sample_rate": 5 / 24}),
        "parts and empty shares": (
            "tied GPT-2",
            3,
            {"limit": 2, "sample_rate": 5 / 24, "steps": 2},
        ),
    },
}
HALF = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def config(stage: int, *, zero: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 10**5,
            "stage3_param_persistence_threshold": 8,  # biases stay gathered
            **(zero or {}),
        },
        "zero_allow_untested_optimizer": True,  # torch.optim.SGD
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }


# -- what the ranks do -----------------------------------------------------------------------------


def scattered_means() -> Trained:
    """The broken twin: each part is divided by the number of ranks, as ZeRO's own reduction does."""
    sum_on = Ranks.sum_on

    def mean(self: Ranks, rank: int, tensor: Tensor) -> Tensor:
        return sum_on(self, rank, tensor) / self.size

    return broken(Ranks, "sum_on", mean)


def noise_of_the_first_part() -> Trained:
    """The broken twin: every rank takes the noise of the beginning of each parameter."""
    return broken(ZeroParameters, "first_coordinate", lambda self, name: 0)


def other_values() -> Trained:
    """The broken twin: the backward of ZeRO-3 reads parameters that are half as large."""

    def read(self: StandIns, noted: Any) -> Tensor:
        return plain(self, noted) / (1 if isinstance(noted, Tensor) else 2)

    plain = StandIns._read
    return broken(StandIns, "_read", read, stage=3)


def uneven_rows() -> str:
    """The broken twin: a rank has as many rows as it has examples, here one or two."""

    def uneven(self: PhysicalPlan, *args: Any) -> None:
        plain(self, *args[:-1], even=False)

    plain = PhysicalPlan.__init__
    name, stage, settings = CASES[4]["one row or two"]
    PhysicalPlan.__init__ = uneven  # type: ignore[method-assign]
    try:
        with pytest.raises(PrivacyError) as error:
            train(name, zero=config(stage), **settings)
    finally:
        PhysicalPlan.__init__ = plain  # type: ignore[method-assign]
    return str(error.value)


def broken(owner: Any, name: str, method: Any, stage: int = 1) -> Trained:
    plain = getattr(owner, name)
    setattr(owner, name, method)
    try:
        return train(zero=config(stage))
    finally:
        setattr(owner, name, plain)


class Half(nn.Module):
    """Takes float32 inputs into a model in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16())  # type: ignore[no-any-return]


def under_adam(stage: int) -> tuple[nn.Module, Any, dptorch.PrivacyEngine]:
    """(the model, what DeepSpeed trains it in, the engine) of a run of four steps."""
    model = make_model()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    whole, optimizer = initialized(model, adam, config(stage))
    engine = dptorch.PrivacyEngine(whole, **settings_of(steps=4))
    engine.attach(optimizer)
    return model, whole, engine


def resumed(stage: int, folder: Path) -> tuple[Tensor, Tensor, float, float]:
    """A run of Adam and one that goes on from its checkpoint: parameters and ε of both."""

    def run(*, load: bool) -> tuple[Tensor, float]:
        model, whole, engine = under_adam(stage)
        if load:
            _, state = whole.load_checkpoint(str(folder))
            engine.load_state_dict(state["privacy"])
        for x, y in engine.loader(make_data()):
            whole.backward(loss_of(whole(x), y))
            whole.step()
            if engine.steps_done == 2 and not load:
                whole.save_checkpoint(str(folder), client_state={"privacy": engine.state_dict()})
        values = torch.cat([values_of(p).flatten() for p in model.parameters()])
        return values, engine.get_privacy_spent().epsilon

    first, later = run(load=False), run(load=True)
    return first[0], later[0], first[1], later[1]


def resumed_on_more(stage: int, folder: Path) -> str:
    """The error of a checkpoint of fewer ranks."""
    _, whole, engine = under_adam(stage)
    with pytest.raises(ConfigurationError) as error:
        whole.load_checkpoint(str(folder))
    assert engine.steps_done == 0
    return str(error.value)


def scheduled() -> tuple[int, list[float]]:
    """Steps, and the learning rates of DeepSpeed's scheduler, where batches come in parts."""
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    whole, optimizer = initialized(
        model,
        sgd,
        config(2)
        | {
            "scheduler": {
                "type": "WarmupLR",
                "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 10, "warmup_type": "linear"},
            }
        },
    )
    engine = dptorch.PrivacyEngine(whole, **settings_of(sample_rate=0.5))
    engine.attach(optimizer)
    rates = []
    for x, y in engine.loader(make_data(), max_physical_batch_size=2):
        loss_of(whole(x), y).backward()
        whole.step()
        rates.append(optimizer.param_groups[0]["lr"])
    return engine.steps_done, rates


def refused() -> dict[str, str]:
    """Errors on what is not covered; nothing was spent."""

    def error_of(act: Callable[[], object]) -> str:
        with pytest.raises(ConfigurationError) as error:
            act()
        return str(error.value)

    def engine(model: nn.Module) -> dptorch.PrivacyEngine:
        return dptorch.PrivacyEngine(model, **settings_of())

    def start(**configuration: Any) -> tuple[Any, Any]:
        model = make_model()
        return initialized(model, torch.optim.SGD(model.parameters(), 0.1), configuration)

    def attached(**configuration: Any) -> None:
        model, optimizer = start(**configuration)
        engine(model).attach(optimizer)

    def late() -> None:
        model = make_model()
        private = engine(model)
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = private.attach(initialized(model, sgd, config(2))[1])
        for x, y in private.loader(make_data()):
            loss_of(model(x), y).backward()
            try:
                optimizer.step()
            finally:
                assert private.steps_done == 0

    def old() -> None:
        import deepspeed

        whole, _ = start(**config(2))
        version, deepspeed.__version__ = deepspeed.__version__, "0.18.9"
        try:
            engine(whole)
        finally:
            deepspeed.__version__ = version

    def twice(model: nn.Module) -> None:
        engine(model).detach()
        engine(model)

    class DeepSpeedOptimizer:
        fp16_groups: tuple[()] = ()
        dtype = torch.float32

    class InFloat16(DeepSpeedOptimizer):
        dtype = torch.float16

    class OnDisk(DeepSpeedOptimizer):
        swap_optimizer = True

    model, optimizer = start(**config(2))
    private = engine(model)
    found = {
        "checkpoint": error_of(lambda: private.save_checkpoint("run.pt")),
        "load": error_of(lambda: private.load_checkpoint("run.pt")),
        "inside": error_of(lambda: engine(start(**config(2))[0].module)),
        "base": error_of(lambda: private.attach(optimizer.optimizer)),
        "again": error_of(lambda: twice(start(**config(3))[0])),
        "late": error_of(late),
        "old": error_of(old),
        "fp16": error_of(lambda: held_by(InFloat16())),
        "nvme": error_of(lambda: held_by(OnDisk())),
        "stage 0": error_of(lambda: engine(start(**config(0))[0])),
        "accumulation": error_of(
            lambda: engine(start(**config(2), gradient_accumulation_steps=2)[0])
        ),
        "master": error_of(
            lambda: attached(**config(1), **HALF, data_types={"grad_accum_dtype": "fp32"})
        ),
    }
    assert private.steps_done == 0
    return found


def program_of_the_page() -> float:
    """ε at the end of the program in docs/scale.md."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as mine:
        os.chdir(Ranks.of().from_first(mine))
        names: dict[str, Any] = {}
        exec(programs()[2], names)
        engine: dptorch.PrivacyEngine = names["engine"]
        assert Path("run", "latest").exists()
        engine.ranks.gather(None)
        os.chdir(before)
        return engine.get_privacy_spent().epsilon


TWINS = {
    "means": scattered_means, "noise": noise_of_the_first_part, "values": other_values,
}  # fmt: skip


def run_cases(size: int, more: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """What each of `size` ranks found, by the name of what it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Once, and not on each rank.
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401

    train("LoRA", steps=1)

    def work(rank: int) -> dict[str, Any]:
        gc.freeze()  # DeepSpeed collects at each start
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # looked at, not used
        return {
            case: train(
                name, zero=config(stage, zero=OFFLOAD if "offload" in case else None), **settings
            )
            for case, (name, stage, settings) in CASES[size].items()
        } | more()

    return found_on_ranks(size, work)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkpoints of two ranks."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def world(folder: Path) -> list[dict[str, Any]]:
    """Of two ranks."""

    def more() -> dict[str, Any]:
        found: dict[str, Any] = {name: twin() for name, twin in TWINS.items()}
        for stage in (2, 3):
            found[f"half {stage}"] = train(wrap=Half, zero=config(stage, **HALF), steps=1)
            found[f"resumed {stage}"] = resumed(stage, folder / str(stage))
        found["scheduled"] = scheduled()
        found["refused"] = refused()
        found["page"] = program_of_the_page()
        return found

    return run_cases(2, more)


@pytest.fixture(scope="module")
def four(folder: Path, world: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of four ranks, which try to go on from what two have saved."""

    def more() -> dict[str, Any]:
        later = {f"resumed {i}": resumed_on_more(i, folder / str(i)) for i in (2, 3)}
        return {**later, "uneven": uneven_rows()}

    return run_cases(4, more)


# -- tests -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlp() -> Trained:
    """The run of one process that most of the runs on ranks are to be."""
    return train()


@pytest.mark.parametrize("case", list(CASES[2]))
def test_ranks_under_zero_take_the_step_of_one_process(
    case: str, world: list[dict[str, Any]]
) -> None:
    name, _, settings = CASES[2][case]
    same_as_one([found[case] for found in world], train(name, **settings))


@pytest.mark.parametrize("case", list(CASES[4]))
def test_four_ranks_under_zero_take_the_step_of_one_process(
    case: str, four: list[dict[str, Any]]
) -> None:
    name, _, settings = CASES[4][case]
    same_as_one([found[case] for found in four], train(name, **settings))


def test_the_cases_have_ranks_with_a_row_more_and_with_none(four: list[dict[str, Any]]) -> None:
    shares = list(zip(*(found["one row or two"].local for found in four), strict=True))
    assert any(min(share) == 1 and max(share) == 2 for share in shares)
    parts = list(zip(*(found["parts and empty shares"].local for found in four), strict=True))
    assert any(min(share) == 0 and max(share) > 0 for share in parts)


def test_ranks_that_would_wait_for_ever_raise_instead(four: list[dict[str, Any]]) -> None:
    """One has a single row, whose backward reads other parameters than that of two rows."""
    for found in four:
        assert "the ranks are at different places of a backward pass" in found["uneven"]
        assert "no parameter" in found["uneven"]


@pytest.mark.parametrize("twin", list(TWINS))
def test_the_comparison_sees_what_is_broken(
    twin: str, world: list[dict[str, Any]], mlp: Trained
) -> None:
    with pytest.raises(AssertionError):
        same_as_one([found[twin] for found in world], mlp)


def test_no_rank_steps_on_what_another_steps_on(world: list[dict[str, Any]]) -> None:
    places = [found["tied GPT-2, stage 2, flat"].places[0] for found in world]
    assert not set(places[0].tolist()) & set(places[1].tolist())
    assert max(map(len, places)) < 0.55 * sum(map(len, places))


@pytest.mark.parametrize("stage", [2, 3])
def test_bfloat16_is_summed_and_noised_in_float32(stage: int, world: list[dict[str, Any]]) -> None:
    """Against one process with the same parameters in bfloat16; ZeRO keeps float32 copies."""
    ranks = [found[f"half {stage}"] for found in world]
    alone = train(wrap=Half, steps=1)
    sums = in_place(ranks, "sums", 0)
    assert sums.dtype == torch.float32
    assert not torch.equal(sums, sums.bfloat16().float())
    assert close(sums, alone.sums[0], 1e-5)
    assert torch.equal(in_place(ranks, "noise", 0), alone.noise[0])
    assert sums.norm() <= 0.2 * sum(found.local[0] for found in ranks) * (1 + 1e-6)
    assert close(ranks[0].values.float(), alone.values.float(), 1e-2)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_goes_on_from_a_checkpoint_of_deepspeed(
    stage: int, world: list[dict[str, Any]]
) -> None:
    for first, later, epsilon, told in (found[f"resumed {stage}"] for found in world):
        assert torch.equal(first, later)
        assert epsilon == told


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_of_deepspeed_on_another_number_of_ranks_says_so(
    stage: int, four: list[dict[str, Any]]
) -> None:
    """On every rank, of which two have no file; nothing is spent."""
    for found in four:
        assert "is of 2 ranks, and this run has 4" in found[f"resumed {stage}"]


def test_the_learning_rate_follows_logical_batches(world: list[dict[str, Any]]) -> None:
    for steps, rates in (found["scheduled"] for found in world):
        assert len(rates) > 2 * steps  # in parts
        assert rates == sorted(rates)
        assert len(set(rates)) == steps


def test_what_is_not_covered_says_so(world: list[dict[str, Any]]) -> None:
    for found in (found["refused"] for found in world):
        assert "client_state=" in found["checkpoint"]
        assert "client_state=" in found["load"]
        assert "what deepspeed.initialize returned first" in found["inside"]
        assert "not a trainable parameter of the model" in found["base"]
        assert "deepspeed.initialize again" in found["again"]
        assert "called after the engine was made" in found["late"]
        assert "DeepSpeed 0.18.9 is too old" in found["old"]
        assert '"bf16": {"enabled": true}' in found["fp16"]  # as in the cases of `Half`
        assert '"device": "cpu"' in found["nvme"]
        assert "DistributedDataParallel" in found["stage 0"]
        assert "max_physical_batch_size" in found["accumulation"]
        assert '"stage": 2' in found["master"]


def test_the_program_of_the_page_runs(world: list[dict[str, Any]]) -> None:
    assert all(2.9 < found["page"] <= 3.0 for found in world)
