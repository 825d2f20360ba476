"""DeepSpeed's ZeRO: what it has divided among ranks trains like the whole on one process.

All cases run in one start of two ranks; each test looks at some of them.
"""

from __future__ import annotations

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
from dptorch.distributed.zero import ZeroParameters
from dptorch.errors import ConfigurationError
from tests.distributed.processes import on_ranks
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
)
from tests.engine.setup import make_data, make_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]

CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "MLP, stage 1": ("MLP", 1, {}),
    "MLP": ("MLP", 2, {}),
    "layer-wise": ("MLP", 1, {"clipping_style": "layer-wise"}),
    "GroupNorm": ("convolutions with GroupNorm", 1, {}),
    "tied GPT-2, stage 1": ("tied GPT-2", 1, {}),
    "tied GPT-2": ("tied GPT-2", 2, {}),
    "LoRA": ("LoRA", 2, {}),
    "parts": ("MLP", 2, {"limit": 2, "sample_rate": 0.5}),
    "empty shares": ("MLP", 1, {"sample_rate": 2 / 24, "steps": 20}),
    "adaptive": ("MLP", 2, {"adaptive_clipping": {"count_stddev": 4.0}}),
    "two passes": ("MLP", 2, {"clipping_mode": "ghost"}),
}
HALF = {"bf16": {"enabled": True}}


def config(stage: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # torch.optim.SGD
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


def broken(owner: Any, name: str, method: Any) -> Trained:
    plain = getattr(owner, name)
    setattr(owner, name, method)
    try:
        return train(zero=config(1))
    finally:
        setattr(owner, name, plain)


class Half(nn.Module):
    """Takes float32 inputs into a model in bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.bfloat16())  # type: ignore[no-any-return]


def resumed() -> tuple[Tensor, Tensor, float, float]:
    """A run of Adam and one that goes on from its checkpoint: parameters and ε of both."""
    with tempfile.TemporaryDirectory() as mine:
        folder = Ranks.of().from_first(mine)

        def run(*, load: bool) -> tuple[Tensor, float]:
            model = make_model()
            adam = torch.optim.Adam(model.parameters(), 0.01)
            whole, optimizer = initialized(model, adam, config(2))
            engine = dptorch.PrivacyEngine(whole, **settings_of(steps=4))
            engine.attach(optimizer)
            if load:
                _, state = whole.load_checkpoint(folder)
                engine.load_state_dict(state["privacy"])
            for x, y in engine.loader(make_data()):
                whole.backward(loss_of(whole(x), y))
                whole.step()
                if engine.steps_done == 2 and not load:
                    whole.save_checkpoint(folder, client_state={"privacy": engine.state_dict()})
            values = nn.utils.parameters_to_vector(model.parameters()).detach()
            return values, engine.get_privacy_spent().epsilon

        first, later = run(load=False), run(load=True)
        Ranks.of().gather(None)  # before the folder goes
    return first[0], later[0], first[1], later[1]


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

    model, optimizer = start(**config(2))
    private = engine(model)
    found = {
        "checkpoint": error_of(lambda: private.save_checkpoint("run.pt")),
        "load": error_of(lambda: private.load_checkpoint("run.pt")),
        "inside": error_of(lambda: engine(start(**config(2))[0].module)),
        "base": error_of(lambda: private.attach(optimizer.optimizer)),
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


TWINS = {"means": scattered_means, "noise": noise_of_the_first_part}


@pytest.fixture(scope="module")
def world() -> list[dict[str, Any]]:
    """What each of two ranks found, by the name of what it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed  # noqa: F401

    def work(rank: int) -> dict[str, Any]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # looked at, not used
        found: dict[str, Any] = {
            case: train(name, zero=config(stage), **settings)
            for case, (name, stage, settings) in CASES.items()
        }
        found |= {name: twin() for name, twin in TWINS.items()}
        found["half"] = train(wrap=Half, zero=config(2, **HALF), steps=1)
        found["resumed"] = resumed()
        found["scheduled"] = scheduled()
        found["refused"] = refused()
        found["page"] = program_of_the_page()
        return found

    by_rank = on_ranks(2, work)
    for found in by_rank:
        if isinstance(found, Exception):
            raise found
    return by_rank


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", list(CASES))
def test_ranks_under_zero_take_the_step_of_one_process(
    case: str, world: list[dict[str, Any]]
) -> None:
    name, _, settings = CASES[case]
    same_as_one([found[case] for found in world], train(name, **settings))


@pytest.mark.parametrize("twin", list(TWINS))
def test_the_comparison_sees_what_is_broken(twin: str, world: list[dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        same_as_one([found[twin] for found in world], train())


def test_no_rank_steps_on_what_another_steps_on(world: list[dict[str, Any]]) -> None:
    places = [found["tied GPT-2"].places[0] for found in world]
    assert not set(places[0].tolist()) & set(places[1].tolist())
    assert max(map(len, places)) < 0.55 * sum(map(len, places))


def test_bfloat16_is_summed_and_noised_in_float32(world: list[dict[str, Any]]) -> None:
    """Against one process with the same parameters in bfloat16; ZeRO keeps float32 copies."""
    ranks = [found["half"] for found in world]
    alone = train(wrap=Half, steps=1)
    sums = in_place(ranks, "sums", 0)
    assert sums.dtype == torch.float32
    assert not torch.equal(sums, sums.bfloat16().float())
    assert close(sums, alone.sums[0], 1e-5)
    assert torch.equal(in_place(ranks, "noise", 0), alone.noise[0])
    assert sums.norm() <= 0.2 * sum(found.local[0] for found in ranks) * (1 + 1e-6)
    assert close(ranks[0].values.float(), alone.values.float(), 1e-2)


def test_a_run_goes_on_from_a_checkpoint_of_deepspeed(world: list[dict[str, Any]]) -> None:
    for first, later, epsilon, told in (found["resumed"] for found in world):
        assert torch.equal(first, later)
        assert epsilon == told


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
        assert "DistributedDataParallel" in found["stage 0"]
        assert "max_physical_batch_size" in found["accumulation"]
        assert '"stage": 2' in found["master"]


def test_the_program_of_the_page_runs(world: list[dict[str, Any]]) -> None:
    assert all(2.9 < found["page"] <= 3.0 for found in world)
