"""A CT Series as voxels with their place in the patient, and the link of each slice to its Instance."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model.geometry import Grid


@dataclass(frozen=True, kw_only=True)
class SliceSource:
    """Where one slice of a volume came from.

    path: the DICOM file. frame_number: 1-based frame inside it (always 1 for a single-frame Instance). is_interpolated:
    the slice was lost and is made up from its neighbours; what is named here is then the slice below it.
    position_lps_mm: `(x, y, z)` of the centre of its first voxel, exactly as the file has it.
    """

    sop_instance_uid: str
    path: Path
    position_lps_mm: tuple[float, ...] = ()
    frame_number: int = 1
    is_interpolated: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """One CT Series in Hounsfield units on its own grid.

    voxels_hu: int16, shape `(Z, Y, X)`; Z runs foot to head, rows and columns stay as stored. Padding is -1024.
    grid: place of the voxels in LPS mm; sheared when the gantry was tilted.
    slices: one per Z index, same order as `voxels_hu`.
    warnings: sentences for the operator (e.g. a dropped localizer); no patient data.
    incomplete: the one of them that says why Instances are, or may be, missing; "" if there is none.
    """

    study_instance_uid: str
    series_instance_uid: str
    voxels_hu: NDArray[np.int16]
    grid: Grid
    slices: tuple[SliceSource, ...]
    warnings: tuple[str, ...] = ()
    incomplete: str = ""
