"""Watch what decides a step beside the noisy gradients: hooks of the optimizer, and losses that a
scheduler of its learning rate follows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.overrides import TorchFunctionMode

from dptorch.errors import PrivacyError
from dptorch.tape.provenance.calls import each_tensor, info
from dptorch.tape.recording.places import user_line
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.reads import is_trusted
from dptorch.tape.recording.tensor_states import batch_of

__all__ = ["RefuseValues", "watch_schedulers"]

_plain_step = ReduceLROnPlateau.step


class RefuseValues(TorchFunctionMode):
    """Refuse ops inside that bring values of a batch, or numbers that were read from one, together with
    gradients or parameters, which are released.

    Numbers are known as `dptorch.tape.recording.read_numbers` knows them.

    Raises:
        PrivacyError: by such an op. The step is counted by then.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not info(func).passive:
            tensors = list(each_tensor(args, kwargs))
            private = [t for t in tensors if batch_of(t) is not None]
            number = next((v for v in (*args, *kwargs.values()) if read_numbers.owner_of(v)), None)
            if (
                len(private) < len(tensors)
                and (private or number is not None)
                and not is_trusted(())
            ):
                what = (
                    "values of the batch" if private else f"the number {number:.6g}, read from it,"
                )
                raise PrivacyError(
                    f"{user_line()}: a hook of the optimizer computes with {what} and with gradients "
                    "or parameters, which are released. No noise covers that. Use public numbers; if "
                    "it is only logged, do it inside dptorch.tape.trusted_reads()."
                )
        return func(*args, **kwargs)


def watch_schedulers() -> None:
    """Let ``ReduceLROnPlateau`` refuse what it is given of a private batch, for good."""
    ReduceLROnPlateau.step = _step  # type: ignore[method-assign]


@functools.wraps(_plain_step)
def _step(self: ReduceLROnPlateau, metrics: Any, *args: Any, **kwargs: Any) -> None:
    private = (
        batch_of(metrics) is not None
        if isinstance(metrics, Tensor)
        else read_numbers.owner_of(metrics) is not None
    )
    if private and hasattr(self.optimizer, "privacy_engine") and not is_trusted(()):
        raise PrivacyError(
            f"{user_line()}: ReduceLROnPlateau is given a value of the private batch, whose examples "
            "then decide the learning rate of all steps to come. No noise covers that. Give it the "
            "loss on public data, or take a schedule by the number of the step."
        )
    _plain_step(self, metrics, *args, **kwargs)
