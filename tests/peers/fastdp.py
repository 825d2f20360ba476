"""fastDP: its scripts. It has no tests."""

from __future__ import annotations

from tests.peers.examples import Example
from tests.peers.peer import Peer
from tests.peers.reasons import NOT_APPLICABLE, REFUSED, Reason

__all__ = ["FASTDP"]

_IMAGES = "examples/image_classification/"
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
        Example(_IMAGES + "CelebA_TIMM.py"),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_ZERO1.py", gpus=2),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_ZERO23.py", gpus=2),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_ZERO_extending.py", gpus=2),
        Example(_IMAGES + "ZERO_examples/CIFAR_TIMM_FSDP_extending.py", gpus=2),
    ),
    reasons=(
        Reason(REFUSED, "ZERO", "needs 2 GPUs", "Needs several processes, which are refused."),
        Reason(
            NOT_APPLICABLE, "CelebA", "Dataset not found|CelebA",
            "Reads CelebA, whose files the runner does not make.",
        ),
    ),
)  # fmt: skip
