"""What the scores are computed from: forward passes over a data set, in batches, on the device.

Shape legend: N examples, K classes, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from dptorch.audit.evidence import Array
from dptorch.errors import ConfigurationError, DataError
from dptorch.tape.recording.model_hooks import hooks_of

__all__ = [
    "TokenStatistics",
    "answer",
    "class_log_probabilities",
    "device_of",
    "evaluating",
    "labelled",
    "logits_of",
    "token_statistics",
    "tokenize",
    "with_progress",
]

Item = TypeVar("Item")
_LABELS = ("labels", "label", "y", "target")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no engine listening; every module's mode is restored."""
    # Of every module: parts of a model that trains may be in evaluation mode, as frozen ones are.
    modes = {module: module.training for module in model.modules()}
    hooks = hooks_of(model)
    model.eval()
    try:
        with hooks.paused() if hooks is not None else nullcontext():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def with_progress(items: Iterable[Item], wanted: bool, text: str) -> Iterable[Item]:
    """The items, with a bar on a terminal if `wanted`."""
    if not wanted:
        return items
    from rich.progress import track

    return track(items, description=text)


def labelled(data: Any) -> Dataset[Any]:
    """A data set of (input, label), from one or from a pair of tensors.

    Raises:
        DataError: it is empty, or something else.
    """
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], (int, str)):
        data = TensorDataset(torch.as_tensor(data[0]), torch.as_tensor(data[1]))
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise DataError(
            f"{type(data).__name__} is no data set of examples: expected one with __len__ and "
            "__getitem__ whose items are (input, label), or a pair of tensors (inputs, labels)."
        )
    if len(data) == 0:
        raise DataError("the data set is empty.")
    split_item(data[0])
    dataset: Dataset[Any] = data
    return dataset


def split_item(item: Any) -> tuple[Any, Any]:
    """(input, label) of an item: a pair, or a mapping with one of the usual names for the label.

    Raises:
        DataError: it is neither.
    """
    if isinstance(item, Mapping):
        for name in _LABELS:
            if name in item:
                return {k: v for k, v in item.items() if k != name}, item[name]
    elif isinstance(item, (tuple, list)) and len(item) == 2:
        return item[0], item[1]
    raise DataError(
        f"an example is {type(item).__name__}. Expected (input, label), or a mapping with one of "
        f"{', '.join(_LABELS)}. Without the true label there is no loss to look at."
    )


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned.

    Raises:
        ConfigurationError: there are none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise ConfigurationError(
            f"the model returned {type(output).__name__} without logits, so no loss can be computed. "
            "Pass a model whose output is a tensor of logits or has .logits, such as "
            "AutoModelForCausalLM or a classifier, but not a bare encoder."
        )
    return found


def class_log_probabilities(
    model: nn.Module, data: Any, *, batch_size: int = 256, progress: bool = False
) -> tuple[Array, Array]:
    """What a classifier says about each example.

    Args:
        model: returns logits [B, K].
        data: see `labelled`. Mappings are passed to the model by name.

    Returns:
        log probabilities, float64 [N, K], and labels, int64 [N].

    Example:
        >>> model = nn.Linear(3, 2)
        >>> log_p, y = class_log_probabilities(model, (torch.zeros(5, 3), torch.zeros(5).long()))
        >>> log_p.shape, y.tolist()
        ((5, 2), [0, 0, 0, 0, 0])
    """
    device = device_of(model)
    batches: DataLoader[Any] = DataLoader(labelled(data), batch_size=batch_size)
    found, labels = [], []
    with evaluating(model), torch.no_grad():
        for batch in with_progress(batches, progress, "Scoring"):
            x, y = split_item(batch)
            logits = answer(model, x, device)
            # In float32 the loss of an example that was learnt by heart rounds to 0.
            found.append(logits.double().log_softmax(-1).cpu())
            labels.append(torch.as_tensor(y).cpu())
    log_p, y_all = torch.cat(found), torch.cat(labels).long()
    if log_p.dim() != 2 or int(y_all.max()) >= log_p.shape[1] or int(y_all.min()) < 0:
        raise DataError(
            f"logits of shape {tuple(log_p.shape)} do not fit labels from {int(y_all.min())} to "
            f"{int(y_all.max())}."
        )
    return log_p.numpy(), y_all.numpy()


def answer(model: nn.Module, x: Any, device: torch.device) -> Tensor:
    """The logits of a batch of inputs; a mapping is passed by name."""
    if not isinstance(x, Mapping):
        return logits_of(model(x.to(device)))
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in x.items()}
    return logits_of(model(**moved))


# -- text ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """What a language model says about each next token of one text. All float64 [T - 1].

    Attributes:
        log_p: log probability of the token that comes.
        mean: expectation of the log probability under the model's own prediction: minus its entropy.
        std: standard deviation of the same.
        top: probability of the most likely token.
        margin: difference of the two highest log probabilities.
        top_entropy: entropy of the five most likely tokens among themselves.
        variance_p: standard deviation of the probabilities over the vocabulary.
    """

    log_p: Array
    mean: Array
    std: Array
    top: Array
    margin: Array
    top_entropy: Array
    variance_p: Array

    def __len__(self) -> int:
        return len(self.log_p)

    @property
    def loss(self) -> float:
        """Mean negative log likelihood of a token."""
        return -float(self.log_p.mean())


def tokenize(texts: Sequence[str], tokenizer: Any, *, max_length: int = 512) -> list[list[int]]:
    """Token ids of each text, cut to `max_length`.

    A text of a single token has no next token to predict; where the tokenizer has a token for the
    beginning (or the end) of a text, it is put first, and otherwise the text gives no statistics.
    """
    found = []
    start = getattr(tokenizer, "bos_token_id", None)
    if start is None:
        start = getattr(tokenizer, "eos_token_id", None)
    for text in texts:
        ids = list(tokenizer(text, truncation=True, max_length=max_length)["input_ids"])
        if len(ids) == 1 and start is not None and ids[0] != start:
            ids = [start, *ids]
        found.append([int(i) for i in ids])
    return found


def token_statistics(
    model: nn.Module,
    ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> list[TokenStatistics]:
    """Statistics of each text's next-token predictions.

    The prediction at position t is held against the token at t + 1; no text sees another, and padding
    is masked. Evaluation mode; the model is left as it was.

    Args:
        model: a causal language model: ``model(input_ids=..., attention_mask=...)`` gives logits
            [B, T, V].
        ids: the tokens of each text; at least two of each.

    Raises:
        DataError: a text of fewer than two tokens.
        ConfigurationError: the model returns no logits.
    """
    short = [i for i, row in enumerate(ids) if len(row) < 2]
    if short:
        raise DataError(
            f"text {short[0]} has {len(ids[short[0]])} tokens, but a next token needs at least two."
        )
    device = device_of(model)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
    starts = range(0, len(order), batch_size)
    found: dict[int, TokenStatistics] = {}
    with evaluating(model), torch.no_grad():
        for start in with_progress(starts, progress, "Reading texts"):
            chosen = order[start : start + batch_size]
            longest = len(ids[chosen[-1]])
            input_ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
            # Padding comes last, where no prediction of a causal
            # model looks, whether it heeds the mask or not.
            mask = torch.zeros_like(input_ids)
            for row, i in enumerate(chosen):
                input_ids[row, : len(ids[i])] = torch.tensor(ids[i])
                mask[row, : len(ids[i])] = 1
            output = model(input_ids=input_ids.to(device), attention_mask=mask.to(device))
            logits = logits_of(output)
            if logits.shape[:2] != input_ids.shape:
                raise ConfigurationError(
                    f"the model returned logits of shape {tuple(logits.shape)} for "
                    f"{tuple(input_ids.shape)} tokens: expected one prediction a token, as a causal "
                    "language model gives."
                )
            for row, i in enumerate(chosen):
                n = len(ids[i])
                found[i] = _statistics(logits[row, : n - 1], input_ids[row, 1:n].to(device))
    return [found[i] for i in range(len(ids))]


def _statistics(logits_TV: Tensor, target_T: Tensor) -> TokenStatistics:
    # Finite, so that a token that the model rules out adds 0 · log 0 = 0 to the expectations, not NaN.
    log_p_TV = logits_TV.float().log_softmax(-1).clamp_min(-1e6)
    p_TV = log_p_TV.exp()
    mean = (p_TV * log_p_TV).sum(-1)
    second = (p_TV * log_p_TV.square()).sum(-1)
    best = log_p_TV.topk(min(5, log_p_TV.shape[-1]), dim=-1).values
    among = best.log_softmax(-1)
    parts = (
        log_p_TV.gather(-1, target_T[:, None])[:, 0],
        mean,
        # The difference may round below 0 where one token is nearly certain.
        (second - mean.square()).clamp_min(0).sqrt(),
        best[:, 0].exp(),
        best[:, 0] - best[:, 1],
        -(among.exp() * among).sum(-1),
        p_TV.std(-1),
    )
    return TokenStatistics(*(part.double().cpu().numpy() for part in parts))
