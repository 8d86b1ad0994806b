"""The compute of the RSNA 2022 winner's design, with random weights: one network of each kind (the winner ran 31).

A resnet18d inflated to 3D in a U-Net on 128 x 128 x 128 voxels finds the vertebrae; an EfficientNetV2-S over 7 x 15
images of 6 channels and a BiLSTM judge them. Written from the published architectures; only their cost is wanted.
References: He et al., CVPR 2019 (resnet-d); Tan and Le, ICML 2021, table 4 (EfficientNetV2-S).
"""

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from model.networks.efficientnet import ConvNormAct, MBConv

NUM_VERTEBRAE, NUM_SLICES, NUM_PIXELS = 7, 15, 224
UNET_SIDE = 128


class ConvNorm3d(nn.Sequential):
    """Convolution without bias, and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1) -> None:
        padding = kernel_size // 2
        super().__init__(
            nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding, bias=False), nn.BatchNorm3d(out_channels)
        )


class Block3d(nn.Module):
    """ResNet's basic block; of the shortcut, resnet-d averages before it projects."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm3d(in_channels, out_channels, stride=stride)
        self.conv2 = ConvNorm3d(out_channels, out_channels)
        is_same = stride == 1 and in_channels == out_channels
        pool = nn.AvgPool3d(2) if stride == 2 else nn.Identity()
        self.shortcut = nn.Identity() if is_same else nn.Sequential(pool, ConvNorm3d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class WinnersUNet(nn.Module):
    """`(1, 1, 128, 128, 128)` to logits of C1..C7, `(1, 7, 128, 128, 128)`."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 64, 128, 256, 512)
        stem = ((1, 32, 2), (32, 32, 1), (32, 64, 1))
        self.stem = nn.Sequential(
            *(nn.Sequential(ConvNorm3d(before, after, stride=stride), nn.ReLU()) for before, after, stride in stem)
        )
        self.pool = nn.MaxPool3d(3, 2, 1)
        self.stages = nn.ModuleList(
            nn.Sequential(
                Block3d(sizes[i], sizes[i + 1], stride=2 if i else 1), Block3d(sizes[i + 1], sizes[i + 1], stride=1)
            )
            for i in range(4)
        )
        decoder = ((512 + 256, 256), (256 + 128, 128), (128 + 64, 64), (64 + 64, 32), (32, 16))
        self.decoder = nn.ModuleList(
            nn.Sequential(ConvNorm3d(before, after), nn.ReLU(), ConvNorm3d(after, after), nn.ReLU())
            for before, after in decoder
        )
        self.head = nn.Conv3d(16, NUM_VERTEBRAE, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.stem(x)]
        y = self.pool(skips[0])
        for stage in self.stages:
            y = stage(y)
            skips.append(y)
        skips.pop()
        for block in self.decoder:
            y = F.interpolate(y, scale_factor=2, mode="nearest")
            y = block(torch.cat([y, skips.pop()], dim=1) if skips else y)
        logits: Tensor = self.head(y)
        return logits


class FusedMBConv(nn.Module):
    """Inverted residual whose expansion is itself the 3 x 3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        expanded = in_channels * expansion
        self.layers = nn.Sequential(
            ConvNormAct(in_channels, expanded, 3, stride),
            *([ConvNormAct(expanded, out_channels, 1, is_linear=True)] if expansion > 1 else []),
        )
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.has_shortcut else y


class WinnersClassifier(nn.Module):
    """`(7, 15, 6, 224, 224)` to the logit of each slice, `(7, 15)`."""

    # number of blocks, channels, stride, expansion
    FUSED = ((2, 24, 1, 1), (4, 48, 2, 4), (4, 64, 2, 4))
    SQUEEZED = ((6, 128, 2, 4), (9, 160, 1, 6), (15, 256, 2, 6))

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [ConvNormAct(6, 24, 3, 2)]
        channels = 24
        for num_blocks, after, stride, expansion in self.FUSED:
            for number in range(num_blocks):
                blocks.append(FusedMBConv(channels, after, 1 if number else stride, expansion))
                channels = after
        for num_blocks, after, stride, expansion in self.SQUEEZED:
            for number in range(num_blocks):
                blocks.append(MBConv(channels, after, 3, 1 if number else stride, expansion, drop_path=0.0))
                channels = after
        self.encoder = nn.Sequential(*blocks, ConvNormAct(channels, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.lstm = nn.LSTM(1280, 256, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(512, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        hidden, _ = self.lstm(features.reshape(*x.shape[:2], -1))
        logits: Tensor = self.head(hidden)[..., 0]
        return logits


def winners_networks(device: torch.device) -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    """Each network with an input of its size, ready to run."""
    unet, classifier = WinnersUNet().eval(), WinnersClassifier().eval()
    unet.to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return {
        "3D U-Net, resnet18d": (unet, (torch.randn(1, 1, UNET_SIDE, UNET_SIDE, UNET_SIDE, device=device),)),
        "EfficientNetV2-S + BiLSTM": (
            classifier,
            (torch.randn(NUM_VERTEBRAE, NUM_SLICES, 6, NUM_PIXELS, NUM_PIXELS, device=device),),
        ),
    }
