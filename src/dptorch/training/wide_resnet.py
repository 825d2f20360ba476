"""The wide residual network of De et al. (2022): weights standardised, groups normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptorch.errors import ConfigurationError

__all__ = ["StandardisedConv2d", "WideResNet"]


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1 / fan-in in each output channel, times a
    trained gain (Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", 2019; the gain after Brock et al. 2021). It looks at weights alone.

    Args: those of `torch.nn.Conv2d`.
    """

    def __init__(self, *arguments: int, **settings: int) -> None:
        super().__init__(*arguments, **settings)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> [B, C', H', W']."""
        fan_in = self.weight[0].numel()
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) * torch.rsqrt((variance * fan_in).clamp_min(1e-4)) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class _Block(nn.Module):
    """Two 3 x 3 convolutions after normalisation and ReLU, and the way round them."""

    def __init__(self, channels: int, wider: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(16, channels)
        self.conv1 = StandardisedConv2d(channels, wider, 3, stride=stride, padding=1)
        self.norm2 = nn.GroupNorm(16, wider)
        self.conv2 = StandardisedConv2d(wider, wider, 3, padding=1)
        self.short: nn.Module = nn.Identity()
        self.changes = channels != wider
        if self.changes:
            self.short = StandardisedConv2d(channels, wider, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        short: Tensor = self.short(h) if self.changes else x
        h = self.conv1(h)
        return short + self.conv2(F.relu(self.norm2(h)))


class WideResNet(nn.Module):
    """A pre-activation residual network of three stages; WRN-16-4 has 2.75 million parameters.

    Args:
        input_shape: (channels, height, width).
        num_classes: number of logits.
        depth: 4 + 6 times the blocks of a stage: 16, 28, 40.
        width: by what the channels 16, 32, 64 are multiplied.

    Raises:
        ConfigurationError: inputs that are no images, or a depth of another form.

    Example:
        >>> WideResNet((3, 32, 32), 10, depth=10, width=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, input_shape: tuple[int, ...], num_classes: int, depth: int = 16, width: int = 4
    ) -> None:
        super().__init__()
        if len(input_shape) != 3 or (depth - 4) % 6 or depth < 10:
            raise ConfigurationError(
                f"WideResNet of depth {depth} on inputs of shape {input_shape}: expected images "
                "(channels, height, width), and a depth of 10, 16, 22, ..."
            )
        self.first = StandardisedConv2d(input_shape[0], 16, 3, padding=1)
        channels = 16
        blocks: list[nn.Module] = []
        for stage in range(3):
            for block in range((depth - 4) // 6):
                wider = 16 * width * 2**stage
                blocks.append(_Block(channels, wider, 2 if stage and not block else 1))
                channels = wider
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(16, channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W]."""
        h = F.relu(self.norm(self.blocks(self.first(x_BCHW))))
        logits: Tensor = self.head(h.mean((2, 3)))
        return logits
