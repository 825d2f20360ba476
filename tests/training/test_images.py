"""Preprocessing looks at one image at a time; a twin that looks at all of them is caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dptorch.training.images import deskew, hog, standardise
from dptorch.training.scattering import scattering

Transform = Callable[[Tensor], Tensor]


def pictures(n: int = 6) -> Tensor:
    """Random strokes [n, 28, 28] in [0, 1], the second image empty."""
    generator = torch.Generator().manual_seed(1)
    images = torch.zeros(n, 28, 28)
    for image in images:
        for _ in range(4):
            top, left = torch.randint(2, 16, (2,), generator=generator).tolist()
            height, width = torch.randint(1, 9, (2,), generator=generator).tolist()
            image[top : top + height, left : left + width] = torch.rand((), generator=generator)
    images[1] = 0
    return images


def largest_influence_on_others(transform: Transform) -> float:
    """How far output i moves, over all i != j, when image j is replaced or removed."""
    images = pictures()
    before = transform(images)
    moved = 0.0
    for j in range(len(images)):
        replaced = images.clone()
        replaced[j] = 1 - replaced[j]
        others = [i for i in range(len(images)) if i != j]
        moved = max(moved, float((transform(replaced)[others] - before[others]).abs().max()))
        moved = max(moved, float((transform(images[others]) - before[others]).abs().max()))
    return moved


def normalise_by_data_set(images: Tensor) -> Tensor:
    """The broken twin: statistics of the whole data set."""
    return (images - images.mean()) / images.std()


@pytest.mark.parametrize(
    "transform",
    [deskew, standardise, hog, lambda x: hog(deskew(x)), lambda x: scattering(x[:, None])],
)
def test_each_output_depends_on_its_own_image_alone(transform: Transform) -> None:
    assert largest_influence_on_others(transform) < 1e-5


def test_normalising_by_the_data_set_is_caught() -> None:
    assert largest_influence_on_others(normalise_by_data_set) > 1e-2


def deskew_pixel_by_pixel(image: np.ndarray) -> np.ndarray:
    """The definition, one output pixel at a time."""
    height, width = image.shape
    mass = image.sum()
    rows, cols = np.mgrid[:height, :width]
    row_mean, col_mean = (rows * image).sum() / mass, (cols * image).sum() / mass
    shear = ((rows - row_mean) * (cols - col_mean) * image).sum()
    shear /= ((rows - row_mean) ** 2 * image).sum()

    def pixel(r: int, c: int) -> float:
        return image[r, c] if 0 <= r < height and 0 <= c < width else 0.0

    out = np.zeros_like(image)
    for r in range(height):
        for c in range(width):
            down = r - (height - 1) / 2
            y, x = row_mean + down, col_mean + (c - (width - 1) / 2) + shear * down
            top, left = int(np.floor(y)), int(np.floor(x))
            for dy in (0, 1):
                for dx in (0, 1):
                    weight = (1 - abs(y - top - dy)) * (1 - abs(x - left - dx))
                    out[r, c] += weight * pixel(top + dy, left + dx)
    return out


def test_deskew_matches_its_definition() -> None:
    images = pictures(3)[[0, 2]].double()
    expected = np.stack([deskew_pixel_by_pixel(image.numpy()) for image in images])
    np.testing.assert_allclose(deskew(images).numpy(), expected, atol=1e-9)


def test_deskew_removes_the_slant() -> None:
    upright = deskew(pictures()[[0, 2, 3]])
    row, col = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    for image in upright:
        mass = image.sum()
        row_mean, col_mean = (row * image).sum() / mass, (col * image).sum() / mass
        assert abs(row_mean - 13.5) < 0.2
        assert abs(col_mean - 13.5) < 0.2
        covariance = ((row - row_mean) * (col - col_mean) * image).sum() / mass
        variance = ((row - row_mean) ** 2 * image).sum() / mass
        assert abs(covariance / variance) < 0.05


def test_an_empty_image_stays_finite() -> None:
    empty = torch.zeros(1, 28, 28)
    for transform in (deskew, standardise, hog):
        assert transform(empty).abs().max() == 0


def test_standardise_gives_mean_0_and_deviation_1() -> None:
    out = standardise(torch.rand(5, 3, 8, 8))
    torch.testing.assert_close(out.mean((1, 2, 3)), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((1, 2, 3), correction=0), torch.ones(5))


def test_hog_rows_have_norm_1_and_mean_0() -> None:
    features = hog(pictures()[[0, 2, 3]])
    assert features.shape == (3, 432)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(features.mean(1), torch.zeros(3), atol=1e-6, rtol=0)


def test_hog_sees_the_direction_of_an_edge() -> None:
    ramp = torch.linspace(0, 1, 28).expand(28, 28)
    rightward, downward = hog(torch.stack([ramp, ramp.T]))
    per_bin_right = rightward.reshape(9, 12, 4).sum((0, 2))
    per_bin_down = downward.reshape(9, 12, 4).sum((0, 2))
    assert per_bin_right.argmax() == 0
    assert per_bin_down.argmax() == 3  # a quarter of twelve bins


def test_hog_refuses_sides_that_cells_do_not_fill() -> None:
    with pytest.raises(ValueError, match="multiple of cell=7"):
        hog(torch.zeros(1, 30, 28))
