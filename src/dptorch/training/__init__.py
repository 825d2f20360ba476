"""The main job: `dptorch train`. Data, recipes, models, the training run and its report.

data, readers   examples from a recipe or from files
images          fixed transforms of one image at a time
recipes         data, model and settings known to work together
models          what `--model` may name
canaries        made-up examples planted for a later audit
job             everything that determines a run
loop            the run itself: an ordinary training loop on the engine
run_folder      what a run leaves on disk
report          the page about it
"""

from dptorch.training.run_folder import load_model

__all__ = ["load_model"]
