"""What is settled before an engine begins: its plan, what it trains, what its ranks have in common."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from dptorch.distributed import Ranks
from dptorch.distributed.agreement import shapes
from dptorch.distributed.placement import Placement
from dptorch.distributed.sharded import is_sharded
from dptorch.distributed.zero3 import is_partitioned
from dptorch.engine.settings import EngineSettings
from dptorch.errors import ConfigurationError, one_of, warn
from dptorch.plan import PlanSettings, PrivacyPlan, make_plan
from dptorch.randomness import RootKey
from dptorch.tape.gradients.clipping_modes import NON_PRIVATE, Mode
from dptorch.tape.recording.model_hooks import hooks_of

if TYPE_CHECKING:
    from dptorch.ledger import DatasetLedger

__all__ = ["plan_under", "settled_plan", "start_together", "trainable"]


def settled_plan(plan: PrivacyPlan | None, settings: PlanSettings) -> PrivacyPlan:
    """Return the plan that an engine was given, or one made from its settings.

    Raises:
        ConfigurationError: there are both, or a setting is not known.
    """
    for name in settings:
        one_of("argument", name, EngineSettings.__annotations__)
    if plan is None:
        return make_plan(**settings)
    if settings:
        raise ConfigurationError(
            f"plan= and {', '.join(f'{n}=' for n in settings)} are given: the plan says all that "
            "the guarantee depends on. Leave them out, or make the engine without plan=."
        )
    return plan


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters of `model` by name.

    Raises:
        ConfigurationError: there are none, they have no values yet, or the model has an engine or is
            TorchScript.
    """
    if hooks_of(model) is not None:
        raise ConfigurationError(
            "this model already has a privacy engine: its gradients would be clipped and noised "
            "twice. Call detach() on the other engine first."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigurationError(
            f"model={type(model).__name__}: TorchScript runs outside Python, where nothing can follow "
            "it. Give the nn.Module that it was made of, and script that after training."
        )
    parameters: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ConfigurationError(
            "the model has no trainable parameter. Unfreeze what should be trained with "
            "requires_grad_(True) before making the engine."
        )
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ConfigurationError(
                f"the parameter {name!r} has no shape yet: a lazy layer takes it from its first input. "
                "Call the model once, on a batch of zeros, before making the engine."
            )
        if p.device.type == "meta":
            raise ConfigurationError(
                f"the parameter {name!r} is on the meta device and has no values yet. Load the "
                "weights, or model.to_empty(device='cpu') and initialise them, before making the "
                "engine."
            )
        if p.is_complex() and p.requires_grad:
            raise ConfigurationError(
                f"the parameter {name!r} is complex, and noise is added to real numbers. Keep it as "
                "nn.Parameter(torch.view_as_real(w)), and use torch.view_as_complex(self.w) in "
                "forward()."
            )
    return parameters


def plan_under(mode: Mode, plan: PrivacyPlan, ranks: Ranks) -> PrivacyPlan:
    """Return the plan under a clipping mode, which can do what plan and ranks need. Ordinary training,
    whose epsilon is infinite, is a plan of its own.

    Raises:
        ConfigurationError: it cannot.
    """
    if plan.mechanism == "discrete_gaussian" and mode.passes != 1:
        raise ConfigurationError(
            f"clipping_mode={mode.name!r} never holds the gradients of examples, which "
            "mechanism='discrete_gaussian' rounds one by one. Use clipping_mode='auto'."
        )
    if mode is NON_PRIVATE and ranks.size > 1:
        raise ConfigurationError(
            f"clipping_mode='non-private' on {ranks.size} ranks: the engine would add nothing up. "
            "Compare on one process, or train in DistributedDataParallel without an engine."
        )
    if mode is NON_PRIVATE:
        warn(
            "clipping_mode='non-private': gradients are neither clipped nor noised, and the engine's "
            "plan has noise_multiplier=0. This run is for comparison; its epsilon is infinite."
        )
        return replace(plan, noise_multiplier=0.0, target_epsilon=None)
    return plan


def start_together(
    ranks: Ranks,
    model: nn.Module,
    placement: Placement,
    parameters: dict[str, Tensor],
    plan: PrivacyPlan,
    clipping_mode: str,
    seed: int | None,
    ledger: DatasetLedger | None,
) -> RootKey:
    """Check that all ranks start the same run, and give them one root key and rank 0's model.

    Parameters and buffers become those of rank 0, as in DistributedDataParallel. Ranks that have the
    same examples draw the same random numbers from here on.

    Raises:
        ConfigurationError: on every rank, naming what differs.
    """
    has_ledger = ranks.from_first(ledger is not None)
    ranks.agree(
        {
            **{f"the plan's {k}": str(v) for k, v in json.loads(plan.to_json()).items()},
            "clipping_mode": clipping_mode,
            "the trainable parameters": shapes(parameters),
            "the model": shapes(dict(model.named_parameters())),
            "ledger": "one" if has_ledger or ledger is not None else "none",
            "the version of torch": torch.__version__,
        }
    )
    key = ranks.share_key(seed)
    with torch.no_grad():
        every = [*model.parameters(), *model.buffers()]
        whole = [t for t in every if not (is_sharded(t) or is_partitioned(t))]
        ranks.copy_from_first_(t.data for t in whole)
    if placement.data_ranks.size < ranks.size:
        if plan.mechanism == "discrete_gaussian":
            raise ConfigurationError(
                "mechanism='discrete_gaussian' rounds the whole gradient of each example, and tensor "
                "parallel ranks have parts of it. Use mechanism='gaussian', or train replicated."
            )
        placement.begin_alike()
    return key
