"""Weights that training begins from: of a file or of another run, and what is known of their data."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, DataError
from dptorch.training.run_folder import RunFolder

__all__ = ["Origin", "load_weights", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """What a statement says of the weights that training began from.

    Attributes:
        weights: file, run or published model.
        data: what they were trained on, in words; None if nobody said.
        epsilon, delta: the guarantee that their maker states for that data; None without privacy.
        same_data: whether it is known to be the data of this run, so that the two guarantees add up.
        before: what the statement of the run that made them says of how they came about.
    """

    weights: str
    data: str | None = None
    epsilon: float | None = None
    delta: float | None = None
    same_data: bool = False
    before: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `run.json`."""
        return asdict(self)

    @property
    def note(self) -> str:
        """The same in a sentence, for the statement.

        Example:
            >>> Origin("vit.pt", "photos of the web").note[84:155]
            'without privacy. That data counts as public: nothing here protects it, '
        """
        return " ".join([self._own_note, *(f"Of those weights: {each}" for each in self.before)])

    @property
    def _own_note(self) -> str:
        data = self.data or "data that nobody named"
        began = f"training began from the weights of {self.weights}, which were trained on {data}"
        if self.epsilon is None:
            return (
                f"{began}, without privacy. That data counts as public: nothing here protects it, nor "
                "what of it is in this run's data too."
            )
        budget = f"({self.epsilon:g}, {self.delta:g})" if self.delta else f"{self.epsilon:g}"
        if self.same_data:
            return (
                f"{began} with {budget}-differential privacy: the same data as this run's. The two "
                "guarantees add up; dptorch ledger total says what both cost together."
            )
        return (
            f"{began} with {budget}-differential privacy, as their maker states. That guarantee is for "
            "that data; for what of it is in this run's data too, the two guarantees add up."
        )


def origin_of(
    path: str,
    data: str | None,
    epsilon: float | None,
    delta: float | None,
    own_data: str,
    *,
    protects: bool = True,
) -> Origin:
    """What is known of the weights at `path`.

    Args:
        path: a file, or the folder of a run.
        data, epsilon, delta: as the user says; of a run its own record says it.
        own_data: where the data of the run to come is.
        protects: whether that run is to be private.

    Raises:
        ConfigurationError: a δ without ε, or numbers for a run that has its own; or a run without
            privacy on the same data.
        DataError: the run has no statement.
    """
    if not Path(path).is_dir():
        if delta is not None and epsilon is None:
            raise ConfigurationError(f"init_delta={delta:g} without init_epsilon: give both.")
        return Origin(Path(path).name, data, epsilon, delta)
    if data is not None or epsilon is not None or delta is not None:
        raise ConfigurationError(
            f"init={path!r} is a run, whose statement says its data and its ε. Leave out init_data, "
            "init_epsilon and init_delta."
        )
    folder = RunFolder(Path(path))
    about = folder.read_json("run.json")
    if "statement" not in about:
        raise DataError(f"{path}: that run has neither finished nor been interrupted in order.")
    claims = about["statement"]
    private = claims["plan"]["noise_multiplier"] > 0 and claims["private_randomness"]
    same = _is_same_data(about, own_data)
    if same and protects and not private:
        raise ConfigurationError(
            f"init={path!r} was trained without privacy (or with noise from a known seed) on the data "
            "of this run, and nothing that follows would protect it. Begin with weights of other data, "
            "or with a private run."
        )
    return Origin(
        f"the run {folder.path.resolve().name}",
        about["data"]["source"],
        claims["epsilon"] if private else None,
        claims["delta"] if private else None,
        same_data=same,
        before=tuple(claims["notes"]),
    )


def _is_same_data(about: Mapping[str, Any], own_data: str) -> bool:
    """Whether a run or release is known to be on the data at `own_data`: by its path, or by the
    identity beside it that the ledger of both has."""
    from dptorch.ledger.dataset_id import beside, sidecar_of

    source = about["job"].get("data")
    if source is not None and Path(source).resolve() == Path(own_data).resolve():
        return True
    kept = about["statement"].get("ledger")
    path = Path(own_data).resolve()
    return kept is not None and sidecar_of(path).exists() and beside(path) == kept["dataset"]


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
