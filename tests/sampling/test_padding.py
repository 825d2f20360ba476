"""The zero example keeps the structure of any batch and none of its numbers."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dptorch.sampling.padding import zeros_like_batch

Point = namedtuple("Point", ["x", "y"])


@dataclass(frozen=True)
class Sample:
    image: torch.Tensor
    name: str


class Encoding(UserDict):  # type: ignore[type-arg]
    """Like a tokenizer's result."""


def test_tensors_keep_shape_and_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool):
        batch = torch.ones(1, 3, 2, dtype=dtype)
        zeroed = zeros_like_batch(batch)
        assert zeroed.shape == (1, 3, 2)
        assert zeroed.dtype == dtype
        assert not zeroed.any()
        assert batch.all(), "the original is left alone"


def test_structures_are_kept() -> None:
    batch = {
        "pair": (torch.ones(1, 2), [torch.ones(1)]),
        "point": Point(torch.ones(1), 2.5),
        "text": ["one example"],
        "raw": b"bytes",
        "none": None,
        "count": 3,
        "flag": True,
        "array": np.ones((1, 4), np.float32),
        "words": np.array(["word"]),
    }
    zeroed = zeros_like_batch(batch)
    assert type(zeroed) is dict
    assert list(zeroed) == list(batch)
    assert torch.equal(zeroed["pair"][0], torch.zeros(1, 2))
    assert type(zeroed["pair"]) is tuple
    assert torch.equal(zeroed["pair"][1][0], torch.zeros(1))
    assert isinstance(zeroed["point"], Point)
    assert zeroed["point"].y == 0.0
    assert torch.equal(zeroed["point"].x, torch.zeros(1))
    assert (zeroed["text"], zeroed["raw"], zeroed["none"]) == (["one example"], b"bytes", None)
    assert zeroed["count"] == 0
    assert zeroed["flag"] is False
    assert zeroed["array"].dtype == np.float32
    assert not zeroed["array"].any()
    assert zeroed["words"].tolist() == ["word"]


def test_classes_are_kept() -> None:
    encoding = zeros_like_batch(Encoding({"input_ids": torch.ones(1, 5, dtype=torch.int64)}))
    assert isinstance(encoding, Encoding)
    assert torch.equal(encoding["input_ids"], torch.zeros(1, 5, dtype=torch.int64))
    sample = Sample(torch.ones(1, 2), "cat")
    zeroed = zeros_like_batch(sample)
    assert isinstance(zeroed, Sample)
    assert zeroed.name == "cat"
    assert not zeroed.image.any()
    assert sample.image.all()


def test_packed_sequences_stay_valid() -> None:
    packed = pack_sequence([torch.ones(3, 2)])
    zeroed = zeros_like_batch(packed)
    assert isinstance(zeroed, PackedSequence)
    assert torch.equal(zeroed.batch_sizes, packed.batch_sizes)
    assert not zeroed.data.any()
    output, _ = torch.nn.GRU(2, 4)(zeroed)
    assert output.data.shape == (3, 4)


def test_unknown_objects_are_passed_on() -> None:
    marker = object()
    assert zeros_like_batch([marker])[0] is marker
