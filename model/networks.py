"""The two networks: a 3D U-Net that finds and numbers vertebrae, and a 2.5D CNN with BiGRU that judges each of them.

Only layers and shapes: how voxels become inputs is in `model/segment.py` and `model/classify.py`, training is in
`training/`. Shape letters: B batch, C channels, Z Y X voxels of a volume, S slices of a vertebra, F features.
"""

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

    Input: HU through two windows (`model.segment.network_input`), sides divisible by `stride`.
    Reference: Cicek et al., 3D U-Net, MICCAI 2016.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = 2 ** (len(channels) - 1)
        sizes = (2, *channels[1:])
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
        return scores


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


class RegionDecoder(nn.Module):
    """U-Net decoder over the slice encoder's features: the logit of "fracture" for every pixel."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels[i + 1] + channels[i], channels[i], 3, padding=1, bias=False),
                nn.BatchNorm2d(channels[i]),
                nn.ReLU(inplace=True),
            )
            for i in reversed(range(len(channels) - 1))
        )
        # The encoder's finest features are at half resolution: four sub-pixels each.
        last = nn.Conv2d(channels[0], 4, 3, padding=1)
        nn.init.constant_(last.bias, -4.0)  # type: ignore[arg-type]  # fracture is rare: training starts from "none"
        self.head = nn.Sequential(last, nn.PixelShuffle(2))

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits `(B, 1, Y, X)` from `SliceEncoder` features."""
        y = features[-1]
        for block, skip in zip(self.blocks, reversed(features[:-1]), strict=True):
            y = block(torch.cat([F.interpolate(y, scale_factor=2, mode="nearest"), skip], dim=1))
        return self.head(y)  # type: ignore[no-any-return]


class AdditiveAttention(nn.Module):
    """Weights a sequence: softmax of v . tanh(W x). Reference: Bahdanau et al., ICLR 2015."""

    def __init__(self, num_features: int, num_hidden: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(num_features, num_hidden), nn.Tanh(), nn.Linear(num_hidden, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted mean `(B, F)` and the weights `(B, S)`, which sum to 1."""
        weights = self.score(x).squeeze(-1).softmax(dim=1)
        return torch.einsum("bs,bsf->bf", weights, x), weights


class FractureNet(nn.Module):
    """One vertebra as a stack of slices: CNN per slice, BiGRU over slices, attention, one logit; and fracture regions.

    The region decoder shares the encoder. Its strongest pixels are among the features the GRU reads, so that the
    verdict rests on what is shown.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...], num_hidden: int) -> None:
        super().__init__()
        self.encoder = SliceEncoder(in_channels, channels)
        self.decoder = RegionDecoder(self.encoder.out_channels)
        num_features = 2 * channels[-1] + 2
        self.gru = nn.GRU(num_features, num_hidden, batch_first=True, bidirectional=True)
        self.attention = AdditiveAttention(2 * num_hidden, num_hidden)
        self.head = nn.Linear(2 * num_hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Level logits `(B,)`, attention over slices `(B, S)` and region logits `(B, S, Y, X)` of `(B, S, C, Y, X)`."""
        num_vertebrae, num_slices = x.shape[:2]
        features = self.encoder(x.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        regions = self.decoder(features).squeeze(1).reshape(num_vertebrae, num_slices, *x.shape[-2:])
        deepest = features[-1].flatten(2)
        strongest = regions.flatten(2).topk(24, dim=2).values / 4
        pooled = torch.cat([deepest.mean(2), deepest.amax(2)], dim=1).reshape(num_vertebrae, num_slices, -1)
        evidence = torch.stack([strongest[..., 0], strongest.mean(2)], dim=2)
        hidden, _ = self.gru(torch.cat([pooled, evidence], dim=2))
        context, weights = self.attention(hidden)
        return self.head(context).squeeze(1), weights, regions
