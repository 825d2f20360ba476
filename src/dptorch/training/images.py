"""Fixed image transforms that look at one image at a time.

A statistic of the data set (its mean, its principal components) is computed from private examples
and would need privacy budget of its own. Everything here is a fixed function of a single image, so
it costs none: changing one image changes that image's output and no other.

Shapes: N images, H rows, W columns, K features.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["deskew", "hog", "standardise"]


def deskew(images_NHW: Tensor) -> Tensor:
    """Shear and shift each image so that its ink is upright and centred.

    The shear is the regression of column on row under the image's own ink; pixels are interpolated
    bilinearly and what comes from outside is 0.

    Args:
        images_NHW: non-negative float tensor, 0 is background. An empty image stays empty.

    Returns:
        float tensor of the same shape.

    Guarantees:
        Output n depends on image n alone.
        Held by `test_each_output_depends_on_its_own_image_alone`.

    Example:
        >>> slanted = torch.zeros(1, 28, 28)
        >>> rows = torch.arange(6, 22)
        >>> slanted[0, rows, rows] = 1.0
        >>> upright = deskew(slanted)
        >>> upright.shape
        torch.Size([1, 28, 28])
        >>> bool(upright[0, :, 12:16].sum() > 0.95 * upright.sum())  # the diagonal stands upright
        True
    """
    _, height, width = images_NHW.shape
    row_H1 = torch.arange(height, dtype=images_NHW.dtype)[:, None]
    col_1W = torch.arange(width, dtype=images_NHW.dtype)[None, :]
    mass = images_NHW.sum((1, 2)).clamp_min(1e-6)
    row_mean = (images_NHW * row_H1).sum((1, 2)) / mass
    col_mean = (images_NHW * col_1W).sum((1, 2)) / mass
    row_dev = row_H1[None] - row_mean[:, None, None]
    col_dev = col_1W[None] - col_mean[:, None, None]
    row_var = (images_NHW * row_dev.square()).sum((1, 2)) / mass
    covariance = (images_NHW * row_dev * col_dev).sum((1, 2)) / mass
    shear = covariance / row_var.clamp_min(1e-6)

    # affine_grid maps output coordinates, scaled to [-1, 1], to input coordinates.
    theta = images_NHW.new_zeros(len(images_NHW), 2, 3)
    theta[:, 0, 0] = 1.0
    theta[:, 1, 1] = 1.0
    theta[:, 0, 1] = shear * (height - 1) / (width - 1)
    theta[:, 0, 2] = 2 * col_mean / (width - 1) - 1
    theta[:, 1, 2] = 2 * row_mean / (height - 1) - 1
    size = [len(images_NHW), 1, height, width]
    grid = F.affine_grid(theta, size, align_corners=True)
    out = F.grid_sample(images_NHW[:, None], grid, align_corners=True)
    empty = images_NHW.sum((1, 2)) <= 0
    return out[:, 0].masked_fill(empty[:, None, None], 0.0)


def standardise(inputs: Tensor) -> Tensor:
    """Give each example mean 0 and standard deviation 1 over its own entries.

    Args:
        inputs: float tensor [N, ...]. A constant example becomes zeros.

    Returns:
        float tensor of the same shape.

    Guarantees:
        Output n depends on example n alone.
        Held by `test_each_output_depends_on_its_own_image_alone`.

    Example:
        >>> out = standardise(torch.tensor([[0.0, 2.0], [5.0, 5.0]]))
        >>> out.tolist()
        [[-1.0, 1.0], [0.0, 0.0]]
    """
    flat = inputs.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return (centred / deviation.clamp_min(1e-6)).reshape(inputs.shape)


def hog(images_NHW: Tensor, *, cell: int = 7, bins: int = 12, clip: float = 0.2) -> Tensor:
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005), centred and of unit norm.

    Signed orientations are shared linearly between the two nearest bins, positions between the
    nearest cells, and every 2 x 2 block of cells is normalised by L2-Hys (unit norm, clip, unit
    norm). Each image's features are then centred by *their own* mean: the all-ones direction,
    common to all images, would otherwise take most of a clipped gradient and none of the signal.

    Args:
        images_NHW: float tensor.
        cell: pixels to a side of a cell; must divide both H and W at least twice.
        bins: orientations over the full circle.
        clip: ceiling of a block's entries between its two normalisations.

    Returns:
        float tensor [N, K], K = 4 * bins * (H / cell - 1) * (W / cell - 1), rows of norm 1 (or 0
        where an image has no edge).

    Guarantees:
        Output n depends on image n alone.
        Held by `test_each_output_depends_on_its_own_image_alone`.

    Example:
        >>> hog(torch.rand(3, 28, 28)).shape
        torch.Size([3, 432])
    """
    n, height, width = images_NHW.shape
    if height % cell or width % cell or min(height, width) < 2 * cell:
        raise ValueError(
            f"hog needs sides that are a multiple of cell={cell} and at least twice as long, but "
            f"these images are {height} x {width}."
        )
    padded = F.pad(images_NHW[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    d_col = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    d_row = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    magnitude = torch.hypot(d_col, d_row)
    position = torch.atan2(d_row, d_col).remainder(2 * math.pi) * (bins / (2 * math.pi))
    below = position.floor()
    share_above = position - below
    below_bin = below.long() % bins
    votes = images_NHW.new_zeros(n, bins, height, width)
    votes.scatter_add_(1, below_bin[:, None], (magnitude * (1 - share_above))[:, None])
    votes.scatter_add_(1, ((below_bin + 1) % bins)[:, None], (magnitude * share_above)[:, None])

    rows, columns = (_cell_weights(side, cell).to(votes) for side in (height, width))
    cells = rows @ votes @ columns.T
    blocks = F.unfold(cells, kernel_size=2).transpose(1, 2)  # [N, blocks, 4 * bins]

    # 0.1 is small against the gradient mass of an inked block (pixels in [0, 1]) and keeps a
    # block of faint noise from being blown up to norm 1.
    def unit(v: Tensor) -> Tensor:
        return v / (v.square().sum(-1, keepdim=True) + 0.1**2).sqrt()

    features = unit(unit(blocks).clamp_max(clip)).flatten(1)
    features = features - features.mean(1, keepdim=True)
    return features / features.square().sum(1, keepdim=True).sqrt().clamp_min(1e-6)


@functools.cache
def _cell_weights(side: int, cell: int) -> Tensor:
    """How much each pixel of a row counts for each cell: [side / cell, side].

    Averaging twice weighs by a triangle two cells wide: a stroke near a border counts for both cells,
    so a shift by a pixel changes the features little.
    """
    pixels = F.pad(torch.eye(side, dtype=torch.float64), (cell // 2, (cell - 1) // 2))[:, None]
    return cell * F.avg_pool1d(F.avg_pool1d(pixels, cell, stride=1), cell)[:, 0].T
