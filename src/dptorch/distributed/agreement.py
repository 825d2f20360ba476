"""What ranks must have in common, in a few bytes: their model's shapes, and their data."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from dptorch.distributed.zero3 import is_partitioned, whole_shape
from dptorch.randomness import RootKey

__all__ = [
    "SAME_DATA",
    "digest_of_examples",
    "digest_of_parameters",
    "digest_of_values",
    "places_of_key",
    "shapes",
]

#: What the statement of a run on several ranks assumes.
SAME_DATA: Final = (
    "all processes have the same data set in the same order: compared are the number of examples and, "
    "at each loader, 13 of them and 64 that the secret key chooses (all of a TensorDataset of up to 64 "
    "MB, all indices of a Subset)"
)

_LOOKED_AT: Final = 13  # examples of the data set
_CHOSEN: Final = 64  # more of them, by the key
_SMALL: Final = 64 << 20  # bytes of a data set in tensors, of which all is looked at
_WORDS: Final = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_NO_VALUE: Final = "differs each time that it is read"


def shapes(parameters: Mapping[str, Tensor]) -> str:
    """Return names, types and shapes of parameters in words.

    Example:
        >>> shapes({"weight": torch.zeros(2, 3)})
        'weight float32 [2, 3]'
    """
    return "; ".join(
        f"{name} {str(p.dtype).removeprefix('torch.')} {list(whole_shape(p))}"
        for name, p in parameters.items()
    )


def digest_of_parameters(parameters: Mapping[str, Tensor]) -> str:
    """Return a sum of all bits of the parameters' values, by exact integer arithmetic; without those
    that are spread over ranks."""
    total = 0
    for p in parameters.values():
        words = _WORDS.get(p.element_size())
        if type(p.data).__name__ == "DTensor" or is_partitioned(p):
            continue  # each rank has a shard of its own
        if words is not None and p.numel():
            total += int(p.detach().contiguous().view(words).sum(dtype=torch.int64))
    return f"{total % 2**64:016x}"


def places_of_key(key: RootKey, step: int, size: int) -> list[int]:
    """Return places in a data set of `size` examples, chosen by the key: others at each step."""
    if not size:
        return []
    drawn = (key.derive("places that ranks compare", step, i) for i in range(_CHOSEN))
    return [int.from_bytes(each[:8], "little") % size for each in drawn]


def digest_of_examples(dataset: Any, also: Iterable[int] = ()) -> str:
    """Return a hash of some examples of a data set, first and last among them; of all of a small one
    that is in tensors, and of the indices of a subset.

    Args:
        dataset: of map style.
        also: places of further examples to look at.

    They are read under a fixed state of the global random generators, which is put back. An example
    that is another each time even so (an augmentation with a generator of its own) is left out.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(20.0))
        >>> turned = torch.utils.data.TensorDataset(torch.arange(20.0).flip(0))
        >>> digest_of_examples(data) == digest_of_examples(turned)
        False
    """
    size = len(dataset)
    whole = hashlib.sha256()
    if isinstance(dataset, Subset):
        _add(np.asarray(dataset.indices), whole)
    if isinstance(dataset, TensorDataset) and sum(t.nbytes for t in dataset.tensors) <= _SMALL:
        _add(list(dataset.tensors), whole)
        return whole.hexdigest()[:16]
    places = sorted({i * (size - 1) // max(1, _LOOKED_AT - 1) for i in range(_LOOKED_AT)} | {*also})
    for i in places:
        once, again = _read(dataset, i), _read(dataset, i)
        whole.update((once if once == again else _NO_VALUE).encode())
    return whole.hexdigest()[:16]


def _read(dataset: Any, index: int) -> str:
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # those of other devices are not put back
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            return digest_of_values(dataset[index])
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def digest_of_values(value: Any) -> str:
    """Return a hash of tensors, arrays, numbers and texts, in whatever containers they are.

    Of an object of another kind, only its type and what it offers as an array count.
    """
    found = hashlib.sha256()
    _add(value, found)
    return found.hexdigest()


def _add(value: Any, found: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _add(key, found)
            _add(item, found)
        return
    if isinstance(value, list | tuple):
        found.update(f"{len(value)} items".encode())
        for item in value:
            _add(item, found)
        return
    if isinstance(value, bytes):
        found.update(value)
        return
    if value is None or isinstance(value, str | bool | int | float | complex):
        found.update(f"{type(value).__name__} {value!r};".encode())
        return
    try:  # tensors, arrays, images
        array = value.detach().cpu().float().numpy() if isinstance(value, Tensor) else value
        array = np.ascontiguousarray(array)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0)
    if array.dtype == object:
        if array.size > 1:
            _add(array.tolist(), found)
        array = np.empty(0)
    found.update(f"{type(value).__name__} {array.dtype} {array.shape};".encode())
    found.update(array.tobytes())
