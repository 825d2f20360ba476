"""private_vision: its one script. It has no tests."""

from __future__ import annotations

from tests.peers.examples import Example
from tests.peers.peer import Peer

__all__ = ["PRIVATE_VISION"]

_SMALL = "--bs 10 --mini_bs 5 --model resnet10t --pretrained 0 "

PRIVATE_VISION = Peer(
    name="private_vision",
    packages={
        "opacus": "dptorch.compat.opacus",
        "private_vision": "dptorch.compat.private_vision",
    },
    tests=("tests", "test_*.py"),
    folders=("cifar_DP.py",),
    examples=(
        Example("cifar_DP.py", _SMALL, "cifar_DP.py, ghost_mixed"),
        Example("cifar_DP.py", _SMALL + "--mode ghost", "cifar_DP.py, ghost"),
        Example("cifar_DP.py", _SMALL + "--mode non-ghost", "cifar_DP.py, non-ghost"),
        Example("cifar_DP.py", _SMALL + "--mode non-private", "cifar_DP.py, non-private"),
        Example(
            "cifar_DP.py",
            "--bs 10 --mini_bs 5 --model vit_tiny_patch16_224 --pretrained 0 --cifar_data CIFAR100",
            "cifar_DP.py, a ViT on CIFAR-100",
        ),
    ),
    reasons=(),
)
