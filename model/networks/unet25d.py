"""U-Nets over slices with their neighbours: the reference vertebra U-Net, and the one for fracture regions."""

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from model.networks.encoders import make_encoder, total_stride
from model.networks.fracture import evidence

DECODER_CHANNELS = (16, 32, 64, 128, 256)
"""Of the decoder at strides 1, 2, 4, 8 and 16."""


class DecoderBlock(nn.Module):
    """Twice the grid, beside it the encoder's features if there are any, then two 3 x 3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels + skip_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """`(B, in_channels, Y, X)` and `(B, skip_channels, 2 Y, 2 X)` to `(B, out_channels, 2 Y, 2 X)`."""
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.layers(x if skip is None else torch.cat([x, skip], dim=1))  # type: ignore[no-any-return]


class SliceUNet(nn.Module):
    """The reference vertebra U-Net: one slice with its neighbours in, a class for each of its pixels out.

    Classes: 0 background, 1..7 = C1..C7, 8 = T1.
    Reference: Ronneberger et al., U-Net, MICCAI 2015, on an EfficientNet-B0 encoder.
    """

    def __init__(self, encoder: str = "efficientnet-b0", in_channels: int = 3, num_classes: int = 9) -> None:
        super().__init__()
        self.encoder = make_encoder(encoder, in_channels)
        channels = self.encoder.out_channels
        self.stride = total_stride(self.encoder)
        """What the sides of the input must be divisible by."""
        num_blocks = self.stride.bit_length() - 1
        skips = [*reversed(channels[:-1]), *[0] * (num_blocks - len(channels) + 1)]
        widths = [channels[-1], *reversed(DECODER_CHANNELS[:num_blocks])]
        self.decoder = nn.ModuleList(DecoderBlock(widths[i], skips[i], widths[i + 1]) for i in range(num_blocks))
        self.head = nn.Conv2d(widths[-1], num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `(B, num_classes, Y, X)` of `(B, in_channels, Y, X)`."""
        skips: list[Tensor] = self.encoder(x)
        y = skips.pop()
        for block in self.decoder:
            y = block(y, skips.pop() if skips else None)
        return self.head(y)  # type: ignore[no-any-return]


class SliceVertebraUNet(nn.Module):
    """The reference U-Net run over a volume slice by slice; it answers as `VertebraUNet` does, so that it can stand in.

    The level of a voxel is that of its likeliest vertebra: a whole number here.
    """

    NUM_AT_ONCE = 32
    """Slices; more need more memory and gain nothing."""

    def __init__(self, encoder: str = "efficientnet-b0") -> None:
        super().__init__()
        self.unet = SliceUNet(encoder)
        self.stride = self.unet.stride

    def forward(self, x: Tensor) -> list[Tensor]:
        """Scores `(B, 2, Z, Y, X)` of the input of `VertebraUNet`, of which the first window is read.

        Channel 0 is the logit of "vertebra", channel 1 the level, 1..8.
        """
        num_volumes, _, num_slices = x.shape[:3]
        window = torch.cat([x[:, :1, :1], x[:, :1], x[:, :1, -1:]], dim=2)
        triples = torch.cat([window[:, :, k : k + num_slices] for k in range(3)], dim=1)
        slices = triples.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        classes = torch.cat([self.unet(part) for part in torch.split(slices, self.NUM_AT_ONCE)])
        vertebra = classes[:, 1:].logsumexp(1) - classes[:, 0]
        level = classes[:, 1:].argmax(1) + 1
        scores = torch.stack([vertebra, level.to(vertebra.dtype)], dim=1)
        return [scores.reshape(num_volumes, num_slices, *scores.shape[1:]).transpose(1, 2)]


class RegionAnswer(NamedTuple):
    """logits: of "fractured", `(B,)`. regions: logits of "fracture", `(B, S, Y, X)`."""

    logits: Tensor
    regions: Tensor


class RegionUNet(nn.Module):
    """Fracture voxels inside one vertebra's stack of slices, and what they say of the vertebra.

    It shares nothing with `FractureNet`, learns from voxels alone, and so errs elsewhere: a second opinion. That
    opinion is the vertebra's `evidence`, scaled and shifted.
    """

    def __init__(self, encoder: str = "efficientnet-b0", in_channels: int = 6) -> None:
        super().__init__()
        self.unet = SliceUNet(encoder, in_channels, num_classes=1)
        nn.init.constant_(self.unet.head.bias, -4.0)  # type: ignore[arg-type]  # fracture is rare: training starts from "none"
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.offset = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> RegionAnswer:
        """Answers for `(B, S, in_channels, Y, X)`, of which the last channel is the vertebra's mask, 0..1."""
        num_vertebrae, num_slices = x.shape[:2]
        slices = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        regions = self.unet(slices).reshape(num_vertebrae, num_slices, *x.shape[-2:])
        return RegionAnswer(self.scale * evidence(regions, x[:, :, -1]) + self.offset, regions)
