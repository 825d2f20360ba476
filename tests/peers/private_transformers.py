"""private-transformers: its tests and scripts, which were written for transformers 4."""

from __future__ import annotations

from tests.peers.examples import Example
from tests.peers.peer import Peer
from tests.peers.reasons import NOT_APPLICABLE, REFUSED, Reason
from tests.peers.texts import CLASSIFICATION, GENERATION

__all__ = ["PRIVATE_TRANSFORMERS"]

_GENERATION = "examples/table2text/run_language_modeling.py"
_CLASSIFICATION = "examples/classification/run_classification.py"
_IMAGES = "examples/image_classification/main.py"
_GPT2 = GENERATION + "--model_name_or_path distilgpt2 --tokenizer_name distilgpt2 --clipping_mode "
_SMALL = "--train_batch_size 4 --per_device_train_batch_size 2 --epochs 1 "


def _classify(model: str, way: str, mode: str) -> Example:
    """Classification with `model`, by its `way` ("prompt" or "finetune")."""
    more = f"--model_name_or_path {model} --few_shot_type {way} --clipping_mode {mode}"
    name = f"{_CLASSIFICATION}, {model}, {way}, {mode}"
    return Example(_CLASSIFICATION, CLASSIFICATION + more, name, module=True)


PRIVATE_TRANSFORMERS = Peer(
    name="private-transformers",
    packages={"private_transformers": "dptorch.compat.private_transformers"},
    tests=("tests", "test_*.py"),
    folders=("examples",),
    weights=True,
    examples=(
        Example(_GENERATION, _GPT2 + "ghost", _GENERATION + ", ghost", module=True),
        Example(_GENERATION, _GPT2 + "default", _GENERATION + ", default", module=True),
        Example(_GENERATION, _GPT2 + "per_layer", _GENERATION + ", per_layer", module=True),
        Example(
            _GENERATION, _GPT2 + "ghost --store_grads yes", _GENERATION + ", gradients stored",
            module=True,
        ),
        _classify("roberta-base", "prompt", "ghost"),
        _classify("roberta-base", "finetune", "default"),
        _classify("bert-base-cased", "prompt", "ghost"),
        Example(_IMAGES, _SMALL),
        Example(_IMAGES, _SMALL + "--linear_probe False", _IMAGES + ", all layers"),
    ),
    reasons=(
        Reason(
            REFUSED, "test_.*generation", "DID NOT RAISE",
            "Ghost clipping of tied weights is supported; the original refuses it.",
        ),
        Reason(
            NOT_APPLICABLE, "test_t5_layer_norm", "supported_layers_grad_samplers",
            "Calls the function with which the original computes a single layer.",
        ),
        Reason(
            REFUSED, "gradients stored", "summed_grad",
            "A callback reads `summed_grad`, the clipped sum without noise, and writes it to a file.",
        ),
        Reason(
            REFUSED, "bert-base-cased", "is not a trainable parameter of the model",
            "The script replaces the table of token types after it has listed the parameters, so "
            "that the optimizer steps a table that the model has no more; in the original the new one "
            "is trained by nobody, in silence.",
        ),
    ),
)  # fmt: skip
