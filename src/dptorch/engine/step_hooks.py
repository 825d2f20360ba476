"""Watch what hooks of an optimizer compute with the noisy gradients in its step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode

from dptorch.errors import PrivacyError
from dptorch.tape.provenance.calls import each_tensor, info
from dptorch.tape.recording.places import user_line
from dptorch.tape.recording.read_numbers import read_numbers
from dptorch.tape.recording.reads import is_trusted
from dptorch.tape.recording.tensor_states import batch_of

__all__ = ["RefuseValues"]


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
