"""What turns a slice with its neighbours into feature maps, by name.

An encoder is any module with `out_channels`, fine to coarse, whose answer is a list of feature maps of which each has
half the grid of the one before; `stride` is the first one's.
"""

import itertools
import re

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from model.networks.efficientnet import COEFFICIENTS, EfficientNet


def make_encoder(name: str, in_channels: int) -> "ResidualEncoder | EfficientNet | TimmEncoder":
    """An untrained encoder of `(B, in_channels, Y, X)`.

    name: `residual-24-48-96` (channels of each scale), `efficientnet-b0` to `-b3`, or `timm:` and a model of timm.

    Raises:
        ValueError: there is no such encoder, or it does not fit.
        ModuleNotFoundError: timm is asked for and not installed.
    """
    if match := re.fullmatch(r"residual((?:-\d+)+)", name):
        return ResidualEncoder(in_channels, tuple(int(channels) for channels in match[1][1:].split("-")))
    family, _, variant = name.partition("-")
    if family == "efficientnet" and variant in COEFFICIENTS:
        return EfficientNet(variant, in_channels)
    if name.startswith("timm:"):
        return TimmEncoder(name.removeprefix("timm:"), in_channels)
    raise ValueError(
        f"There is no encoder {name!r}. Name residual-N-N-... with the channels of each scale, "
        f"{', '.join(f'efficientnet-{variant}' for variant in COEFFICIENTS)}, or timm:NAME."
    )


def total_stride(encoder: "ResidualEncoder | EfficientNet | TimmEncoder") -> int:
    """What the sides of an encoder's input must be divisible by, so that decoders can double its features back."""
    return int(encoder.stride * 2 ** (len(encoder.out_channels) - 1))


class ResidualBlock2d(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut; `stride` 2 halves the grid."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, Y, X)` to `(B, out_channels, Y / stride, X / stride)`."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        # The stride is taken before the convolution, which is the same: oneDNN 3.12, in PyTorch 2.13, crashes in the
        # backward pass of a 1 x 1 convolution with a stride on CPUs with AVX-512.
        return F.relu(y + self.shortcut(x[..., :: self.stride, :: self.stride]), inplace=True)


class ResidualEncoder(nn.Module):
    """Small residual CNN, for a model that fits into a repository and a CPU."""

    stride = 2

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 5, 2, 2, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.ModuleList(
            ResidualBlock2d(channels[max(i - 1, 0)], channels[i], stride=1 if i == 0 else 2)
            for i in range(len(channels))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps `(B, out_channels[i], Y / 2^(i+1), X / 2^(i+1))`, fine to coarse."""
        features = []
        y = self.stem(x)
        for stage in self.stages:
            y = stage(y)
            features.append(y)
        return features


class TimmEncoder(nn.Module):
    """Any backbone of timm that gives features at halving scales of slices of any size, untrained.

    Not those that read one size only, as many with attention do.
    """

    def __init__(self, name: str, in_channels: int) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"The encoder timm:{name} needs timm, which is not installed: pip install timm. "
                "It brings torchvision; efficientnet-b0 needs neither."
            ) from error
        try:
            self.backbone = timm.create_model(name, pretrained=False, features_only=True, in_chans=in_channels)
        except RuntimeError as error:
            raise ValueError(f"timm has no model {name!r} with features at several scales ({error}).") from error
        strides = self.backbone.feature_info.reduction()
        if any(after != 2 * before for before, after in itertools.pairwise(strides)):
            raise ValueError(f"timm:{name} has features at strides {strides}; each must be twice the one before.")
        self.stride = int(strides[0])
        self.out_channels = tuple(self.backbone.feature_info.channels())
        self.is_channels_last = self._answers_channels_last(name, in_channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps `(B, out_channels[i], Y / (stride * 2^i), X / (stride * 2^i))`, fine to coarse."""
        features = self.backbone(x)
        return [feature.permute(0, 3, 1, 2) for feature in features] if self.is_channels_last else list(features)

    @torch.no_grad()
    def _answers_channels_last(self, name: str, in_channels: int) -> bool:
        """Whether features come as `(B, Y, X, C)`, as of some backbones.

        Raises:
            ValueError: they come otherwise, or this size of slice is none that the backbone reads.
        """
        side = 2 * total_stride(self)
        sides = [side // (self.stride * 2**i) for i in range(len(self.out_channels))]
        was_training = self.backbone.training
        try:
            found = [
                tuple(feature.shape[1:]) for feature in self.backbone.eval()(torch.zeros(1, in_channels, side, side))
            ]
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"timm:{name} does not read slices of {side} x {side} pixels ({error}). Name a backbone that reads any "
                "size."
            ) from error
        self.backbone.train(was_training)
        if found == [(channels, n, n) for channels, n in zip(self.out_channels, sides, strict=True)]:
            return False
        if found == [(n, n, channels) for channels, n in zip(self.out_channels, sides, strict=True)]:
            return True
        raise ValueError(
            f"timm:{name} gives features of shapes {found} of {side} x {side} pixels; sides must be {sides}."
        )
