"""Small DICOM objects for tests: CT Series with known content, and what else turns up among them.

Every voxel's value is a function of its place in the patient (`hu_at`), so a test can check any claim about order,
orientation or geometry by asking: is the value at these LPS coordinates the one that belongs there?
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import (
    ComprehensiveSRStorage,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from model import Grid, SliceSource, Volume

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)

# The stored value 0 is -1024 HU, as most scanners have it.
_INTERCEPT = -1024

Edit = Callable[[int, Dataset], None]


def hu_at(points_lps_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """HU `(...)` at LPS points `(..., 3)`: a ramp along all three axes, different in each, with air where x < -4 mm."""
    x, y, z = np.moveaxis(np.asarray(points_lps_mm, float), -1, 0)
    return np.where(x < -4, -1000.0, np.clip(np.rint(300 + 40 * x + 17 * y + 5 * z), -900, 2000))


def make_volume(voxels_hu: NDArray[np.int16], grid: Grid, **values: Any) -> Volume:
    """A volume of these voxels, from Instances that are nowhere; values: its other attributes."""
    slices = tuple(SliceSource(sop_instance_uid=f"1.2.{z}", path=Path(f"{z}.dcm")) for z in range(grid.shape[0]))
    uids = {"study_instance_uid": "1.1", "series_instance_uid": "1.2"}
    return Volume(voxels_hu=voxels_hu, grid=grid, slices=slices, **uids | values)


def slice_positions(
    *,
    num_slices: int,
    spacing_mm: float,
    orientation: Sequence[float],
    tilt_deg: float = 0.0,
    origin_lps_mm: Sequence[float] = (-9.0, -7.0, -20.0),
) -> NDArray[np.float64]:
    """Position `(num_slices, 3)` of the first pixel of each slice, from `origin_lps_mm` along the normal.

    tilt_deg: gantry tilt; each slice is also shifted within its plane, along the columns.
    """
    row, column = np.reshape(orientation, (2, 3))
    step = spacing_mm * (np.cross(row, column) + np.tan(np.radians(tilt_deg)) * column)
    return np.asarray(origin_lps_mm) + np.arange(num_slices)[:, None] * step


def make_ct_series(
    folder: Path,
    *,
    num_slices: int = 8,
    spacing_mm: float = 1.0,
    rows: int = 20,
    columns: int = 24,
    pixel_spacing_mm: tuple[float, float] = (0.75, 1.0),
    orientation: Sequence[float] = AXIAL,
    tilt_deg: float = 0.0,
    reverse: bool = False,
    signed: bool = False,
    origin_lps_mm: Sequence[float] = (-9.0, -7.0, -20.0),
    positions_lps_mm: Sequence[Sequence[float]] | None = None,
    transfer_syntax_uid: str = ExplicitVRLittleEndian,
    series_instance_uid: str | None = None,
    study_instance_uid: str | None = None,
    edit: Edit | None = None,
) -> list[Path]:
    """Writes a single-frame CT Series with the content of `hu_at`; returns the paths in order of InstanceNumber.

    The first slice lies lowest along the normal; `reverse` numbers them the other way round. positions_lps_mm: exactly
    these positions, instead of `num_slices`, `spacing_mm`, `tilt_deg` and `origin_lps_mm`. edit(i, ds): changes slice
    `i` (from 0, in order of InstanceNumber) before it is written, and before it is compressed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    positions = slice_positions(
        num_slices=num_slices,
        spacing_mm=spacing_mm,
        orientation=orientation,
        tilt_deg=tilt_deg,
        origin_lps_mm=origin_lps_mm,
    )
    if positions_lps_mm is not None:
        positions = np.asarray(positions_lps_mm, float)
    series_uid = series_instance_uid or generate_uid()
    study_uid = study_instance_uid or generate_uid(entropy_srcs=[series_uid])  # what comes late is of the same Study
    frame_of_reference_uid = generate_uid()
    paths = []
    for i, position in enumerate(positions[::-1] if reverse else positions):
        ds = _instance(CTImageStorage, "CT", series_uid, study_uid, i + 1)
        ds.FrameOfReferenceUID = frame_of_reference_uid
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.ImagePositionPatient = [round(float(value), 6) for value in position]
        ds.ImageOrientationPatient = [round(float(value), 9) for value in orientation]
        ds.PixelSpacing = list(pixel_spacing_mm)
        ds.SliceThickness = spacing_mm
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0 if signed else _INTERCEPT, "HU"
        hu = hu_at(_pixel_places(position, orientation, pixel_spacing_mm, rows, columns))
        _set_pixels(ds, hu - float(ds.RescaleIntercept), signed=signed)
        if edit:
            edit(i, ds)
        paths.append(_write(ds, folder / f"{i:04d}.dcm", transfer_syntax_uid))
    return paths


def make_enhanced_ct(
    path: Path,
    *,
    num_frames: int = 8,
    spacing_mm: float = 1.0,
    rows: int = 20,
    columns: int = 24,
    pixel_spacing_mm: tuple[float, float] = (0.75, 1.0),
    orientation: Sequence[float] = AXIAL,
    frame_order: Sequence[int] | None = None,
    transfer_syntax_uid: str = ExplicitVRLittleEndian,
) -> Path:
    """Writes one Enhanced CT of `num_frames` frames with the content of `hu_at`.

    Spacing and orientation are shared by all frames; position and rescale are given per frame, and the intercept
    differs from frame to frame. frame_order: the frames as stored, as positions along the normal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    positions = slice_positions(num_slices=num_frames, spacing_mm=spacing_mm, orientation=orientation)
    ds = _instance(EnhancedCTImageStorage, "CT", generate_uid(), generate_uid(), 1)
    ds.FrameOfReferenceUID = generate_uid()
    ds.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    shared = Dataset()
    shared.PixelMeasuresSequence = [_item(PixelSpacing=list(pixel_spacing_mm), SliceThickness=spacing_mm)]
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=list(orientation))]
    ds.SharedFunctionalGroupsSequence = [shared]
    frames, stored = [], []
    for i in frame_order if frame_order is not None else range(num_frames):
        intercept = _INTERCEPT + i
        frame = Dataset()
        frame.PlanePositionSequence = [_item(ImagePositionPatient=[float(value) for value in positions[i]])]
        frame.PixelValueTransformationSequence = [
            _item(RescaleSlope=1, RescaleIntercept=intercept, RescaleType="HU"),
        ]
        frame.CTImageFrameTypeSequence = [_item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])]
        frames.append(frame)
        stored.append(hu_at(_pixel_places(positions[i], orientation, pixel_spacing_mm, rows, columns)) - intercept)
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    ds.NumberOfFrames = num_frames
    _set_pixels(ds, np.stack(stored), signed=False)
    return _write(ds, path, transfer_syntax_uid)


def make_localizer(
    path: Path, *, like: Path | None = None, image_type: Sequence[str] = ("ORIGINAL", "PRIMARY", "LOCALIZER")
) -> Path:
    """Writes a coronal scout, a CT Image of its own size; like: an Instance whose Series and Study it belongs to."""
    beside = pydicom.dcmread(like, stop_before_pixels=True) if like else None

    def as_localizer(_: int, ds: Dataset) -> None:
        ds.ImageType = list(image_type)
        ds.InstanceNumber = 1000

    (written,) = make_ct_series(
        path.parent / f".{path.stem}",
        num_slices=1,
        rows=30,
        columns=10,
        orientation=CORONAL,
        series_instance_uid=beside.SeriesInstanceUID if beside else None,
        study_instance_uid=beside.StudyInstanceUID if beside else None,
        edit=as_localizer,
    )
    written.rename(path)
    written.parent.rmdir()
    return path


def make_screen_save(path: Path, *, like: Path | None = None) -> Path:
    """Writes a dose report as scanners do: a Secondary Capture without geometry, Modality CT."""
    beside = pydicom.dcmread(like, stop_before_pixels=True) if like else None
    ds = _instance(
        SecondaryCaptureImageStorage,
        "CT",
        beside.SeriesInstanceUID if beside else generate_uid(),
        beside.StudyInstanceUID if beside else generate_uid(),
        999,
    )
    ds.ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    ds.ConversionType = "WSD"
    _set_pixels(ds, np.zeros((16, 16)), signed=False)
    return _write(ds, path, ExplicitVRLittleEndian)


def make_report(path: Path) -> Path:
    """Writes a minimal structured report: an Instance that is no image at all."""
    ds = _instance(ComprehensiveSRStorage, "SR", generate_uid(), generate_uid(), 1)
    ds.ValueType = "CONTAINER"
    return _write(ds, path, ExplicitVRLittleEndian)


def _instance(sop_class_uid: str, modality: str, series_uid: str, study_uid: str, number: int) -> Dataset:
    """A dataset with what every Instance needs."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study_uid, series_uid
    ds.Modality, ds.InstanceNumber, ds.SeriesNumber, ds.StudyID = modality, number, 1, "1"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Test^Neck", "TEST", "19700101", "O"
    ds.StudyDate, ds.StudyTime, ds.ContentDate, ds.ContentTime = "20260101", "120000", "20260101", "120000"
    ds.AccessionNumber, ds.ReferringPhysicianName, ds.Manufacturer = "", "", "Factory"
    ds.PositionReferenceIndicator, ds.KVP, ds.AcquisitionNumber = "", None, None
    ds.PatientPosition, ds.BodyPartExamined = "HFS", "CSPINE"
    return ds


def _item(**values: object) -> Dataset:
    """A sequence item with these attributes."""
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def _pixel_places(
    position: NDArray[np.float64],
    orientation: Sequence[float],
    pixel_spacing_mm: tuple[float, float],
    rows: int,
    columns: int,
) -> NDArray[np.float64]:
    """LPS mm `(rows, columns, 3)` of the pixels of one slice, written as PS3.3 C.7.6.2.1.1 has it."""
    row, column = np.reshape(orientation, (2, 3))
    j, i = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return position + row * pixel_spacing_mm[1] * i[..., None] + column * pixel_spacing_mm[0] * j[..., None]


def _set_pixels(ds: Dataset, stored: NDArray[np.float64], *, signed: bool) -> None:
    """Stores `(Y, X)` or `(frames, Y, X)` as 16-bit pixels."""
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, int(signed)
    ds.PixelData = np.rint(stored).astype("<i2" if signed else "<u2").tobytes()


def _write(ds: Dataset, path: Path, transfer_syntax_uid: str) -> Path:
    """Writes a Part 10 file, compressed when the transfer syntax asks for it."""
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    syntax = pydicom.uid.UID(transfer_syntax_uid)
    if syntax.is_encapsulated:
        by = "pydicom" if syntax == RLELossless else ""  # GDCM's RLE encoder aborts on odd sizes of 8 bits
        ds.compress(syntax, generate_instance_uid=False, encoding_plugin=by)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(path, enforce_file_format=True)
    return path
