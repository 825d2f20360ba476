"""What is trained of a network: everything, adapters, biases, or its last layer."""

from __future__ import annotations

from typing import Any, Final

from torch import Tensor, nn

from dptorch.errors import ConfigurationError, one_of

__all__ = ["METHODS", "apply_method", "head_of", "plain_state"]

#: Name, and what it trains. The last layer is new in a network with other classes, so all train it.
METHODS: Final = {
    "full": "all parameters",
    "last-layer": "the last linear layer; the body is frozen",
    "bias-only": "biases and the last layer (BiTFiT: Bu et al. 2022)",
    "norm-only": "normalisation layers and the last layer",
    "lora": "low-rank adapters of linear layers and convolutions, and the last layer (Hu et al. 2021)",
    "ffa-lora": "LoRA with its first factor frozen, which noise disturbs less (Sun et al. 2024)",
}
_NORMS: Final = ("GroupNorm", "LayerNorm", "BatchNorm", "RMSNorm", "InstanceNorm")


def head_of(network: nn.Module) -> tuple[str, nn.Linear]:
    """The name of the last linear layer, and the layer.

    Raises:
        ConfigurationError: there is none.
    """
    linear = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    classifier = getattr(network, "get_classifier", lambda: None)()  # of timm
    if isinstance(classifier, nn.Linear):
        return next((name, m) for name, m in linear if m is classifier)
    if not linear:
        raise ConfigurationError(
            f"{type(network).__name__} has no linear layer that could be its last. Use method='full'."
        )
    return linear[-1]


def apply_method(network: nn.Module, method: str, *, rank: int = 8) -> nn.Module:
    """Return the network with what `method` trains trainable, and all else frozen.

    Args:
        network: of images; changed in place.
        method: a name in `METHODS`.
        rank: of LoRA.

    Raises:
        ConfigurationError: an unknown method, or a network without what it trains.
    """
    one_of("method", method, METHODS)
    if method == "full":
        return network
    name, head = head_of(network)
    if method in ("lora", "ffa-lora"):
        return _adapted(network, name, rank, freeze_first=method == "ffa-lora")
    norms = {
        id(p)
        for module in network.modules()
        if any(kind in type(module).__name__ for kind in _NORMS)
        for p in module.parameters(recurse=False)
    }
    last = {id(p) for p in head.parameters()}
    for parameter_name, parameter in network.named_parameters():
        of_method = (method == "bias-only" and parameter_name.endswith("bias")) or (
            method == "norm-only" and id(parameter) in norms
        )
        parameter.requires_grad_(of_method or id(parameter) in last)
    return network


def _adapted(network: nn.Module, head: str, rank: int, *, freeze_first: bool) -> nn.Module:
    if rank < 1:
        raise ConfigurationError(f"lora_rank={rank}: expected 1 or more.")
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            f"LoRA needs the package peft, which cannot be imported ({error}). Install it with: pip "
            "install 'dptorch[vision]'."
        ) from error
    # A grouped convolution has no low-rank form.
    targets = [
        name
        for name, m in network.named_modules()
        if name != head
        and (isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.groups == 1))
    ]
    if not targets:
        raise ConfigurationError(
            f"{type(network).__name__} has no layer before its last that LoRA adapts. Use bias-only."
        )
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=None
    )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    adapted: nn.Module = peft.inject_adapter_in_model(config, network)
    for name, parameter in adapted.named_parameters():
        first = "lora_A" in name
        parameter.requires_grad_(
            ("lora_" in name and not (first and freeze_first)) or name.startswith(f"{head}.")
        )
    return adapted


def plain_state(network: Any) -> dict[str, Tensor]:
    """The state of a network with its adapters added to the weights, under the names without them.

    The network itself stays as it is, to the last bit: a run may go on with it.
    """
    deltas: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            deltas[f"{name}.weight"] = module.get_delta_weight("default").detach()
    found = {}
    for name, value in network.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        found[plain] = value + deltas[plain] if plain in deltas else value
    return found
