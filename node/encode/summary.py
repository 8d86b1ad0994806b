"""The pages of a case as Secondary Capture, which every viewer shows, and as an Encapsulated PDF with text to search.

Nothing in the pixels names the patient: the header does, and what stands in a header can be taken out of a copy.
Importing this module loads matplotlib.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from highdicom import SOPClass
from highdicom.sc import SCImage
from highdicom.sr import CodedConcept
from matplotlib.backends.backend_pdf import PdfPages
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage, ExplicitVRLittleEndian

from model import Analysis, Volume
from node import codes
from node.encode.canvas import plain_settings
from node.encode.equipment import processing_equipment
from node.encode.maker import Maker
from node.encode.pages import BANNER, draw_pages

IMAGE_SERIES_NUMBER, PDF_SERIES_NUMBER = 9004, 9005
PDF_FILE_NAME = "summary.pdf.dcm"
_TITLE = "AI cervical spine fracture summary (research)"


_PATIENT_AND_STUDY = {
    "patient_id": "PatientID",
    "patient_name": "PatientName",
    "patient_birth_date": "PatientBirthDate",
    "patient_sex": "PatientSex",
    "accession_number": "AccessionNumber",
    "study_id": "StudyID",
    "study_date": "StudyDate",
    "study_time": "StudyTime",
    "referring_physician_name": "ReferringPhysicianName",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Summary:
    """Pages, uint8 RGB `(rows, columns, 3)`, and all of them as a PDF; empty where not asked for.

    planes: for each page the Z indices of the slices it shows.
    """

    pages: Sequence[NDArray[np.uint8]]
    pdf: bytes
    planes: Sequence[Sequence[int]]


def draw_summary(analysis: Analysis, volume: Volume, maker: Maker, *, images: bool, pdf: bool) -> Summary:
    """Draws the pages once for both forms; the same input gives the same bytes."""
    made_by = f"{maker.node.manufacturer} {maker.node.software_version}"
    pages: list[NDArray[np.uint8]] = []
    planes: list[Sequence[int]] = []
    buffer = BytesIO()
    metadata = {"Title": _TITLE, "Creator": made_by, "Subject": BANNER, "CreationDate": None}
    with plain_settings(), PdfPages(buffer, metadata=metadata) as file:
        for canvas in draw_pages(analysis, volume, made_by):
            planes.append(sorted(canvas.planes) or range(len(volume.slices)))  # sheets are cut from all
            if images:
                pages.append(canvas.pixels())
            if pdf:
                file.savefig(canvas.figure)
    return Summary(pages=pages, pdf=buffer.getvalue() if pdf else b"", planes=planes)


def page_file_name(number: int) -> str:
    """Of a page, counted from 1."""
    return f"summary-{number:02d}.sc.dcm"


def make_images(summary: Summary, maker: Maker) -> list[SCImage]:
    """A single-frame Secondary Capture for each page, all in one Series. Reference: PS3.3 A.8.1."""
    source, name = maker.source, "summary.sc"
    derivation = f"Drawn from the CT and what {maker.model.name} {maker.model.version} found in it. {BANNER}."[:1024]
    images = []
    for number, (pixels, planes) in enumerate(zip(summary.pages, summary.planes, strict=True), start=1):
        ds = SCImage.from_ref_dataset(
            source.header,
            pixels,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),
            series_number=IMAGE_SERIES_NUMBER,
            series_description="AI summary pages (research)",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            specific_character_set=source.character_set_for(derivation),
            contributing_equipment=[processing_equipment(maker.node)],
            **maker.identification(name)
            | {"sop_instance_uid": maker.uids.uid(f"{name} instance {number}"), "instance_number": number},
        )
        ds.copy_patient_and_study_information(source.header)
        ds.PatientOrientation = []  # a page shows several views; each bears its own marks
        ds.BodyPartExamined = "CSPINE"
        ds.ConversionType = "WSD"
        ds.BurnedInAnnotation = "YES"
        ds.ImageComments = BANNER
        ds.DerivationDescription = derivation
        ds.SourceImageSequence = _source_images(planes, maker)
        images.append(ds)
    return images


def make_pdf(summary: Summary, maker: Maker) -> SOPClass:
    """The pages as an Encapsulated PDF. Reference: PS3.3 A.45.1."""
    source, name = maker.source, PDF_FILE_NAME.removesuffix(".dcm")
    header = source.header
    ds = SOPClass(
        study_instance_uid=header.StudyInstanceUID,
        series_number=PDF_SERIES_NUMBER,
        series_description="AI summary (research)",
        sop_class_uid=EncapsulatedPDFStorage,
        modality="DOC",
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=source.character_set,
        **{key: header.get(keyword) for key, keyword in _PATIENT_AND_STUDY.items()},
        **maker.identification(name),
    )
    ds.copy_patient_and_study_information(header)
    ds.ContributingEquipmentSequence = [processing_equipment(maker.node)]
    ds.ConversionType = "WSD"
    ds.BurnedInAnnotation = "YES"
    ds.VerificationFlag = "UNVERIFIED"
    ds.AcquisitionDateTime = None
    ds.DocumentTitle = _TITLE
    ds.ConceptNameCodeSequence = [CodedConcept.from_code(codes.IMAGING_MEASUREMENT_REPORT)]
    ds.SourceInstanceSequence = _source_images(range(len(source.slices)), maker)
    ds.MIMETypeOfEncapsulatedDocument = "application/pdf"
    ds.EncapsulatedDocumentLength = len(summary.pdf)
    ds.EncapsulatedDocument = summary.pdf + b"\0" * (len(summary.pdf) % 2)
    return ds


def _source_images(planes: Sequence[int], maker: Maker) -> list[Dataset]:
    """References to the Instances of these slices, and to their frames."""
    source = maker.source
    frames: dict[str, list[int]] = {}
    for z in planes:
        frames.setdefault(source.slices[z].sop_instance_uid, []).append(source.slices[z].frame_number)
    items = []
    for uid, numbers in frames.items():
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.sop_class_uid, uid
        if source.is_multi_frame:
            item.ReferencedFrameNumber = sorted(set(numbers))
        item.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(codes.SOURCE_IMAGE)]
        items.append(item)
    return items
