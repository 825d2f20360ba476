"""From a picture to a model's input: size, channels, scale, fixed features. One picture at a time.

Shapes: N pictures, C channels, S the side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dptorch.errors import ConfigurationError, one_of
from dptorch.training.images import deskew, hog, standardise
from dptorch.training.scattering import scattering

__all__ = ["FEATURES", "SCALES", "Look", "in_groups"]

_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # published with the models

SCALES: Final = {
    "standardise": "mean 0 and deviation 1 over each picture's own pixels",
    "half": "from -1 to 1",
    "imagenet": "less ImageNet's published means, over its deviations",
}
FEATURES: Final = {
    "scattering": "wavelet scattering coefficients",
    "hog": "histograms of oriented gradients of a grey picture, deskewed",
}


@dataclass(frozen=True)
class Look:
    """What is done to a picture before a model sees it; every field is public.

    Attributes:
        size: S, to which pictures are resized. Others than squares are stretched.
        channels: 1 (grey) or 3 (RGB).
        scale: a name in `SCALES`.
        features: a name in `FEATURES`, or None for the pixels.

    Guarantees:
        An input depends on its own picture alone.
        Held by `test_an_input_depends_on_its_own_picture_alone`.

    Raises:
        ConfigurationError: a name or number that does not fit.
    """

    size: int
    channels: int = 3
    scale: str = "standardise"
    features: str | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ConfigurationError(f"image_size={self.size}: expected a positive side.")
        if self.channels not in (1, 3):
            raise ConfigurationError(f"channels={self.channels}: expected 1 (grey) or 3 (RGB).")
        one_of("scale", self.scale, SCALES)
        if self.features is not None:
            one_of("features", self.features, FEATURES)
        if self.scale == "imagenet" and self.channels == 1:
            raise ConfigurationError(
                "scale='imagenet' is of RGB pictures. Use half, or channels=3."
            )
        if self.features == "hog" and (self.channels != 1 or self.size % 7 or self.size < 14):
            raise ConfigurationError(
                f"features='hog' of {self.channels} channels and {self.size} pixels: expected "
                "channels=1 and a side that is a multiple of 7, such as 28."
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Look:
        """What a run's preparation says; fields that an older one lacks have their defaults."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for `run.json`."""
        return asdict(self)

    def pixels(self, picture: Any) -> Tensor:
        """A picture of Pillow as uint8 [C, S, S]."""
        picture = picture.convert("L" if self.channels == 1 else "RGB")
        if picture.size != (self.size, self.size):
            picture = picture.resize((self.size, self.size))
        array = np.array(picture, dtype=np.uint8).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()

    def inputs(self, pixels_NCSS: Tensor) -> Tensor:
        """Inputs of a model, float32 [N, *shape], of pixels, uint8 [N, C, S, S]."""
        x = pixels_NCSS.float() / 255
        if self.features == "hog":
            return hog(deskew(x[:, 0]))
        if self.features == "scattering":
            return in_groups(scattering(x))
        if self.scale == "standardise":
            return standardise(x)
        if self.scale == "half":
            return x * 2 - 1
        mean, deviation = (torch.tensor(values).reshape(3, 1, 1) for values in _IMAGENET)
        return (x - mean) / deviation

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        blank = torch.zeros(1, self.channels, self.size, self.size, dtype=torch.uint8)
        return tuple(self.inputs(blank).shape[1:])


def in_groups(features_NKhw: Tensor) -> Tensor:
    """Return features standardised in threes within a picture and scaled to norm 1: [N, K h w]."""
    groups = features_NKhw.shape[1] // 3  # K is 81 for each channel of a picture
    flat = F.group_norm(features_NKhw, groups).flatten(1)
    return flat / flat.square().sum(1, keepdim=True).sqrt().clamp_min(1e-6)
