"""Engines of other libraries that are not on the package index, from a checkout.

They were written for older versions of torch and transformers. What is changed to run them is stated
with the results. Their own code is not changed.
"""

from __future__ import annotations

import importlib
import io
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from torch import nn

from dptorch.bench.engines import (
    POSITIONS,
    Engine,
    Settings,
    Step,
    give_positions,
    mean_loss_step,
    sgd,
)
from dptorch.bench.workloads import Workload
from dptorch.errors import ConfigurationError, one_of
from dptorch.training.packages import hide_broken_torchvision

__all__ = ["PEERS", "peer_engines", "read_peers"]

#: The name on the command line, the package in the checkout by its names over the years.
PEERS = {
    "fastdp": ("fastDP",),
    "private-transformers": ("private_transformers",),
    "private-vision": ("private_vision", "private_CNN"),
}


def read_peers(values: list[str]) -> dict[str, Path]:
    """``NAME=PATH`` of the command line.

    Raises:
        ConfigurationError: for an unknown name, or a path without the package.
    """
    found = {}
    for value in values:
        name, _, path = value.partition("=")
        name = one_of("peer", name.lower().replace("_", "-"), PEERS)
        folder = Path(path).expanduser().resolve()
        if not path or not any((folder / package).is_dir() for package in PEERS[name]):
            raise ConfigurationError(
                f"--peer {value!r}: there is no folder {' or '.join(PEERS[name])} in "
                f"{path!r}. Give the folder of a checkout, as --peer {name}=PATH."
            )
        found[name] = folder
    return found


def peer_engines(checkouts: Mapping[str, Path]) -> list[Engine]:
    """The engines that the checkouts give."""
    found: list[Engine] = []
    if folder := checkouts.get("fastdp"):
        what = f"fastDP, clipping_fn='Abadi'{_OLD_FORWARD}{POSITIONS}"
        found += [
            Engine("fastdp/MixOpt", what, _fastdp(folder)),
            Engine("fastdp/MixOpt-origin", f"{what}; origin_params", _fastdp(folder, origin=True)),
            Engine("fastdp/layer-wise", what, _fastdp(folder, style="layer-wise"), False),
        ]
    if folder := checkouts.get("private-transformers"):
        what = "private-transformers, clipping_mode='ghost', without statistics of its own"
        what += f"; ml_swissknife replaced by the two functions it uses{_OLD_FORWARD}{POSITIONS}"
        found.append(Engine("private-transformers/ghost", what, _private_transformers(folder)))
    if folder := checkouts.get("private-vision"):
        what = f"private_vision, mixed ghost clipping, without statistics of its own{POSITIONS}"
        found.append(Engine("private-vision/mixed", what, _private_vision(folder)))
    return found


_OLD_FORWARD = (
    "; its replacements of transformers' forward methods are off, they fit older versions"
)


def _package(folder: Path, name: str) -> Any:
    """Import a package from a checkout, without what it prints."""
    if name not in sys.modules:
        hide_broken_torchvision()
        sys.path.insert(0, str(folder))
        try:
            importlib.import_module(name)
        finally:
            sys.path.remove(str(folder))
    return sys.modules[name]


@contextmanager
def _quiet() -> Iterator[None]:
    with redirect_stdout(io.StringIO()):
        yield


def _common(work: Workload, settings: Settings) -> dict[str, Any]:
    return dict(
        batch_size=work.batch_size,
        sample_size=work.batch_size,
        epochs=10**6,
        noise_multiplier=settings.noise_multiplier,
        max_grad_norm=settings.max_grad_norm,
        record_snr=False,
    )


def _fastdp(
    folder: Path, *, style: str = "all-layer", origin: bool = False
) -> Callable[[Workload, Settings], Step]:
    def attach(work: Workload, settings: Settings) -> Step:
        with _quiet():
            package = _package(folder, "fastDP")
            package.privacy_engine.transformers_support.forward_swapper = lambda module: None
            give_positions(work.model)
            optimizer = sgd(work.model, settings)
            engine = package.PrivacyEngine(
                work.model,
                **_common(work, settings),
                clipping_mode="MixOpt",
                clipping_fn="Abadi",
                clipping_style=style,
                origin_params=_origin(work.model) if origin else None,
            )
            engine.attach(optimizer)
        return _silent(mean_loss_step(work, work.model, optimizer))

    return attach


def _origin(model: nn.Module) -> list[str]:
    """Where the graph must start for all layers to be reached: embeddings, or the first bias."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, _LAYERS)]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    embeddings = [f"{n}.weight" for n, m in layers if isinstance(m, nn.Embedding)]
    first = [f"{n}.{part}" for n, _ in layers for part in ("bias", "weight")]
    return [n for n in embeddings if n in trainable] or [n for n in first if n in trainable][:1]


_LAYERS = (nn.Linear, nn.Conv2d, nn.Embedding)


def _private_transformers(folder: Path) -> Callable[[Workload, Settings], Step]:
    def attach(work: Workload, settings: Settings) -> Step:
        sys.modules.setdefault("ml_swissknife", _swissknife())
        with _quiet():
            package = _package(folder, "private_transformers")
            package.privacy_engine.transformers_support.forward_swapper = lambda module: None
            give_positions(work.model)
            optimizer = sgd(work.model, settings)
            engine = package.PrivacyEngine(
                work.model, **_common(work, settings), clipping_mode="ghost", skip_checks=True
            )
            engine.attach(optimizer)
        return _silent(_loss_to_step(work, optimizer))

    return attach


def _swissknife() -> Any:
    """Stands in for a package that pins old versions of much else; two names of it are used."""

    class ContainerMeta(type):
        def all(cls) -> list[str]:
            return [v for k, v in vars(cls).items() if not k.startswith("_")]

    utils: Any = types.ModuleType("ml_swissknife.utils")
    utils.ContainerMeta = ContainerMeta
    utils.handle_unused_kwargs = lambda unused, msg=None: None
    package: Any = types.ModuleType("ml_swissknife")
    package.utils = utils
    return package


def _private_vision(folder: Path) -> Callable[[Workload, Settings], Step]:
    def attach(work: Workload, settings: Settings) -> Step:
        with _quiet():
            names = [name for name in PEERS["private-vision"] if (folder / name).is_dir()]
            package = _package(folder, names[0])
            give_positions(work.model)
            optimizer = sgd(work.model, settings)
            engine = package.PrivacyEngine(
                work.model, **_common(work, settings), ghost_clipping=True, mixed=True
            )
            engine.attach(optimizer)
        return _silent(_loss_to_step(work, optimizer))

    return attach


def _loss_to_step(work: Workload, optimizer: Any) -> Step:
    """Both backwards happen in the optimizer's step, which takes the losses."""

    def step() -> None:
        optimizer.step(loss=work.per_example())
        optimizer.zero_grad()

    return step


def _silent(step: Step) -> Step:
    """Without what the first steps print."""

    def quiet() -> None:
        with _quiet():
            step()

    return quiet
