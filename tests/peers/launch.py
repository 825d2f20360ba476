"""Run a script of a peer as it stands, on this machine and without a network.

``python -m tests.peers.launch SCRIPT [ARGUMENTS]``. What the script cannot have here is given to it:
tiny files in the place of data sets, random weights in the place of published ones, the CPU where it
asks for a GPU that is not there.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import tests.oracles.torchvision_on_cpu  # noqa: F401  (before transformers)

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

    for kind in (datasets.MNIST, datasets.CIFAR10):

        def begin(
            self: Any, *args: Any, kind: Any = kind, made: Any = kind.__init__, **kw: Any
        ) -> None:
            kw.pop("root", None)
            made(self, str(root), *args[1:], **kw | {"download": False})

        kind.__init__ = begin  # type: ignore[method-assign]
    datasets.cifar.check_integrity = lambda path, md5=None: Path(path).is_file()

    import datasets as hub

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        rows = [line.split("\t") for line in (root / "sst2/train.tsv").read_text().splitlines()[1:]]
        texts = {"text": [r[0] for r in rows], "label": [int(r[1]) for r in rows]}
        return hub.DatasetDict({n: hub.Dataset.from_dict(texts) for n in ("train", "test")})

    hub.load_dataset = load


def random_weights() -> None:
    """Let published weights and vocabularies be small and random."""
    import timm
    import transformers

    made = timm.create_model
    timm.create_model = lambda name, pretrained=False, **kwargs: made(name, **kwargs)
    transformers.BertTokenizerFast.from_pretrained = classmethod(lambda cls, *a, **k: tokenizer())


def tokenizer() -> Any:
    """A tokenizer of the words in `data_files`, BERT's special tokens among them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    from tests.peers.data_files import WORDS

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    """Run the script with its arguments."""
    script = arguments[0]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        on_cpu()
    local_data(Path(os.environ[DATA]))
    random_weights()
    sys.argv = arguments
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
