"""A phantom as a CT Series of DICOM files, one Instance a slice, written as a scanner would."""

from pathlib import Path
from uuid import NAMESPACE_OID, uuid5

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from model.geometry import Grid
from model.phantom.render import Phantom

_IMPLEMENTATION_UID = UID("2.25.305828488182831875890203105390285383139")


def write_series(
    phantom: Phantom,
    folder: Path,
    *,
    seed: int = 0,
    study_instance_uid: str | None = None,
    series_instance_uid: str | None = None,
    patient_id: str | None = None,
    series_number: int = 2,
    series_description: str = "C-Spine bone",
    patient_position: str = "HFS",
    transfer_syntax_uid: str = ExplicitVRLittleEndian,
) -> list[Path]:
    """Paths of the files written, one per Z index of the grid and in that order, which InstanceNumber follows.

    seed: UIDs and identifiers are derived from it; the same seed writes the same UIDs. study_instance_uid,
    series_instance_uid: None derives them. transfer_syntax_uid: one that pydicom can encode (RLE, JPEG-LS, JPEG 2000).

    Raises:
        ValueError: rows and columns of the grid are not at right angles, which DICOM cannot say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    study = study_instance_uid or _uid("study", seed)
    series = series_instance_uid or _uid("series", seed, series_number)
    shared = _shared_attributes(
        phantom.grid,
        study=study,
        series=series,
        patient_id=patient_id or f"PHANTOM-{seed:04d}",
        frame_of_reference=_uid("frame of reference", study),
        patient_position=patient_position,
    )
    shared.SeriesNumber = series_number
    shared.SeriesDescription = series_description
    paths = []
    for index, slice_hu in enumerate(phantom.voxels_hu):
        ds = _instance(shared, phantom.grid, index, slice_hu)
        if transfer_syntax_uid != ExplicitVRLittleEndian:
            ds.compress(transfer_syntax_uid, generate_instance_uid=False)
        path = folder / f"CT{index + 1:04d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _uid(*parts: object) -> str:
    """A UID that the parts determine. Reference: PS3.5 B.2 (UUID as an OID under 2.25)."""
    name = "/".join(["C-Spine Node phantom", *map(str, parts)])
    return f"2.25.{uuid5(NAMESPACE_OID, name).int}"


def _direction(grid: Grid) -> tuple[list[float], float]:
    """ImageOrientationPatient of the grid, and the distance of its slices along their normal, mm."""
    along_column, along_row = grid.affine[:3, 1], grid.affine[:3, 2]
    row = along_row / np.linalg.norm(along_row)
    column = along_column / np.linalg.norm(along_column)
    if abs(float(row @ column)) > 1e-4:
        raise ValueError(
            f"Rows and columns of the grid meet at a cosine of {float(row @ column):.4f}; expected 0. "
            "DICOM cannot describe such slices: shear the slice direction instead."
        )
    step = abs(float(np.cross(row, column) @ grid.affine[:3, 0]))
    return [round(float(value), 9) for value in (*row, *column)], step


def _tilt_deg(grid: Grid) -> float:
    """Angle between the way from slice to slice and the slices' normal, degrees; more than 0 on sheared grids."""
    normal = np.cross(grid.affine[:3, 2], grid.affine[:3, 1])
    step = grid.affine[:3, 0]
    cosine = abs(float(normal @ step)) / float(np.linalg.norm(normal) * np.linalg.norm(step))
    return float(np.rad2deg(np.arccos(min(cosine, 1.0))))


def _shared_attributes(
    grid: Grid, *, study: str, series: str, patient_id: str, frame_of_reference: str, patient_position: str
) -> Dataset:
    """What all Instances of the Series have in common. Reference: PS3.3 A.3 (CT Image IOD)."""
    orientation, step_mm = _direction(grid)
    _, row_step_mm, column_step_mm = grid.spacing_mm
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.SOPClassUID = CTImageStorage
    ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = ds.ContentDate = "20260101"
    ds.StudyTime = ds.SeriesTime = ds.AcquisitionTime = ds.ContentTime = "120000"
    ds.AccessionNumber = patient_id[-16:]
    ds.Modality = "CT"
    ds.Manufacturer = "C-Spine Node"
    ds.InstitutionName = "Phantom"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription = "CT cervical spine"
    ds.ManufacturerModelName = "Procedural phantom"
    ds.PatientName = f"PHANTOM^{patient_id}"
    ds.PatientID = patient_id
    ds.PatientBirthDate = ""
    ds.PatientSex = "O"
    ds.BodyPartExamined = "CSPINE"
    ds.SliceThickness = round(step_mm, 6)
    ds.KVP = 120
    ds.DataCollectionDiameter = 500
    ds.SpacingBetweenSlices = round(step_mm, 6)
    ds.DeviceSerialNumber = "0001"
    ds.SoftwareVersions = "1"
    ds.ProtocolName = "C-Spine trauma"
    ds.ReconstructionDiameter = round(column_step_mm * grid.shape[2], 3)
    ds.GantryDetectorTilt = round(_tilt_deg(grid), 3)
    ds.ExposureTime = 500
    ds.XRayTubeCurrent = 300
    ds.Exposure = 150
    ds.FilterType = "BODY"
    ds.ConvolutionKernel = "BONE"
    ds.PatientPosition = patient_position
    ds.StudyInstanceUID = study
    ds.SeriesInstanceUID = series
    ds.StudyID = patient_id[-16:]
    ds.AcquisitionNumber = 1
    ds.ImageOrientationPatient = orientation
    ds.FrameOfReferenceUID = frame_of_reference
    ds.PositionReferenceIndicator = ""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = grid.shape[1], grid.shape[2]
    ds.PixelSpacing = [round(row_step_mm, 9), round(column_step_mm, 9)]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.WindowCenter, ds.WindowWidth = 400, 1800
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    return ds


def _instance(shared: Dataset, grid: Grid, index: int, slice_hu: NDArray[np.int16]) -> Dataset:
    ds = Dataset()
    ds.update(shared)
    ds.SOPInstanceUID = _uid("instance", shared.SeriesInstanceUID, index)
    ds.InstanceNumber = index + 1
    position = grid.to_lps_mm(np.array([index, 0, 0]))
    ds.ImagePositionPatient = [round(float(value), 6) for value in position]
    normal = np.cross(shared.ImageOrientationPatient[:3], shared.ImageOrientationPatient[3:])
    ds.SliceLocation = round(float(normal @ position), 6)
    ds.PixelData = (np.clip(slice_hu, -1024, 3071).astype(np.int32) + 1024).astype("<u2").tobytes()
    ds["PixelData"].VR = "OW"
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.ImplementationClassUID = _IMPLEMENTATION_UID
    return ds
