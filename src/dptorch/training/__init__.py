"""The main job: `dptorch train`. Data, recipes, models, the training run and its report.

data, readers   examples from a recipe or from files; table_data from tables
images          fixed transforms of one image at a time
hyperparameters what recipes and own data are trained with
recipes         data, model and settings known to work together
models          what `--model` may name
canaries        made-up examples planted for a later audit
predictor       a run's model with its preprocessing; digest, preparation
job             everything that determines a run
loop            the run itself: an ordinary training loop on the engine
selection       the best of several runs, paid for
run_folder      what a run leaves on disk
report          the page about it
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from dptorch.training.run_folder import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> _Any:
    """Import `load_model` when it is asked for: the command line needs settings, and no torch."""
    if name == "load_model":
        from dptorch.training.run_folder import load_model

        return load_model
    raise AttributeError(f"module 'dptorch.training' has no attribute {name!r}")
