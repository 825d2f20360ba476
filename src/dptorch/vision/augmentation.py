"""Augmentation multiplicity: several views of each example, whose mean gradient is clipped.

De et al., "Unlocking High-Accuracy Differentially Private Image Classification through Scale" (2022).
The views of an example lie on an axis of their own, so that they are one record: its loss is the mean
over its views, and its gradient is clipped once.

Shapes: B examples, K views, C channels, S the side in pixels, L outputs.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.errors import ConfigurationError, one_of
from dptorch.randomness import RootKey

__all__ = ["AUGMENTATIONS", "Augmentation", "Views"]

#: Ways to change a picture at random, by name.
AUGMENTATIONS: Final = {
    "none": "pictures as they are",
    "flip": "mirrored with probability 1/2",
    "crop": "moved by up to an eighth of the side, what comes from outside mirrored at the border",
    "flip-crop": "both",
}


class Augmentation:
    """Draws views of pictures, independently for each example.

    The draws come from a secret key, the step and the part of its batch. A run that goes on from a
    checkpoint so sees the views that it would have seen. The key has to be secret: which draws an
    example gets depends on its place in the batch, and so on who else is in it; where nobody knows the
    draws, all places are alike.

    Args:
        kind: a name in `AUGMENTATIONS`.
        views: K, number of views of an example in a step.
        key: of the draws; None for a fresh one.

    Guarantees:
        The gradient of an example is clipped as that of the mean loss of its views, and nothing of it
        enters another example's.
        Held by `test_the_step_is_the_clipped_mean_over_the_views_of_each_example`.

    Raises:
        ConfigurationError: an unknown kind, no view, or several views that are all the same.

    Example:
        >>> views = Augmentation("flip-crop", views=4)
        >>> views(torch.rand(2, 3, 32, 32), step=0).shape
        torch.Size([2, 4, 3, 32, 32])
    """

    def __init__(self, kind: str, views: int = 1, key: RootKey | None = None) -> None:
        one_of("augment", kind, AUGMENTATIONS)
        if views < 1:
            raise ConfigurationError(f"views={views}: expected 1 or more.")
        if kind == "none" and views > 1:
            raise ConfigurationError(
                f"views={views} of pictures as they are would be {views} times the same. Choose an "
                "augmentation: augment='flip-crop'."
            )
        self.kind = kind
        self.views = views
        self._key = key or RootKey.from_os()
        self._step = self._part = -1

    def __call__(self, x_BCSS: Tensor, step: int) -> Tensor:
        """Views [B, K, C, S, S] of inputs, the next part of the batch of `step`."""
        self._part = self._part + 1 if step == self._step else 0
        self._step = step
        seed = self._key.derive("augmentation", step, self._part)
        drawn = torch.Generator().manual_seed(int.from_bytes(seed[:7], "big"))
        b, _, height, width = x_BCSS.shape
        x = x_BCSS
        if "crop" in self.kind:
            x = F.pad(x, (width // 8, width // 8, height // 8, height // 8), mode="reflect")
        x = x[:, None].expand(b, self.views, *x.shape[1:])
        rows = self._places(b, height, drawn, mirrored=False).to(x.device)
        columns = self._places(b, width, drawn, mirrored=True).to(x.device)
        rows = rows[:, :, None, :, None].expand(*x.shape[:3], height, x.shape[4])
        x = x.gather(3, rows)
        columns = columns[:, :, None, None, :].expand(*x.shape[:4], width)
        return x.gather(4, columns)

    def state_dict(self) -> dict[str, Any]:
        """The key, by which a run goes on with the same draws."""
        return {"key": self._key.export()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that key."""
        self._key = RootKey.restore(state_dict["key"])
        self._step = -1

    def _places(self, b: int, side: int, drawn: torch.Generator, *, mirrored: bool) -> Tensor:
        """Which row or column of the padded picture each one of a view is, int64 [B, K, side]."""
        at = torch.arange(side).expand(b, self.views, side)
        if mirrored and "flip" in self.kind:
            flipped = torch.rand(b, self.views, 1, generator=drawn) < 0.5
            at = torch.where(flipped, side - 1 - at, at)
        if "crop" in self.kind:
            most = 2 * (side // 8)
            at = at + torch.randint(most + 1, (b, self.views, 1), generator=drawn)
        return at


class Views(nn.Module):
    """A network that takes views [B, K, ...] and gives outputs [B, K, L]; inputs [B, ...] give [B, L].

    Args:
        network: takes inputs [N, *shape].
        dims: number of dimensions of a batch of inputs, N among them.
    """

    def __init__(self, network: nn.Module, dims: int = 4) -> None:
        super().__init__()
        self.network = network
        self._dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.ndim == self._dims:
            plain: Tensor = self.network(x)
            return plain
        outputs: Tensor = self.network(x.flatten(0, 1))
        return outputs.unflatten(0, x.shape[:2])
