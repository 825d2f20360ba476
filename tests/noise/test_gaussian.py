"""The Gaussian mechanism: what it refuses, and that its noise is a function of position alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dptorch.clipping.sums import ClippedSum, RoundedSum
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise import (
    BandedNoise,
    DiscreteGaussianNoise,
    GaussianNoise,
    InverseBandedNoise,
)
from dptorch.noise.gaussian import DEVICE_BLOCK, _add_on_device
from dptorch.noise.noisy_gradient import NoisyGradient
from dptorch.noise.spans import Columns, Span
from dptorch.randomness import RootKey

KEY = RootKey.from_seed(11)
SHAPES = {"a": (300, 217), "b": (1,), "c": (0, 5), "d": (7, 11, 13), "e": (70_000,), "f": (2, 3)}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def zeros(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def noise_of(values: dict[str, torch.Tensor], step: int = 3, scale: float = 1.5) -> torch.Tensor:
    noisy = GaussianNoise(scale).privatize(ClippedSum(values, 1.0), KEY, step)
    return torch.cat([t.reshape(-1) for t in noisy.values.values()])


def test_adds_noise_to_the_sum() -> None:
    values = {name: torch.full(shape, 7.0) for name, shape in SHAPES.items()}
    noisy = GaussianNoise(1.5).privatize(ClippedSum(values, 1.0), KEY, 3)
    assert isinstance(noisy, NoisyGradient)
    assert (set(noisy.stddev.values()), noisy.max_norm) == ({1.5}, 1.0)
    assert list(noisy.values) == list(SHAPES)
    for name, shape in SHAPES.items():
        assert noisy.values[name].shape == shape
    flat = torch.cat([t.reshape(-1) for t in noisy.values.values()])
    assert torch.allclose(flat - 7.0, noise_of(zeros()), atol=2e-6)


def test_scale_is_multiplier_times_clipping_norm() -> None:
    reference = noise_of(zeros(), scale=1.0)
    noisy = GaussianNoise(0.5).privatize(ClippedSum(zeros(), 8.0), KEY, 3)
    assert noisy.stddev == dict.fromkeys(SHAPES, 4.0)
    flat = torch.cat([t.reshape(-1) for t in noisy.values.values()])
    assert torch.allclose(flat, 4.0 * reference, rtol=1e-6)


def test_each_parameter_can_have_its_own_scale() -> None:
    """One sequence of normals, each parameter's part times its own scale."""
    scales = {name: 0.25 * 2**i for i, name in enumerate(SHAPES)}
    noisy = GaussianNoise(1.5).privatize(ClippedSum(zeros(), 40.0, scales), KEY, 3)
    unit = GaussianNoise(1.0).privatize(ClippedSum(zeros(), 1.0), KEY, 3)
    assert noisy.stddev == {name: 1.5 * scale for name, scale in scales.items()}
    assert noisy.max_norm == 40.0
    for name, scale in scales.items():
        assert torch.allclose(noisy.values[name], 1.5 * scale * unit.values[name], rtol=1e-6)


@pytest.mark.parametrize(
    "scales", [{"w": 0.0}, {"w": math.nan}, {"w": -1.0}, {}, {"w": 1.0, "v": 1.0}, {"v": 1.0}]
)
def test_refuses_scales_that_leave_a_parameter_unprotected(scales: dict[str, float]) -> None:
    values = {"w": torch.zeros(3)}
    with pytest.raises(PrivacyError, match="scales"):
        GaussianNoise(1.0).privatize(ClippedSum(values, 1.0, scales), KEY, 0)
    assert torch.equal(values["w"], torch.zeros(3))


def longest_in_units_of_noise(scales: dict[str, float], noise_scales: dict[str, float]) -> float:
    """The longest of many contributions of norm 1 in units of `scales`, under noise of others."""
    zero = {"a": torch.zeros(3), "b": torch.zeros(4)}
    noisy = GaussianNoise(1.7).privatize(ClippedSum(zero, 2.0, noise_scales), KEY, 0)
    generator = torch.Generator().manual_seed(0)
    longest = 0.0
    for _ in range(100):
        g = {n: torch.randn(v.shape, generator=generator) for n, v in zero.items()}
        norm = math.sqrt(sum((g[n] / scales[n]).square().sum().item() for n in g))
        in_noise = sum((g[n] / norm / noisy.stddev[n]).square().sum().item() for n in g)
        longest = max(longest, math.sqrt(in_noise))
    return longest


def test_scaled_noise_hides_a_scaled_contribution_as_the_multiplier_says() -> None:
    scales, swapped = {"a": 0.1, "b": 2.0}, {"a": 2.0, "b": 0.1}
    assert longest_in_units_of_noise(scales, scales) == pytest.approx(1 / 1.7, rel=1e-5)
    assert longest_in_units_of_noise(scales, swapped) > 1 / 1.7, "the broken twin must be caught"


def test_noise_is_a_function_of_key_step_context_position_and_scale() -> None:
    """Of the values through the context alone; each of the five changes every coordinate."""

    def noise(values: float = 0.0, **changed: Any) -> torch.Tensor:
        given = {"key": KEY, "step": 3, "context": 9, "multiplier": 1.5} | changed
        filled = {name: torch.full_like(t, values).double() for name, t in zeros().items()}
        noisy = GaussianNoise(given["multiplier"]).privatize(
            ClippedSum(filled, 1.0), given["key"], given["step"], context=given["context"]
        )
        return torch.cat([t.reshape(-1) for t in noisy.values.values()]) - values

    same = noise()
    assert torch.equal(noise(), same)
    assert torch.allclose(noise(values=0.5), same, rtol=0, atol=1e-14)
    others = {"key": RootKey.from_seed(77), "step": 4, "context": 10, "multiplier": 3.0}
    for name, value in others.items():
        assert (noise(**{name: value}) != same).all(), name
    assert same.unique().numel() == same.numel(), "two positions share a number"


def test_every_coordinate_gets_noise() -> None:
    assert (noise_of(zeros()) != 0).all()


def test_no_sum_without_noise_remains() -> None:
    values = zeros()
    noisy = GaussianNoise(1.0).privatize(ClippedSum(values, 1.0), KEY, 0)
    for name in values:
        assert noisy.values[name] is values[name]


def test_noise_does_not_depend_on_how_parameters_are_cut() -> None:
    whole = noise_of(zeros())
    total = whole.numel()
    assert torch.equal(whole, noise_of({"all": torch.zeros(total)}))
    pieces = {str(i): torch.zeros(min(9_973, total - i)) for i in range(0, total, 9_973)}
    assert torch.equal(whole, noise_of(pieces))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shards_get_the_slices_of_the_noise_of_the_whole(ranks: int) -> None:
    """As on a mesh: each rank holds a part of each parameter and knows where the part begins."""
    whole = zeros()
    starts, at = {}, 0
    for name, value in whole.items():
        starts[name] = at
        at += value.numel()
    found = {name: torch.zeros(value.numel()) for name, value in whole.items()}
    for rank in range(ranks):
        cuts = {
            n: (v.numel() * rank // ranks, v.numel() * (rank + 1) // ranks)
            for n, v in whole.items()
        }
        shard = {n: torch.zeros(b - a) for n, (a, b) in cuts.items()}
        offsets = {n: starts[n] + a for n, (a, _) in cuts.items()}
        shard = dict(reversed(shard.items()))  # the order of names does not matter
        noisy = GaussianNoise(1.5).privatize(ClippedSum(shard, 1.0), KEY, 3, offsets=offsets)
        for n, (a, b) in cuts.items():
            found[n][a:b] = noisy.values[n]
    assert torch.equal(torch.cat(list(found.values())), noise_of(whole))


def banded(kind: type[Any]) -> Any:
    return kind(1.5, [1.0, 0.5], 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianNoise(1.5),
        lambda: banded(BandedNoise),
        lambda: banded(InverseBandedNoise),
        lambda: DiscreteGaussianNoise(1.5),
    ],
)
@pytest.mark.parametrize("in_memory", [torch.Tensor.contiguous, lambda t: t.t().contiguous().t()])
def test_columns_get_their_part_of_the_noise_of_the_whole(make: Any, in_memory: Any) -> None:
    """As of a linear layer whose inputs are divided: each rank has some columns of the weight."""
    discrete = isinstance(make(), DiscreteGaussianNoise)
    dtype = torch.int64 if discrete else torch.float32
    kind = RoundedSum if discrete else ClippedSum

    def sums(parts: dict[str, torch.Tensor]) -> ClippedSum:
        placed = {n: v.clone() if v.dim() == 1 else in_memory(v.clone()) for n, v in parts.items()}
        return kind(placed, 1.0)

    def steps_of(parts: dict[str, torch.Tensor], **more: Any) -> list[dict[str, torch.Tensor]]:
        noise = make()
        return [noise.privatize(sums(parts), KEY, step, **more).values for step in range(3)]

    shape = {"before": (5,), "weight": (300, 217), "after": (70_000,)}
    whole = {name: torch.zeros(each, dtype=dtype) for name, each in shape.items()}
    expected = steps_of(whole)
    for a, b in ((0, 100), (100, 217)):
        mine = whole | {"weight": whole["weight"][:, a:b]}
        where = {"before": 0, "weight": Columns(5 + a, 217), "after": 5 + 300 * 217}
        for found, all_of_it in zip(steps_of(mine, offsets=where), expected, strict=True):
            assert torch.equal(found["weight"], all_of_it["weight"][:, a:b])
            assert torch.equal(found["after"], all_of_it["after"])


def test_columns_that_are_none_are_refused() -> None:
    sums = {"a": torch.zeros(4, 3), "b": torch.zeros(9)}
    for first, row in ((-1, 3), (0, 2)):
        where: dict[str, Any] = {"a": Columns(first, row), "b": 100}
        with pytest.raises(ConfigurationError, match="offsets"):
            GaussianNoise(1.0).privatize(ClippedSum(sums, 1.0), KEY, 0, offsets=where)
    where = {"a": Columns(0, 6), "b": 20}  # the last of its columns is number 20
    with pytest.raises(PrivacyError, match="'b' and 'a' overlap"):
        GaussianNoise(1.0).privatize(ClippedSum(sums, 1.0), KEY, 0, offsets=where)


def test_offsets_that_would_repeat_noise_are_refused() -> None:
    values = {"a": torch.zeros(10), "b": torch.zeros(10)}
    with pytest.raises(PrivacyError, match="'b' and 'a' overlap"):
        GaussianNoise(1.0).privatize(ClippedSum(values, 1.0), KEY, 0, offsets={"a": 0, "b": 9})
    for bad in ({"a": 0}, {"a": 0, "b": -1}, {"a": 0, "b": 10, "c": 20}, {"a": 0, "b": True}):
        with pytest.raises(ConfigurationError, match="offsets"):
            GaussianNoise(1.0).privatize(ClippedSum(values, 1.0), KEY, 0, offsets=bad)
    assert not any(v.any() for v in values.values()), "refused, so nothing may have changed"


@pytest.mark.usefixtures("threads")
def test_noise_does_not_depend_on_threads() -> None:
    size = 1_000_003
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(noise_of({"a": torch.zeros(size), "b": torch.zeros(17)}))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_noise_does_not_depend_on_memory_layout() -> None:
    expected = noise_of({"w": torch.zeros(8, 6, 5, 4), "v": torch.zeros(30, 20)})
    last = torch.zeros(8, 6, 5, 4).to(memory_format=torch.channels_last)
    transposed = torch.zeros(20, 30).t()
    assert not last.is_contiguous()
    assert not transposed.is_contiguous()
    assert torch.equal(expected, noise_of({"w": last, "v": transposed}))


def test_noise_of_both_precisions_agrees() -> None:
    double = noise_of(zeros(torch.float64))
    assert double.dtype == torch.float64
    assert torch.allclose(double, noise_of(zeros()).double(), atol=1e-5)
    mixed = zeros()
    mixed["d"] = mixed["d"].double()
    assert torch.allclose(double, noise_of(mixed).double(), atol=1e-5)


def test_accepts_gradients_that_autograd_knows() -> None:
    parameter = torch.nn.Parameter(torch.zeros(10))
    noisy = GaussianNoise(1.0).privatize(ClippedSum({"p": parameter}, 1.0), KEY, 0)
    assert (noisy.values["p"] != 0).all()


def test_multiplier_zero_adds_nothing() -> None:
    values = {"a": torch.ones(5)}
    noisy = GaussianNoise(0.0).privatize(ClippedSum(values, 2.0), KEY, 0)
    assert noisy.stddev == {"a": 0.0}
    assert torch.equal(noisy.values["a"], torch.ones(5))


def test_other_devices_use_seeded_blocks() -> None:
    """The path of other devices, run on the CPU: positions decide, and blocks differ."""
    device = torch.device("cpu")
    size = DEVICE_BLOCK + 1000

    def run(cuts: list[int], step: int) -> torch.Tensor:
        flat = torch.zeros(size)
        spans = [
            Span(a, flat[a:b], flat[a:b], 2.0)
            for a, b in zip([0, *cuts], [*cuts, size], strict=True)
        ]
        _add_on_device(spans, KEY, (step, 0), device, torch.float32)
        return flat

    whole = run([], 1)
    assert torch.equal(whole, run([5, 1000, DEVICE_BLOCK - 3, DEVICE_BLOCK + 500], 1))
    assert (whole != 0).double().mean() > 0.999_99
    assert (whole[:1000] == whole[DEVICE_BLOCK:]).sum() <= 1
    assert (whole == run([], 2)).double().mean() < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("secure", [False, True])
def test_cuda_noise_is_a_function_of_key_and_step(secure: bool) -> None:
    noise = GaussianNoise(2.0, secure_rng=secure)

    def run(step: int) -> torch.Tensor:
        values = {"a": torch.zeros(100_000, device="cuda"), "b": torch.zeros(7, device="cuda")}
        noisy = noise.privatize(ClippedSum(values, 1.0), KEY, step)
        return torch.cat(list(noisy.values.values())).cpu()

    first = run(0)
    assert torch.equal(first, run(0))
    assert (first == run(1)).double().mean() < 1e-3
    assert abs(first.double().std().item() - 2.0) < 2.0 * 5 / math.sqrt(200_014)
    if secure:
        assert torch.equal(first, noise_of({"all": torch.zeros(100_007)}, step=0, scale=2.0))


@pytest.mark.parametrize("bad", [None, {"w": torch.zeros(3)}, torch.zeros(3), [torch.zeros(3)]])
def test_refuses_what_is_not_clipped(bad: object) -> None:
    with pytest.raises(TypeError, match="Clip first"):
        GaussianNoise(1.0).privatize(bad, KEY, 0)  # type: ignore[arg-type]


def test_refuses_noising_twice() -> None:
    noise = GaussianNoise(1.0)
    noisy = noise.privatize(ClippedSum({"w": torch.zeros(3)}, 1.0), KEY, 0)
    with pytest.raises(TypeError, match="NoisyGradient"):
        noise.privatize(noisy, KEY, 1)  # type: ignore[arg-type]


def test_refuses_other_keys() -> None:
    with pytest.raises(TypeError, match="from_os"):
        GaussianNoise(1.0).privatize(ClippedSum({}, 1.0), b"k" * 32, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.inf, math.nan])
def test_refuses_sums_without_a_bound(max_norm: float) -> None:
    with pytest.raises(PrivacyError, match="max_norm"):
        GaussianNoise(1.0).privatize(ClippedSum({"w": torch.zeros(3)}, max_norm), KEY, 0)


def refused() -> dict[str, torch.Tensor]:
    shared = torch.zeros(4)
    return {
        "bfloat16": torch.zeros(3, dtype=torch.bfloat16),
        "float16": torch.zeros(3, dtype=torch.float16),
        "int64": torch.zeros(3, dtype=torch.int64),
        "complex": torch.zeros(3, dtype=torch.complex64),
        "sparse": torch.zeros(3, 3).to_sparse(),
        "expanded": shared[:1].expand(9),
    }


@pytest.mark.parametrize("kind", list(refused()))
def test_refuses_tensors_that_noise_would_not_cover(kind: str) -> None:
    values = {"good": torch.zeros(3), "bad": refused()[kind]}
    with pytest.raises(PrivacyError, match="'bad'"):
        GaussianNoise(1.0).privatize(ClippedSum(values, 1.0), KEY, 0)
    assert torch.equal(values["good"], torch.zeros(3)), "refused, so nothing may have changed"


def test_refuses_two_names_for_one_tensor() -> None:
    tied = torch.zeros(3)
    with pytest.raises(PrivacyError, match="'head' shares memory with 'embedding'"):
        GaussianNoise(1.0).privatize(ClippedSum({"embedding": tied, "head": tied}, 1.0), KEY, 0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1", None, True])
def test_refuses_impossible_multipliers(bad: object) -> None:
    with pytest.raises(ConfigurationError, match="noise_multiplier"):
        GaussianNoise(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [-1, 1.5, True])
def test_refuses_impossible_steps(step: object) -> None:
    values = {"w": torch.zeros(3)}
    with pytest.raises(ConfigurationError, match="counter"):
        GaussianNoise(1.0).privatize(ClippedSum(values, 1.0), KEY, step)  # type: ignore[arg-type]
    assert torch.equal(values["w"], torch.zeros(3))
