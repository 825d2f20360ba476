"""Scattering features of an image: fixed wavelets, moduli and averages, nothing learned.

Bruna and Mallat, "Invariant Scattering Convolution Networks" (PAMI 2013). Linear models on these
features are hard to beat under differential privacy: Tramer and Boneh, "Differentially Private
Learning Needs Better Features (or Much More Data)" (ICLR 2021).

Shapes: N images, C channels, H rows, W columns, K = 1 + J L + L^2 J (J - 1) / 2 features of a channel,
h = H / 2^J, w = W / 2^J.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.errors import ConfigurationError

__all__ = ["scattering"]


def scattering(images_NCHW: Tensor, *, scales: int = 2, angles: int = 8) -> Tensor:
    """Scattering coefficients of order 0, 1 and 2, averaged over patches of 2^J pixels.

    Args:
        images_NCHW: float tensor. Sides are padded by reflection, and must be a multiple of 2^J.
        scales: J, the number of octaves.
        angles: L, the number of orientations over half a circle.

    Returns:
        float32 [N, C K, h, w]; for 28 x 28 grey images [N, 81, 7, 7].

    Guarantees:
        Output n depends on image n alone.
        Held by `test_each_output_depends_on_its_own_image_alone`.

    Raises:
        ConfigurationError: sides that 2^J does not divide, or that are shorter than 2^(J+1).

    Example:
        >>> scattering(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 81, 7, 7])
    """
    n, channels, height, width = images_NCHW.shape
    step = 2**scales
    if height % step or width % step or min(height, width) < 2 * step:
        raise ConfigurationError(
            f"scattering over {scales} octaves needs sides that are a multiple of {step}, at least "
            f"{2 * step}, but these images are {height} x {width}. Resize them."
        )
    padded = F.pad(images_NCHW, (step,) * 4, mode="reflect").reshape(n * channels, *[
        height + 2 * step, width + 2 * step
    ])  # fmt: skip
    low, waves = _filters(height + 2 * step, width + 2 * step, scales, angles)

    def averaged(signal: Tensor) -> Tensor:
        smooth = torch.fft.ifft2(torch.fft.fft2(signal) * low).real
        return smooth[:, step : step + height : step, step : step + width : step]

    found = [averaged(padded)]
    spectrum = torch.fft.fft2(padded)
    for scale in range(scales):
        for angle in range(angles):
            first = torch.fft.ifft2(spectrum * waves[scale][angle]).abs()
            found.append(averaged(first))
            of_first = torch.fft.fft2(first)
            found += [
                averaged(torch.fft.ifft2(of_first * waves[coarser][other]).abs())
                for coarser in range(scale + 1, scales)
                for other in range(angles)
            ]
    features = torch.stack(found, 1)
    return features.reshape(n, channels * features.shape[1], *features.shape[2:]).float()


@functools.cache
def _filters(
    height: int, width: int, scales: int, angles: int
) -> tuple[Tensor, list[list[Tensor]]]:
    """(low-pass, band-pass by scale and angle), each a spectrum [height, width]."""
    low = _gabor(height, width, sigma=0.8 * 2 ** (scales - 1), angle=0.0, frequency=0.0, slant=1.0)
    waves = [
        [
            _morlet(height, width, 0.8 * 2**scale, math.pi * k / angles, 0.75 * math.pi / 2**scale,
                    4.0 / angles)
            for k in range(angles)
        ]
        for scale in range(scales)
    ]  # fmt: skip
    return torch.fft.fft2(low).real, waves


def _morlet(
    height: int, width: int, sigma: float, angle: float, frequency: float, slant: float
) -> Tensor:
    """Spectrum of a Gabor wave less as much of its envelope as gives it mean 0."""
    wave = _gabor(height, width, sigma, angle, frequency, slant)
    envelope = _gabor(height, width, sigma, angle, 0.0, slant)
    return torch.fft.fft2(wave - wave.sum() / envelope.sum() * envelope).real


def _gabor(
    height: int, width: int, sigma: float, angle: float, frequency: float, slant: float
) -> Tensor:
    """A plane wave in a Gaussian envelope around the origin, periodic: complex64 [height, width]."""
    total = torch.zeros(height, width, dtype=torch.complex64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for shift_row in (-1, 0, 1):  # the wave goes on at the other side
        for shift_column in (-1, 0, 1):
            y = rows + shift_row * height - height * (rows > height // 2)
            x = columns + shift_column * width - width * (columns > width // 2)
            along = x * math.cos(angle) + y * math.sin(angle)
            across = -x * math.sin(angle) + y * math.cos(angle)
            envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
            total += torch.polar(envelope, along * frequency)
    return total * slant / (2 * math.pi * sigma**2)
