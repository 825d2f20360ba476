"""Scattering coefficients, by their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dptorch.errors import ConfigurationError
from dptorch.training.scattering import scattering


def morlet(sigma: float, angle: float, frequency: float, slant: float) -> np.ndarray:
    """A wavelet on a grid of 41 x 41 points, without Fourier transforms."""
    y, x = np.mgrid[-20:21, -20:21].astype(float)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = -x * math.sin(angle) + y * math.cos(angle)
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    wave = envelope * np.exp(1j * frequency * along)
    if frequency:
        wave = wave - wave.sum() / envelope.sum() * envelope
    return wave * slant / (2 * math.pi * sigma**2)


def convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The same size, by summing over the kernel; the image goes on at the other side."""
    found = np.zeros(image.shape, complex)
    for i in range(41):
        for j in range(41):
            found += kernel[i, j] * np.roll(image, (i - 20, j - 20), (0, 1))
    return found


@pytest.mark.slow
def test_coefficients_are_averages_of_moduli_of_wavelet_convolutions() -> None:
    """Two angles at 24 pixels: 1 + 4 + 4 coefficients of a patch, in the order of the paper's tree."""
    image = np.random.default_rng(0).random((24, 24)).astype(np.float32)
    found = scattering(torch.from_numpy(image)[None, None], angles=2)[0].numpy()
    padded = np.pad(image, 4, mode="reflect")
    low = morlet(1.6, 0.0, 0.0, 1.0)

    def averaged(signal: np.ndarray) -> np.ndarray:
        return convolved(signal, low).real[4:28:4, 4:28:4]

    def modulus(signal: np.ndarray, scale: int, angle: int) -> np.ndarray:
        wave = morlet(0.8 * 2**scale, math.pi * angle / 2, 0.75 * math.pi / 2**scale, 2.0)
        return np.abs(convolved(signal, wave))

    expected = [averaged(padded)]
    for scale in (0, 1):
        for angle in (0, 1):
            first = modulus(padded, scale, angle)
            expected.append(averaged(first))
            if scale == 0:
                expected += [averaged(modulus(first, 1, other)) for other in (0, 1)]
    assert found.shape == (9, 6, 6)
    assert np.allclose(found, np.stack(expected), atol=1e-4)


def test_a_shift_moves_pixels_more_than_coefficients() -> None:
    """What they are for."""
    image = torch.zeros(1, 1, 32, 32)
    image[..., 8:24, 12:20] = 1.0
    shifted = image.roll(1, 3)

    def change(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / a.norm())

    assert change(scattering(image), scattering(shifted)) < 0.6 * change(image, shifted)


def test_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"multiple of 4, at least 8, but .* 30 x 30"):
        scattering(torch.zeros(1, 1, 30, 30))
