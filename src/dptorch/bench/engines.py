"""Training engines under comparison. Each turns a workload into a repeatable step.

A step is forward, loss, backward, clipping, noise, an SGD step and zero_grad, on a fixed batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from dptorch.bench.workloads import Unavailable, Workload
from dptorch.errors import ConfigurationError

__all__ = ["NON_PRIVATE", "Engine", "Settings", "Step", "our_engines", "start", "versions"]

Step = Callable[[], None]
NON_PRIVATE = "non-private"
POSITIONS = "; transformers' position_ids are given for every example, which it needs"


@dataclass(frozen=True)
class Settings:
    """What all private engines are asked for."""

    noise_multiplier: float = 1.0
    max_grad_norm: float = 1.0
    lr: float = 1e-6


@dataclass(frozen=True)
class Engine:
    """One way to train.

    Args:
        name: ``family/mode``.
        what: what it is and what had to be done to run it, in words; printed below the results.
        attach: takes hold of the workload's model and returns its step.
        all_layer: whether it clips the whole gradient by ``min(1, C/norm)``, so that a loop over
            examples says what its gradient must be.
    """

    name: str
    what: str
    attach: Callable[[Workload, Settings], Step]
    all_layer: bool = True


def our_engines() -> list[Engine]:
    """The ordinary loop, dptorch, and the engines of installed packages."""
    from dptorch.clipping import STYLES
    from dptorch.tape.gradients.clipping_modes import MODES

    found = [Engine(NON_PRIVATE, "the same loop, nothing attached", _ordinary, all_layer=False)]
    for name, mode in MODES.items():
        what = f"clipping_mode={name!r}: {mode.source}"
        attach = _ours(name, "all-layer")
        found.append(Engine(f"dptorch/{name}", what, attach, name != NON_PRIVATE))
    for style in STYLES:
        if style != "all-layer":  # which all modes above are
            what = f"clipping_style={style!r}, clipping_mode='auto'"
            found.append(Engine(f"dptorch/{style}", what, _ours("auto", style), False))
    for name in ("hooks", "ghost", "functorch"):
        what = (
            f"Opacus with grad_sample_mode={name!r}; in-place modules made ordinary, recurrent ones "
            f"replaced by its own{POSITIONS}"
        )
        found.append(Engine(f"opacus/{name}", what, _opacus(name)))
    found.append(Engine("torch.func/vmap", "vmap(grad) of the whole model, then clipped", _vmap))
    return found


def start(engine: Engine, work: Workload, settings: Settings | None = None) -> Step:
    """Attach the engine and take one step.

    Raises:
        Unavailable: if it cannot be attached or cannot step; says why.
    """
    try:
        step = engine.attach(work, settings or Settings())
        step()
    except Unavailable:
        raise
    except ImportError as error:
        raise Unavailable(f"needs {error.name or error}") from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise Unavailable(f"{type(error).__name__}: {text[:160]}") from error
    return step


def versions() -> dict[str, str]:
    """Versions of what takes part, as far as it is installed."""
    found = {}
    for package in ("dptorch", "torch", "numpy", "opacus", "transformers", "peft"):
        try:
            found[package] = version(package)
        except ImportError:
            found[package] = "not installed"
    return found


def sgd(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of every engine."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=settings.lr)


def mean_loss_step(work: Workload, model: nn.Module, optimizer: Any) -> Step:
    """The loop everybody writes."""

    def step() -> None:
        work.losses(model, *work.inputs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ordinary(work: Workload, settings: Settings) -> Step:
    return mean_loss_step(work, work.model, sgd(work.model, settings))


def _ours(mode: str, style: str) -> Callable[[Workload, Settings], Step]:
    def attach(work: Workload, settings: Settings) -> Step:
        from dptorch.engine.privacy_engine import PrivacyEngine

        try:
            engine = PrivacyEngine(
                work.model,
                sample_rate=1.0,
                sample_size=work.batch_size,
                steps=10**9,
                noise_multiplier=settings.noise_multiplier,
                target_delta=1e-12,
                max_grad_norm=settings.max_grad_norm,
                clipping_mode=mode,
                clipping_style=style,
            )
        except ConfigurationError as error:
            raise Unavailable(str(error)) from error
        optimizer = engine.attach(sgd(work.model, settings))
        return mean_loss_step(work, work.model, optimizer)

    return attach


# -- Opacus ----------------------------------------------------------------------------------------


def give_positions(model: nn.Module) -> None:
    """Have a language model of transformers called with position_ids [B, T].

    It makes [1, T] of its own and broadcasts, which engines that hook modules cannot follow.
    """
    if getattr(model, "config", None) is None or not hasattr(model.config, "vocab_size"):
        return

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        B, T = kwargs["input_ids"].shape
        positions = torch.arange(T, device=kwargs["input_ids"].device)
        return args, kwargs | {"position_ids": positions.expand(B, T).contiguous()}

    model.register_forward_pre_hook(add, with_kwargs=True)


def _replace_recurrent(model: nn.Module) -> None:
    """Put Opacus's recurrent layers, on the memory of the same weights, in place of torch's."""
    from opacus.layers import DPGRU, DPLSTM

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = {nn.LSTM: DPLSTM, nn.GRU: DPGRU}.get(type(child))
            if kind is not None and isinstance(child, nn.RNNBase):
                sizes = child.input_size, child.hidden_size, child.num_layers
                made = kind(*sizes, batch_first=child.batch_first)
                own = child.state_dict()
                for weight, p in made.state_dict(keep_vars=True).items():
                    p.data = own[weight]
                setattr(parent, name, made)


class _PerExample:
    """A criterion that is given the losses."""

    reduction = "mean"

    def __call__(self, losses: Tensor) -> Tensor:
        return losses


def _opacus(mode: str) -> Callable[[Workload, Settings], Step]:
    def attach(work: Workload, settings: Settings) -> Step:
        from opacus import PrivacyEngine
        from torch.utils.data import DataLoader, TensorDataset

        give_positions(work.model)
        _replace_recurrent(work.model)
        for module in work.model.modules():
            if getattr(module, "inplace", False):
                setattr(module, "inplace", False)  # noqa: B010
        # Only its length is used: fixed batches, like every engine's.
        loader = DataLoader(TensorDataset(torch.zeros(work.batch_size)), work.batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, optimizer, *rest = PrivacyEngine().make_private(
                module=work.model,
                optimizer=sgd(work.model, settings),
                criterion=_PerExample(),
                data_loader=loader,
                noise_multiplier=settings.noise_multiplier,
                max_grad_norm=settings.max_grad_norm,
                poisson_sampling=False,
                grad_sample_mode=mode,
            )
        if mode != "ghost":
            return mean_loss_step(work, model, optimizer)
        criterion = rest[0]

        def step() -> None:
            criterion(work.losses(model, *work.inputs)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return attach


# -- torch.func ------------------------------------------------------------------------------------


class _Losses(nn.Module):
    """The workload as one module, which `functional_call` takes."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.model, self._losses = work.model, work.losses

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._losses(self.model, *inputs)


def _vmap(work: Workload, settings: Settings) -> Step:
    from torch.func import functional_call, grad, vmap

    module, optimizer = _Losses(work), sgd(work.model, settings)
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
        return functional_call(module, parameters, tuple(x[None] for x in example))[0]

    per_example = vmap(grad(loss), in_dims=(None, *[0] * len(work.inputs)), randomness="different")

    def step() -> None:
        gradients = per_example({n: p.detach() for n, p in trainable.items()}, *work.inputs)
        with torch.no_grad():
            squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
            norms = torch.stack(squares).sum(0).sqrt()
            factor = (settings.max_grad_norm / norms).clamp(max=1)
            for name, p in trainable.items():
                total = torch.tensordot(factor, gradients.pop(name), 1)
                std = settings.noise_multiplier * settings.max_grad_norm
                p.grad = total.add_(torch.randn_like(total), alpha=std).div_(work.batch_size)
        optimizer.step()
        optimizer.zero_grad()

    return step
