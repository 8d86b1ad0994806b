"""Trains a vertebra U-Net on drawn and real necks together, with what is known of each voxel of either."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name PyTorch's own documentation uses
from torch import Tensor, nn

from model.geometry import FloatArray, Grid
from model.levels import LEVELS
from model.memory import in_bfloat16
from model.networks import VertebraUNet
from model.resample import AIR_HU
from model.segment import network_input, refiner_input
from training.necks.openkbp import OUTLINE_KNOWN, OUTLINE_SOME_BONE
from training.necks.samples import COARSE_MM, FINE_MM
from training.necks.synthetic import ARC_MM, AUX_BRAINSTEM, AUX_SKULL, AUX_UNKNOWN, MAX_LEVEL, straighten
from training.schedule import train
from training.vertebrae import TURN_DEG, cut_field_of_view, degraded, freeze_norms, turned

NUM_AUX = 4
"""None, cord, skull, mandible."""

SHARE_ANYWHERE = 0.08

SHARE_PITCHED, PITCH_DEG = 0.5, 40.0
"""Share of the crops that lean forward or back by up to PITCH_DEG, as patients on a wedge or with a stiff neck do. It
is real texture that leans, which drawn necks do not have."""

SHARE_TWISTED, TWIST_DEG = 0.4, 45.0
"""Share of the crops that are turned about their long axis by up to TWIST_DEG, as who lies on one shoulder is."""

SHARE_CURVED, CURVED_DEG = 0.5, (40.0, 15.0)
"""Share of the crops that are bent, by up to so much from end to end: forward or back, and to a side."""

SHARE_NODDING, NODDING_DEG, NODDING_MM = 0.4, (28.0, 12.0), (18.0, 35.0)
"""Share of the crops that are bent, or bent once more, somewhere along them: by up to so much, over twice so many mm.
So is the neck of who holds the head upright on a neck that leans."""

SHARE_REAL_GUESS = 0.75
"""Share of the refiner's crops that come with a coarse network's own answer, where one is kept beside the sample."""

SHARE_SHIFTED = 0.7
"""Share of the refiner's guesses whose borders between levels are put elsewhere (`shifted`)."""

COARSE_FACTOR = 3
"""Voxels of the fine grid along one of the coarse."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Crop:
    """hu and share float32 `(Z, Y, X)`; level, aux and certainty uint8, as in the samples.

    inputs: float32 `(C, Z, Y, X)`, what the network reads.
    """

    inputs: Tensor
    share: Tensor
    level: Tensor
    aux: Tensor
    certainty: Tensor


class AuxiliaryUNet(nn.Module):
    """The vertebra U-Net, and a head that names other structures; only the former is shipped."""

    def __init__(self, unet: VertebraUNet) -> None:
        super().__init__()
        self.unet = unet
        self.aux = nn.Conv3d(unet.heads[-1].in_channels, NUM_AUX, 1)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Scores at every scale, and logits `(B, NUM_AUX, Z, Y, X)`."""
        scores, features = self.unet.scores_and_features(x)
        return scores, self.aux(features)


def read_crop(path: Path, rng: np.random.Generator, shape: tuple[int, int, int], refine: bool = False) -> Crop:
    """A random piece of a cached sample, turned, scaled, mirrored, cut and degraded anew.

    refine: for the fine network, which also reads what the coarse one thought.
    """
    with np.load(path) as arrays:
        hu, share = (torch.from_numpy(arrays[name]).float() for name in ("hu", "share"))
        labels = [arrays[name] for name in ("level", "aux")]
        labels.append(arrays["certainty"] if "certainty" in arrays else np.full(hu.shape, OUTLINE_KNOWN, np.uint8))
        where = arrays["spine"] if "spine" in arrays else np.argwhere(labels[0][::2, ::2, ::2] > 0) * 2.0
    z, y, x = hu.shape
    centre = where[rng.integers(len(where))] + rng.uniform(-8, 8, size=3) - np.array([0, 6, 0])
    reach = 0.35 * np.asarray(shape)
    centre = np.clip(
        centre, np.minimum(reach, np.array([z, y, x]) / 2), np.maximum([z, y, x] - reach, np.array([z, y, x]) / 2)
    )
    if rng.random() < SHARE_ANYWHERE:
        centre = rng.uniform(0, hu.shape)
    pitch_deg = PITCH_DEG if rng.random() < SHARE_PITCHED else TURN_DEG
    twist_deg = TWIST_DEG if rng.random() < SHARE_TWISTED else TURN_DEG
    target = Grid(shape=shape, affine=turned(centre, np.asarray(shape), rng, (pitch_deg, TURN_DEG, twist_deg)))
    places = crop_places(target, FINE_MM if refine else COARSE_MM, rng)
    hu, share = look_up(torch.stack([hu - AIR_HU, share / 255]), places)
    # Beyond the sample nothing is known but that it is air.
    stacked = torch.from_numpy(np.stack([*labels, np.ones((z, y, x), np.uint8)])).float()
    level, aux, certainty, inside = look_up(stacked, places, nearest=True).to(torch.uint8)
    outside = inside == 0
    certainty[outside] = OUTLINE_KNOWN
    hu = hu + AIR_HU
    if rng.random() < 0.4:
        known = share.clone()
        cut_field_of_view(hu, share, rng)
        certainty[(known != share) | (hu <= AIR_HU)] = OUTLINE_KNOWN
        aux[hu <= AIR_HU] = 0
    aux[aux == AUX_BRAINSTEM] = AUX_UNKNOWN
    if refine:
        hu = thick_slices(hu, int(rng.choice([1, 1, 1, 2, 3, 4])))
        known_guess = guess_path(path)
        if known_guess.exists() and rng.random() < SHARE_REAL_GUESS:
            guess = real_guess(known_guess, places, hu)
        else:
            guess = coarse_guess(share, level.float(), rng)
        logit, guessed_level = guess
        inputs = refiner_input(degraded(hu, rng), logit, shifted(guessed_level, rng))
    else:
        inputs = network_input(degraded(hu, rng))
    return Crop(inputs=inputs, share=share, level=level, aux=aux, certainty=certainty)


def crop_places(crop: Grid, spacing_mm: float, rng: np.random.Generator) -> Tensor:
    """Where in a sample, in its voxels, the voxels of a crop lie, `(Z, Y, X, 3)`, z first; some crops are bent.

    crop: in voxels of the sample. Real texture is bent with the neck so, as no patient's head can be asked to be.
    """
    points = np.stack(np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in crop.shape), indexing="ij"), axis=-1)
    xyz = points.reshape(-1, 3)[:, ::-1].copy()
    if rng.random() < SHARE_CURVED:
        _bend(xyz, 0.0, ARC_MM / spacing_mm, CURVED_DEG, rng)
    if rng.random() < SHARE_NODDING:
        reach = rng.uniform(*NODDING_MM) / spacing_mm
        _bend(xyz, rng.uniform(-0.4, 0.4) * crop.shape[0], reach, NODDING_DEG, rng)
    places = (xyz[:, ::-1] + (np.asarray(crop.shape) - 1) / 2) @ crop.affine[:3, :3].T + crop.affine[:3, 3]
    return torch.from_numpy(places.reshape(*crop.shape, 3).astype(np.float32))


def _bend(
    points: FloatArray, height: float, reach: float, most_deg: tuple[float, float], rng: np.random.Generator
) -> None:
    """Bends at random about a height, in place: forward or back, and to a side. Arguments as of `straighten`."""
    points[:, 2] -= height
    for axis, most in zip((1, 0), most_deg, strict=True):
        straighten(points, axis, np.deg2rad(rng.uniform(-most, most)) / (2 * reach), reach)
    points[:, 2] += height


def look_up(voxels: Tensor, places: Tensor, *, nearest: bool = False) -> Tensor:
    """`voxels`, float32 `(C, Z, Y, X)`, at places in their indices, as `crop_places` gives them; 0 outside."""
    unit = places * 2 / (torch.tensor(voxels.shape[1:]) - 1) - 1
    mode = "nearest" if nearest else "bilinear"
    return F.grid_sample(voxels[None], unit.flip(-1)[None], mode=mode, align_corners=True)[0]


def thick_slices(hu: Tensor, factor: int) -> Tensor:
    """Slices averaged by `factor` and interpolated again, as a thicker Series looks on a finer grid."""
    if factor == 1:
        return hu
    thick = F.avg_pool3d(hu[None, None], (factor, 1, 1), ceil_mode=True, count_include_pad=False)
    return F.interpolate(thick, size=hu.shape, mode="trilinear", align_corners=False)[0, 0]


def shifted(level: Tensor, rng: np.random.Generator) -> Tensor:
    """The guess with its borders elsewhere: up to half a vertebra off, by more at one end than at the other.

    So is what a coarse network says of real necks, which it counts rightly and cuts in the wrong places; of drawn
    necks, which it knows, it says nothing so wrong. The refiner is to look for the discs itself.
    """
    if rng.random() >= SHARE_SHIFTED:
        return level
    along = torch.linspace(-1, 1, level.shape[0])[:, None, None]
    return level + rng.uniform(-0.45, 0.45) + rng.uniform(-0.2, 0.2) * along


def guess_path(path: Path) -> Path:
    """Where the coarse network's answer to a fine sample is kept."""
    return path.with_suffix(".guess.npy")


@torch.inference_mode()
def write_guess(unet: VertebraUNet, path: Path) -> None:
    """Asks the trained coarse network what it thinks of a fine sample, and keeps it, `(2, Z, Y, X)`, float16.

    The sample shows a part of a neck only, of which the level cannot be counted: a whole number is taken from it, so
    that most of it is right, and what is left are mistakes within and between vertebrae.
    """
    with np.load(path) as arrays:
        hu, share, level = (torch.from_numpy(arrays[name].astype(np.float32)) for name in ("hu", "share", "level"))
    factor = (COARSE_FACTOR,) * 3
    hu = F.avg_pool3d(hu[None], factor)[0]
    padding = [(-n) % unet.stride for n in hu.shape]
    padded = F.pad(hu, (0, padding[2], 0, padding[1], 0, padding[0]), value=AIR_HU)
    scores = unet(network_input(padded)[None])[-1][0, :, : hu.shape[0], : hu.shape[1], : hu.shape[2]].float()
    mass = F.avg_pool3d(share[None] / 255, factor)[0]
    truth = F.avg_pool3d((share * level)[None] / 255, factor)[0] / mass.clamp(min=1e-3)
    bone = (mass > 0.5) & (truth <= len(LEVELS) + 1)
    if bone.any():
        scores[1] -= (scores[1] - truth)[bone].median().round()
    guess = guess_path(path)
    unfinished = guess.with_suffix(".tmp")
    with unfinished.open("wb") as file:
        np.save(file, scores.half().numpy())
    unfinished.replace(guess)


def real_guess(path: Path, places: Tensor, hu: Tensor) -> tuple[Tensor, Tensor]:
    """What `write_guess` kept, at the places of a crop (`crop_places`): logit and level."""
    scores = torch.from_numpy(np.load(path).astype(np.float32))
    outside = torch.tensor([-8.0, 0.0])[:, None, None, None]
    coarse_places = (places - (COARSE_FACTOR - 1) / 2) / COARSE_FACTOR
    logit, level = look_up(scores - outside, coarse_places) + outside
    return torch.where(hu <= AIR_HU, -8.0, logit), level


def coarse_guess(share: Tensor, level: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Scores as a coarse network might give them for this truth: blunt, patchy, and here and there of the wrong level.

    share, level: `(Z, Y, X)` on the fine grid, 1 mm. Gives logit and level, of the same shape.
    """
    mass = F.avg_pool3d(share[None], COARSE_FACTOR, ceil_mode=True)[0]
    mean = F.avg_pool3d((share * level)[None], COARSE_FACTOR, ceil_mode=True)[0] / mass.clamp(min=1e-3)
    logit = rng.uniform(6, 10) * (mass - rng.uniform(0.35, 0.6)) + rng.uniform(0.3, 1.6) * _smooth(mass.shape, 3, rng)
    guess = mean + rng.uniform(0.05, 0.35) * _smooth(mass.shape, 6, rng)
    where = torch.nonzero(mass > 0.3)
    for _ in range(int(rng.integers(0, 4)) if len(where) else 0):
        centre = where[int(rng.integers(len(where)))]
        place = torch.meshgrid(*(torch.arange(n) for n in mass.shape), indexing="ij")
        away = sum((axis - at) ** 2 for axis, at in zip(place, centre, strict=True)).float().sqrt()
        guess = guess + rng.choice([-1.0, 1.0]) * rng.uniform(0.4, 1.0) * (away < rng.uniform(2, 6)).float()
    both = torch.stack([logit, guess])[None]
    fine = F.interpolate(both, scale_factor=COARSE_FACTOR, mode="trilinear", align_corners=False)[0]
    z, y, x = share.shape
    return fine[0, :z, :y, :x], fine[1, :z, :y, :x]


def _smooth(shape: torch.Size, reach: int, rng: np.random.Generator) -> Tensor:
    """Noise of about unit size that changes over `reach` voxels."""
    coarse = [max(2, n // reach + 1) for n in shape]
    values = torch.from_numpy(rng.normal(size=(1, 1, *coarse)).astype(np.float32))
    return 1.5 * F.interpolate(values, size=tuple(shape), mode="trilinear", align_corners=True)[0, 0]


def necks_loss(scores: list[Tensor], aux_logits: Tensor, crops: list[Crop], level_weight: float = 0.75) -> Tensor:
    """Outline, level at every scale, and the other structures; each where it is known."""
    share = torch.stack([crop.share for crop in crops])
    level = torch.stack([crop.level for crop in crops]).float()
    aux = torch.stack([crop.aux for crop in crops]).long()
    certainty = torch.stack([crop.certainty for crop in crops])
    logit, aux_logits = scores[-1][:, 0].float(), aux_logits.float()
    known = (certainty == OUTLINE_KNOWN).float()
    probability = logit.sigmoid()
    cross = F.binary_cross_entropy_with_logits(logit, share, reduction="none")
    # Both sides of a surface weigh the same: weighting bone alone drew vertebrae a quarter too large.
    near_bone = F.max_pool3d(share[:, None], 3, stride=1, padding=1)[:, 0]
    outline = (cross * known * (1 + 3 * near_bone)).sum() / known.sum().clamp(min=1)
    dice = 1 - (2 * (probability * share * known).sum() + 1) / (
        ((probability.square() + share.square()) * known).sum() + 1
    )
    named = aux_logits.log_softmax(dim=1)
    other = (
        F.nll_loss(
            named,
            aux.where(aux != AUX_UNKNOWN, -100),
            weight=torch.tensor([0.3, 3.0, 1.0, 1.0]),
            ignore_index=-100,
            reduction="sum",
        )
        / aux.numel()
    )
    total = 3 * outline + dice + 2 * other
    some = certainty == OUTLINE_SOME_BONE
    if some.any():
        neither = (1 - probability) * (1 - named[:, AUX_SKULL].exp())
        total = total - 0.3 * (1 - neither[some]).clamp(min=1e-4).log().mean()
    weight = share * (level > 0) * known
    if weight.any():
        total = total + level_weight * sum(level_loss(score[:, 1].float(), level, weight) for score in scores)
    return total


def level_loss(coordinate: Tensor, level: Tensor, weight: Tensor) -> Tensor:
    """Smooth L1 of the level at one scale; from MAX_LEVEL on, more is as good."""
    factor = level.shape[1] // coordinate.shape[1]
    mass = F.avg_pool3d(weight, factor)
    mean = F.avg_pool3d(weight * level, factor) / mass.clamp(min=1e-6)
    coordinate = torch.where(mean >= MAX_LEVEL - 0.01, coordinate.clamp(max=MAX_LEVEL), coordinate)
    error = F.smooth_l1_loss(coordinate, mean, reduction="none", beta=0.5)
    return (error * mass).sum() / mass.sum().clamp(min=1e-6)


def train_necks(
    network: AuxiliaryUNet,
    sources: list[tuple[float, list[Path]]],
    *,
    num_steps: int,
    learning_rate: float,
    shape: tuple[int, int, int],
    batch_size: int = 2,
    norm_share: float = 0.5,
    refine: bool = False,
    level_weight: float = 0.75,
    seed: int = 0,
) -> Iterator[tuple[int, float]]:
    """Trains in place, leaving the averaged weights; gives step and loss.

    sources: shares and the cached samples to draw them from. level_weight: of the level's error at one scale beside the
    outline's.
    """
    torch.manual_seed(seed)
    shares = np.array([share for share, _ in sources])
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def draw(step: int) -> list[Crop]:
        rng = np.random.default_rng([seed, step])
        crops = []
        for _ in range(batch_size):
            paths = sources[rng.choice(len(sources), p=shares / shares.sum())][1]
            crops.append(read_crop(paths[rng.integers(len(paths))], rng, shape, refine))
        return crops

    with ThreadPoolExecutor(1) as pool:
        ahead = {0: pool.submit(draw, 0)}

        def loss_of_step(step: int) -> Tensor:
            if step >= norm_share * num_steps:
                freeze_norms(network)
            crops = ahead.pop(step).result()
            if step + 1 < num_steps:
                ahead[step + 1] = pool.submit(draw, step + 1)
            inputs = torch.stack([crop.inputs for crop in crops]).contiguous(memory_format=torch.channels_last_3d)
            with in_bfloat16("cpu"):
                scores, aux_logits = network(inputs)
            return necks_loss(scores, aux_logits, crops, level_weight)

        yield from train(network, loss_of_step, num_steps=num_steps, learning_rate=learning_rate)
