"""Saliency map, key objects, summary pages and summary PDF as DICOM objects, read back by other software."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pypdfium2
import pytest

from model import Analysis, SliceWeight, Volume, read_series
from model.bundle import DEFAULT_BUNDLE, read_bundle
from node.encode import ResultObject, encode_results
from node.encode.keyslices import attention_by_plane, key_planes
from node.profiles import Kind, Profile
from node.send import send_files
from tests.factories import make_ct_series
from tests.node.analysed_series import (
    NODE,
    RULES,
    SINGLE_FRAME,
    analysis_of,
    check_conformance,
    children,
    code_of,
    grid_points,
    series,
    value,
)
from tests.node.test_encode import without_dates
from tests.orthanc_server import OrthancServer
from tests.running_node import free_port

SHOWN = (Kind.SALIENCY_MAP, Kind.KEY_OBJECTS, Kind.SUMMARY_IMAGES, Kind.SUMMARY_PDF)


def encode(
    volume: Volume, analysis: Analysis, folder: Path, objects: tuple[Kind, ...] = SHOWN
) -> dict[str, ResultObject]:
    """What was written for a destination that takes these objects, by kind."""
    folder.mkdir(exist_ok=True)
    made = encode_results(analysis, volume, folder, node=NODE, profiles=[Profile(objects=objects)])
    return {item.kind: item for item in made}


@pytest.mark.parametrize("kind", ["axial", "head to foot", "oblique", "enhanced, frames out of order"])
def test_objects_of_every_acquisition_conform(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)

    made = encode(volume, analysis_of(volume), tmp_path / "out", (*SHOWN, Kind.VERTEBRAE_SEG))

    pages = {f"summary-{number:02d}.sc" for number in (1, 2, 3)}
    assert set(made) == {"vertebrae.seg", "saliency.pm", "key-slices.kos", "summary.pdf", *pages}
    for item in made.values():
        check_conformance(item.path)
    if checker := shutil.which("dcentvfy"):  # one study, one patient, consistent Series
        paths = [str(item.path) for item in made.values()] + sorted({str(s.path) for s in volume.slices})
        checked = subprocess.run([checker, *paths], capture_output=True, text=True, check=False)
        complaints = [line for line in checked.stderr.splitlines() if line.startswith(("Error", "Warning"))]
        assert not [line for line in complaints if "AccessionNumber" not in line]  # it mistakes the level of that one
    if dump := shutil.which("dsrdump"):
        dumped = subprocess.run([dump, "-Ec", made["key-slices.kos"].path], capture_output=True, check=False)
        assert dumped.returncode == 0, dumped.stderr


def test_a_repeat_gives_the_same_bytes_dates_aside(tmp_path: Path) -> None:
    volume = series(tmp_path)
    first = encode(volume, analysis_of(volume), tmp_path / "first")
    second = encode(volume, analysis_of(volume), tmp_path / "second")

    for kind in first:
        assert without_dates(first[kind].path) == without_dates(second[kind].path)
    assert len({item.sop_instance_uid for item in first.values()}) == len(first)
    assert len({item.series_instance_uid for item in first.values()}) == len(SHOWN)


def test_patient_and_study_are_named_in_the_header_in_the_source_character_set(tmp_path: Path) -> None:
    def edit(_: int, ds: pydicom.Dataset) -> None:
        ds.SpecificCharacterSet = "ISO_IR 100"
        ds.PatientName, ds.StudyDescription = "Müller^Jörg", "Zürich"

    volume = series(tmp_path, edit=edit)

    for item in encode(volume, analysis_of(volume), tmp_path / "out").values():
        ds = pydicom.dcmread(item.path)
        assert (str(ds.PatientName), ds.StudyDescription, ds.PatientID) == ("Müller^Jörg", "Zürich", "TEST")
        assert ds.SpecificCharacterSet == "ISO_IR 100"


def test_a_model_named_beyond_ascii_is_written_in_utf_8(tmp_path: Path) -> None:
    volume = series(tmp_path, edit=lambda _, ds: setattr(ds, "SpecificCharacterSet", "ISO_IR 100"))
    analysis = analysis_of(volume)
    model = replace(analysis.findings.model, name="Ὀστοῦν")
    analysis = replace(analysis, findings=replace(analysis.findings, model=model))

    naming_it = (Kind.VERTEBRAE_SEG, Kind.FRACTURES_SEG, Kind.SALIENCY_MAP, Kind.KEY_OBJECTS, Kind.SUMMARY_IMAGES)
    made = encode(volume, analysis, tmp_path / "out", naming_it)

    for item in made.values():
        assert pydicom.dcmread(item.path).SpecificCharacterSet == "ISO_IR 192"
        assert "Ὀστοῦν".encode() in item.path.read_bytes()


def test_nothing_is_made_that_nobody_asked_for_and_matplotlib_is_not_loaded(tmp_path: Path) -> None:
    code = "import sys, node.encode; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume), tmp_path / "out", (Kind.KEY_OBJECTS,))
    assert set(made) == {"key-slices.kos"}


def test_without_suspicion_there_are_no_key_objects_and_no_saliency_but_pages(tmp_path: Path) -> None:
    volume = series(tmp_path)

    made = encode(volume, analysis_of(volume, fractured=()), tmp_path / "out")

    assert set(made) == {"summary-01.sc", "summary-02.sc", "summary.pdf"}


# --- Saliency ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SINGLE_FRAME, "enhanced, frames out of order"])
def test_saliency_lies_where_it_was_found_and_runs_from_0_to_1(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    analysis = analysis_of(volume)
    # Different everywhere, so that a voxel in a wrong place is seen.
    ramp = (1 + np.arange(analysis.saliency.size, dtype=np.int64) * 7 % 255).astype(np.uint8)
    analysis = replace(analysis, saliency=np.where(analysis.fractures > 0, ramp.reshape(analysis.saliency.shape), 0))
    made = encode(volume, analysis, tmp_path / "out", (Kind.SALIENCY_MAP,))
    ds = pydicom.dcmread(made["saliency.pm"].path)

    planes = np.flatnonzero(analysis.saliency.any(axis=(1, 2)))
    assert ds.NumberOfFrames == len(planes)
    points = grid_points(volume)
    positions = [np.array(f.PlanePositionSequence[0].ImagePositionPatient, float) for f in _per_frame(ds)]
    frames = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    for frame, position in zip(frames, positions, strict=True):
        (z,) = np.flatnonzero(np.linalg.norm(points[:, 0, 0] - position, axis=-1) < 1e-3)
        assert np.array_equal(frame, analysis.saliency[z])
    orientation = ds.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    right = points[0, 0, 1] - points[0, 0, 0]
    assert np.allclose(orientation[:3], right / np.linalg.norm(right), atol=1e-6)

    image = hd.imread(made["saliency.pm"].path)
    values = image.get_frames(apply_real_world_transform=True)
    assert np.allclose(values, frames / 255)
    (mapping,) = ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence
    (quantity,) = mapping.QuantityDefinitionSequence
    assert code_of(quantity.ConceptCodeSequence) == ("130404", "DCM")


def _per_frame(ds: pydicom.Dataset) -> list[pydicom.Dataset]:
    return list(ds.PerFrameFunctionalGroupsSequence)


@pytest.mark.parametrize("kind", ["axial", "enhanced, frames out of order"])
def test_each_frame_of_the_saliency_names_the_slice_it_lies_on(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    made = encode(volume, analysis_of(volume), tmp_path / "out", (Kind.SALIENCY_MAP,))
    ds = pydicom.dcmread(made["saliency.pm"].path)

    for item in _per_frame(ds):
        (reference,) = item.DerivationImageSequence[0].SourceImageSequence
        source = pydicom.dcmread(_path_of(volume, reference.ReferencedSOPInstanceUID))
        if kind == "axial":
            position = source.ImagePositionPatient
        else:
            position = (
                _per_frame(source)[reference.ReferencedFrameNumber - 1].PlanePositionSequence[0].ImagePositionPatient
            )
        assert item.PlanePositionSequence[0].ImagePositionPatient == position
        assert reference.ReferencedSOPClassUID == source.SOPClassUID


def _path_of(volume: Volume, sop_instance_uid: str) -> Path:
    return next(s.path for s in volume.slices if s.sop_instance_uid == sop_instance_uid)


def test_an_interpolated_slice_gets_no_saliency(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct", num_slices=10)
    volume = read_series([*paths[:4], *paths[5:]], RULES)
    (lost,) = (z for z, item in enumerate(volume.slices) if item.is_interpolated)
    analysis = analysis_of(volume)
    analysis = replace(analysis, saliency=np.ones_like(analysis.saliency))

    made = encode(volume, analysis, tmp_path / "out", (Kind.SALIENCY_MAP,))

    assert pydicom.dcmread(made["saliency.pm"].path).NumberOfFrames == len(volume.slices) - 1
    position = volume.grid.to_lps_mm(np.array([lost, 0.0, 0.0]))
    for item in _per_frame(pydicom.dcmread(made["saliency.pm"].path)):
        assert not np.allclose(np.array(item.PlanePositionSequence[0].ImagePositionPatient, float), position)


# --- Key objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["axial", "enhanced, frames out of order"])
def test_key_objects_are_the_slices_that_carry_the_answer(kind: str, tmp_path: Path) -> None:
    volume = series(tmp_path, kind)
    analysis = analysis_of(volume, fractured=("C2", "C5"))
    made = encode(volume, analysis, tmp_path / "out", (Kind.KEY_OBJECTS,))
    ds = pydicom.dcmread(made["key-slices.kos"].path)

    assert code_of(ds.ConceptNameCodeSequence) == ("113000", "DCM")
    assert "C2, C5" in value(ds, "113012")
    assert "not reviewed" in value(ds, "113012")
    images = [item.ReferencedSOPSequence[0] for item in ds.ContentSequence if item.ValueType == "IMAGE"]
    selected = {
        (image.ReferencedSOPInstanceUID, int(frame))
        for image in images
        for frame in np.atleast_1d(image.get("ReferencedFrameNumber", 1))
    }
    with_regions = {
        (region.sop_instance_uid, region.frame_number)
        for name in ("C2", "C5")
        for region in analysis.findings.levels[name].regions
    }
    assert with_regions <= selected
    assert len(selected) <= 6
    assert selected <= {(s.sop_instance_uid, s.frame_number) for s in volume.slices}
    assert not children(ds, "121071")


def test_attention_to_an_interpolated_slice_counts_for_the_one_it_is_named_after(tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "ct", num_slices=10)
    volume = read_series([*paths[:4], *paths[5:]], RULES)
    (lost,) = (z for z, item in enumerate(volume.slices) if item.is_interpolated)
    level = replace(
        analysis_of(volume).findings.levels["C3"],
        attention=tuple(
            SliceWeight(sop_instance_uid=volume.slices[z].sop_instance_uid, weight=weight)
            for z, weight in ((lost - 1, 0.3), (lost, 0.3), (lost + 1, 0.4))
        ),
    )

    assert attention_by_plane(level, volume.slices) == {lost - 1: 0.6, lost + 1: 0.4}
    assert key_planes(level, volume.slices) == [lost - 1, lost + 1]


# --- Pages as pictures -------------------------------------------------------------------------------------------


def test_pages_are_single_frames_of_one_series_that_say_what_they_are(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume), tmp_path / "out", (Kind.SUMMARY_IMAGES,))
    pages = [pydicom.dcmread(item.path) for item in made.values()]

    assert [ds.InstanceNumber for ds in pages] == [1, 2, 3]
    assert len({ds.SeriesInstanceUID for ds in pages}) == 1
    for ds in pages:
        assert ds.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
        assert (ds.Rows, ds.Columns, ds.PhotometricInterpretation) == (1024, 1024, "RGB")
        assert ds.pixel_array.shape == (1024, 1024, 3)
        assert (ds.BurnedInAnnotation, ds.ConversionType, ds.PatientID) == ("YES", "WSD", "TEST")
        assert "test-model 1.2.3" in ds.DerivationDescription
        assert not ds.PatientOrientation
        known = {item.sop_instance_uid for item in volume.slices}
        assert {item.ReferencedSOPInstanceUID for item in ds.SourceImageSequence} <= known
    assert len(pages[0].SourceImageSequence) == len(volume.slices)
    assert len(pages[1].SourceImageSequence) <= 3


# --- Pages as a PDF ----------------------------------------------------------------------------------------------


def _pdf(item: ResultObject) -> tuple[pydicom.Dataset, pypdfium2.PdfDocument]:
    ds = pydicom.dcmread(item.path)
    return ds, pypdfium2.PdfDocument(ds.EncapsulatedDocument[: ds.EncapsulatedDocumentLength])


def test_the_pdf_says_in_text_what_was_found_and_not_who_it_is(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume, seen=("C2", "C3", "C4", "C5", "C6", "C7"))
    ds, document = _pdf(encode(volume, analysis, tmp_path / "out", (Kind.SUMMARY_PDF,))["summary.pdf"])
    texts = [page.get_textpage().get_text_range() for page in document]

    assert len(texts) == 3
    assert all("AI result, research use, not reviewed" in text for text in texts)
    overview = " ".join(texts[0].split())
    for expected in (
        "Fracture suspected: C5 (87.5 %). Not judged: C1.",
        "not judged: not in view",
        "Slices are 1.0 mm apart.",
        "test-model 1.2.3",
        "Trained on phantoms only.",
        "window level 400, width 1800 HU",
    ):
        assert expected in overview
    assert "Instance 4" in texts[1]
    assert "C5: fracture suspected, 87.5 %" in texts[1]
    assert not any("Test" in text.split() or "Neck" in text for text in texts)
    assert str(ds.PatientName) == "Test^Neck"
    assert (ds.Modality, ds.MIMETypeOfEncapsulatedDocument, ds.VerificationFlag) == (
        "DOC",
        "application/pdf",
        "UNVERIFIED",
    )
    assert code_of(ds.ConceptNameCodeSequence) == ("126000", "DCM")
    assert "CreationDate" not in document.get_metadata_dict(skip_empty=True)


def test_the_overview_says_in_full_what_the_model_of_the_package_was_trained_on(tmp_path: Path) -> None:
    volume = series(tmp_path)
    analysis = analysis_of(volume)
    model = read_bundle(DEFAULT_BUNDLE).info
    analysis = replace(analysis, findings=replace(analysis.findings, model=model))
    _, document = _pdf(encode(volume, analysis, tmp_path / "out", (Kind.SUMMARY_PDF,))["summary.pdf"])
    overview = " ".join(document[0].get_textpage().get_text_range().split())
    assert model.trained_on in overview
    assert "a fracture is suspected" in overview
    assert "No patient is named but in the header." in overview
    assert "the rest stands in the report" not in overview
    assert "87.5 %" in overview
    assert "4 %" in overview
    assert "4.0 %" not in overview  # as the sentence at the top has it


# --- In an archive -----------------------------------------------------------------------------------------------


def test_orthanc_stores_every_object(tmp_path: Path) -> None:
    volume = series(tmp_path)
    made = encode(volume, analysis_of(volume), tmp_path / "out")
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    try:
        refused = send_files([item.path for item in made.values()], orthanc.destination, calling_ae_title="CSPINE")
        stored = orthanc.instances()
    finally:
        orthanc.stop()

    assert not refused
    assert stored == {item.sop_instance_uid for item in made.values()}
