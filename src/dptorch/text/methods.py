"""What is trained of a pretrained model: everything, adapters, biases, the last layer or a prefix."""

from __future__ import annotations

from typing import Any, Final

from torch import nn

from dptorch.errors import ConfigurationError, one_of
from dptorch.text.pooling import PooledClassifier

__all__ = ["METHODS", "apply_method", "head_parameters"]

#: Name, and what it trains. The head of a classifier is new, and is trained by every method.
METHODS: Final = {
    "full": "all parameters",
    "lora": "low-rank adapters of every linear layer (Hu et al. 2021)",
    "ffa-lora": "LoRA with its first factor frozen, which noise disturbs less (Sun et al. 2024)",
    "bias-only": "biases (BiTFiT: Bu et al. 2022)",
    "last-layer": "the output layer alone",
    "prefix": "vectors put before every layer's keys and values (Li and Liang 2021)",
}


def apply_method(
    model: Any, method: str, kind: str, *, rank: int = 8, prefix_length: int = 10
) -> Any:
    """Return the model with what `method` trains trainable, and all else frozen.

    Args:
        model: a pretrained model of transformers.
        method: a name in `METHODS`.
        kind: "classifier", with a new head, which is trained too; "body", whose head is elsewhere;
            "masked" or "causal", which predict words.
        rank: of LoRA.
        prefix_length: number of vectors of a prefix.

    Raises:
        ConfigurationError: unknown method, or a model without what it trains.
    """
    one_of("method", method, METHODS)
    if rank < 1 or prefix_length < 1:
        raise ConfigurationError(
            f"lora_rank={rank}, prefix_length={prefix_length}: expected 1 or more."
        )
    if method == "full":
        return model
    if method in ("lora", "ffa-lora", "prefix"):
        return _adapted(model, method, kind, rank, prefix_length)
    classifier = kind == "classifier"
    head = (
        set() if kind == "body" else {id(p) for p in head_parameters(model, classifier=classifier)}
    )
    for name, parameter in model.named_parameters():
        of_method = method == "bias-only" and name.endswith("bias")
        in_head = id(parameter) in head and (classifier or method == "last-layer")
        parameter.requires_grad_(of_method or in_head)
    head_elsewhere = kind == "body" and method == "last-layer"
    if not head_elsewhere and not any(p.requires_grad for p in model.parameters()):
        raise ConfigurationError(
            f"method={method!r}: {type(model).__name__} has nothing of the kind. Use lora."
        )
    return model


def head_parameters(model: Any, *, classifier: bool) -> list[nn.Parameter]:
    """The parameters after a model's body: a classifier's head, or the layer that predicts words."""
    if isinstance(model, PooledClassifier):
        return list(model.head.parameters())
    base = getattr(model, "get_base_model", lambda: model)()
    if not classifier:
        output = base.get_output_embeddings()
        return [] if output is None else list(output.parameters())
    body = {id(p) for p in getattr(base, base.base_model_prefix).parameters()}
    pooler = getattr(getattr(base, base.base_model_prefix), "pooler", None)
    if pooler is not None:  # new in a model that was pretrained without it
        body -= {id(p) for p in pooler.parameters()}
    return [p for p in model.parameters() if id(p) not in body and p.requires_grad]


def _adapted(model: Any, method: str, kind: str, rank: int, prefix_length: int) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigurationError(
            f"method={method!r} needs the package peft, which cannot be imported ({error}). Install "
            "it with: pip install 'dptorch[text]'."
        ) from error
    task = {"classifier": "SEQ_CLS", "causal": "CAUSAL_LM"}.get(kind, "FEATURE_EXTRACTION")
    config: Any
    if method == "prefix":
        config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=prefix_length)
    else:
        transposed = any(type(m).__name__ == "Conv1D" for m in model.modules())  # GPT-2's layers
        config = peft.LoraConfig(
            task_type=task, r=rank, lora_alpha=2 * rank, target_modules="all-linear",
            fan_in_fan_out=transposed,
        )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    if method == "ffa-lora":
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.requires_grad_(False)
    return adapted
