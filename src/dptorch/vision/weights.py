"""Weights that training on pictures begins from."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from dptorch.errors import DataError

__all__ = ["load_weights"]


def load_weights(network: nn.Module, path: str) -> list[str]:
    """Load what fits into a network, in place; a last layer of other classes stays new.

    Args:
        network: as `dptorch.training.models.build_model` made it.
        path: ``.safetensors``, ``.pt`` or ``.pth``; or the folder of a run.

    Returns:
        the names of the network's tensors that the file does not have, or in another shape.

    Raises:
        DataError: it cannot be read, or most of the network is not in it.
    """
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    found = {name.removeprefix("module."): value for name, value in _tensors(file).items()}
    own = network.state_dict()
    fitting = {n: v for n, v in found.items() if n in own and own[n].shape == v.shape}
    missing = [name for name in own if name not in fitting]
    if sum(own[n].numel() for n in missing) > 0.5 * sum(v.numel() for v in own.values()):
        other = next((n for n in missing if n in found), None)
        why = (
            f"{other} has shape {tuple(found[other].shape)} there and {tuple(own[other].shape)} here"
            if other is not None
            else f"{missing[0]} is not there, but for example {next(iter(found), 'nothing')}"
        )
        raise DataError(
            f"{file}: weights of another model: {why}. Give the --model that they are of."
        )
    network.load_state_dict(fitting, strict=False)
    return missing


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(str(file))
            except SafetensorError as error:
                raise ValueError(str(error)) from error
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, ValueError, RuntimeError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: weights cannot be read ({reason}).") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise DataError(
            f"{file}: not a state dict. Save one with torch.save(model.state_dict(), path)."
        )
    return content
