"""Checkpoints in which each rank writes its own shards, by torch.distributed.checkpoint.

`PrivacyEngine.save_checkpoint` puts a sharded model together on one rank. Where that rank has no room
for it, these write a folder instead: the files of torch.distributed.checkpoint, of model and optimizer,
and `engine.pt`, with the plan, the counter of steps, the secret key and the digests of the other files.
A run goes on from it on any number of ranks, sharded or whole.

The digests find accidents. Whoever can write to the folder can write other digests too, and the file
`.metadata` is a pickle, which runs code when it is read: load no folder that a stranger could write to.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dptorch.distributed.zero import refuse_whole_checkpoint
from dptorch.engine import checkpoint
from dptorch.errors import ConfigurationError, DataError

if TYPE_CHECKING:
    from dptorch.engine.privacy_engine import PrivacyEngine

__all__ = ["load_shards", "save_shards"]

_ENGINE: Final = "engine.pt"


def save_shards(folder: str | Path, engine: PrivacyEngine, *, extra: Any = None) -> None:
    """Write a run to a folder that is whole or absent, each rank its shards. All ranks call it.

    It is written beside `folder` under another name, which is then changed. An earlier checkpoint in
    its place gets ".former" after its name at that moment, and is removed then. All ranks have to see
    the folder.

    Args:
        folder: it holds the key of the noise: keep it as safe as the data, and delete it when the
            run is done.
        engine: of the run, with its optimizer attached.
        extra: plain values of your own.

    Raises:
        ConfigurationError: no optimizer is attached, or DeepSpeed keeps its state.
        PrivacyError: a parameter is not finite.
        DataError: there is no folder to write in.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    final = Path(folder)
    partial = final.with_name(f"{final.name}.partial")
    with engine.ranks.together():
        state = _state_of(engine)
        checkpoint.refuse_not_finite(dict(engine.model.named_parameters()))
        if engine.ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            try:
                partial.mkdir(mode=0o700)
            except OSError as error:
                raise DataError(
                    f"{final}: no checkpoint can be written there ({error})."
                ) from error
    save(state, checkpoint_id=partial, no_dist=engine.ranks.size == 1)
    files = engine.ranks.from_first(_files(partial) if engine.ranks.is_first else [])
    with engine.ranks.together():
        mine = _digests(partial, files[engine.ranks.rank :: engine.ranks.size])
    digests = {name: digest for each in engine.ranks.gather(mine) for name, digest in each.items()}
    with engine.ranks.together():
        if engine.ranks.is_first:
            kept = {"engine": engine.state_dict(), "extra": extra, "digests": digests}
            checkpoint.write(partial / _ENGINE, kept)
            former = final.with_name(f"{final.name}.former")
            shutil.rmtree(former, ignore_errors=True)
            if final.exists():
                final.rename(former)
            partial.rename(final)
            shutil.rmtree(former, ignore_errors=True)


def load_shards(folder: str | Path, engine: PrivacyEngine) -> Any:
    """Go on with the run that `save_shards` wrote, on however many ranks; returns its `extra`.

    For a new engine with the same plan, on the same model, with the same optimizer attached, before its
    loader is made. All ranks call it.

    Raises:
        ConfigurationError: it belongs to another plan or model.
        DataError: a file of it is missing, damaged or no checkpoint. Nothing has changed then.
        PrivacyError: the engine's state has been edited.
    """
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    final = Path(folder)
    with engine.ranks.together():
        kept = checkpoint.read(final / _ENGINE)
        _refuse_damaged(final, kept.get("digests"), engine.ranks.rank, engine.ranks.size)
        state = _state_of(engine)
    engine.load_state_dict(kept["engine"])
    load(state, checkpoint_id=final, no_dist=engine.ranks.size == 1)
    optimizer: Any = engine._optimizer
    set_state_dict(
        engine.model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return kept["extra"]


def _files(folder: Path) -> list[str]:
    """The names of its files, but for that of the engine."""
    return sorted(file.name for file in folder.iterdir() if file.name != _ENGINE)


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Name -> SHA-256. Files may be larger than memory."""
    found = {}
    for name in names:
        with (folder / name).open("rb") as file:
            found[name] = checkpoint.digest_of(file, file.seek(0, 2))
    return found


def _refuse_damaged(folder: Path, digests: dict[str, str] | None, rank: int, size: int) -> None:
    """Raise DataError unless its files are those that were written; each rank reads some of them."""
    if digests is None:
        raise DataError(
            f"{folder / _ENGINE}: it has no digests of shards, so that it is not of a folder that "
            "save_shards wrote. A file of engine.save_checkpoint is read by engine.load_checkpoint."
        )
    missing = sorted(set(digests) - set(_files(folder)))
    if missing:
        raise DataError(f"{folder}: {missing[0]} is missing. Go on from an older checkpoint.")
    found = _digests(folder, sorted(digests)[rank::size])
    if damaged := sorted(name for name in found if found[name] != digests[name]):
        raise DataError(
            f"{folder}: the content of {damaged[0]} is not what was written (the digest differs): "
            "damaged or edited. Go on from an older checkpoint."
        )


def _state_of(engine: PrivacyEngine) -> dict[str, Any]:
    """The tensors of model and optimizer as this rank holds them, by name."""
    from torch.distributed.checkpoint.state_dict import get_state_dict

    refuse_whole_checkpoint(engine.model)
    if engine._optimizer is None:
        raise ConfigurationError(
            "no optimizer is attached: call engine.attach(optimizer) before saving, and before loading."
        )
    model, optimizer = get_state_dict(engine.model, engine._optimizer)
    return {"model": model, "optimizer": optimizer}
