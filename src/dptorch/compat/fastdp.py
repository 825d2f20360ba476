"""fastDP, by name and call. Change ``from fastDP`` to ``from dptorch.compat.fastdp``.

What each argument means here, where that differs: `docs/migrating.md`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from dptorch.compat.arguments import known_arguments
from dptorch.compat.attached_engine import AttachedEngine, automatic_clipping
from dptorch.compat.stand_ins import LORA, NOT_BY_LAYER, stand_in
from dptorch.distributed import Ranks
from dptorch.distributed.wrappers import unwrapped
from dptorch.errors import ConfigurationError, one_of
from dptorch.plan import PlanSettings

__all__ = [
    "PrivacyEngine",
    "PrivacyEngine_Distributed_Stage_2_and_3",
    "PrivacyEngine_Distributed_extending",
    "lora_utils",
    "supported_differentially_private_layers",
]

_MODES = {
    "ghost": "BK-ghost",
    "MixGhostClip": "BK-MixGhostClip",
    "MixOpt": "BK-MixOpt",
    "BK-ghost": "BK-ghost",
    "BK-MixGhostClip": "BK-MixGhostClip",
    "BK-MixOpt": "BK-MixOpt",
    "default": "auto",
}
_FUNCTIONS = {"Abadi": "abadi", "automatic": "automatic", "global": "global"}
_STYLES = ("all-layer", "layer-wise", "param-wise")
#: Stands in for fastDP's module: says on use what to call.
lora_utils = stand_in("lora_utils", LORA)
#: Stands in for fastDP's list: there is no list of layers here.
supported_differentially_private_layers = stand_in(
    "supported_differentially_private_layers", NOT_BY_LAYER
)


class PrivacyEngine(AttachedEngine):
    """fastDP's engine: an ordinary loop with ``loss.backward()`` and ``optimizer.step()``.

    Several backwards before a step are one batch of that many parts.

    Args:
        module, num_steps, named_params, record_snr, settings: see \
`dptorch.compat.attached_engine.AttachedEngine`.
        max_grad_norm: bound C on one example's gradient. With "automatic" clipping it only scales the
            step, and is 1 unless `numerical_stability_constant` is given, as in fastDP.
        target_delta: by default 1 / (2 * sample_size), as in fastDP.
        alphas, eps_error: accepted: the accountants here have orders and errors of their own.
        numerical_stability_constant: γ of automatic clipping ``C / (n + γ)``: 0.01, or 0 (AUTO-V).
            For the other functions it is not needed: a gradient of norm 0 has coefficient 1.
        accounting_mode: "rdp", "glw" or "all".
        clipping_mode: "MixOpt", "MixGhostClip" or "ghost", with "BK-" before it or not; "default" is
            what is fastest. All give the same gradients.
        clipping_fn: "automatic", "Abadi" or "global".
        loss_reduction: how the loss joins the examples, "mean" or "sum".
        origin_params: accepted, where the names exist: no weight gradient is ever computed twice here,
            so nothing needs to be chosen.
        clipping_style: "all-layer", "layer-wise", "param-wise", or a list of layers that begin blocks;
            what comes before the first of them belongs to its block.
        num_GPUs: how many processes torch.distributed has, or 1. Noise is added once, to the sum over
            all of them, and never divided.
        torch_seed_is_fixed: accepted: noise comes from a key of its own, never from torch's seed.
        seed: see `dptorch.PrivacyEngine`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        >>> privacy_engine = PrivacyEngine(
        ...     model, batch_size=16, sample_size=64, epochs=3, target_epsilon=2,
        ...     clipping_fn="automatic", clipping_mode="MixOpt", origin_params=None,
        ...     clipping_style="all-layer")
        >>> privacy_engine.attach(optimizer)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> for x, y in privacy_engine.loader(data):
        ...     torch.nn.functional.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> 0 < privacy_engine.get_privacy_spent()["eps_rdp"] < 2
        True
    """

    @known_arguments
    def __init__(  # type: ignore[misc]  # its names of functions and styles are not the plan's
        self,
        module: nn.Module,
        *,
        num_steps: int | None = None,
        alphas: Sequence[float] | None = None,
        record_snr: bool = False,
        named_params: Sequence[tuple[str, Tensor]] | None = None,
        numerical_stability_constant: float | None = None,
        accounting_mode: str = "rdp",
        eps_error: float = 0.05,
        clipping_mode: str = "MixOpt",
        clipping_fn: str = "automatic",
        origin_params: Sequence[str] | None = None,
        clipping_style: str | Sequence[str] = "all-layer",
        num_GPUs: int = 1,
        torch_seed_is_fixed: bool = False,
        seed: int | None = None,
        **settings: Unpack[PlanSettings],
    ) -> None:
        if num_GPUs not in (1, Ranks.of().size):
            raise ConfigurationError(
                f"num_GPUs={num_GPUs}, but torch.distributed has {Ranks.of().size} processes. Noise "
                "is added once, to the sum over all of them. Start them first, by torchrun and "
                "init_process_group, or leave num_GPUs out."
            )
        _check_origin(module, origin_params)
        function = _FUNCTIONS[one_of("clipping_fn", clipping_fn, _FUNCTIONS)]
        if function == "automatic":
            function = automatic_clipping(numerical_stability_constant)
            if numerical_stability_constant is None:
                settings["max_grad_norm"] = 1.0
        style: Any = clipping_style
        if isinstance(style, str):
            one_of("clipping_style", style, _STYLES)
        else:
            style = _blocks(unwrapped(module), list(style), settings.get("max_grad_norm", 1.0))
        settings |= {"clipping_fn": function, "clipping_style": style}
        super().__init__(
            module,
            num_steps=num_steps,
            default_delta=lambda n: 1 / (2 * n),
            accounting_mode=accounting_mode,
            modes=("rdp", "glw", "all"),
            named_params=named_params,
            record_snr=record_snr,
            clipping_mode=_MODES[one_of("clipping_mode", clipping_mode, _MODES)],
            seed=seed,
            **settings,
        )
        self.alphas = alphas
        self.eps_error = eps_error
        self.clipping_mode = clipping_mode
        self.clipping_fn = clipping_fn
        self.clipping_style = clipping_style
        self.loss_reduction = self.engine.plan.loss_reduction

    @property
    def bias_only(self) -> bool:
        """Whether nothing but biases is trained (DP-BiTFiT)."""
        return all(name.rpartition(".")[2] == "bias" for name, _ in self.named_params)


class PrivacyEngine_Distributed_Stage_2_and_3(PrivacyEngine):
    """fastDP's engine for models that several processes share, on the ranks that dptorch has.

    fastDP's replaces functions of DeepSpeed before ``deepspeed.initialize``, is attached to no
    optimizer, and reports ε = 0. This one is made of what ``deepspeed.initialize`` or ``fully_shard``
    returned, and attached to the optimizer that goes with it; batches come from its `loader`.

    Args:
        module: that model. A bare one is trained whole on each process.
        clipping_style: as of `PrivacyEngine`; by default that of fastDP's engine.
        settings: of `PrivacyEngine`.
    """

    def __init__(
        self, module: nn.Module, *, clipping_style: Any = "layer-wise", **settings: Any
    ) -> None:
        super().__init__(module, clipping_style=clipping_style, **settings)


class PrivacyEngine_Distributed_extending(PrivacyEngine):
    """As `PrivacyEngine_Distributed_Stage_2_and_3`, clipped by parameter, as fastDP's is.

    Args:
        module, settings: as there.
        grad_accum_steps, max_sequence_length, per_device_physical_batch_size: accepted: backwards
            before a step add up, and ``loader(max_physical_batch_size=...)`` says what fits.
        per_sample_clip: True; sums over several examples are not clipped as one.

    Raises:
        ConfigurationError: ``per_sample_clip=False``, whose noise would hide no single example.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        grad_accum_steps: int = 1,
        max_sequence_length: int = 1,
        per_device_physical_batch_size: int = 8,
        per_sample_clip: bool = True,
        **settings: Any,
    ) -> None:
        if not per_sample_clip:
            raise ConfigurationError(
                "per_sample_clip=False clips the gradient of several examples as one, and no epsilon "
                "here covers that. Leave it out: each example is clipped by itself."
            )
        super().__init__(module, clipping_style="param-wise", **settings)


def _check_origin(module: nn.Module, origin: Sequence[str] | None) -> None:
    names = [name for name, _ in module.named_parameters()]
    for part in [origin] if isinstance(origin, str) else origin or ():
        if not any(part in name for name in names):
            raise ConfigurationError(
                f"origin_params: no parameter of the model has {part!r} in its name. Leave "
                "origin_params out: nothing has to be chosen here."
            )


def _blocks(module: nn.Module, heads: list[str], max_grad_norm: float) -> dict[str, float]:
    """fastDP's blocks as groups of parameters: each reaches from its head to the next head."""
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    layers = {
        name: [f"{name}.{n}".lstrip(".") for n, _ in layer.named_parameters(recurse=False)]
        for name, layer in module.named_modules()
    }
    for head in heads:
        one_of("clipping_style: layer", head, [name for name in layers if name])
    members: dict[str, list[str]] = {head: [] for head in layers if head in heads}
    if not members:
        raise ConfigurationError("clipping_style=[]: name at least one layer, or use 'all-layer'.")
    block = next(iter(members))
    for name, parameters in layers.items():
        block = name if name in members else block
        members[block] += [n for n in parameters if n in trainable]
    empty = [head for head, inside in members.items() if not inside]
    if empty:
        raise ConfigurationError(
            f"clipping_style: nothing is trained in the block of {empty[0]!r}."
        )
    norm = max_grad_norm / math.sqrt(len(members))
    return {"|".join(inside): norm for inside in members.values()}
