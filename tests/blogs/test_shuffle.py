"""The shuffle keeps the multiset of blocks, is uniform, and moves what it should."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dptorch.blogs.shuffle import BlockShuffle
from dptorch.errors import PrivacyError
from dptorch.randomness import RootKey


def _shuffled(g, block_size, *, clip=math.inf, seed=0, step=0):
    out = g.clone(memory_format=torch.preserve_format)
    BlockShuffle({"w": block_size}, clip, RootKey.from_seed(seed)).apply({"w": out}, step)
    return out


def _blocks(flat, block_size):
    """The multiset of a vector's blocks, when the short one is the only one of its length."""
    size = max(1, min(block_size, len(flat) // 2))
    cut = [tuple(flat[i : i + size].tolist()) for i in range(0, len(flat), size)]
    return Counter(cut), size


def _is_rearrangement(before, after, block_size):
    """Whether `after` is some order of the blocks of `before`; all values must be distinct."""
    expected, _ = _blocks(before, block_size)
    starts = {block[0]: block for block in expected}
    flat, at = after.tolist(), 0
    while at < len(flat):
        block = starts.pop(flat[at], None)
        if block is None or tuple(flat[at : at + len(block)]) != block:
            return False
        at += len(block)
    return not starts


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 400), st.integers(1, 450), st.integers(0, 2**32), st.integers(0, 2**40))
def test_every_block_survives_whole(n, block_size, seed, step):
    before = torch.arange(1.0, n + 1)
    after = _shuffled(before, block_size, seed=seed, step=step)
    assert _is_rearrangement(before, after, block_size)


def test_pad_and_cut_does_not_keep_the_blocks():
    """Negative control: what the releases did with a block size that does not divide."""

    def pad_and_cut(g, block_size):
        padded = torch.nn.functional.pad(g, (0, -len(g) % block_size)).view(-1, block_size)
        return padded[torch.randperm(len(padded))].reshape(-1)[: len(g)]

    torch.manual_seed(0)
    before = torch.arange(1.0, 11)
    kept = [_is_rearrangement(before, pad_and_cut(before, 4), 4) for _ in range(30)]
    assert not all(kept)
    assert all(_is_rearrangement(before, _shuffled(before, 4, step=s), 4) for s in range(30))


@pytest.mark.slow
def test_every_order_of_the_blocks_is_equally_likely():
    """24 orders of three blocks and a remainder, 4,800 draws; chi-square at false alarm 1e-4."""
    from scipy import stats

    before = torch.arange(8.0)  # blocks of 2, 2, 2 and, with block size 2 on 7 elements, 1
    counts = Counter(tuple(_shuffled(before[:7], 2, step=s).tolist()) for s in range(4800))
    assert len(counts) == 24
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_tensors_of_a_step_and_steps_of_a_tensor_have_orders_of_their_own():
    shuffle = BlockShuffle({"a": 1, "b": 1}, math.inf, RootKey.from_seed(3))
    gradients = {"a": torch.arange(50.0), "b": torch.arange(50.0)}
    shuffle.apply(gradients, 0)
    assert not torch.equal(gradients["a"], gradients["b"])
    again = torch.arange(50.0)
    shuffle.apply({"a": again}, 1)
    assert not torch.equal(gradients["a"], again)


def test_the_same_seed_and_step_repeat_and_the_operating_system_does_not():
    g = torch.randn(300)
    assert torch.equal(_shuffled(g, 3, seed=5, step=7), _shuffled(g, 3, seed=5, step=7))
    assert not torch.equal(_shuffled(g, 3, seed=5, step=7), _shuffled(g, 3, seed=6, step=7))
    secret = []
    for _ in range(2):
        out = g.clone()
        BlockShuffle({"w": 3}, math.inf, RootKey.from_os()).apply({"w": out}, 7)
        secret.append(out)
    assert not torch.equal(*secret)


def test_the_global_generator_neither_decides_nor_moves():
    g = torch.randn(100)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = _shuffled(g, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, _shuffled(g, 4))


def test_clipping_is_to_the_norm_of_the_tensor():
    g = torch.randn(101)
    out = _shuffled(g, 7, clip=0.5)
    assert out.norm().item() == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(out.sort().values, (g * (0.5 / g.norm())).sort().values)
    within = _shuffled(g, 7, clip=2 * g.norm().item())
    assert torch.equal(within.sort().values, g.sort().values)  # bit for bit
    assert torch.equal(_shuffled(torch.zeros(9), 2, clip=1.0), torch.zeros(9))


def test_memory_layout_does_not_matter():
    g = torch.randn(8, 5, 3, 3)
    last = g.to(memory_format=torch.channels_last)
    out = _shuffled(last, 6, clip=1.0)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, _shuffled(g, 6, clip=1.0))
    flipped = torch.randn(6, 4).T
    torch.testing.assert_close(_shuffled(flipped, 3), _shuffled(flipped.contiguous(), 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    g = torch.arange(1.0, 60).to(dtype)
    assert torch.equal(_shuffled(g, 4).sort().values, g.sort().values)
    # 60,000 squared is beyond float16; the norm is taken in float32.
    assert _shuffled(torch.full((10,), 6e4).to(dtype), 2, clip=1.0).norm().item() == (
        pytest.approx(1.0, rel=2e-2)
    )


def test_nothing_is_changed_when_one_gradient_is_bad():
    good, bad = torch.randn(20), torch.randn(20)
    bad[3] = float("nan")
    shuffle = BlockShuffle({"a": 1, "b": 1}, 1.0, RootKey.from_seed(0))
    before = good.clone()
    with pytest.raises(PrivacyError, match="'b' is not finite"):
        shuffle.apply({"a": good, "b": bad}, 0)
    sparse = torch.eye(4).to_sparse()
    with pytest.raises(PrivacyError, match="sparse=False"):
        shuffle.apply({"a": good, "b": sparse}, 0)
    assert torch.equal(good, before)
