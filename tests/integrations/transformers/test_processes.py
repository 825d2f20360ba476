"""Private trainers on two processes: whole, in shards and under DeepSpeed, the model of one process.

All cases run in one start of two ranks; each test looks at some of them.
"""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("trl")

from dptorch.errors import ConfigurationError
from dptorch.integrations.transformers import DPSFTTrainer
from dptorch.integrations.transformers.dividing import divided
from dptorch.integrations.transformers.sharding import sharded
from dptorch.ledger import open_ledger
from tests.distributed.launched import leave_out_shared_memory, shard_on_cpus
from tests.distributed.processes import found_on_ranks
from tests.distributed.scenarios import values_of
from tests.integrations.transformers import setup
from tests.integrations.transformers.setup import Kill, build, data, ran, trainer_of

pytestmark = setup.quiet
SETTINGS = {
    "gradient_accumulation_steps": 2, "max_steps": 4, "learning_rate": 1e-2,
    "save_strategy": "steps", "save_steps": 2,
}  # fmt: skip
SHARDS = {
    "transformer_layer_cls_to_wrap": ["GPT2Block"],
    # Gloo mixes up the messages of whole ones, without an engine too.
    "state_dict_type": "SHARDED_STATE_DICT",
}
STAGES = (2, 3)


def make(folder, rows, *, model=None, **more):
    return trainer_of(
        model or build("gpt2"), "gpt2", folder, dataset=data("gpt2", [3 + i % 6 for i in range(32)]),
        privacy={"noise_multiplier": 0.5}, per_device_train_batch_size=rows, **SETTINGS | more,
    )  # fmt: skip


def sft(folder, rows, **more):
    """Of adapters, by TRL; no checkpoint."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model = get_peft_model(build("gpt2"), config)
    settings = {"cls": DPSFTTrainer, "save_strategy": "no", "max_steps": 2, "bf16": False}
    return make(folder, rows, model=model, **settings | more)


def found_by(trainer):
    """(its trained parameters, whole; ε; what the model is in; where its parameters are)."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return (
        torch.cat([values_of(p).flatten() for p in trained]),
        trainer.get_privacy_spent().epsilon,
        type(trainer.model_wrapped).__name__,
        {str(getattr(p, "placements", "whole")) for p in trained},
    )


def killed_and_gone_on(folder, **more):
    given = more.pop("given", {})
    killed = make(folder, 4, given=given | {"callbacks": [Kill(3)]}, **more)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = make(folder, 4, given=given, **more)
    again.train(resume_from_checkpoint=True)
    return found_by(again)


def under_deepspeed(stage, folder):
    """What ``accelerate launch`` with a DeepSpeed configuration leaves in the environment."""
    file = folder / f"zero{stage}-{os.environ['RANK']}.json"
    zero = {"stage": stage, "reduce_bucket_size": 10**5, "stage3_param_persistence_threshold": 8}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    file.write_text(json.dumps({"zero_optimization": zero, **dict.fromkeys(auto, "auto")}))
    os.environ |= {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
    }  # fmt: skip
    return {"use_cpu": False, "ddp_backend": "gloo"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What each of two ranks found, by the name of what it did, and the folder of the ledger."""
    import deepspeed

    folder = tmp_path_factory.mktemp("runs")

    def work(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # looked at, not used
        ledger = open_ledger(folder / "ledger.db").dataset("reviews") if rank == 0 else None
        found = {
            "whole": killed_and_gone_on(folder / "whole", given={"ledger": ledger}),
            "whole, SFT": found_by(ran(sft(folder / "none", 4))),
        }
        with pytest.raises(ConfigurationError, match="on several GPUs only"):
            make(folder / "none", 4, fsdp=True, fsdp_config=dict(SHARDS))
        shard_on_cpus()
        found["shards"] = killed_and_gone_on(folder / "shards", fsdp=True, fsdp_config=dict(SHARDS))
        on = {"fsdp": True, "fsdp_config": dict(SHARDS)}
        found["shards, SFT"] = found_by(ran(sft(folder / "none", 4, **on)))
        os.environ.pop("ACCELERATE_USE_FSDP")
        leave_out_shared_memory()
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        for stage in STAGES:
            on = under_deepspeed(stage, folder)
            found[f"ZeRO-{stage}"] = killed_and_gone_on(folder / f"zero{stage}", **on)
            found[f"ZeRO-{stage}, SFT"] = found_by(ran(sft(folder / "none", 4, **on)))
        return found

    return found_on_ranks(2, work), folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds, of a Trainer and of TRL's."""
    folder = tmp_path_factory.mktemp("alone")
    return {"": found_by(ran(make(folder, 8))), ", SFT": found_by(ran(sft(folder, 8)))}


def same(world, case, alone):
    """Assert that the ranks have the model of one process; returns its wrapper and placements."""
    by_rank, _ = world
    for found in by_rank:
        torch.testing.assert_close(found[case][0], alone[0], rtol=0, atol=1e-5)
    return found[case][2:]


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(world, alone):
    """In DistributedDataParallel, with AdamW, noise, a ledger and a checkpoint gone on from."""
    by_rank, folder = world
    assert same(world, "whole", alone[""])[0] == "DistributedDataParallel"
    assert same(world, "whole, SFT", alone[", SFT"])[0] == "DistributedDataParallel"
    # The third step was released twice: once before the interruption.
    assert all(found["whole"][1] > alone[""][1] for found in by_rank)
    total = open_ledger(folder / "ledger.db").dataset("reviews").total()
    assert (total.runs, total.steps) == (1, 5)


@pytest.mark.slow
def test_two_processes_with_shards_train_the_model_of_one(world, alone):
    """FSDP2 by accelerate, with AdamW, noise, and a checkpoint gone on from; LoRA by TRL."""
    for case, one in (("shards", alone[""]), ("shards, SFT", alone[", SFT"])):
        assert same(world, case, one)[1] == {"(Shard(dim=0),)"}
        assert all(found[case][1] == one[1] for found in world[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_trains_the_model_of_one(stage, world, alone):
    """As ``accelerate launch`` starts it: the same, and LoRA by TRL."""
    for case, one in ((f"ZeRO-{stage}", alone[""]), (f"ZeRO-{stage}, SFT", alone[", SFT"])):
        assert same(world, case, one)[0] == "DeepSpeedEngine"
        assert all(found[case][1] == one[1] for found in world[0])


@pytest.mark.parametrize(
    ("version", "checkpointing", "chunk", "way_out"),
    [
        (1, False, None, "Use version 2"),
        (2, True, None, r"activation_checkpointing=True\)"),
        (2, False, 8, "loss_chunk=8"),
    ],
)
def test_other_ways_of_sharding_are_refused(version, checkpointing, chunk, way_out):
    plugin = SimpleNamespace(fsdp_version=version, activation_checkpointing=checkpointing)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    trainer = SimpleNamespace(model=None, is_fsdp_enabled=True, accelerator=accelerator)
    with pytest.raises(ConfigurationError, match=way_out):
        sharded(trainer, loss_chunk=chunk)


@pytest.mark.parametrize(
    ("processes", "chunk", "way_out"), [(2, None, 'ddp_backend="gloo"'), (1, 8, "use stage 2")]
)
def test_other_ways_of_dividing_are_refused(processes, chunk, way_out):
    plugin = SimpleNamespace(zero_stage=3)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(
        model=None, is_deepspeed_enabled=True, accelerator=accelerator,
        args=SimpleNamespace(world_size=processes),
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match=way_out):
        divided(trainer, steps=1, loss_chunk=chunk)
