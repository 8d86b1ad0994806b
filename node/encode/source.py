"""The source Series as highdicom wants to see it: a header, and a dataset a slice with only what its objects need.

The files were read by `model` already, so their geometry is known to be sound; what scanners leave out or get wrong
elsewhere in the header of the first one is mended here, in memory. Pixels are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from highdicom.enum import SpecificCharacterSetValues
from pydicom.config import RAISE
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import CTImageStorage
from pydicom.valuerep import format_number_as_ds, validate_value

from model import PARSE_ERRORS, Grid, SliceSource, slice_headers
from node.encode.identity import derive_uid

# Type 2 in the Patient and General Study modules: always present in a result, empty when the source lacks them.
_TYPE_2 = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)

# Dates, times, ages and numbers that are none are emptied; text is kept, even if it is longer than it may be.
_STRICT_VRS = ("AS", "DA", "DS", "DT", "IS", "TM")

UTF_8 = "ISO_IR 192"
_CHARACTER_SETS = {item.value for item in SpecificCharacterSetValues}

_FUNCTIONAL_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One Series.

    header: patient, study, series and equipment of its first slice, mended; text is decoded, so it can be written in
    any character set. slices: one per Z index of `grid`. orientation: direction cosines of rows and of columns.
    """

    header: Dataset
    slices: Sequence[SliceSource]
    grid: Grid
    orientation: tuple[float, ...]
    pixel_spacing_mm: tuple[float, ...]

    @property
    def sop_class_uid(self) -> str:
        """SOP Class of every Instance of the Series."""
        return str(self.header.SOPClassUID)

    @property
    def character_set(self) -> str:
        """The source's own character set, so that names keep their bytes; UTF-8 where highdicom does not know it."""
        own = self.header.get("SpecificCharacterSet")
        return own if isinstance(own, str) and own in _CHARACTER_SETS else UTF_8

    def character_set_for(self, *texts: str) -> str:
        """The source's character set if these texts of ours need no other than ASCII, or else UTF-8."""
        return self.character_set if all(text.isascii() for text in texts) else UTF_8

    @property
    def is_multi_frame(self) -> bool:
        """Whether references need frame numbers."""
        return self.sop_class_uid != CTImageStorage

    def position_texts(self, z: int) -> list[str]:
        """ImagePositionPatient of a slice."""
        return [str(format_number_as_ds(value)) for value in self.slices[z].position_lps_mm]

    def image(self, z: int) -> Dataset:
        """One slice as a single-frame CT Instance without pixels and with nothing of the patient.

        A slice of an Enhanced CT too, under its Instance's UID with the frame number appended: highdicom takes only a
        whole multi-frame Instance, and a Series may be several.
        """
        header, source = self.header, self.slices[z]
        ds = Dataset()
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "Modality"):
            setattr(ds, keyword, header[keyword].value)
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, source.sop_instance_uid
        if self.is_multi_frame:
            ds.SOPInstanceUID += f".{source.frame_number}"
        ds.Rows, ds.Columns = self.grid.shape[1:]
        ds.ImagePositionPatient = self.position_texts(z)
        ds.ImageOrientationPatient = [format_number_as_ds(value) for value in self.orientation]
        ds.PixelSpacing = [format_number_as_ds(value) for value in self.pixel_spacing_mm]
        # Along the normal, which is less than the distance between positions when the gantry was tilted.
        spacing_mm = self.grid.voxel_volume_mm3 / (self.grid.spacing_mm[1] * self.grid.spacing_mm[2])
        ds.SpacingBetweenSlices = f"{spacing_mm:.6g}"
        ds.SliceThickness = header.get("SliceThickness") or f"{spacing_mm:.6g}"
        return ds

    def references(self) -> list[Dataset]:
        """One dataset for each Instance of the Series with the UIDs of study, series, class and instance."""
        return [self._reference(uid) for uid in dict.fromkeys(item.sop_instance_uid for item in self.slices)]

    def _reference(self, sop_instance_uid: str) -> Dataset:
        ds = Dataset()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = self.header.StudyInstanceUID, self.header.SeriesInstanceUID
        ds.SOPClassUID, ds.SOPInstanceUID = self.sop_class_uid, sop_instance_uid
        return ds


def read_source(slices: Sequence[SliceSource], grid: Grid) -> Source:
    """The Series, of which only the first file is opened.

    Raises:
        OSError: it cannot be opened.
    """
    first = slices[0]
    ds = pydicom.dcmread(first.path, stop_before_pixels=True)
    frame = slice_headers(ds)[first.frame_number - 1]
    return Source(
        header=_mended(ds, frame.sop_class_uid or CTImageStorage, frame.sop_instance_uid),
        slices=slices,
        grid=grid,
        orientation=frame.orientation or (),
        pixel_spacing_mm=frame.pixel_spacing_mm or (),
    )


def read_refused(paths: Sequence[Path]) -> Source:
    """A Series that could not be read as a volume, for reports only: of one SOP Class, its slices in no order.

    Raises:
        OSError: a file cannot be opened.
    """
    tags = ["SOPClassUID", "SOPInstanceUID"]
    found = {path: pydicom.dcmread(path, specific_tags=tags, stop_before_pixels=True) for path in sorted(paths)}
    first = next(iter(found))
    slices = [
        SliceSource(sop_instance_uid=str(ds.get("SOPInstanceUID") or path.stem), path=path)
        for path, ds in found.items()
        if ds.get("SOPClassUID") == found[first].get("SOPClassUID")
    ]
    ds = pydicom.dcmread(first, stop_before_pixels=True)
    header = _mended(ds, str(ds.get("SOPClassUID") or CTImageStorage), slices[0].sop_instance_uid)
    grid = Grid.axial(shape=(len(slices), 1, 1), spacing_mm=(1.0, 1.0, 1.0))  # nobody asks where they lie
    return Source(header=header, slices=slices, grid=grid, orientation=(), pixel_spacing_mm=())


def _mended(ds: Dataset, sop_class_uid: str, sop_instance_uid: str) -> Dataset:
    """The header with everything highdicom insists on; values it would refuse are emptied."""
    for keyword in _FUNCTIONAL_GROUPS:
        if keyword in ds:
            del ds[keyword]
    _drop_unreadable(ds)
    ds.decode()
    for keyword in _TYPE_2:
        value = ds.get(keyword)
        if isinstance(value, MultiValue):
            value = value[0] if value else None
        setattr(ds, keyword, "" if value is None else value)
    if ds.PatientSex not in ("M", "F", "O"):
        ds.PatientSex = ""
    for element in ds:
        if element.VR in _STRICT_VRS and not _is_valid(element):
            ds[element.tag].value = ""
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, sop_instance_uid
    ds.Modality = "CT"
    if not ds.get("FrameOfReferenceUID"):
        # Without one there is no place to put a mask. Viewers then match by the referenced Instances.
        ds.FrameOfReferenceUID = derive_uid("frame of reference", ds.SeriesInstanceUID)
    return ds


def _drop_unreadable(ds: Dataset) -> None:
    """Removes what cannot be parsed, such as text where a binary number belongs: nothing that results need."""
    for tag in list(ds.keys()):
        try:
            element = ds[tag]
        except (OSError, *PARSE_ERRORS):  # OSError is pydicom's for a sequence that breaks off
            del ds[tag]
            continue
        for item in element.value if element.VR == "SQ" else ():
            _drop_unreadable(item)


def _is_valid(element: DataElement) -> bool:
    texts = ["" if value is None else str(value) for value in (element.value if element.VM > 1 else [element.value])]
    if element.VR in ("DA", "TM") and any("-" in text for text in texts):  # a range, which is for queries
        return False
    try:
        for text in texts:
            validate_value(element.VR, text, RAISE)
    except ValueError:
        return False
    return True
