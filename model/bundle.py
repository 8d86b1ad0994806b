"""A trained model in one place: safetensors weights and `bundle.json`, which says what they are and how to use them.

A bundle is a folder, or a zip of one, with or without the folder itself. Reading verifies the sha256 of every weights
file and every key of the JSON; nothing in a bundle is executed. This module imports torch only to load weights, so that
a bundle can be checked and named without it.
"""

import hashlib
import json
import math
import shutil
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.calibrate import Challenge, Platt
from model.findings import ModelInfo
from model.levels import LEVELS, OUTPUTS
from model.typed_json import from_json

if TYPE_CHECKING:
    from torch import nn

    from model.networks import FractureNet, RegionUNet, SliceVertebraUNet, StudyNet, VertebraUNet

FORMAT = 2
"""Version of the bundle layout this code reads and writes."""

MAX_FOLDS = 100

DEFAULT_BUNDLE = Path(__file__).parent / "weights" / "necks"
"""The bundle that comes with the package."""

READ_ERRORS = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""Of a file, or of a zip that is damaged, encrypted, or compressed in a way that Python does not know."""

PHANTOM_BUNDLE = Path(__file__).parent / "weights" / "phantom"
"""A second one, which knows the procedural phantom and nothing else: for the demo and tests on phantoms."""

DESCRIPTION = "bundle.json"
VERTEBRA_WEIGHTS = "vertebra_unet.safetensors"
REFINER_WEIGHTS = "vertebra_refiner.safetensors"
FRACTURE_WEIGHTS = "fracture_net.safetensors"
STUDY_WEIGHTS = "study_net.safetensors"
REGION_WEIGHTS = "region_unet.safetensors"
"""Names of the weights files; those of several folds have the fold's number before the suffix, from 0."""


class BundleError(Exception):
    """A model bundle that is missing, damaged, or of another architecture than this version reads."""


SPACING_MM = (0.1, 10.0)
"""Smallest and largest distance of voxels or pixels that a network may want."""


def _check_range(name: str, value: float, limits: tuple[float, float]) -> None:
    """Refuses a number that is outside, or none: it would show as a crash in the middle of an analysis."""
    if not limits[0] <= value <= limits[1]:
        raise ValueError(f"{name} is {value}; it must be from {limits[0]:g} to {limits[1]:g}")


def _check_channels(name: str, channels: tuple[int, ...]) -> None:
    """Refuses scales that make no U-Net."""
    if len(channels) < 2 or min(channels) < 1:
        raise ValueError(f"{name} is {list(channels)}; two or more numbers from 1 on are needed")


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """The vertebra U-Net and the grid it works on: one of the two.

    channels: of the 3D U-Net's scales, fine to coarse. encoder: of the 2.5D U-Net, see `model.networks.make_encoder`.
    spacing_mm: of the isotropic grid. continued_mm: slices that end in the neck are continued so far by their last one,
    without its bone; 0 for a network that numbers rightly what ends in air.
    """

    channels: tuple[int, ...] = ()
    encoder: str | None = None
    spacing_mm: float
    continued_mm: float = 0.0

    def __post_init__(self) -> None:
        _check_range("segment.continued_mm", self.continued_mm, (0, 500))
        if (self.encoder is None) == (not self.channels):
            raise ValueError("segment needs either channels, for a 3D U-Net, or an encoder, for a 2.5D U-Net")
        if self.channels:
            _check_channels("segment.channels", self.channels)
        _check_range("segment.spacing_mm", self.spacing_mm, SPACING_MM)


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """A second vertebra U-Net, on a finer grid around what the first one found.

    in_channels: of its input: the two windows, and what it is told of the coarse answer.
    """

    channels: tuple[int, ...]
    in_channels: int
    spacing_mm: float

    def __post_init__(self) -> None:
        _check_channels("refine.channels", self.channels)
        _check_range("refine.in_channels", self.in_channels, (1, 100))
        _check_range("refine.spacing_mm", self.spacing_mm, SPACING_MM)


@dataclass(frozen=True, kw_only=True)
class ClassifySettings:
    """The fracture network and the stack of slices it reads for each vertebra.

    encoder: see `model.networks.make_encoder`. num_hidden: GRU units per direction. num_heads: 1 for all levels, or 7.
    num_layers: of the GRU. num_slices: slices over the vertebra's extent. num_pixels, pixel_mm: side and pixel size of
    a slice. window_hu: what is told apart in it. region_threshold: probability from which a pixel is shown as fracture.
    mirrored: the answer is the mean of the one to the vertebra and the one to its mirror image, at twice the cost.
    """

    encoder: str
    num_hidden: int
    num_heads: int = 1
    num_layers: int = 1
    num_slices: int
    num_pixels: int
    pixel_mm: float
    window_hu: tuple[float, float] = (-700.0, 1800.0)
    region_threshold: float
    mirrored: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.window_hu[0] < self.window_hu[1] < math.inf:
            raise ValueError(f"classify.window_hu is {self.window_hu}; the first must be below the second")
        _check_range("classify.num_slices", self.num_slices, (2, 1000))
        _check_range("classify.num_pixels", self.num_pixels, (1, 4096))
        _check_range("classify.pixel_mm", self.pixel_mm, SPACING_MM)
        _check_range("classify.region_threshold", self.region_threshold, (0, 1))
        if self.num_heads not in (1, len(LEVELS)):
            raise ValueError(f"classify.num_heads is {self.num_heads}; it must be 1 or {len(LEVELS)}")


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """The network over the seven levels. num_hidden: GRU units per direction."""

    num_hidden: int


@dataclass(frozen=True, kw_only=True)
class RegionSettings:
    """The fracture-region U-Net: it draws the regions then, and gives a second opinion on each level.

    encoder: see `model.networks.make_encoder`. weight: of its logit in the level's, 0..1.
    """

    encoder: str
    weight: float

    def __post_init__(self) -> None:
        _check_range("regions.weight", self.weight, (0, 1))


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """One source of what the model learned from. use: which part of the model it trained, chose or measured."""

    name: str
    licence: str
    use: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Networks:
    """The networks of a bundle.

    refiner: None where the coarse vertebra U-Net's outline is final. fracture_nets: one for each fold. study_nets: the
    same, each beside the fracture network it was trained with, or none at all.
    """

    unet: "VertebraUNet | SliceVertebraUNet"
    refiner: "VertebraUNet | None" = None
    fracture_nets: "tuple[FractureNet, ...]"
    study_nets: "tuple[StudyNet, ...]" = ()
    region_net: "RegionUNet | None" = None

    def by_file(self) -> "dict[str, nn.Module]":
        """Each network by the name of its weights file."""
        networks: dict[str, nn.Module] = {VERTEBRA_WEIGHTS: self.unet}
        if self.refiner is not None:
            networks[REFINER_WEIGHTS] = self.refiner
        networks.update(zip(_of_folds(FRACTURE_WEIGHTS, len(self.fracture_nets)), self.fracture_nets, strict=True))
        networks.update(zip(_of_folds(STUDY_WEIGHTS, len(self.study_nets)), self.study_nets, strict=True))
        if self.region_net is not None:
            networks[REGION_WEIGHTS] = self.region_net
        return networks


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle.

    folder: where it is; may be a zip file. refine, study, regions: None where there is no such network. num_folds: how
    many fracture networks, and study networks, answer together. calibration: from logits to probabilities, by output;
    an output that is not named is not calibrated. challenge: other numbers, made for the RSNA challenge's metric and
    never shown as probabilities. metrics: what its training measured, for people to read. sha256: of its weights files
    by name, as they were read; it counts for nothing in `==`.
    """

    folder: Path
    info: ModelInfo
    segment: SegmentSettings
    refine: RefineSettings | None = None
    classify: ClassifySettings
    num_folds: int = 1
    study: StudySettings | None = None
    regions: RegionSettings | None = None
    calibration: dict[str, Platt] = field(default_factory=dict)
    challenge: Challenge | None = None
    training_data: tuple[TrainingData, ...] = ()
    metrics: dict[str, Any]
    sha256: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.num_folds <= MAX_FOLDS:
            raise ValueError(f"num_folds is {self.num_folds}; 1 to {MAX_FOLDS} are possible")
        if unknown := sorted(self.calibration.keys() - set(OUTPUTS)):
            raise ValueError(f"calibration has {', '.join(unknown)}; the outputs are {', '.join(OUTPUTS)}")

    @property
    def file_names(self) -> tuple[str, ...]:
        """The weights files such a bundle has."""
        return (
            VERTEBRA_WEIGHTS,
            *([REFINER_WEIGHTS] if self.refine else []),
            *_of_folds(FRACTURE_WEIGHTS, self.num_folds),
            *_of_folds(STUDY_WEIGHTS, self.num_folds if self.study else 0),
            *([REGION_WEIGHTS] if self.regions else []),
        )

    def to_dict(self) -> dict[str, Any]:
        """What `bundle.json` says, but for the format."""
        content = asdict(self)
        del content["folder"]
        return content

    def new_networks(self) -> Networks:
        """Networks of this architecture, untrained.

        Raises:
            BundleError: there is no such encoder, it needs a package that is not installed, or cannot read the slices.
        """
        from model.networks import FractureNet, RegionUNet, SliceVertebraUNet, StudyNet, VertebraUNet

        folds = range(self.num_folds)
        segment, refine, classify = self.segment, self.refine, self.classify
        study, regions = self.study, self.regions
        try:
            networks = Networks(
                unet=SliceVertebraUNet(segment.encoder) if segment.encoder else VertebraUNet(segment.channels),
                refiner=VertebraUNet(refine.channels, refine.in_channels) if refine else None,
                fracture_nets=tuple(
                    FractureNet(
                        classify.encoder,
                        classify.num_hidden,
                        num_heads=classify.num_heads,
                        num_layers=classify.num_layers,
                    )
                    for _ in folds
                ),
                study_nets=tuple(StudyNet(2 * classify.num_hidden, study.num_hidden) for _ in folds) if study else (),
                region_net=RegionUNet(regions.encoder) if regions else None,
            )
            strides = [network.stride for network in networks.fracture_nets]
            strides += [networks.region_net.unet.stride] if networks.region_net else []
            for stride in strides:
                if classify.num_pixels % stride:
                    raise ValueError(f"classify.num_pixels is {classify.num_pixels}; a multiple of {stride} is needed")
        except (ValueError, ModuleNotFoundError) as error:
            raise BundleError(f"The model bundle {self.folder} cannot be used here: {error}") from error
        return networks

    def digest(self) -> str:
        """The sha256 of `bundle.json`, which names that of every other file."""
        return hashlib.sha256((_files(self.folder) / DESCRIPTION).read_bytes()).hexdigest()

    def load_networks(self) -> Networks:
        """All networks on the CPU in evaluation mode.

        Raises:
            BundleError: the weights do not fit the architecture the bundle names, or it cannot be built here.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        networks = self.new_networks()
        files = _files(self.folder)
        for name, network in networks.by_file().items():
            try:
                network.load_state_dict(load((files / name).read_bytes()))
            except (RuntimeError, SafetensorError) as error:
                raise BundleError(
                    f"{self.folder / name} does not fit the architecture in {DESCRIPTION} ({error}). "
                    "Use the two as they were exported together."
                ) from error
            network.eval()
        return networks


def read_bundle(folder: Path | None = None) -> Bundle:
    """The bundle in a folder or zip file, every file verified; None takes the one that comes with the package.

    Raises:
        BundleError: what is missing, damaged or unknown, and what to do.
    """
    folder = DEFAULT_BUNDLE if folder is None else Path(folder)
    path = folder / DESCRIPTION
    try:
        files = _files(folder)
        content = json.loads((files / DESCRIPTION).read_text(encoding="utf-8"))
    except READ_ERRORS as error:
        raise BundleError(
            f"No model bundle in {folder}: {DESCRIPTION} cannot be read ({getattr(error, 'strerror', None) or error}). "
            "Name a folder that `cspine-train` exported, or a zip of it alone, or leave the setting out for the bundle "
            "that comes with this."
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}). Copy or export the bundle again.") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise BundleError(
            f"{path} has format {found!r}; this version reads format {FORMAT}. Export the model again with it."
        )
    try:
        bundle: Bundle = from_json(Bundle, {"folder": folder, **content}, DESCRIPTION)
        if surplus := sorted(bundle.sha256.keys() - set(bundle.file_names)):
            raise ValueError(f"sha256 names {', '.join(surplus)}, which this architecture does not have")
    except ValueError as error:
        raise BundleError(f"{path} does not describe a bundle: {error}. Copy or export the bundle again.") from error
    for name in bundle.file_names:
        _verify(files / name, bundle.sha256.get(name))
    return bundle


def find_bundles(place: Path) -> list[Path]:
    """The bundle that a path is, or else those in that folder; the path itself if there is none."""
    if place.is_file() or (place / DESCRIPTION).exists():
        return [place]
    inside = [path for path in sorted(place.glob("*")) if (path / DESCRIPTION).exists() or path.suffix == ".zip"]
    return inside or [place]


def write_bundle(bundle: Bundle, networks: Networks) -> None:
    """Writes weights and `bundle.json` to `bundle.folder`, which is made if needed; what else is there stays.

    A kill leaves the bundle from before or, in the moment of the change, none: `bundle.json` goes first and comes last.
    """
    by_file = networks.by_file()
    if by_file.keys() != set(bundle.file_names):
        raise ValueError(f"The bundle describes {bundle.file_names}; the networks given are {tuple(by_file)}.")
    unfinished = bundle.folder / ".unfinished"  # inside, since the folder may be a disk of its own
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    hashes = {}
    for name, network in by_file.items():
        write_weights(network, unfinished / name)
        (unfinished / name).chmod(0o644)  # the node may run as another user than trained
        hashes[name] = _sha256(unfinished / name)
    content = {"format": FORMAT, **bundle.to_dict(), "sha256": hashes}
    (unfinished / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (bundle.folder / DESCRIPTION).unlink(missing_ok=True)
    for name in (*by_file, DESCRIPTION):
        (unfinished / name).rename(bundle.folder / name)
    unfinished.rmdir()


def write_weights(network: "nn.Module", path: Path) -> None:
    """Writes a network's weights as safetensors.

    Raises:
        OSError: they cannot be written: the disk is full, for one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({key: value.contiguous().cpu() for key, value in network.state_dict().items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def _of_folds(name: str, num_folds: int) -> tuple[str, ...]:
    """The names of a network's weights files."""
    stem, suffix = name.split(".")
    return (name,) if num_folds == 1 else tuple(f"{stem}.{fold}.{suffix}" for fold in range(num_folds))


def _files(folder: Path) -> Traversable:
    """What a bundle's files are found in; of a zip its top, or the one folder there that holds a bundle."""
    if not folder.is_file():
        return folder
    top = zipfile.Path(folder)
    inside = [place for place in top.iterdir() if (place / DESCRIPTION).is_file()]
    return inside[0] if len(inside) == 1 and not (top / DESCRIPTION).exists() else top


def _verify(file: Traversable, expected: str | None) -> None:
    if not file.is_file():
        raise BundleError(f"{file} is missing from the model bundle. Copy or export the bundle again.")
    try:
        found = _sha256(file)
    except READ_ERRORS as error:
        raise BundleError(f"{file} cannot be read ({error}). Copy or export the bundle again.") from error
    if found != expected:
        raise BundleError(
            f"{file} is damaged or was exchanged: its sha256 is {found}, {DESCRIPTION} says {expected}. "
            "Copy or export the bundle again."
        )


def _sha256(file: Traversable) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]
