"""Every transfer syntax, and every file that comes with pydicom, sent to the real node by real associations."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from pydicom.uid import CTImageStorage, ImplicitVRLittleEndian, JPEGLosslessSV1

from model import SeriesRules, read_series
from model.phantom import Anatomy, Phantom, default_grid, render, write_series
from node.case import CaseState
from node.cli import main
from node.index import Index
from tests.raw_scu import associate, dataset_of, send_bytes
from tests.running_node import RunningNode
from tests.stored import path_of
from tests.transfer_syntaxes import LOSSLESS, convert, need_encoder

SMALL = SeriesRules(min_slices=3, min_extent_mm=1.0)
PYDICOM_FILES = Path(pydicom.__file__).parent / "data"

TAKEN, MISMATCH, CANNOT_UNDERSTAND = 0x0000, 0xA900, 0xC000
NOT_ACCEPTED = None  # the presentation context

# File (the first row that fits) -> answer to it as what it is, answer to its dataset announced as CT Image, reason.
TABLE: dict[str, tuple[int | None, int | None, str]] = {
    "test_files/CT_small.dcm": (TAKEN, TAKEN, "CT; the second time it is the same Instance"),
    "test_files/693_J2KI.dcm": (TAKEN, TAKEN, "CT in JPEG 2000"),
    "test_files/J2K_pixelrep_mismatch.dcm": (TAKEN, TAKEN, "CT in JPEG 2000, signed in a way of its own"),
    "test_files/dicomdirtests/*/CT*": (TAKEN, TAKEN, "CT"),
    "test_files/dicomdirtests/TINY_ALPHA/PT000000/*": (CANNOT_UNDERSTAND, CANNOT_UNDERSTAND, "CT without pixels"),
    "test_files/UN_sequence.dcm": (CANNOT_UNDERSTAND, CANNOT_UNDERSTAND, "CT without Series Instance UID"),
    "charset_files/chrSQEncoding*": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "MR without Series Instance UID"),
    "charset_files/*.dcm": (NOT_ACCEPTED, MISMATCH, "Secondary Capture or CR in many character sets"),
    "palettes/*.dcm": (NOT_ACCEPTED, MISMATCH, "Color Palette"),
    "test_files/ExplVR_*NoMeta.dcm": (NOT_ACCEPTED, MISMATCH, "RT Ion Plan without File Meta Information"),
    "test_files/ExplVR_BigEnd.dcm": (NOT_ACCEPTED, MISMATCH, "Ultrasound in big endian"),
    "test_files/MR_*.dcm": (NOT_ACCEPTED, MISMATCH, "MR, one of them truncated"),
    "test_files/SC_*.dcm": (NOT_ACCEPTED, MISMATCH, "Secondary Capture in many syntaxes"),
    "test_files/GDCMJ2K_TextGBR.dcm": (NOT_ACCEPTED, MISMATCH, "Secondary Capture"),
    "test_files/JP*.dcm": (NOT_ACCEPTED, MISMATCH, "Secondary Capture in the kin of JPEG"),
    "test_files/image_dfl.dcm": (NOT_ACCEPTED, MISMATCH, "Secondary Capture, deflated"),
    "test_files/examples_*.dcm": (NOT_ACCEPTED, MISMATCH, "Ultrasound, MR"),
    "test_files/badVR.dcm": (NOT_ACCEPTED, MISMATCH, "RT Dose with values that break their VR"),
    "test_files/rt*.dcm": (NOT_ACCEPTED, MISMATCH, "radiotherapy, one of them truncated"),
    "test_files/liver_*.dcm": (NOT_ACCEPTED, MISMATCH, "Segmentation: what this node sends and never takes"),
    "test_files/reportsi*.dcm": (NOT_ACCEPTED, MISMATCH, "Basic Text SR"),
    "test_files/test-SR.dcm": (NOT_ACCEPTED, MISMATCH, "Comprehensive SR"),
    "test_files/waveform_ecg.dcm": (NOT_ACCEPTED, MISMATCH, "ECG"),
    "test_files/dicomdirtests/*/CR*": (NOT_ACCEPTED, MISMATCH, "CR"),
    "test_files/dicomdirtests/*/MR*": (NOT_ACCEPTED, MISMATCH, "MR"),
    "test_files/dicomdirtests/*DICOMDIR*": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "a DICOMDIR is no Instance of a Series"),
    "test_files/meta_missing_tsyntax.dcm": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "fragment: no UIDs, no transfer syntax"),
    "test_files/no_meta*.dcm": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "fragment: no UIDs"),
    "test_files/*priv_SQ.dcm": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "private sequences and little else"),
    "test_files/empty_charset_LEI.dcm": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "fragment: no UIDs"),
    "test_files/zipMR.gz": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "compressed by gzip"),
    "test_files/crayons.icc": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "an ICC profile"),
    "*.json": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "text"),
    "*.txt": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "text"),
    "*.dump": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "text"),
    "*README*": (NOT_ACCEPTED, CANNOT_UNDERSTAND, "text"),
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningNode]:
    """A node that receives, and finds nothing whole."""
    running = RunningNode(tmp_path_factory.mktemp("node"), complete={"quiet_time_s": 3600.0}, analyse={"threads": 1})
    yield running
    running.stop()


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    anatomy = Anatomy.random(3)
    return render(anatomy, default_grid(anatomy, (2.0, 2.4, 2.4), shape=(32, 48, 40)))


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda uid: uid.keyword)
def test_a_series_in_any_syntax_is_stored_as_it_came_and_read_to_the_same_voxels(
    node: RunningNode, phantom: Phantom, tmp_path: Path, syntax: str
) -> None:
    need_encoder(syntax)
    sent = write_series(phantom, tmp_path, seed=LOSSLESS.index(syntax))[:6]
    for path in sent:
        convert(path, syntax)
    association = associate(node.port, [(CTImageStorage, syntax)])
    for path in sent:
        encoded, context, uid = dataset_of(path)
        answer = send_bytes(association, encoded, context, uid)
        assert answer is not None
        assert answer.Status == TAKEN
    association.release()

    index = Index(node.data_dir)
    stored = index.instance_paths(pydicom.dcmread(sent[0], stop_before_pixels=True).SeriesInstanceUID)
    index.close()
    assert {dataset_of(path)[0] for path in stored} == {dataset_of(path)[0] for path in sent}
    assert {pydicom.dcmread(path).file_meta.TransferSyntaxUID for path in stored} == {syntax}
    volume = read_series(stored, SMALL)
    np.testing.assert_array_equal(volume.voxels_hu, np.clip(phantom.voxels_hu[:6], -1024, 3071))
    np.testing.assert_allclose(volume.grid.affine, phantom.grid.affine, atol=1e-4)


def row_of(name: str) -> tuple[int | None, int | None, str]:
    rows = [row for pattern, row in TABLE.items() if fnmatchcase(name, pattern)]
    assert rows, f"{name} is not in the table: what should a node for CT answer to it?"
    return rows[0]


def test_every_file_of_pydicom_gets_the_status_it_deserves(node: RunningNode) -> None:
    names = [
        str(path.relative_to(PYDICOM_FILES))
        for path in sorted(PYDICOM_FILES.rglob("*"))
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert len(names) > 150
    files = {name: dataset_of(PYDICOM_FILES / name) for name in names}
    syntaxes = {context[1] or ImplicitVRLittleEndian for _, context, _ in files.values()}
    as_it_is = associate(node.port, sorted({context for _, context, _ in files.values() if all(context)}))
    as_ct = associate(node.port, [(CTImageStorage, syntax) for syntax in sorted(syntaxes)])
    wrong, taken = [], set()
    for name, (encoded, context, uid) in files.items():
        expected = row_of(name)
        answers = (
            send_bytes(as_it_is, encoded, context, uid),
            send_bytes(as_ct, encoded, (CTImageStorage, context[1] or ImplicitVRLittleEndian), uid),
        )
        statuses = [None if answer is None else answer.get("Status") for answer in answers]
        if statuses[0] is NOT_ACCEPTED and expected[1] == MISMATCH and statuses[1] == CANNOT_UNDERSTAND:
            statuses[1] = MISMATCH  # no CT in two ways, such as a report, which has no pixels: either will do
        if statuses != list(expected[:2]):
            wrong.append(f"{name} ({expected[2]}): {[s if s is None else hex(s) for s in statuses]}")
        taken |= {uid} if TAKEN in statuses else set()
    for association in (as_it_is, as_ct):
        assert association.is_established, "an odd file cost its neighbours the association"
        association.release()

    assert not wrong, "\n".join(wrong)
    index = Index(node.data_dir)
    cases = index.cases()
    rows = {path for case in cases for path in index.instance_paths(case.series_instance_uid)}
    assert all(path_of(index, uid) in rows for uid in taken)
    assert sum(case.num_instances for case in cases) == len(rows)
    index.close()
    on_disk = {path for path in (node.data_dir / "instances").rglob("*.dcm") if path.stat().st_size}
    assert on_disk == rows, "spool and index are one"
    assert "receiver-died" not in node.log()


@pytest.mark.parametrize("num_bytes", [1, 7, 200, 500])
def test_a_dataset_cut_within_its_header_cannot_be_understood(node: RunningNode, num_bytes: int) -> None:
    encoded, context, uid = dataset_of(PYDICOM_FILES / "test_files" / "CT_small.dcm")
    association = associate(node.port, [context])

    answer = send_bytes(association, encoded[:num_bytes], context, f"{uid}.{num_bytes}")

    assert answer is not None
    assert answer.Status in (CANNOT_UNDERSTAND, MISMATCH)
    assert association.is_established
    association.release()


def send_compressed(running: RunningNode, paths: list[Path]) -> None:
    association = associate(running.port, [(CTImageStorage, JPEGLosslessSV1)])
    for path in paths:
        answer = send_bytes(association, *dataset_of(path))
        assert answer is not None
        assert answer.Status == TAKEN
    association.release()


@pytest.mark.timeout(300)
def test_a_compressed_series_is_analysed_and_purged_and_new_when_it_comes_again(
    tmp_path: Path, phantom: Phantom, untrained_bundle: Path
) -> None:
    sent = write_series(phantom, tmp_path / "sent")
    for path in sent:
        convert(path, JPEGLosslessSV1)
    running = RunningNode(
        tmp_path,
        analyse={"bundle": str(untrained_bundle), "threads": 2},
        rules={"study_wait_s": 0.0},
        retention={"originals_days": 0, "results_days": 0},
    )
    try:
        send_compressed(running, sent)
        assert list(running.wait_until_settled()) == [CaseState.DONE]
        (case,) = running.cases()
        assert case.result_dir is not None
        made = [pydicom.dcmread(path).SOPInstanceUID for path in case.result_dir.glob("*.dcm")]
        assert made

        CliRunner().invoke(main, ["purge", "--config", str(running.config_path)], catch_exceptions=False)

        (case,) = running.cases()
        assert case.originals_purged_at is not None
        assert case.results_purged_at is not None
        left = [path for top in ("instances", "cases") for path in (running.data_dir / top).rglob("*.dcm")]
        assert [path for path in left if path.stat().st_size] == []
        index = Index(running.data_dir)
        assert all(index.is_result(uid) for uid in made)
        send_compressed(running, sent)
        assert (index.cases()[0].num_instances, index.cases()[0].originals_purged_at) == (len(sent), None)
        index.close()
    finally:
        running.kill()
    running.wait_until_gone()  # the processes that decode, too
