"""From a picture to an input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dptorch.errors import ConfigurationError
from dptorch.training.pictures import FEATURES, SCALES, Look

LOOKS = [Look(28, 3, scale) for scale in SCALES] + [Look(28, 1, features=f) for f in FEATURES]


def pixels(look: Look, n: int = 4) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, look.channels, 28, 28), generator=drawn, dtype=torch.uint8)


@pytest.mark.parametrize("look", LOOKS)
def test_an_input_depends_on_its_own_picture_alone(look: Look) -> None:
    raw = pixels(look)
    together = look.inputs(raw)
    assert together.shape[1:] == look.shape
    other = raw.clone()
    other[1] = 255 - other[1]
    changed = look.inputs(other)
    for i in range(4):
        assert torch.allclose(together[i], look.inputs(raw[i : i + 1])[0], atol=1e-5)
        assert torch.allclose(changed[i], together[i], atol=1e-5) == (i != 1)


def test_scales_are_what_they_say() -> None:
    raw = pixels(LOOKS[0])
    half = Look(28, 3, "half").inputs(raw)
    assert float(half.min()) == -1
    assert float(half.max()) == 1
    standard = Look(28, 3, "standardise").inputs(raw)
    assert torch.allclose(standard.flatten(1).mean(1), torch.zeros(4), atol=1e-5)
    imagenet = Look(28, 3, "imagenet").inputs(raw)
    assert torch.allclose(imagenet[:, 2] * 0.225 + 0.406, raw[:, 2] / 255, atol=1e-6)


def test_pictures_are_resized_and_made_grey() -> None:
    picture = Image.fromarray(np.full((10, 20, 3), (255, 0, 0), dtype=np.uint8))
    assert Look(8, 3).pixels(picture)[:, 3, 3].tolist() == [255, 0, 0]
    assert Look(8, 1).pixels(picture).shape == (1, 8, 8)


def test_an_older_preparation_is_understood() -> None:
    assert Look.from_dict({"kind": "images", "size": 8, "channels": 1}) == Look(8, 1, "standardise")
    assert Look.from_dict(Look(14, 1, features="hog").to_dict()).features == "hog"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "expected a positive side"),
        ({"size": 8, "channels": 2}, r"1 \(grey\) or 3"),
        ({"size": 8, "scale": "hlf"}, "mean 'half'"),
        ({"size": 8, "features": "hog", "channels": 1}, "multiple of 7"),
        ({"size": 8, "features": "sift"}, "features"),
        ({"size": 8, "scale": "imagenet", "channels": 1}, "RGB"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Look(**settings)  # type: ignore[arg-type]
