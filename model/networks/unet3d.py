"""The 3D U-Net that finds and numbers vertebrae."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn


class ResidualBlock3d(nn.Module):
    """Two 3 x 3 x 3 convolutions with batch norm beside a shortcut; `stride` 2 halves the grid."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm3d(out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm3d(out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, Z, Y, X)` to `(B, out_channels, Z / stride, Y / stride, X / stride)`."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x), inplace=True)


class VertebraUNet(nn.Module):
    """3D residual U-Net: for each voxel, whether it is vertebra and at which level along the spine.

    The level is one number, not a class each: C1 is 1, C7 is 7, T1 is 8. Neighbouring vertebrae look alike, and an
    ordinal says "between C4 and C5" where classes must choose. Every decoder scale has a head; their outputs add up,
    so that coarse scales number and fine scales outline. At full resolution there is no encoder, only the input itself:
    most of the cost would be there.

    Batch norm, not instance norm: with the latter the numbers depended on how much air and shoulder the field of view
    holds (training/LOG.md).

    Input: `in_channels` at least two, HU through two windows first (`model.segment.network_input`); sides divisible by
    `stride`.
    Reference: Cicek et al., 3D U-Net, MICCAI 2016.
    """

    def __init__(self, channels: tuple[int, ...], in_channels: int = 2) -> None:
        super().__init__()
        self.stride = 2 ** (len(channels) - 1)
        sizes = (in_channels, *channels[1:])
        scales = list(reversed(range(len(channels) - 1)))
        self.encoder = nn.ModuleList(ResidualBlock3d(sizes[i], sizes[i + 1], stride=2) for i in range(len(sizes) - 1))
        self.narrow = nn.ModuleList(nn.Conv3d(channels[i + 1], channels[i], 1) for i in scales)
        self.decoder = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(channels[i] + sizes[i], channels[i], 3, padding=1, bias=False),
                nn.BatchNorm3d(channels[i]),
                nn.ReLU(inplace=True),
            )
            for i in scales
        )
        self.heads = nn.ModuleList(nn.Conv3d(channels[i], 2, 1) for i in scales)
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
        # Training starts from "background" and the middle of the neck; finer scales only add to it.
        self.heads[0].bias.data = torch.tensor([-3.0, 4.5])

    def forward(self, x: Tensor) -> list[Tensor]:
        """Scores `(B, 2, Z, Y, X)` at every decoder scale, coarse to fine; the last one is the answer.

        Channel 0 is the logit of "vertebra", channel 1 the level coordinate (meaningful only inside vertebrae).
        """
        return self.scores_and_features(x)[0]

    def scores_and_features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What `forward` gives, and the finest features `(B, channels[0], Z, Y, X)`, for what else is learned of
        them."""
        skips = [x]
        for block in self.encoder:
            skips.append(block(skips[-1]))
        y = skips.pop()
        scores: list[Tensor] = []
        for narrow, block, head in zip(self.narrow, self.decoder, self.heads, strict=True):
            y = F.interpolate(narrow(y), scale_factor=2, mode="nearest")
            y = block(torch.cat([y, skips.pop()], dim=1))
            score = head(y)
            if scores:
                score = score + F.interpolate(scores[-1], scale_factor=2, mode="trilinear", align_corners=False)
            scores.append(score)
        return scores, y
