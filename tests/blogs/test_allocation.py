"""Block sizes: within the target, as large as the equal share allows, each tensor once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dptorch.blogs.allocation import equal_share, per_step, trainable_groups
from dptorch.blogs.index import Index0121, Index2024
from dptorch.errors import ConfigurationError

INDICES = st.sampled_from(
    [Index2024(1.0, 1e-5), Index2024(0.1, 1e-3), Index2024(5.0, 1e-6), Index0121(0.01)]
)
SIZES = st.lists(st.integers(2, 5000), min_size=1, max_size=6)


def _total(index, sizes, blocks, steps):
    return index.after(steps, per_step(index, sizes, blocks))


def _at_share(index, sizes, share):
    """Every group's largest block within `share`, by trying all of them."""
    return [
        max([b for b in range(1, d // 2 + 1) if index.of_group(d, b) <= share], default=1)
        for d in sizes
    ]


@settings(max_examples=60, deadline=None)
@given(INDICES, SIZES, st.integers(1, 10_000), st.floats(0.01, 100.0))
def test_a_run_stays_within_its_target_or_is_refused_with_what_can_be_met(
    index, sizes, steps, target
):
    least = _total(index, sizes, [1] * len(sizes), steps)
    if least > target:
        with pytest.raises(ConfigurationError, match="attainable minimum") as caught:
            equal_share(index, sizes, steps, target)
        assert f"{least:.4g}" in str(caught.value)
        assert equal_share(index, sizes, steps, target, at_minimum=True) == [1] * len(sizes)
        return
    blocks = equal_share(index, sizes, steps, target)
    assert _total(index, sizes, blocks, steps) <= target
    assert all(1 <= b <= d // 2 for b, d in zip(blocks, sizes, strict=True))


@settings(max_examples=25, deadline=None)
@given(
    INDICES,
    st.lists(st.integers(2, 60), min_size=1, max_size=4),
    st.integers(1, 300),
    st.floats(0.5, 300.0),
)
def test_no_larger_equal_share_stays_within_the_target(index, sizes, steps, target):
    try:
        blocks = equal_share(index, sizes, steps, target)
    except ConfigurationError:
        return
    shares = sorted({index.of_group(d, b) for d in sizes for b in range(1, d // 2 + 1)})
    candidates = [_at_share(index, sizes, share) for share in [0.0, *shares]]
    within = [c for c in candidates if _total(index, sizes, c, steps) <= target]
    assert blocks == max(within, key=sum)


def test_the_search_of_the_releases_could_exceed_the_target():
    """Negative control: the vector closest to the target, which they took, may lie above it."""
    index, sizes, steps, target = Index2024(1.0, 1e-5), [50, 60], 10, 2.75
    shares = sorted({index.of_group(d, b) for d in sizes for b in range(1, d // 2 + 1)})
    vectors = [_at_share(index, sizes, share) for share in shares]
    closest = min(vectors, key=lambda v: abs(_total(index, sizes, v, steps) - target))
    assert _total(index, sizes, closest, steps) > target
    assert _total(index, sizes, equal_share(index, sizes, steps, target), steps) <= target


def test_the_network_of_the_report_gets_the_printed_block_sizes():
    blocks = equal_share(Index2024(1.0, 1e-5), [416, 4640, 15690], steps=100, target=1.0)
    assert blocks == [5, 62, 213]


def test_a_long_run_has_a_plan_too():
    """The releases gave up where target / steps fell below 1e-6."""
    index, sizes = Index0121(1e-4), [10**6, 10**5]
    blocks = equal_share(index, sizes, 2_000_000, 1.0)
    assert 0.5 < _total(index, sizes, blocks, 2_000_000) <= 1.0


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(nn.init.ones_(nn.Linear(3, 1).weight[0].detach()))
        self.head = nn.Linear(4, 11)
        self.head.weight = self.embed.weight
        self.norm.weight.requires_grad_(False)


def test_tied_tensors_count_once_and_frozen_ones_not_at_all():
    model = Tied()
    groups = trainable_groups(model)
    sizes = {name: n for g in groups for name, n in g.sizes.items()}
    assert sizes == {"scale": 3, "embed.weight": 44, "norm.bias": 4, "head.bias": 11}
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    single = trainable_groups(model, "parameter")
    assert {g.name: g.size for g in single} == sizes


def test_no_layer_is_counted_inside_its_container():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 2))))
    assert [(g.name, g.size) for g in trainable_groups(model)] == [("0.0", 8), ("0.1.0", 6)]


def test_a_frozen_model_is_refused():
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        trainable_groups(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ConfigurationError, match="'layer'"):
        trainable_groups(nn.Linear(2, 2), "layers")
