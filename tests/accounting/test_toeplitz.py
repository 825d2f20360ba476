"""Toeplitz strategies: published tables, dense matrices, brute force over participations."""

import itertools
import math

import numpy as np
import pytest

from dptorch.accounting import Workload, strategy_sensitivity, workload_error
from dptorch.accounting.toeplitz import (
    coefficients_of,
    column_norms,
    inverse,
    inverse_square_root,
    optimised,
    square_root,
    toeplitz_sensitivity,
    unbounded_sensitivity,
)
from dptorch.errors import ConfigurationError

# Root mean square error of prefix sums over (k, n / k)-participation, made once by another program
# from dense matrices: identity, square root whole and cut to n / k, 16 and 64 bands, and its inverse
# cut to 4, 16 and 64; and the inverse 1, -λ with the best λ of two digits.
TABLE = {
    (128, 1): (8.0312, 2.4488, 2.4488, 2.9461, 2.4365, 3.4637, 2.4918, 2.4227, 2.9130),
    (128, 4): (16.0624, 6.1735, 5.1580, 5.8922, None, 6.9283, 5.3867, 6.0681, 5.8993),
    (1024, 1): (22.6385, 3.1098, 3.1098, 7.2184, 4.3765, 9.1093, 5.0972, 3.4482, 4.8160),
    (2048, 8): (90.5318, 13.7070, 10.9479, 28.5278, 16.5468, 36.2326, 19.7075, 12.3427, 16.4060),
    (2000, 10): (100.0250, 16.5068, 12.8528, 31.5283, 18.3080, 40.0372, 21.7924, 13.9236, 18.2126),
}


def dense(coefficients, steps):
    found = np.zeros((steps, steps))
    for i, value in enumerate(coefficients[:steps]):
        found += value * np.eye(steps, k=-i)
    return found


@pytest.mark.parametrize(("steps", "epochs"), TABLE)
def test_errors_of_the_table(steps, epochs):
    def error(c, *, inverted=False):
        strategy = inverse(c, steps) if inverted else c
        sensitivity = toeplitz_sensitivity(
            strategy, steps=steps, participations=epochs, min_separation=steps // epochs
        )
        return sensitivity * workload_error(c, steps, inverse=inverted)

    bands = (1, steps, steps // epochs, 16, 64)
    found = [error(square_root(b)) for b in bands]
    found += [error(inverse_square_root(b), inverted=True) for b in (4, 16, 64)]
    found.append(error(np.array([1.0, -0.88 if steps == 128 else -0.96]), inverted=True))
    for mine, theirs in zip(found, TABLE[steps, epochs], strict=True):
        assert theirs is None or mine == pytest.approx(theirs, rel=1e-4)


def test_values_of_another_library():
    """Those that jax_privacy's tests hold."""
    assert inverse_square_root(5) == pytest.approx([1, -1 / 2, -1 / 8, -1 / 16, -5 / 128])
    c = dense(square_root(30), 30)
    assert np.allclose(c @ c, np.tril(np.ones((30, 30))), atol=1e-12)
    assert np.allclose(c @ dense(inverse(square_root(30), 30), 30), np.eye(30), atol=1e-12)
    assert inverse(square_root(30), 30) == pytest.approx(inverse_square_root(30))
    one = toeplitz_sensitivity([1, 1], steps=2, participations=1, min_separation=1)
    assert one == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize("steps", [1, 2, 5, 17, 64])
def test_errors_are_those_of_dense_matrices(steps):
    rates = tuple(np.linspace(1.0, 0.1, steps))
    c = np.array([1.0, 0.7, -0.2, 0.1])
    for workload in (Workload(), Workload(0.9), Workload(0.9, rates), Workload(0.0, rates)):
        product = workload.matrix(steps) @ np.linalg.inv(dense(c, steps))
        wanted = math.sqrt((product**2).sum() / steps)
        assert workload_error(c, steps, workload) == pytest.approx(wanted)
        by_inverse = workload_error(inverse(c, steps), steps, workload, inverse=True)
        assert by_inverse == pytest.approx(wanted)


def test_a_workload_is_what_sgd_does():
    """Parameters after each step of torch's SGD, for gradients that are unit vectors."""
    import torch

    rates, steps = (0.5, 0.2, 0.1, 0.4), 4
    weight = torch.zeros(steps, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.8)
    rows = []
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = rates[t]
        weight.grad = torch.eye(steps)[t]
        optimizer.step()
        rows.append(-weight.detach().numpy())
    assert np.allclose(Workload(0.8, rates).matrix(steps), np.stack(rows), atol=1e-6)


def patterns(steps, separation):
    for size in range(1, steps + 1):
        for chosen in itertools.combinations(range(steps), size):
            if all(b - a >= separation for a, b in itertools.pairwise(chosen)):
                yield list(chosen)


@pytest.mark.parametrize("steps", [1, 3, 8, 12])
@pytest.mark.parametrize("coefficients", [square_root(3), square_root(12), [1.0, -0.5, 0.2]])
def test_sensitivity_by_enumeration(steps, coefficients):
    """All ways of taking part; of those with overlap all contributions that point one way."""
    separation = 3
    matrix = dense(np.asarray(coefficients), steps)
    worst = max(np.linalg.norm(matrix[:, p].sum(axis=1)) for p in patterns(steps, separation))
    found = toeplitz_sensitivity(
        coefficients, steps=steps, participations=steps, min_separation=separation
    )
    assert found == pytest.approx(worst)
    if len(coefficients) <= separation:
        asked = {"participations": steps, "min_separation": separation}
        assert found == pytest.approx(strategy_sensitivity(matrix, **asked))


def test_the_sensitivity_of_another_matrix_is_wrong():
    """The broken twin: noise by coefficients that were cut, sensitivity from those that were not, and
    the other way round. Brute force over the noise that is added tells them apart."""
    steps, separation = 12, 4
    cut, whole = square_root(4), square_root(12)

    def truth(c):
        matrix = dense(c, steps)
        return max(np.linalg.norm(matrix[:, p].sum(axis=1)) for p in patterns(steps, separation))

    def of(c):
        return toeplitz_sensitivity(c, steps=steps, participations=steps, min_separation=separation)

    assert of(cut) == pytest.approx(truth(cut))
    assert of(whole) == pytest.approx(truth(whole))
    assert of(cut) < 0.8 * truth(whole), "would claim less than what is so"
    assert of(whole) > 1.2 * truth(cut)


def test_a_strategy_that_no_theorem_covers_is_refused():
    with pytest.raises(ConfigurationError, match="strategy_sensitivity"):
        toeplitz_sensitivity([1.0, 0.2, 0.5], steps=6, participations=3, min_separation=2)


def test_records_in_every_step():
    """With columns of norm 1, and every sign: no pattern has more than the bound."""
    steps, c = 7, np.array([1.0, -0.6, 0.4])
    matrix = dense(c, steps) / column_norms(c, steps)
    assert np.allclose(np.linalg.norm(matrix, axis=0), 1)
    signs = np.array(list(itertools.product((-1, 0, 1), repeat=steps)))
    worst = np.linalg.norm(matrix @ signs.T, axis=0).max()
    assert worst <= unbounded_sensitivity(c, steps) * (1 + 1e-12)
    assert worst == pytest.approx(unbounded_sensitivity(np.abs(c), steps), rel=0.15)


@pytest.mark.parametrize(
    "workload", [Workload(), Workload(0.9), Workload(0.9, tuple(np.linspace(1, 0.05, 60)))]
)
def test_optimised_coefficients_cannot_be_bettered_nearby(workload):
    steps = 60

    def error(c):
        return float(np.linalg.norm(c)) * workload_error(c, steps, workload)

    c = optimised(5, steps, workload)
    assert error(c) < error(square_root(5))
    for i in range(1, 5):
        for change in (-1e-3, 1e-3):
            moved = c.copy()
            moved[i] += change
            assert error(moved) > error(c) * (1 - 1e-7)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("square", "'square-root', 'prefix-sum'"),
        ([1.0] * 5, "Give at most 4"),
        ([0.0, 1.0], "the first above 0"),
        ([1.0, math.nan], "finite"),
        (Workload(rates=(1.0, 0.5)), "2 learning rates, and the run 9"),
    ],
)
def test_coefficients_that_cannot_be(wanted, message):
    with pytest.raises(ConfigurationError, match=message):
        coefficients_of(4, 9, wanted)


@pytest.mark.parametrize("bad", [{"momentum": 1.0}, {"rates": (-1.0,)}, {"rates": (0.0, 0.0)}])
def test_workloads_that_cannot_be(bad):
    with pytest.raises(ConfigurationError, match=r"momentum|rates"):
        Workload(**bad)
