"""Run a script of a peer as it stands, on this machine and without a network.

``python -m tests.peers.launch SCRIPT [ARGUMENTS]``, or ``-m FOLDER MODULE [ARGUMENTS]``. What the
script cannot have here is given to it: tiny files in the place of data sets, random weights in the
place of published ones, the CPU where it asks for a GPU that is not there, and names that libraries
have removed. dptorch's keys are the same in every run, so that what comes of it can be seen again.
"""

from __future__ import annotations

import os
import random
import runpy
import shutil
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.oracles.torchvision_on_cpu  # noqa: F401  (before transformers)
from tests.peers.former_names import add_former_names, add_names_of_transformers
from tests.peers.small_models import random_timm_weights, random_vision_weights, random_weights

#: The environment variable with the folder of `data_files.write_all`.
DATA = "PEERS_DATA"


def on_cpu() -> None:
    """Let whatever asks for a GPU have the CPU."""

    def plain(given: Any) -> Any:
        named = isinstance(given, str | torch.device) and str(given).startswith("cuda")
        return torch.device("cpu") if named else given

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: call(
            self, *map(plain, args), **{name: plain(value) for name, value in kwargs.items()}
        )

    for kind in (torch.Tensor, torch.nn.Module):
        kind.to = wrap(kind.to)  # type: ignore[method-assign]
        kind.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.synchronize = lambda *args: None


def local_data(root: Path) -> None:
    """Let data sets of torchvision and of the Hub be the files below `root`."""
    from torchvision import datasets

    for kind in (datasets.MNIST, datasets.CIFAR10, datasets.CelebA):

        def begin(
            self: Any, *args: Any, kind: Any = kind, made: Any = kind.__init__, **kw: Any
        ) -> None:
            kw.pop("root", None)
            made(self, str(root), *args[1:], **kw | {"download": False})

        kind.__init__ = begin  # type: ignore[method-assign]
    urllib.request.urlretrieve = lambda address, name: shutil.copy(
        root / "archives" / Path(address).name, name
    )
    datasets.CelebA._check_integrity = lambda self: True  # type: ignore[method-assign]
    datasets.cifar.check_integrity = lambda path, md5=None: Path(path).is_file()


def local_hub(root: Path) -> None:
    """Let data sets of the Hub be the texts of SST-2 below `root`."""
    import datasets as hub

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        rows = [line.split("\t") for line in (root / "sst2/train.tsv").read_text().splitlines()[1:]]
        texts = {"text": [r[0] for r in rows], "label": [int(r[1]) for r in rows]}
        return hub.DatasetDict({n: hub.Dataset.from_dict(texts) for n in ("train", "test")})

    hub.load_dataset = load


def no_workers() -> None:
    """Let loaders load in their own process: workers die in forks of a server, and data are tiny."""
    loader: Any = torch.utils.data.DataLoader
    made = loader.__init__

    def begin(self: Any, *args: Any, num_workers: int = 0, **settings: Any) -> None:
        made(self, *args, **settings)

    loader.__init__ = begin


def known_keys() -> None:
    """Let the root keys of one process be those of the next, each of them another."""
    drawn = random.Random(0)
    from dptorch.randomness import KEY_BYTES, KeySource, RootKey

    RootKey.from_os = classmethod(  # type: ignore[method-assign, assignment]
        lambda cls: cls(drawn.randbytes(KEY_BYTES), KeySource.OS)
    )


def prepare(source: str = "timm transformers") -> None:
    """Give scripts and tests what they cannot have here.

    Args:
        source: the script; libraries that it does not name are not looked at, as importing them takes
            long.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        on_cpu()
    known_keys()
    no_workers()
    local_data(Path(os.environ[DATA]))
    random_vision_weights()
    add_former_names()
    if "timm" in source:
        random_timm_weights()
    if "transformers" in source:
        local_hub(Path(os.environ[DATA]))
        random_weights()
        add_names_of_transformers()


def main(arguments: list[str]) -> None:
    """Run the script, or the module ``-m NAME`` below the folder that is given, with its arguments."""
    if arguments[0] == "-m":
        folder, module, *rest = arguments[1:]
        prepare(Path(folder, *module.split(".")).with_suffix(".py").read_text())
        sys.argv = [module, *rest]
        sys.path.insert(0, folder)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    prepare(Path(arguments[0]).read_text())
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
