"""`BatchMemoryManager`: split large logical batches into small physical ones."""

from __future__ import annotations

from types import TracebackType

from torch.optim import Optimizer

from dptorch.compat.arguments import known_arguments
from dptorch.compat.opacus.data_loader import DPDataLoader
from dptorch.errors import ConfigurationError

__all__ = ["BatchMemoryManager", "wrap_data_loader"]


class BatchMemoryManager:
    """Within its ``with``, at most `max_physical_batch_size` examples go through the model at once.

    ``optimizer.step()`` waits for the last part of a logical batch; the guarantee is the same. A loop
    that is left within a logical batch leaves nothing behind: the batch is dropped and drawn again.

    Args:
        data_loader: what ``make_private`` returned.
        max_physical_batch_size: most examples at once.
        optimizer: what ``make_private`` returned.

    Raises:
        ConfigurationError: for another loader or optimizer.
    """

    @known_arguments
    def __init__(
        self, *, data_loader: DPDataLoader, max_physical_batch_size: int, optimizer: Optimizer
    ) -> None:
        self._loader = wrap_data_loader(
            data_loader=data_loader, max_batch_size=max_physical_batch_size, optimizer=optimizer
        )

    def __enter__(self) -> DPDataLoader:
        return self._loader

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


@known_arguments
def wrap_data_loader(
    *, data_loader: DPDataLoader, max_batch_size: int, optimizer: Optimizer
) -> DPDataLoader:
    """The loader in parts of at most `max_batch_size`; see `BatchMemoryManager`."""
    if not isinstance(data_loader, DPDataLoader):
        raise ConfigurationError(
            f"data_loader={type(data_loader).__name__}: give the loader that make_private returned. "
            "The batches of another loader cannot be told apart from parts of batches."
        )
    if getattr(optimizer, "privacy_engine", None) is None:
        raise ConfigurationError(
            "the optimizer has no privacy engine: give the one that make_private returned."
        )
    return data_loader.in_parts(max_batch_size)
