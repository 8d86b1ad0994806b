"""EfficientNet: a slice's features at five scales, for the U-Nets and the fracture network.

Reference: Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks, ICML 2019, table 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Stage(NamedTuple):
    """A row of table 1: blocks of one shape, of which the first has the stride and the others keep the grid."""

    num_blocks: int
    out_channels: int
    kernel_size: int
    stride: int
    expansion: int


STEM_CHANNELS = 32

STAGES = (
    Stage(1, 16, 3, 1, 1),
    Stage(2, 24, 3, 2, 6),
    Stage(2, 40, 5, 2, 6),
    Stage(3, 80, 3, 2, 6),
    Stage(3, 112, 5, 1, 6),
    Stage(4, 192, 5, 2, 6),
    Stage(1, 320, 3, 1, 6),
)
"""EfficientNet-B0; the others are this one, wider and deeper."""

COEFFICIENTS = {"b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4)}
"""Width and depth of each, as multiples of B0's."""

DROP_PATH = 0.2
"""How often training skips the last block; earlier ones are skipped less often, in proportion."""


class ConvNormAct(nn.Sequential):
    """Convolution without bias, batch norm and, unless `is_linear`, SiLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        is_linear: bool = False,
    ) -> None:
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels),
            *([] if is_linear else [nn.SiLU(inplace=True)]),
        )


class SqueezeExcite(nn.Module):
    """Scales each channel by what all of them hold on average. Reference: Hu et al., CVPR 2018."""

    def __init__(self, channels: int, num_squeezed: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, num_squeezed, 1)
        self.excite = nn.Conv2d(num_squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, Y, X)` to the same."""
        scale = nn.functional.silu(self.squeeze(x.mean((2, 3), keepdim=True)), inplace=True)
        return x * torch.sigmoid(self.excite(scale))


class MBConv(nn.Module):
    """Inverted residual: expand, convolve each channel by itself, squeeze and excite, project.

    drop_path: share of training samples for which a block with a shortcut is skipped.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int, drop_path: float
    ) -> None:
        super().__init__()
        expanded = in_channels * expansion
        self.layers = nn.Sequential(
            *([ConvNormAct(in_channels, expanded, 1)] if expansion > 1 else []),
            ConvNormAct(expanded, expanded, kernel_size, stride, groups=expanded),
            SqueezeExcite(expanded, max(1, in_channels // 4)),
            ConvNormAct(expanded, out_channels, 1, is_linear=True),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, Y, X)` to `(B, out_channels, Y / stride, X / stride)`."""
        y: Tensor = self.layers(x)
        if not self.has_shortcut:
            return y
        if self.training and self.drop_path:
            kept = 1 - self.drop_path
            y = y * (torch.rand(len(x), 1, 1, 1, device=x.device) < kept).to(y.dtype) / kept
        return x + y


class EfficientNet(nn.Module):
    """The stages of an EfficientNet, B0 to B3, without the classifier that follows them.

    variant: a key of COEFFICIENTS.
    """

    stride = 2

    def __init__(self, variant: str, in_channels: int) -> None:
        super().__init__()
        width, depth = COEFFICIENTS[variant]
        stages = [
            stage._replace(
                num_blocks=math.ceil(stage.num_blocks * depth), out_channels=round_channels(stage.out_channels * width)
            )
            for stage in STAGES
        ]
        num_blocks = sum(stage.num_blocks for stage in stages)
        channels = round_channels(STEM_CHANNELS * width)
        self.stem = ConvNormAct(in_channels, channels, 3, stride=2)
        self.stages = nn.ModuleList()
        number = 0
        for stage in stages:
            blocks = []
            for i in range(stage.num_blocks):
                stride = stage.stride if i == 0 else 1
                drop_path = DROP_PATH * number / num_blocks
                blocks.append(
                    MBConv(channels, stage.out_channels, stage.kernel_size, stride, stage.expansion, drop_path)
                )
                channels = stage.out_channels
                number += 1
            self.stages.append(nn.Sequential(*blocks))
        # The last stage before each halving of the grid, and the last of all.
        self.ends = [i for i in range(len(stages)) if i + 1 == len(stages) or stages[i + 1].stride == 2]
        self.out_channels = tuple(stages[i].out_channels for i in self.ends)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps `(B, out_channels[i], Y / 2^(i+1), X / 2^(i+1))`, fine to coarse: strides 2, 4, 8, 16, 32."""
        features = []
        y = self.stem(x)
        for i, stage in enumerate(self.stages):
            y = stage(y)
            if i in self.ends:
                features.append(y)
        return features


def round_channels(channels: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth smaller."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * channels else rounded + 8
