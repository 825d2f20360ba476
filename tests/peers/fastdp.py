"""fastDP: its scripts. It has no tests."""

from __future__ import annotations

from tests.peers.examples import Example
from tests.peers.peer import Peer
from tests.peers.reasons import REFUSED, Reason
from tests.peers.texts import CLASSIFICATION, GENERATION

__all__ = ["FASTDP"]

_IMAGES = "examples/image_classification/"
_TABLES = "examples/table2text/"
_TEXTS = "examples/text_classification/run_classification.py"
_GPT2 = GENERATION + "--model_name_or_path gpt2 --tokenizer_name gpt2 "
_ROBERTA = CLASSIFICATION + "--model_name_or_path roberta-base "
_MIXED = "--clipping_fn automatic --clipping_style all-layer --clipping_mode MixOpt "
_SMALL = "--epochs 1 --bs 10 --mini_bs 5 --model resnet10t "

FASTDP = Peer(
    name="fastDP",
    packages={"opacus": "dptorch.compat.opacus", "fastDP": "dptorch.compat.fastdp"},
    tests=("tests", "test_*.py"),
    folders=("examples",),
    examples=(
        Example(_IMAGES + "CIFAR_TIMM.py", _SMALL + "--dimension 32"),
        Example(
            _IMAGES + "CIFAR_TIMM.py",
            _SMALL + "--dimension 32 --clipping_mode BK-ghost --clipping_style layer-wise",
            _IMAGES + "CIFAR_TIMM.py, ghost, layer-wise",
        ),
        Example(
            _IMAGES + "CIFAR_TIMM.py",
            _SMALL + "--dimension 32 --clipping_mode BiTFiT",
            _IMAGES + "CIFAR_TIMM.py, biases alone",
        ),
        Example(_IMAGES + "CV_TIMM.py", _SMALL),
        Example(_IMAGES + "CelebA_TIMM.py", _SMALL + "--labels 0 1 2"),
        Example(_TABLES + "run_language_modeling.py", _GPT2 + _MIXED + "--bias_only no"),
        Example(
            _TABLES + "run_language_modeling.py", _GPT2 + _MIXED + "--bias_only yes",
            _TABLES + "run_language_modeling.py, biases alone",
        ),
        Example(
            _TEXTS, _ROBERTA + _MIXED + "--few_shot_type prompt --bias_only no", _TEXTS + ", prompt",
            module=True,
        ),
        Example(
            _TEXTS, _ROBERTA + _MIXED + "--few_shot_type finetune --bias_only yes",
            _TEXTS + ", finetune, biases alone", module=True,
        ),
        Example(_TABLES + "run_language_modeling_extending.py", gpus=2),
        Example(_TABLES + "run_language_modeling_ZERO23.py", gpus=2),
        Example(_TABLES + "run_ZERO_extending.py", gpus=2),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_ZERO1.py", gpus=2),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_ZERO23.py", gpus=2),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_ZERO_extending.py", gpus=2),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_FSDP_extending.py", gpus=2),
    ),
    reasons=(
        Reason(
            REFUSED, "ZERO|FSDP|extending", "needs 2 GPUs",
            "Needs several processes, which are refused.",
        ),
    ),
)  # fmt: skip
