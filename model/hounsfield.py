"""Are these Hounsfield units? A refusal that says what they look like, where they are not.

Asks no network, and where no vertebra is. Called by `model/pipeline.py` before the vertebrae are sought.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from model.geometry import Grid
from model.resample import AIR_HU, BODY_HU
from model.stack import SeriesError
from model.volume import Volume

MAX_BRIGHT_SHARE, BRIGHT_HU = 0.02, 4000
"""Share of the body that may be so bright. Measured: below 0.001, from metal in extended-scale CT."""

SAMPLE_MM = 3.0


def check_values(volume: Volume) -> None:
    """Refuses voxels that are not Hounsfield units, most often for a wrong RescaleSlope or RescaleIntercept.

    Raises:
        SeriesError: they are not; the message says what they look like.
    """
    series = f"Series {volume.series_instance_uid}"
    if volume.voxels_hu.dtype != np.int16:
        raise SeriesError(f"{series} has voxels of type {volume.voxels_hu.dtype}; int16 Hounsfield units are needed.")
    sample = sampled(volume)
    if _looks_like_ct(sample):
        return
    median = float(np.median(sample))
    for what, undo in _MISTAKES.items():
        if _looks_like_ct(undo(sample)):
            raise SeriesError(
                f"{series} does not hold Hounsfield units: its values (median {median:.0f}) look like {what}. "
                "Check RescaleSlope and RescaleIntercept, or send the original CT."
            )
    body = sample[sample > BODY_HU]
    bright = float((body > BRIGHT_HU).mean()) if body.size else 0.0
    if bright > MAX_BRIGHT_SHARE:
        raise SeriesError(
            f"{series} does not hold Hounsfield units: {bright:.0%} of the body is above {BRIGHT_HU} HU (up to "
            f"{MAX_BRIGHT_SHARE:.0%} is plausible). Check PixelRepresentation, BitsStored, RescaleSlope and "
            "RescaleIntercept, or send the original CT."
        )


def sampling_steps(grid: Grid) -> tuple[int, int, int]:
    """Every how manieth voxel along each axis is enough for measures of a whole slice: about SAMPLE_MM apart."""
    z, y, x = (max(1, round(SAMPLE_MM / spacing)) for spacing in grid.spacing_mm)
    return z, y, x


def sampled(volume: Volume) -> NDArray[np.float32]:
    """Voxels about SAMPLE_MM apart, float32 `(Z, Y, X)`."""
    z, y, x = sampling_steps(volume.grid)
    return volume.voxels_hu[::z, ::y, ::x].astype(np.float32)


def _looks_like_ct(hu: NDArray[np.float32]) -> bool:
    """Whether there is air, and in the body mostly soft tissue and some bone.

    Measured, of the body: soft tissue 0.78 to 0.90, bone 0.05 to 0.15.
    """
    body = hu[hu > BODY_HU]
    if body.size < 0.005 * hu.size or (hu < -500).mean() < 0.001:
        return False
    soft, bone = ((body > -200) & (body < 150)).mean(), (body > 300).mean()
    return bool(soft > 0.6 and 0.002 < bone < 0.35)


_Undo = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_MISTAKES: dict[str, _Undo] = {
    "Hounsfield units plus about 1000, as if there were no RescaleIntercept": lambda hu: hu - 1024,
    "ten times Hounsfield units": lambda hu: np.where(hu <= AIR_HU, AIR_HU, hu / 10).astype(np.float32),
    "a tenth of Hounsfield units": lambda hu: hu * 10 if hu.min() > -500 else hu,
    "Hounsfield units of the opposite sign": lambda hu: -hu,
}
