"""Stacks of slices by vertebra, as a cut keeps them for one study.

`planes_hu.npy`, `masks.npy`, `regions.npy` and `stacks.json`, in a folder that appears when it is whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.files import replacing_folder, write_json


@dataclass(frozen=True, kw_only=True)
class CutSettings:
    """The stacks to cut: as `model.bundle.ClassifySettings`, which may stand for it, has them."""

    num_slices: int = 15
    num_pixels: int = 96
    pixel_mm: float = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class Stacks:
    """The vertebrae C1..C7 of one study; index 0 is C1, and all seven are there, empty where `judged` is False.

    planes_hu: int16 `(7, P, Y, X)` on `model.classify.stack_grid` of each vertebra. masks: uint8 `(7, P, Y, X)`,
    0..255, how much of a voxel is the vertebra. regions: uint8 `(7, P, Y, X)`, 255 in the fracture: in a box and at the
    bone. Read from a cut these are memory-mapped: take what is needed. The slices of the network are every other plane,
    `[:, NUM_NEIGHBOURS : P - NUM_NEIGHBOURS : 2]` with `model.classify.NUM_NEIGHBOURS`.

    The others are `(7,)`. judged: the vertebra was found and at least `MIN_VISIBLE` of it is in the field of view; do
    not train on others. fractured: the study's label where judged. regions_known: regions are a target: of intact
    vertebrae, and of fractured ones with a box. visible: float32, share of the vertebra in the field of view.
    """

    planes_hu: NDArray[np.int16]
    masks: NDArray[np.uint8]
    regions: NDArray[np.uint8]
    fractured: NDArray[np.bool_]
    judged: NDArray[np.bool_]
    regions_known: NDArray[np.bool_]
    visible: NDArray[np.float32]


_VOXELS = ("planes_hu", "masks", "regions")
_FLAGS = ("fractured", "judged", "regions_known")


def write_stacks(folder: Path, stacks: Stacks, fingerprint: str) -> None:
    """Writes a study's stacks, in place of what was there; fingerprint: of what they were made from."""
    with replacing_folder(folder) as unfinished:
        for name in _VOXELS:
            np.save(unfinished / f"{name}.npy", getattr(stacks, name))
        content = {name: getattr(stacks, name).tolist() for name in (*_FLAGS, "visible")}
        write_json(unfinished / "stacks.json", {"fingerprint": fingerprint, **content})


def read_stacks(folder: Path) -> Stacks:
    """What `write_stacks` wrote."""
    content = json.loads((folder / "stacks.json").read_text(encoding="utf-8"))
    return Stacks(
        **{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _VOXELS},
        **{name: np.array(content[name], bool) for name in _FLAGS},
        visible=np.array(content["visible"], np.float32),
    )


def stacks_fingerprint(folder: Path) -> str | None:
    """The fingerprint that stacks were written with, None if there are none."""
    try:
        fingerprint: str = json.loads((folder / "stacks.json").read_text(encoding="utf-8"))["fingerprint"]
    except FileNotFoundError:
        return None
    return fingerprint
