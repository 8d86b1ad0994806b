"""The 2.5D CNN with BiGRU and attention that judges one vertebra."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from model.networks.encoders import SliceEncoder


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
