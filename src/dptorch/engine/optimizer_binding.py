"""Binding to a torch optimizer: its step applies noisy gradients only.

`step`, `zero_grad` and `virtual_step` of one optimizer object are replaced; `restore` puts them
back. Learning-rate schedulers and anything else that calls ``optimizer.step`` keep working.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch.optim import LBFGS, Optimizer, SparseAdam

from dptorch.distributed.sharded import local_part
from dptorch.distributed.zero import held_by, not_stepped
from dptorch.errors import BudgetExhausted, ConfigurationError
from dptorch.noise.noisy_gradient import NoisyGradient

__all__ = ["OptimizerBinding", "check_parameters", "write_gradients"]

Closure = Callable[[], Any]

# torch.amp.GradScaler hands its scale to optimizers that have this, and asserts on gradients of others.
_SCALES = "_step_supports_amp_scaling"
_NO_SCALER = (
    "torch.amp.GradScaler multiplies the loss by a number that it changes, and skips steps by looking "
    "at exact gradients. Under privacy an example whose gradient is not finite is left out by itself. "
    "Make it with GradScaler(enabled=False), or leave it out, and use torch.autocast with "
    "dtype=torch.bfloat16, which needs no scale. The step was neither taken nor counted."
)


class OptimizerBinding:
    """Replaces the methods of `optimizer` until `restore`.

    Args:
        optimizer: any torch.optim optimizer.
        take_step: called when a step is due, after the closure ran; fills ``.grad`` with noisy
            gradients and returns True, or returns False if the logical batch is not complete.
        add_pending: called by ``virtual_step``.
        drop_pending: called by ``zero_grad``.
        owner: becomes ``optimizer.privacy_engine``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        take_step: Callable[[], bool],
        add_pending: Callable[[], None],
        drop_pending: Callable[[], None],
        owner: Any,
    ) -> None:
        if getattr(optimizer, "privacy_engine", None) is not None:
            raise ConfigurationError(
                "this optimizer already has a privacy engine. Call engine.detach() on it first, or "
                "make a new optimizer."
            )
        if isinstance(optimizer, SparseAdam):
            raise ConfigurationError(
                "SparseAdam takes sparse gradients, and a private gradient has noise in every row, "
                "those of the examples that were not drawn too. Use torch.optim.Adam."
            )
        self.optimizer = optimizer
        self._take_step = take_step
        self._drop_pending = drop_pending
        self._attached = True
        self._step = optimizer.step
        self._zero_grad = optimizer.zero_grad
        self._own = {n: optimizer.__dict__.get(n) for n in ("step", "zero_grad", _SCALES)}

        # Learning-rate schedulers take the function out of the method and bind it to the optimizer
        # again, so it must be a method of the optimizer and not of this object.
        def step(_: Optimizer, closure: Closure | None = None, **others: Any) -> Any:
            if others:
                raise ConfigurationError(
                    f"step({', '.join(f'{name}=' for name in others)}): a step may look at gradients "
                    "alone, and at no loss, which no noise covers. Call step() without them, or use an "
                    "optimizer that goes by .grad alone."
                )
            return self._private_step(closure)

        # The mark by which a scheduler made before knows that its own wrapper is still called.
        step.__dict__.update(getattr(self._step, "__func__", self._step).__dict__)
        self._methods = {
            "step": types.MethodType(step, optimizer),
            "zero_grad": self._private_zero_grad,
        }
        for name, method in self._methods.items():
            setattr(optimizer, name, method)
        setattr(optimizer, _SCALES, True)
        optimizer.virtual_step = add_pending  # type: ignore[attr-defined]
        optimizer.privacy_engine = owner  # type: ignore[attr-defined]
        from dptorch.engine.step_hooks import watch_schedulers

        watch_schedulers()

    def _private_step(self, closure: Closure | None = None) -> Any:
        if not self._attached:  # a scheduler wrapped this method and still calls it
            return self._step() if closure is None else self._step(closure)
        if _only_makes_state(self.optimizer):
            return self._step()
        if hasattr(self.optimizer, "grad_scale"):
            raise ConfigurationError(_NO_SCALER)
        if isinstance(self.optimizer, LBFGS):
            return self._lbfgs_step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._take_step():
            with _watched() if has_hooks(self.optimizer) else nullcontext():
                try:
                    self._step()
                except TypeError as error:
                    if closure is not None and "'NoneType' object is not callable" in str(error):
                        raise ConfigurationError(
                            f"{type(self.optimizer).__name__} calls its closure inside step(), which "
                            "looks at the private batch again, or at its exact loss. The closure is "
                            "run once, before the step. Use an optimizer that goes by .grad alone."
                        ) from error
                    raise
        else:
            not_stepped(self.optimizer)
        return _plain(loss)

    def _lbfgs_step(self, closure: Closure | None) -> Any:
        if closure is None:
            raise ConfigurationError("LBFGS needs a closure: optimizer.step(closure).")
        if any(group["line_search_fn"] is not None for group in self.optimizer.param_groups):
            raise ConfigurationError(
                "LBFGS with a line search chooses its step by comparing exact losses of private "
                "data, which no noise covers. Use line_search_fn=None."
            )
        losses: list[Any] = []

        def private_closure() -> float:
            losses.append(closure())
            try:
                self._take_step()  # each evaluation is a release of its own, and is accounted as a step
            except BudgetExhausted as error:
                calls = self.optimizer.param_groups[0]["max_eval"]
                raise BudgetExhausted(
                    f"{error} One step() of LBFGS evaluates its closure up to max_eval={calls} times, "
                    "and each is a step of the plan: pass max_iter=1, or plan more steps."
                ) from None
            # LBFGS would stop on the change of an exact loss. NaN compares false with everything.
            return float("nan")

        self._step(private_closure)
        return _plain(losses[0]) if losses else None

    def _private_zero_grad(self, set_to_none: bool = True) -> None:
        if self._attached:
            self._drop_pending()
        self._zero_grad(set_to_none)

    def restore(self) -> None:
        """Give the optimizer its own methods back."""
        self._attached = False
        for name, method in self._methods.items():
            # Where something has wrapped our method since, it stays and passes through.
            if self.optimizer.__dict__.get(name) is method:
                del self.optimizer.__dict__[name]
                if self._own[name] is not None:
                    setattr(self.optimizer, name, self._own[name])
        for name in ("virtual_step", "privacy_engine", _SCALES):
            self.optimizer.__dict__.pop(name, None)
        if self._own[_SCALES] is not None:
            setattr(self.optimizer, _SCALES, self._own[_SCALES])


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether code of the user's own runs inside the optimizer's step."""
    # DeepSpeed's is no optimizer of torch, and holds one.
    inner = optimizer if isinstance(optimizer, Optimizer) else getattr(optimizer, "optimizer", None)
    return bool(
        getattr(inner, "_optimizer_step_pre_hooks", None)
        or getattr(inner, "_optimizer_step_post_hooks", None)
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def _watched() -> AbstractContextManager[Any]:
    from dptorch.engine.step_hooks import RefuseValues

    return RefuseValues()


def _only_makes_state(optimizer: Optimizer) -> bool:
    """Whether this step is torch.distributed.checkpoint's, on zeros, for the state it will load."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(12):  # wrappers of schedulers and of accelerate are between
        if frame is None or frame.f_code.co_name == "_init_optim_state":
            break
        frame = frame.f_back
    else:
        return False
    held = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return frame is not None and not any(g is not None and local_part(g).any() for g in held)


def _plain(loss: Any) -> Any:
    """Return a loss as an ordinary tensor, without the recording that it was followed by."""
    if not isinstance(loss, Tensor):
        return loss
    with torch._C.DisableTorchFunction():  # a followed tensor stays one through detach()
        return loss.detach()


def write_gradients(
    parameters: dict[str, Tensor],
    noisy: NoisyGradient,
    hand_over: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Hand a noisy gradient to the optimizer, parameter by parameter: as `Placement.hand_over`, which
    nothing else calls.

    Raises:
        TypeError: `noisy` is anything but a `NoisyGradient`, whose noise nobody vouches for.
    """
    if not isinstance(noisy, NoisyGradient):
        raise TypeError(
            f"an optimizer steps on a NoisyGradient, not on a {type(noisy).__name__}: without noise "
            "it would release the data. A mechanism's privatize() returns one"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            hand_over(name, p, noisy.values[name])


def check_parameters(model_parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Model and optimizer must hold the same trainable parameters.

    Raises:
        ConfigurationError: naming a parameter that only one of them has.
    """
    mine = {id(p): name for name, p in model_parameters.items()}
    seen: set[int] = set()
    for i, group in enumerate(held_by(optimizer)):
        for j, p in enumerate(group):
            seen.add(id(p))
            if not p.requires_grad and p.grad is not None:
                raise ConfigurationError(
                    f"parameter {j} of the optimizer's group {i}, of shape {tuple(p.shape)}, is frozen "
                    "but holds a gradient from before, which the optimizer would step on as it is, "
                    "without noise. Set its .grad to None, or leave it out of the optimizer."
                )
            if p.requires_grad and id(p) not in mine:
                raise ConfigurationError(
                    f"parameter {j} of the optimizer's group {i}, of shape {tuple(p.shape)}, is not "
                    "a trainable parameter of the model: it would be stepped without privacy, or "
                    "not at all. Build the optimizer from model.parameters() after any change to "
                    "the model."
                )
    missing = [name for key, name in mine.items() if key not in seen]
    if missing:
        raise ConfigurationError(
            f"the model's trainable parameter '{missing[0]}' "
            + (f"and {len(missing) - 1} more are" if len(missing) > 1 else "is")
            + " not in the optimizer: its gradient would be clipped with the others and never "
            "used. Add it, or freeze it with requires_grad_(False) before making the engine."
        )
