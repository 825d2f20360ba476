"""Parameters that DeepSpeed's ZeRO has divided among ranks, as an engine sees them.

Under ZeRO-1 and ZeRO-2 every rank has the parameters that forward passes use, and one part of their
float32 copies, with the optimizer's state of it. The parts cut through one long vector of all
parameters, so that a rank's *fragment* of one parameter is a range of it, at times an empty one. Under
ZeRO-3 each parameter is cut by itself, and forward passes gather it: see `zero3`. ZeRO's
own reduction runs when autograd accumulates into a parameter. It never does under an engine, since the
recording detaches parameters, and so ZeRO has nothing to reduce. The clipped sums are added up here,
each fragment on the rank that steps on it. What that rank has noised is put where ZeRO puts what it has
reduced, in float32 whatever the type of the parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from dptorch.distributed.ranks import Ranks
from dptorch.distributed.zero3 import StandIns, is_partitioned, part_of_rank
from dptorch.errors import ConfigurationError, warn

__all__ = [
    "ZeroParameters",
    "held_by",
    "is_zero",
    "not_stepped",
    "refuse_whole_checkpoint",
    "unwrapped_from_deepspeed",
]

_OLDEST: Final = (0, 19)  # of DeepSpeed


def is_zero(p: Tensor) -> bool:
    """Whether ZeRO has divided a parameter, or its optimizer's state, among ranks."""
    return hasattr(p, "_hp_mapping") or hasattr(p, "ds_id")


def unwrapped_from_deepspeed(model: nn.Module) -> nn.Module:
    """Return the model inside what ``deepspeed.initialize`` returned, or `model` itself.

    Raises:
        ConfigurationError: DeepSpeed trains it in a way that is not covered.
    """
    if not _is_of_deepspeed(model):
        return model
    import deepspeed

    engine: Any = model
    if _numbers(deepspeed.__version__) < _OLDEST:
        raise ConfigurationError(
            f"DeepSpeed {deepspeed.__version__} is too old: what is read of it here is of 0.19. "
            "Upgrade with pip install 'deepspeed>=0.19'."
        )
    if _has_class(model, "PipelineEngine"):
        raise ConfigurationError(
            "the model is in DeepSpeed's PipelineEngine: no rank sees an example's whole gradient, "
            "and pipeline parallelism is not covered. Use ZeRO: deepspeed.initialize of a module."
        )
    if engine.zero_optimization_stage() not in (1, 2, 3):
        raise ConfigurationError(
            f'"zero_optimization": {{"stage": {engine.zero_optimization_stage()}}}: only stages 1, 2 '
            "and 3 are covered. Stage 0 is DistributedDataParallel: use that."
        )
    if engine.gradient_accumulation_steps() != 1:
        raise ConfigurationError(
            f'"gradient_accumulation_steps": {engine.gradient_accumulation_steps()} would step on '
            "parts of a logical batch. Set it to 1, and use "
            "engine.loader(data, max_physical_batch_size=...): a step then waits for the last part."
        )
    engine.enable_backward_allreduce = (
        False  # there is nothing to reduce, and it does not expect that
    )
    inside: nn.Module = engine.module
    return inside


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version.

    Example:
        >>> _numbers("0.19.8"), _numbers("1.2+cpu")
        ((0, 19), (1, 2))
    """
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def held_by(optimizer: Any) -> list[list[Tensor]]:
    """Return the parameters that an optimizer steps on, by group: those of the model under ZeRO too.

    Raises:
        ConfigurationError: it is an optimizer of DeepSpeed that is not covered.
    """
    if not _has_class(optimizer, "DeepSpeedOptimizer"):
        return [list(group["params"]) for group in optimizer.param_groups]
    groups = getattr(optimizer, "fp16_groups", None)  # of stage 3
    if groups is None and not hasattr(optimizer, "partition_gradients"):
        raise ConfigurationError(
            f"DeepSpeed's {type(optimizer).__name__} is not covered. It is what bfloat16 with float32 "
            'accumulation takes in stage 1: use "zero_optimization": {"stage": 2}.'
        )
    if optimizer.dtype == torch.float16:
        raise ConfigurationError(
            '"fp16": {"enabled": true} multiplies the loss by a number that it changes by looking at '
            "exact gradients, and gradients of single examples underflow in float16. Use "
            '"bf16": {"enabled": true}.'
        )
    if getattr(optimizer, "use_muon", False):
        raise ConfigurationError(
            "DeepSpeed's Muon reads gradients where ZeRO has reduced them, and there are none. Use "
            "torch.optim.Muon, replicated, or another optimizer."
        )
    if getattr(optimizer, "swap_optimizer", False):
        raise ConfigurationError(
            '"offload_optimizer": {"device": "nvme"} keeps gradients in files, and is not covered. Use '
            '{"device": "cpu"}.'
        )
    return [list(group) for group in (optimizer.bit16_groups if groups is None else groups)]


def not_stepped(optimizer: Any) -> None:
    """Tell DeepSpeed that its optimizer took no step, since the logical batch goes on, so that its
    learning rate stays as well."""
    if _has_class(optimizer, "DeepSpeedOptimizer"):
        optimizer.overflow = True  # until the next step


def refuse_whole_checkpoint(model: nn.Module) -> None:
    """Check that a checkpoint of `model` can be one file.

    Raises:
        ConfigurationError: ZeRO has divided its optimizer's state, and writes checkpoints of its own.
    """
    if any(is_zero(p) for p in model.parameters()):
        raise ConfigurationError(
            "DeepSpeed keeps each rank's part of the optimizer. Save with "
            'model_engine.save_checkpoint(folder, client_state={"privacy": engine.state_dict()}), and '
            "go on with _, state = model_engine.load_checkpoint(folder) and "
            'engine.load_state_dict(state["privacy"]), before engine.loader. The folder then holds '
            "the key of the noise: keep it as safe as the data."
        )


class ZeroParameters:
    """The trainable parameters of a model that ZeRO trains.

    Args:
        given: what ``deepspeed.initialize`` returned first.
        parameters: of the model inside, by name.
        ranks: the processes that they are divided among.

    Attributes:
        followed: parameter name -> the parameter, which every rank has, or under ZeRO-3 its stand-in.
        is_whole: whether this rank can run the model without the others.
        around_forward: makes what a recorded forward pass runs in.

    Raises:
        ConfigurationError: `given` is something else, or the fragments of the ranks are not the whole.
    """

    def __init__(self, given: Any, parameters: dict[str, Tensor], ranks: Ranks) -> None:
        if not _is_of_deepspeed(given):
            raise ConfigurationError(
                "the model's parameters are divided by ZeRO. Give the engine what "
                "deepspeed.initialize returned first, and not the module inside."
            )
        if (bound := given.gradient_clipping()) > 0:
            warn(
                f"DeepSpeed scales the noisy gradient to a norm of {bound}, by default too. That costs "
                "no privacy, and makes steps shorter. Examples are clipped already: set "
                '"gradient_clipping": 0.'
            )
        _refuse_checkpoints_of_others(given, ranks.size)
        self._zero = given.optimizer
        self._ranks = ranks
        self.is_whole = not any(map(is_partitioned, parameters.values()))
        self.followed = parameters
        self.around_forward: Callable[[], AbstractContextManager[None]] = nullcontext
        self._stand_ins: StandIns | None = None
        if not self.is_whole:
            offload = self._zero.parameter_offload
            self._stand_ins = StandIns(given.module, parameters, offload, ranks)
            self.followed = self._stand_ins.by_name
            self.around_forward = self._stand_ins.restored_on_demand
        mine = {name: _fragment(p, ranks.rank) for name, p in parameters.items() if is_zero(p)}
        #: parameter name -> the ranges [first, end) of each rank.
        self._ranges: dict[str, list[tuple[int, int]]] = {
            name: [theirs[name] for theirs in ranks.gather(mine)] for name in mine
        }
        for name, ranges in self._ranges.items():
            if sum(end - first for first, end in ranges) != self.followed[name].numel():
                raise ConfigurationError(
                    f"ZeRO divides the parameter {name!r} as {ranges} among the engine's "
                    f"{ranks.size} ranks, which is not the whole of it. Train on all ranks that "
                    "deepspeed.initialize knows of."
                )

    def __contains__(self, name: str) -> bool:
        return name in self._ranges

    def first_coordinate(self, name: str) -> int:
        """Return where this rank's fragment begins in the parameter, in its flat form."""
        return self._ranges[name][self._ranks.rank][0] if name in self._ranges else 0

    def summed(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return this rank's fragments of the sums over all ranks, in a message to each rank.

        Args:
            whole: parameter name -> this rank's sum, of the whole parameter; empty afterwards.
        """
        if self._stand_ins is not None:
            self._stand_ins.read_nothing()
        names = list(whole)
        flat = {name: whole.pop(name).reshape(-1) for name in names}
        found: dict[str, Tensor] = {}
        for rank in range(self._ranks.size):
            parts = [flat[name][slice(*self._ranges[name][rank])] for name in names]
            total = self._ranks.sum_on(rank, torch.cat(parts)) if parts else None
            if rank == self._ranks.rank and total is not None:
                sizes = [part.numel() for part in parts]
                found = dict(zip(names, total.split(sizes), strict=True))
        return found

    def hand_over(self, name: str, p: Tensor, value: Tensor) -> None:
        """Put this rank's fragment of a gradient into the one that ZeRO's optimizer steps on."""
        zero, held = self._zero, cast(Any, p)
        if is_partitioned(p):
            group, first, _ = zero.grad_position[zero.get_param_id(p)]
            parts = zero.fp32_partitioned_groups_flat
        elif held._hp_mapping is not None:
            group = held._hp_mapping.param_group_index
            first = held._hp_mapping.hp_fragment_address.start
            parts = zero.single_partition_of_fp32_groups
        else:
            return  # other ranks step on it
        if _offloads(zero):
            whole = parts[group].grad
            # By this the noisy gradient is scaled, where "gradient_clipping" asks for that.
            zero.norm_for_param_grads[zero.get_param_id(p)] = value.norm().cpu()
        else:
            if zero.averaged_gradients.get(group) is None:  # since the last step
                zero.averaged_gradients[group] = [torch.zeros_like(parts[group])]
            (whole,) = zero.averaged_gradients[group]
        whole[first : first + value.numel()] = value.flatten()


def _refuse_checkpoints_of_others(given: Any, size: int) -> None:
    """Have ``load_checkpoint`` raise on each rank, in words, where another number of ranks has saved:
    DeepSpeed's own check sees it on those alone that have a file."""
    load = given.load_checkpoint

    @wraps(load)
    def load_checkpoint(load_dir: str, tag: str | None = None, *rest: Any, **more: Any) -> Any:
        latest = Path(load_dir, "latest")
        name = latest.read_text().strip() if tag is None and latest.is_file() else str(tag)
        there = len(list(Path(load_dir, name).glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")))
        divided = more.get("load_optimizer_states", True) and not given.load_universal_checkpoint()
        if divided and there not in (0, size):
            raise ConfigurationError(
                f"the checkpoint in {Path(load_dir, name)} is of {there} ranks, and this run has "
                f"{size}. DeepSpeed keeps each rank's part of the optimizer, and does not divide it "
                f"anew. Go on on {there} ranks. Nothing was spent."
            )
        return load(load_dir, tag, *rest, **more)

    given.load_checkpoint = load_checkpoint


def _fragment(p: Any, rank: int) -> tuple[int, int]:
    """[first, end): the coordinates of a parameter, in its flat form, that this rank steps on."""
    if is_partitioned(p):
        return part_of_rank(p, rank)
    if p._hp_mapping is None:
        return 0, 0
    where = p._hp_mapping.lp_fragment_address
    return where.start, where.start + where.numel


def _offloads(optimizer: Any) -> bool:
    """Whether a ZeRO optimizer keeps its gradients and states in the memory of the CPU."""
    return bool(getattr(optimizer, "cpu_offload", getattr(optimizer, "offload_optimizer", False)))


def _has_class(value: object, name: str) -> bool:
    """Whether an object is of a class of this name, which need not be imported to know it is not."""
    return any(c.__name__ == name for c in type(value).__mro__)


def _is_of_deepspeed(model: object) -> bool:
    return _has_class(model, "DeepSpeedEngine")
