"""Checkpoints: all that a private run needs to go on, in one file that is whole or absent.

The file is what `torch.save` writes, and a last line with its SHA-256. It holds the root key of the
run, in the clear: whoever has the file can take the noise off every released model of the run. It is
therefore readable by its owner only (mode 0600), belongs where the training data is, and is never
part of what is published; a finished run does not need it any more.

What the checks are for: a file cut short or changed by accident fails its digest; an engine state
that was edited (a smaller noise multiplier, fewer steps done) fails its seal, which is a message
authentication code under the root key. What they are not for: someone who holds the file holds the
key, and can make another file that passes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import pickle
import random
from collections.abc import Mapping
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dptorch.atomic_files import replacing
from dptorch.distributed import Ranks
from dptorch.distributed.placement import Placement
from dptorch.distributed.sharded import local_part
from dptorch.distributed.zero import refuse_whole_checkpoint
from dptorch.errors import ConfigurationError, DataError, PrivacyError
from dptorch.randomness import RootKey

__all__ = ["File", "Stateful", "digest_of", "load_run", "read", "save_run", "seal", "unseal"]

_FORMAT: Final = 1
_TRAILER: Final = b"\ndptorch checkpoint, sha256 of the bytes before this line: "
_TRAILER_BYTES: Final = len(_TRAILER) + 64 + 1
_CHUNK: Final = 2**20


#: Where a checkpoint is: a path, or a file that is open for bytes (such as `io.BytesIO`).
File: TypeAlias = str | Path | BinaryIO


class Stateful(Protocol):
    """What a checkpoint can hold beside model and optimizer: a scheduler, an average of weights."""

    def state_dict(self) -> dict[str, Any]:
        """All that it needs to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there."""


# -- a run -----------------------------------------------------------------------------------------


class _Engine(Stateful, Protocol):
    model: nn.Module
    ranks: Ranks
    _placement: Placement


def save_run(
    path: File,
    engine: _Engine,
    optimizer: Optimizer | None,
    others: Mapping[str, Stateful],
    extra: Any,
) -> None:
    """See `PrivacyEngine.save_checkpoint`. The first rank writes. Where parameters are spread over
    ranks, all are needed to put them together."""
    from dptorch.distributed.full_state import gathered, is_spread

    refuse_whole_checkpoint(engine.model)
    spread = is_spread(engine.model)
    if not spread and not engine.ranks.is_first:
        return
    with engine.ranks.together() if spread else nullcontext():
        refuse_not_finite(dict(engine.model.named_parameters()))
    state = {
        "model": gathered(engine.model.state_dict()),
        "optimizer": None if optimizer is None else gathered(_optimizer_state(optimizer)),
        "engine": engine.state_dict(),
        "others": {name: other.state_dict() for name, other in others.items()},
        "random": _random_state(),
        "extra": extra,
    }
    with engine.ranks.together() if spread else nullcontext():
        if engine.ranks.is_first:
            write(path, state)


def load_run(
    path: File,
    engine: _Engine,
    optimizer: Optimizer | None,
    others: Mapping[str, Stateful],
) -> Any:
    """See `PrivacyEngine.load_checkpoint`."""
    from dptorch.distributed.full_state import shards_of_model, shards_of_optimizer

    refuse_whole_checkpoint(engine.model)
    with engine.ranks.together():
        state = read(path)
        # All that can be refused is refused before anything is changed.
        _refuse_other_model(engine.model, state["model"])
        _refuse_other_optimizer(optimizer, state["optimizer"])
        if set(others) != set(state["others"]):
            raise ConfigurationError(
                f"{path} was saved with {_names(state['others'])} and is loaded with "
                f"{_names(others)}: give load_checkpoint what save_checkpoint was given."
            )
    engine.load_state_dict(state["engine"])
    engine.model.load_state_dict(shards_of_model(engine.model, state["model"]))
    if optimizer is not None:
        optimizer.load_state_dict(shards_of_optimizer(optimizer, state["optimizer"]["state"]))
    for name, other in others.items():
        other.load_state_dict(state["others"][name])
    _set_random_state(state["random"])
    if rank := engine._placement.data_ranks.rank:  # or the dropout of all ranks would be alike
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
    return state["extra"]


def refuse_not_finite(parameters: Mapping[str, Tensor]) -> None:
    """Raise PrivacyError if a parameter holds NaN or infinity. (It is a function of noisy releases,
    so that looking at it costs nothing.)"""
    mine = (local_part(p) for p in parameters.values())
    values = [p for p in mine if p.numel() and p.is_floating_point()]
    largest = torch._foreach_norm(values, math.inf) if values else []
    if all(bool(x.isfinite()) for x in largest):
        return
    name = next(n for n, p in parameters.items() if not bool(local_part(p).isfinite().all()))
    raise PrivacyError(
        f"the model's parameter {name!r} holds NaN or infinity, so every example's gradient would "
        "be dropped and the step spent on noise alone. It was neither taken nor counted, and no "
        "checkpoint is replaced. Go back to the last checkpoint, with a lower learning rate or "
        "checked initial weights."
    )


def _names(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "nothing beside model and optimizer"


# -- the file --------------------------------------------------------------------------------------


def write(path: File, state: Mapping[str, Any]) -> None:
    """Replace the file by one that holds `state`, readable by its owner only.

    To a file that is open the bytes are written as they are; who may read it is its owner's care.

    Raises:
        ConfigurationError: `state` holds something other than tensors and plain values.
        DataError: the file cannot be written; what was there before is still there.
    """
    _refuse_objects(state, "checkpoint")
    if not isinstance(path, str | Path):
        held = BytesIO()
        torch.save({"format": _FORMAT, **state}, held)
        digest = hashlib.sha256(held.getbuffer()).hexdigest()
        path.write(held.getbuffer())
        path.write(_TRAILER + digest.encode() + b"\n")
        return
    try:
        with replacing(path, private=True) as partial:
            torch.save({"format": _FORMAT, **state}, partial)
            with partial.open("rb+") as file:
                digest = digest_of(file, partial.stat().st_size)
                file.write(_TRAILER + digest.encode() + b"\n")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        kept = " The checkpoint from before is kept." if Path(path).exists() else ""
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: the checkpoint could not be written ({reason}).{kept} Make room or choose "
            "another folder, and save again; the run itself is unharmed."
        ) from error


def read(path: File) -> dict[str, Any]:
    """What `write` wrote. Tensors and plain values only, so no code in the file can run.

    A file that is open is read to its end, and is then where it was.

    Raises:
        DataError: the file is missing, cut short, changed, of a newer version, or something else.
    """
    try:
        if isinstance(path, str | Path):
            with Path(path).open("rb") as file:
                state = _read(file, path)
        else:
            begin = path.tell()
            held = BytesIO(path.read())
            path.seek(begin)
            state = _read(held, "the file")
    except (OSError, RuntimeError, pickle.UnpicklingError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a readable checkpoint ({error})") from error
    if state.get("format") != _FORMAT:
        raise DataError(f"{path}: written by a newer dptorch (format {state.get('format')!r})")
    return state


def _read(file: BinaryIO, name: str | Path) -> dict[str, Any]:
    """The content of a file, if its digest is that of its bytes."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _TRAILER_BYTES))
    trailer = file.read()
    if not trailer.startswith(_TRAILER):
        raise DataError(
            f"{name}: not a readable checkpoint: cut short, changed, or not written by "
            "engine.save_checkpoint(). Go on from an older one."
        )
    if digest_of(file, size - _TRAILER_BYTES) != trailer[len(_TRAILER) : -1].decode():
        raise DataError(
            f"{name}: its content is not what was written (the digest differs): damaged or "
            "edited. Go on from an older checkpoint."
        )
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
    return state


def digest_of(file: BinaryIO, size: int) -> str:
    """Return the SHA-256 of the first `size` bytes, as hexadecimal digits."""
    found, left = hashlib.sha256(), size
    file.seek(0)
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        found.update(chunk)
        left -= len(chunk)
    return found.hexdigest()


def _refuse_objects(value: Any, where: str) -> None:
    """Only what `torch.load(weights_only=True)` reads back: found now, not when it is needed."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_objects(key, where)
            _refuse_objects(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple, set, torch.Size):
        for i, item in enumerate(value):
            _refuse_objects(item, f"{where}[{i}]")
    elif not (
        value is None
        or isinstance(value, Tensor)
        or type(value) in (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    ):
        raise ConfigurationError(
            f"{where} is a {type(value).__name__}, which cannot be loaded without running code "
            "from the file. Keep tensors, numbers, strings, lists and dicts in checkpoints."
        )


# -- the engine's state ----------------------------------------------------------------------------


def seal(values: Mapping[str, Any], key: RootKey) -> dict[str, Any]:
    """`values` (plain, as JSON has them) with the key, and a code that shows later edits."""
    return {**values, "key": key.export(), "seal": _code(values, key)}


def unseal(state: Mapping[str, Any]) -> tuple[dict[str, Any], RootKey]:
    """The values and the key of what `seal` returned.

    Raises:
        ConfigurationError: it is something else.
        PrivacyError: it has been edited.
    """
    if not isinstance(state, Mapping) or not {"key", "seal"} <= set(state):
        raise ConfigurationError(
            "this is not the state of an engine; pass what engine.state_dict() returned."
        )
    key = RootKey.restore(state["key"])
    values = {name: value for name, value in state.items() if name not in ("key", "seal")}
    if not isinstance(state["seal"], str) or not hmac.compare_digest(
        state["seal"], _code(values, key)
    ):
        raise PrivacyError(
            "the engine's state has been changed since it was saved (its seal does not fit): with "
            "another noise multiplier or another count of steps the stated epsilon would be wrong. "
            "Go on from a checkpoint as it was saved."
        )
    return values, key


def _code(values: Mapping[str, Any], key: RootKey) -> str:
    text = json.dumps(values, sort_keys=True).encode()
    return hmac.new(key.derive("seal of a checkpoint"), text, "sha256").hexdigest()


# -- what goes with it -----------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    """The state of the global generators, on which dropout and augmentation depend."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    _, numbers, position, *gauss = legacy
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (torch.from_numpy(numbers.astype(np.int64)), position, *gauss),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: Mapping[str, Any]) -> None:
    """Undo what was drawn since `_random_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    numbers, position, *gauss = state["numpy"]
    np.random.set_state(("MT19937", numbers.numpy().astype(np.uint32), position, *gauss))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def _refuse_other_model(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Raise ConfigurationError unless `saved` is a state of a model like this one."""
    mine = {n: _shape(v) for n, v in model.state_dict().items()}
    theirs = {n: _shape(v) for n, v in saved.items()}
    for name in dict.fromkeys([*mine, *theirs]):
        if mine.get(name) != theirs.get(name):
            raise ConfigurationError(
                f"the checkpoint belongs to another model: {name!r} is "
                f"{theirs.get(name, 'missing')} there and {mine.get(name, 'missing')} here. Build "
                "the model as it was when the checkpoint was saved."
            )


def refuse_other_parameters(mine: Mapping[str, list[int]], theirs: Mapping[str, list[int]]) -> None:
    """Raise ConfigurationError unless a state has trainable parameters of these names and shapes."""
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            raise ConfigurationError(
                f"the checkpoint was saved with other trainable parameters: {name!r} is "
                f"{theirs.get(name, 'not trained')} there and {mine.get(name, 'not trained')} here."
            )


def _shape(value: Any) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def _refuse_other_optimizer(optimizer: Optimizer | None, saved: Mapping[str, Any] | None) -> None:
    """Raise ConfigurationError unless `saved` is a state of an optimizer like this one."""
    mine = None if optimizer is None else _optimizer_state(optimizer)
    if mine is None or saved is None:
        if mine is not saved:
            raise ConfigurationError(
                "the checkpoint was saved "
                + ("without" if saved is None else "with")
                + " an attached optimizer: call engine.attach(optimizer) before saving, and before "
                "loading."
            )
        return
    for what, a, b in (
        ("class", saved["class"], mine["class"]),
        ("parameters in each group", _groups(saved["state"]), _groups(mine["state"])),
    ):
        if a != b:
            raise ConfigurationError(
                f"the checkpoint's optimizer is another one: {what} {a} there, {b} here."
            )


def _optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """State and class of an optimizer."""
    return {"class": type(optimizer).__name__, "state": optimizer.state_dict()}


def _groups(state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]
