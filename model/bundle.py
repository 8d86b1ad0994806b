"""A trained model as a folder: safetensors weights and `bundle.json`, which says what they are and how to use them.

Reading verifies the sha256 of every weights file and every key of the JSON; nothing in a bundle is executed. This
module imports torch only to load weights, so that a bundle can be checked and named without it.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.findings import ModelInfo

if TYPE_CHECKING:
    from torch import nn

    from model.networks import FractureNet, VertebraUNet

FORMAT = 1
"""Version of the bundle layout this code reads and writes."""

DEFAULT_BUNDLE = Path(__file__).parent / "weights" / "phantom"
"""The bundle that comes with the package."""

VERTEBRA_WEIGHTS = "vertebra_unet.safetensors"
REFINER_WEIGHTS = "vertebra_refiner.safetensors"
FRACTURE_WEIGHTS = "fracture_net.safetensors"


class BundleError(Exception):
    """A model bundle that is missing, damaged, or of another architecture than this version reads."""


@dataclass(frozen=True, kw_only=True)
class SegmentSettings:
    """The vertebra U-Net and the grid it works on.

    channels: of the encoder's scales, fine to coarse. spacing_mm: of the isotropic grid.
    """

    channels: tuple[int, ...]
    spacing_mm: float


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """A second vertebra U-Net, on a finer grid around what the first one found.

    in_channels: of its input: the two windows, and what it is told of the coarse answer.
    """

    channels: tuple[int, ...]
    in_channels: int
    spacing_mm: float


@dataclass(frozen=True, kw_only=True)
class ClassifySettings:
    """The fracture network and the stack of slices it reads for each vertebra.

    channels: of the slice encoder's scales. num_hidden: GRU units per direction. num_slices: slices over the vertebra's
    extent. num_pixels, pixel_mm: side and pixel size of a slice. region_threshold: probability from which a pixel is
    shown as fracture.
    """

    channels: tuple[int, ...]
    num_hidden: int
    num_slices: int
    num_pixels: int
    pixel_mm: float
    region_threshold: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Networks:
    """The networks of a bundle; `refiner` is None where the coarse vertebra U-Net's outline is final."""

    unet: "VertebraUNet"
    refiner: "VertebraUNet | None" = None
    fracture_net: "FractureNet"

    def by_file(self) -> "dict[str, nn.Module]":
        """Each network by the name of its weights file."""
        networks: dict[str, nn.Module] = {VERTEBRA_WEIGHTS: self.unet, FRACTURE_WEIGHTS: self.fracture_net}
        if self.refiner is not None:
            networks[REFINER_WEIGHTS] = self.refiner
        return networks


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A verified bundle; `metrics` are the numbers its training measured, for people to read."""

    folder: Path
    info: ModelInfo
    segment: SegmentSettings
    refine: RefineSettings | None = None
    classify: ClassifySettings
    metrics: dict[str, Any]

    def new_networks(self) -> Networks:
        """Networks of this architecture, untrained."""
        from model.networks import FractureNet, VertebraUNet

        refine = self.refine
        return Networks(
            unet=VertebraUNet(self.segment.channels),
            refiner=VertebraUNet(refine.channels, refine.in_channels) if refine else None,
            fracture_net=FractureNet(
                f"residual-{'-'.join(map(str, self.classify.channels))}", self.classify.num_hidden
            ),
        )

    def load_networks(self) -> Networks:
        """All networks on the CPU in evaluation mode.

        Raises:
            BundleError: the weights do not fit the architecture the bundle names.
        """
        from safetensors.torch import load_file

        networks = self.new_networks()
        for name, network in networks.by_file().items():
            try:
                network.load_state_dict(load_file(self.folder / name))
            except RuntimeError as error:
                raise BundleError(
                    f"{self.folder / name} does not fit the architecture in bundle.json ({error}). "
                    "Use the two as they were exported together."
                ) from error
            network.eval()
        return networks


def read_bundle(folder: Path | None = None) -> Bundle:
    """The bundle in a folder, every file verified; None takes the one that comes with the package.

    Raises:
        BundleError: what is missing, damaged or unknown, and what to do.
    """
    folder = DEFAULT_BUNDLE if folder is None else Path(folder)
    path = folder / "bundle.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(
            f"No model bundle in {folder}: bundle.json cannot be read ({error.strerror}). "
            "Name a folder that `cspine-train` exported, or leave the setting out for the bundle that comes with this."
        ) from error
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON ({error}). Copy or export the bundle again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise BundleError(
            f"{path} has format {found!r}; this version reads format {FORMAT}. Export the model again with it."
        )
    try:
        bundle = Bundle(
            folder=folder,
            info=_settings(ModelInfo, content["model"]),
            segment=_settings(SegmentSettings, content["segment"]),
            refine=_settings(RefineSettings, content["refine"]) if content.get("refine") else None,
            classify=_settings(ClassifySettings, content["classify"]),
            metrics=dict(content["metrics"]),
        )
        hashes = dict(content["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{path} is not a complete bundle: {error}. Copy or export the bundle again.") from error
    for name in (VERTEBRA_WEIGHTS, FRACTURE_WEIGHTS, *([REFINER_WEIGHTS] if bundle.refine else [])):
        _verify(folder / name, hashes.get(name))
    return bundle


def write_bundle(bundle: Bundle, networks: Networks) -> None:
    """Writes weights and `bundle.json` to `bundle.folder`, which is made if needed."""
    from safetensors.torch import save_file

    bundle.folder.mkdir(parents=True, exist_ok=True)
    hashes = {}
    for name, network in networks.by_file().items():
        save_file({key: value.contiguous().cpu() for key, value in network.state_dict().items()}, bundle.folder / name)
        (bundle.folder / name).chmod(0o644)  # the node may run as another user than trained
        hashes[name] = _sha256(bundle.folder / name)
    content = {
        "format": FORMAT,
        "model": asdict(bundle.info),
        "segment": asdict(bundle.segment),
        **({"refine": asdict(bundle.refine)} if bundle.refine else {}),
        "classify": asdict(bundle.classify),
        "metrics": bundle.metrics,
        "sha256": hashes,
    }
    (bundle.folder / "bundle.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _settings(kind: type[Any], content: dict[str, Any]) -> Any:
    """One settings object of a bundle; all its fields and no others, each of the type it is declared with."""
    known: dict[str, Any] = {field.name: field.type for field in fields(kind)}
    if content.keys() != known.keys():
        raise ValueError(f"{kind.__name__} needs {sorted(known)} and has {sorted(content)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
    types: dict[Any, Any] = {str: str, int: int, float: (int, float)}
    for name, value in values.items():
        if not isinstance(value, types.get(known[name], tuple)) or isinstance(value, bool):
            raise ValueError(f"{kind.__name__}.{name} is {value!r}, which is not of type {known[name]}")
    return kind(**values)


def _verify(path: Path, expected: str | None) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing from the model bundle. Copy or export the bundle again.")
    found = _sha256(path)
    if found != expected:
        raise BundleError(
            f"{path} is damaged or was exchanged: its sha256 is {found}, bundle.json says {expected}. "
            "Copy or export the bundle again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
