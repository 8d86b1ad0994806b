"""What turns a slice with its neighbours into feature maps."""

import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn


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


class SliceEncoder(nn.Module):
    """Small residual CNN over one slice with its neighbours. Any module with `out_channels` and this output fits."""

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
