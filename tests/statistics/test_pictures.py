"""Statistics of pictures: a picture counts once, however many pixels it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.vision.files import colours, write_cifar10, write_folder, write_mnist

from dptorch.errors import ConfigurationError, DataError
from dptorch.statistics import Numeric, describe_pictures
from dptorch.statistics.contributions import integer_sum, unit_means
from dptorch.statistics.pictures import picture_means
from dptorch.vision.formats import find_format

RGB = [Numeric(name, (0.0, 1.0), bins=8) for name in ("red", "green", "blue")]


def test_a_picture_contributes_the_mean_of_its_pixels() -> None:
    chance = np.random.default_rng(0)
    pictures = [
        chance.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((4, 5), (1, 1), (9, 2))
    ]
    found, units = integer_sum(RGB, picture_means(RGB, pictures))
    pixels = np.concatenate([p.reshape(-1, 3) / 255 for p in pictures])
    owners = [str(i) for i, p in enumerate(pictures) for _ in range(p.shape[0] * p.shape[1])]
    wanted, as_many = integer_sum(RGB, unit_means(RGB, pixels, owners))
    assert units == as_many == 3
    assert np.abs(found - wanted).max() <= 3  # each rounded towards zero, of 2**24


@pytest.mark.parametrize(
    ("write", "channels"), [(write_cifar10, 3), (write_folder, 3), (write_mnist, 1)]
)
def test_channels_have_the_mean_and_deviation_of_their_pixels(
    write, channels, tmp_path: Path
) -> None:
    write(tmp_path)
    found = describe_pictures(tmp_path, channels=channels, epsilon=1e6, delta=1e-5, seed=0)
    kind, where = find_format(tmp_path, None)
    part = kind.read(where, None)["train"]
    from PIL import Image

    opened = [p if isinstance(p, np.ndarray) else np.asarray(Image.open(p)) for p in part.pictures]
    pixels = np.stack(opened).reshape(-1, channels) / 255
    means = [summary.mean for summary in found.summaries.values()]
    deviations = [summary.deviation for summary in found.summaries.values()]
    assert means == pytest.approx(pixels.mean(0).tolist(), abs=5e-3)
    assert deviations == pytest.approx(pixels.std(0).tolist(), abs=5e-3)
    assert found.statement.plan.sample_size == len(part.labels)


def test_a_modest_budget_is_enough_for_as_many_as_cifar_has() -> None:
    """The tutorial's claim: 50,000 pictures, three means and deviations at ε = 0.1."""
    from dptorch.statistics.releases import release

    quantities = [Numeric(name, (0.0, 1.0), bins=0) for name in ("red", "green", "blue")]
    few, _ = colours(100, 10, seed=1)
    parts = np.tile(np.concatenate(list(picture_means(quantities, few))), (500, 1))
    found = release(quantities, [parts], units=50_000, epsilon=0.1, delta=1e-6, seed=0)
    pixels = np.stack(list(few)).reshape(-1, 3) / 255
    for channel, summary in enumerate(found.summaries.values()):
        assert summary.mean_noise < 0.0011
        assert abs(summary.mean - pixels[:, channel].mean()) < 5 * summary.mean_noise
        assert abs(summary.deviation - pixels[:, channel].std()) < 5 * summary.deviation_noise


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Expected bytes"):
        list(picture_means(RGB, [np.zeros((4, 4, 3))]))
    with pytest.raises(DataError, match="Expected bytes"):
        list(picture_means(RGB, [np.zeros((4, 4), np.uint8)]))
    with pytest.raises(ConfigurationError, match="channels=2"):
        describe_pictures(tmp_path, channels=2, epsilon=1.0)
    with pytest.raises(DataError, match="no image data set"):
        describe_pictures(tmp_path, epsilon=1.0)
    write_folder(tmp_path)
    (tmp_path / "cat" / "0.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match="cannot be read"):
        describe_pictures(tmp_path, epsilon=1.0)
