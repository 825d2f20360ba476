"""private-transformers, by name and call. Change ``from private_transformers`` to
``from dptorch.compat.private_transformers``.

What each argument means here, where that differs: `docs/migrating.md`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from typing_extensions import Unpack

from dptorch.clipping import AdaptiveClipping
from dptorch.compat.arguments import known_arguments
from dptorch.compat.attached_engine import LossVectorEngine
from dptorch.compat.stand_ins import LORA, NOT_BY_LAYER, stand_in
from dptorch.errors import one_of
from dptorch.plan import PlanSettings

__all__ = [
    "PrivacyEngine",
    "freeze_isolated_params_for_vit",
    "lora_utils",
    "supported_layers_grad_samplers",
]

_PER_LAYER = ("per_layer", "per_layer_percentile")
_MODES = {"default": "auto", "ghost": "ghost", **dict.fromkeys(_PER_LAYER, "auto")}
# Parameters that no layer applies, by the names that Hugging Face gives them in ViT, DeiT and BEiT.
_ISOLATED = (
    "cls_token",
    "distillation_token",
    "mask_token",
    "position_embeddings",
    "relative_position_bias_table",
    "lambda_1",
    "lambda_2",
)


#: Stands in for the module of this name: says on use what to call.
lora_utils = stand_in("lora_utils", LORA)
#: Stands in for the list of this name: there is no list of layers here.
supported_layers_grad_samplers = stand_in("supported_layers_grad_samplers", NOT_BY_LAYER)


class PrivacyEngine(LossVectorEngine):
    """private-transformers' engine: give ``optimizer.step(loss=loss)`` one loss for each example.

    ``optimizer.virtual_step(loss=loss)`` adds a part of the batch. ``backward()`` is not called.

    Args:
        module: any model; tied and shared weights, too, in every mode.
        named_params, record_snr, settings: see `dptorch.compat.attached_engine.AttachedEngine`.
        max_grad_norm: bound on one example's gradient, over all layers together.
        target_delta: by default sample_size ** -1.1, as in private-transformers.
        alphas, eps_error: accepted: the accountants here have orders and errors of their own.
        numerical_stability_constant: accepted and not needed: a gradient of norm 0 has coefficient 1.
        clipping_mode: "default"; "ghost" (norms in one backward, sums in a second); "per_layer": each
            layer is clipped to max_grad_norm / sqrt(layers); "per_layer_percentile": so at first, and
            then each layer's norm follows the median of its gradients' norms, privately.
        accounting_mode: "rdp", "glw" or "all".
        skip_checks: accepted: there is no list of models.
        seed: see `dptorch.PrivacyEngine`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.Adam(params=model.parameters(), lr=1e-4)
        >>> privacy_engine = PrivacyEngine(
        ...     model, batch_size=16, sample_size=64, epochs=3, max_grad_norm=0.1, target_epsilon=3)
        >>> privacy_engine.attach(optimizer)
        >>> data = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
        >>> for x, y in privacy_engine.loader(data):
        ...     loss = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        ...     optimizer.step(loss=loss)
        >>> privacy_engine.steps
        4
    """

    @known_arguments
    def __init__(
        self,
        module: nn.Module,
        *,
        alphas: Sequence[float] | None = None,
        record_snr: bool = True,
        named_params: Sequence[tuple[str, Tensor]] | None = None,
        numerical_stability_constant: float = 1e-6,
        clipping_mode: str = "default",
        accounting_mode: str = "rdp",
        eps_error: float = 0.05,
        skip_checks: bool = False,
        seed: int | None = None,
        **settings: Unpack[PlanSettings],
    ) -> None:
        one_of("clipping_mode", clipping_mode, _MODES)
        if clipping_mode in _PER_LAYER:
            settings["clipping_style"] = "layer-wise"
        if clipping_mode == "per_layer_percentile":
            settings["adaptive_clipping"] = AdaptiveClipping()
        super().__init__(
            module,
            default_delta=lambda n: n**-1.1,
            accounting_mode=accounting_mode,
            modes=("rdp", "glw", "all"),
            named_params=named_params,
            record_snr=record_snr,
            clipping_mode=_MODES[clipping_mode],
            seed=seed,
            **settings,
        )
        self.alphas = alphas
        self.eps_error = eps_error
        self.clipping_mode = clipping_mode


def freeze_isolated_params_for_vit(model: nn.Module) -> None:
    """Freeze tokens, position embeddings and layer scales of a ViT, DeiT or BEiT.

    private-transformers cannot train them. Nothing here needs it; the call is for repeating its runs.

    Example:
        >>> import torch
        >>> model = nn.ParameterDict({"cls_token": torch.zeros(1), "head": torch.zeros(1)})
        >>> freeze_isolated_params_for_vit(model)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['head']
    """
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in _ISOLATED:
            p.requires_grad_(False)
