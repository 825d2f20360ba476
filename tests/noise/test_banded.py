"""Noise of a banded matrix: against dense ones, whole, in shards and after restarts."""

import numpy as np
import pytest
import torch

from dptorch.accounting.toeplitz import column_norms, square_root
from dptorch.clipping.sums import ClippedSum
from dptorch.errors import ConfigurationError, PrivacyError
from dptorch.noise import BandedNoise, GaussianNoise, recursive
from dptorch.noise.compiled import compiled
from dptorch.noise.normal import KEYSTREAM_BLOCK
from dptorch.randomness import RootKey

KEY = RootKey.from_seed(3)
SIZES = {"weight": (5, 7), "bias": (11,)}


def zeros(sizes=SIZES, dtype=torch.float32):
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in sizes.items()}


def flat(values):
    return torch.cat([v.flatten() for v in values.values()]).double().numpy()


def context_of(step):
    return 100 + step


def taken(noise, steps, *, sizes=SIZES, first=0, norm=1.0, skip=(), **more):
    """The noise of steps, [steps, coordinates]."""
    found = []
    for t in range(first, steps):
        if t not in skip:
            sums = ClippedSum(zeros(sizes), norm)
            found.append(flat(noise.privatize(sums, KEY, t, context=context_of(t), **more).values))
    return np.stack(found)


def white(steps, sizes=SIZES):
    return taken(GaussianNoise(1.0), steps, sizes=sizes)


def dense(coefficients, steps):
    """C with columns of norm 1."""
    found = sum(c * np.eye(steps, k=-i) for i, c in enumerate(coefficients[:steps]))
    return found / np.linalg.norm(found, axis=0)


COEFFICIENTS = [square_root(2), square_root(4), np.array([1.0, -0.4, 0.3, 0.2]), square_root(20)]


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=len)
def test_the_noise_of_a_run_is_that_of_the_dense_matrix(coefficients):
    steps = 12
    noise = BandedNoise(0.7, coefficients.tolist(), steps)
    found = taken(noise, steps, norm=2.0, divisor=4.0)
    wanted = 0.7 * 2.0 / 4.0 * np.linalg.inv(dense(coefficients, steps)) @ white(steps)
    assert np.allclose(found, wanted, rtol=0, atol=3e-6)


def test_scales_of_parameters():
    """Each parameter by its own scale, as groups and adaptive clipping ask for; and what is said."""
    noise = BandedNoise(1.0, [1.0, 0.5], 3)
    for t in range(3):
        sums = ClippedSum(zeros(), 1.0, scales={"weight": 3.0, "bias": 0.5 + t})
        released = noise.privatize(sums, KEY, t, context=context_of(t))
    row = (np.linalg.inv(dense([1.0, 0.5], 3)) @ white(3))[2]
    assert np.allclose(flat(released.values), np.repeat([3.0, 2.5], [35, 11]) * row, atol=1e-5)
    expected = np.linalg.norm(np.linalg.inv(dense([1.0, 0.5], 3))[2])
    assert released.stddev == pytest.approx({"weight": 3.0 * expected, "bias": 2.5 * expected})


def test_covariance_of_released_noise():
    """10^4 coordinates, which are independent: their covariance over steps is (C'C)^-1."""
    steps, count = 6, 10**4
    c = square_root(3)
    found = taken(BandedNoise(1.0, c.tolist(), steps), steps, sizes={"weight": (count,)})
    matrix = dense(c, steps)
    wanted = np.linalg.inv(matrix.T @ matrix)
    error = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / count)
    assert (np.abs(found @ found.T / count - wanted) < 5 * error).all()
    independent = taken(GaussianNoise(1.0), steps, sizes={"weight": (count,)})
    assert (np.abs(independent @ independent.T / count - wanted) > 5 * error).any()


def test_one_band_is_independent_noise():
    one = taken(BandedNoise(1.3, [1.0], 4), 4, norm=0.5, divisor=3.0)
    assert (one == taken(GaussianNoise(1.3), 4, norm=0.5, divisor=3.0)).all()


def test_shards_and_restarts_give_the_noise_of_the_whole():
    steps, c = 9, square_root(8).tolist()  # the restart is within steps that read rows together
    sizes = {"weight": (100_003,)}
    whole = taken(BandedNoise(1.0, c, steps), steps, sizes=sizes)

    def part(first, size):
        sizes, where = {"weight": (size,)}, {"weight": first}
        before = BandedNoise(1.0, c, steps)
        taken(before, 5, sizes=sizes, offsets=where)
        after = BandedNoise(1.0, c, steps)
        after.restore(before.state(5), 5)
        return taken(after, steps, sizes=sizes, first=5, offsets=where)

    assert (part(0, 100_003) == whole[5:]).all()
    parts = np.concatenate([part(0, 40_001), part(40_001, 60_002)], axis=1)
    assert (parts == whole[5:]).all()


@pytest.mark.parametrize("bands", [2, 8])
def test_the_compiled_pass_makes_the_bits_of_torch(monkeypatch, bands):
    """In several parameters with scales of their own, and after a restart, which only moves rows on."""
    library = compiled()
    if library is None or not library.has_cipher:
        pytest.skip("nothing is compiled here: the other path is the only one")
    steps, sizes = 7, {"a": (150_001,), "b": (3,), "c": (120_000,)}

    def run():
        noise = BandedNoise(1.3, square_root(bands).tolist(), steps)
        early = taken(noise, 5, sizes=sizes, divisor=17.3, skip=(2,))
        again = BandedNoise(1.3, square_root(bands).tolist(), steps)
        again.restore(noise.state(5), 5)
        return np.concatenate([early, taken(again, steps, sizes=sizes, first=5, divisor=17.3)])

    found = run()
    monkeypatch.setattr(recursive, "pass_over", lambda spans: (None, [], 1))
    assert (run() == found).all()


@pytest.mark.slow
def test_memory_is_one_buffer_for_each_band():
    """And nothing else of the model's size is allocated in a step, nor by torch without a compiler."""
    for library in (compiled(), None):
        noise = BandedNoise(1.0, square_root(8).tolist(), 20)
        sums = [ClippedSum({"weight": torch.zeros(2**20)}, 1.0) for _ in range(3)]
        with pytest.MonkeyPatch.context() as patch:
            if library is None:
                patch.setattr(recursive, "pass_over", lambda spans: (None, [], 1))
            noise.privatize(sums[0], KEY, 0)
            held = sum(b.numel() * b.element_size() for b in noise._buffers.values())
            assert held == 7 * 4 * 2**20
            with torch.profiler.profile(profile_memory=True) as profile:
                noise.privatize(sums[1], KEY, 1)
        largest = max(
            event.self_cpu_memory_usage / max(1, event.count) for event in profile.key_averages()
        )
        assert largest <= 4 * KEYSTREAM_BLOCK


@pytest.mark.parametrize(("bands", "failed"), [(3, 3), (8, 3), (8, 4)])
def test_a_step_that_failed_is_not_taken_back(monkeypatch, bands, failed):
    """Its number is spent, its noise was never seen: as if its column of C ended on the diagonal.

    Also where it was to read all rows for later steps, and where it was one of those.
    """
    steps, c = 8, square_root(bands)
    noise = BandedNoise(1.0, c.tolist(), steps)
    first = taken(noise, failed)
    with monkeypatch.context() as patch:
        patch.setattr(noise, "_advance", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            taken(noise, failed + 1, first=failed)
    found = np.concatenate([first, taken(noise, steps, first=failed + 1)])
    matrix = dense(c, steps)
    matrix[failed + 1 :, failed] = 0
    wanted = np.linalg.inv(matrix) @ white(steps)
    assert np.allclose(found, np.delete(wanted, failed, axis=0), atol=3e-6)
    again = BandedNoise(1.0, c.tolist(), steps)
    again.restore(noise.state(steps - 1) | {"contexts": noise.state(steps)["contexts"][:6]}, 6)
    assert (taken(again, steps, first=6) == found[-2:]).all()


@pytest.mark.parametrize(
    ("bands", "together", "numbers"), [(2, 1, 2), (4, 1, 4), (8, 3, 17 / 3), (64, 11, 149 / 11)]
)
def test_what_a_step_reads_and_writes(bands, together, numbers):
    """Rows by one reading of all for several steps; without that it would be b numbers a coordinate."""
    noise = BandedNoise(1.0, square_root(bands).tolist(), 10**4)
    taps = [noise.taps(step) for step in range(1000 * together, 1001 * together)]
    assert sum(len(t.rows) + len(t.weights) for t in taps) / together == numbers <= bands


def test_what_cannot_go_on_is_refused():
    noise = BandedNoise(1.0, [1.0, 0.5], 4)
    taken(noise, 2)
    with pytest.raises(PrivacyError, match="step 1 was released already"):
        taken(noise, 2, first=1)
    with pytest.raises(PrivacyError, match="step 4 is past the 4"):
        taken(noise, 5, first=4)
    state = noise.state(2)
    with pytest.raises(PrivacyError, match="noise of 1 of the 2 steps"):
        BandedNoise(1.0, [1.0, 0.5], 4).restore({**state, "contexts": state["contexts"][:1]}, 2)
    with pytest.raises(PrivacyError, match="noise of none of the 2 steps"):
        BandedNoise(1.0, [1.0, 0.5], 4).restore(None, 2)
    elsewhere = BandedNoise(1.0, [1.0, 0.5], 4)
    elsewhere.restore({**state, "made_on": ["cuda torch.float32"]}, 2)
    with pytest.raises(ConfigurationError, match="Go on where the run was"):
        taken(elsewhere, 3, first=2)


def test_columns_are_shorter_at_the_end_of_a_run():
    assert column_norms(square_root(3), 4) == pytest.approx(
        np.linalg.norm(sum(c * np.eye(4, k=-i) for i, c in enumerate(square_root(3))), axis=0)
    )
