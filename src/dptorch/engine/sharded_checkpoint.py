"""Checkpoints in which each rank writes its own shards, by torch.distributed.checkpoint.

`PrivacyEngine.save_checkpoint` puts a sharded model together on one rank. Where that rank has no room
for it, these write a folder instead: the files of torch.distributed.checkpoint, of model and optimizer,
and `engine.pt`, with the plan, the counter of steps and the secret key. A run goes on from it on any
number of ranks, sharded or whole.
"""

from __future__ import annotations

import shutil
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
    with engine.ranks.together():
        if engine.ranks.is_first:
            checkpoint.write(partial / _ENGINE, {"engine": engine.state_dict(), "extra": extra})
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
        DataError: it is missing, damaged or no checkpoint.
        PrivacyError: the engine's state has been edited.
    """
    from torch.distributed.checkpoint.state_dict import set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    final = Path(folder)
    with engine.ranks.together():
        kept = checkpoint.read(final / _ENGINE)
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
