"""What the receiver takes, asked over real associations by pynetdicom and by dcmtk."""

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    generate_uid,
)
from pynetdicom.sop_class import Verification
from sqlalchemy.exc import OperationalError

from node.case import CaseState
from node.config import Config
from node.index import Index
from node.receive import contexts, lane
from node.receive.commit import GroupCommit
from tests.factories import make_ct_series, make_enhanced_ct
from tests.node.sending import (
    CONFLICT,
    SUCCESS,
    associate,
    carried,
    encoded_dataset,
    files_under,
    make_instance,
    store_one,
)
from tests.stored import path_of
from tests.waiting import WAIT_S, wait_until


def test_c_echo_is_answered(receiver: Config) -> None:
    association = associate(receiver, Verification, transfer_syntaxes=(ImplicitVRLittleEndian,))
    assert association.send_c_echo().Status == SUCCESS
    association.release()


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless]
)
def test_c_store_keeps_the_dataset_as_it_came(receiver: Config, index: Index, tmp_path: Path, syntax: str) -> None:
    sent = make_instance(tmp_path / "sent", transfer_syntax_uid=syntax, rows=64, columns=64)
    assert store_one(receiver, sent) == SUCCESS
    uid = pydicom.dcmread(sent).SOPInstanceUID
    stored = path_of(index, uid)
    assert encoded_dataset(stored) == encoded_dataset(sent)
    assert pydicom.dcmread(stored).file_meta.TransferSyntaxUID == syntax
    assert (pydicom.dcmread(stored).pixel_array == pydicom.dcmread(sent).pixel_array).all()


def test_success_is_answered_only_when_file_name_and_row_are_safe(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the status must not cost the Instance."""
    happened: list[str] = []
    fsync, fdatasync, add, response = os.fsync, os.fdatasync, index.add_instances, lane.c_store_response

    def note(sync: Callable[[int], None]) -> Callable[[int], None]:
        def noted(descriptor: int) -> None:
            if len(happened) == 2:  # of the file: its row comes first then
                wait_until(lambda: "row" in happened)
            sync(descriptor)
            happened.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

        return noted

    monkeypatch.setattr(os, "fsync", note(fsync))
    monkeypatch.setattr(os, "fdatasync", note(fdatasync))
    monkeypatch.setattr(index, "add_instances", lambda *a, **k: (add(*a, **k), happened.append("row"))[0])
    monkeypatch.setattr(lane, "c_store_response", lambda *a: (happened.append("status"), response(*a))[1])
    sent = make_instance(tmp_path / "sent")
    assert store_one(receiver, sent) == SUCCESS
    stored = path_of(index, pydicom.dcmread(sent).SOPInstanceUID)
    folder, run = stored.parent, stored.parent.parent
    # The folder is synced with the names of a batch of files in it, before any of them is used.
    assert happened == [run.name, folder.name, "row", stored.name, "status"]


def test_a_case_holds_what_came_of_a_series(receiver: Config, index: Index, tmp_path: Path) -> None:
    paths = make_ct_series(tmp_path / "sent", num_slices=5)
    association = associate(receiver)
    for path in paths:
        assert association.send_c_store(path).Status == SUCCESS
    association.release()
    ds = pydicom.dcmread(paths[0])
    (case,) = index.cases()
    assert (case.state, case.num_instances) == (CaseState.RECEIVING, 5)
    assert (case.series_instance_uid, case.study_instance_uid) == (ds.SeriesInstanceUID, ds.StudyInstanceUID)
    assert case.calling_ae_title == "SCANNER"
    headers = index.stored_series(case.series_instance_uid).headers
    assert len({tuple(header["position_lps_mm"]) for header in headers}) == 5


def test_enhanced_ct_is_taken_with_a_header_for_each_frame(receiver: Config, index: Index, tmp_path: Path) -> None:
    sent = make_enhanced_ct(tmp_path / "enhanced.dcm", num_frames=6)
    assert store_one(receiver, sent) == SUCCESS
    assert len(index.stored_series(pydicom.dcmread(sent).SeriesInstanceUID).headers) == 6


def test_a_dataset_without_sop_class_and_modality_is_taken(receiver: Config, index: Index, tmp_path: Path) -> None:
    """The Instances of RSNA 2022 are like that; the request names the SOP Class."""

    def strip(ds: Dataset) -> None:
        del ds.Modality

    sent = make_instance(tmp_path / "sent", strip)
    ds = pydicom.dcmread(sent)
    del ds.SOPClassUID
    ds.save_as(sent)
    assert store_one(receiver, sent) == SUCCESS
    (header,) = index.stored_series(ds.SeriesInstanceUID).headers
    assert header["sop_class_uid"] == CTImageStorage


def test_every_transfer_syntax_that_can_be_decoded_is_accepted(receiver: Config) -> None:
    syntaxes = contexts.decodable_transfer_syntaxes()
    for sop_class in contexts.CT_SOP_CLASSES:
        association = associate(receiver, sop_class, transfer_syntaxes=tuple(syntaxes))
        assert {context.transfer_syntax[0] for context in association.accepted_contexts} == set(syntaxes)
        association.release()


def test_the_usual_transfer_syntaxes_can_be_decoded() -> None:
    """A codec that went missing from the dependencies would else be noticed at a customer's scanner."""
    names = {pydicom.uid.UID(uid).name for uid in contexts.decodable_transfer_syntaxes()}
    assert names >= {
        "Implicit VR Little Endian",
        "Explicit VR Little Endian",
        "Deflated Explicit VR Little Endian",
        "Explicit VR Big Endian",
        "RLE Lossless",
        "JPEG Baseline (Process 1)",
        "JPEG Extended (Process 2 and 4)",
        "JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 [Selection Value 1])",
        "JPEG-LS Lossless Image Compression",
        "JPEG-LS Lossy (Near-Lossless) Image Compression",
        "JPEG 2000 Image Compression (Lossless Only)",
        "JPEG 2000 Image Compression",
        "High-Throughput JPEG 2000 Image Compression (Lossless Only)",
    }


def test_any_called_ae_title_is_served(receiver: Config) -> None:
    association = associate(receiver)  # calls ANYTHING
    assert association.is_established
    association.release()


def test_the_same_instance_twice_is_stored_once_and_acknowledged_twice(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    sent = make_instance(tmp_path / "sent")
    assert [store_one(receiver, sent), store_one(receiver, sent)] == [SUCCESS, SUCCESS]
    assert [case.num_instances for case in index.cases()] == [1]
    assert len(files_under(index.data_dir)) == 1


def test_another_instance_with_the_same_uid_is_refused_and_the_first_kept(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    uid = generate_uid()
    first, second = (
        make_instance(tmp_path / str(number), lambda ds: setattr(ds, "SOPInstanceUID", uid)) for number in range(2)
    )
    assert [store_one(receiver, first), store_one(receiver, second)] == [SUCCESS, CONFLICT]
    stored = path_of(index, uid)
    assert encoded_dataset(stored) == encoded_dataset(first)
    assert len(index.cases()) == 1


def test_refused_conflicts_are_counted_at_the_series_of_the_instance_that_is_here(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    uid = generate_uid()
    first, second, in_other_series = (
        make_instance(tmp_path / str(number), lambda ds: setattr(ds, "SOPInstanceUID", uid)) for number in range(3)
    )
    ds = pydicom.dcmread(first)
    ds.KVP = "80"
    ds.save_as(second)
    assert [store_one(receiver, path) for path in (first, first)] == [SUCCESS, SUCCESS]
    (before,) = index.cases()
    assert (before.num_conflicts, before.last_conflict_at, before.conflicts) == (0, None, "")
    began_at = time.time()
    assert [store_one(receiver, path) for path in (second, in_other_series, first)] == [CONFLICT, CONFLICT, SUCCESS]
    (case,) = index.cases()
    assert (case.series_instance_uid, case.num_conflicts) == (ds.SeriesInstanceUID, 2)
    assert case.last_conflict_from == "SCANNER"
    assert began_at <= (case.last_conflict_at or 0) <= time.time()
    assert case.changed_at == before.changed_at  # nothing became of it


def test_a_conflict_that_cannot_be_counted_is_refused_all_the_same(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    uid = generate_uid()
    first, second = (
        make_instance(tmp_path / str(number), lambda ds: setattr(ds, "SOPInstanceUID", uid)) for number in range(2)
    )
    assert store_one(receiver, first) == SUCCESS

    def away(*_: str) -> None:
        raise OperationalError("UPDATE cases", {}, Exception("the server closed the connection"))

    monkeypatch.setattr(index, "note_conflict", away)
    assert store_one(receiver, second) == CONFLICT
    assert "action=conflict-not-noted series=" in caplog.text


@pytest.mark.parametrize(("same", "second_status"), [(True, SUCCESS), (False, CONFLICT)])
def test_one_uid_over_two_associations_at_the_same_moment_is_one_instance(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool, second_status: int
) -> None:
    """Of different Instances one is refused, whichever; neither sees the other before it is written."""
    uid = generate_uid()
    first, second = (
        make_instance(tmp_path / str(number), lambda ds: setattr(ds, "SOPInstanceUID", uid)) for number in range(2)
    )
    both, statuses, add = threading.Barrier(2), [], GroupCommit.add
    monkeypatch.setattr(GroupCommit, "add", lambda *values: (both.wait(WAIT_S), add(*values))[1])
    senders = [
        threading.Thread(target=lambda path=path: statuses.append(store_one(receiver, path)))
        for path in (first, first if same else second)
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert sorted(statuses) == [SUCCESS, second_status]
    assert len(files_under(index.data_dir)) == len(index.cases()) == 1


def test_enhanced_sop_classes_are_those_of_the_model() -> None:
    from model.stack import CT_SOP_CLASSES

    assert set(contexts.CT_SOP_CLASSES) == set(CT_SOP_CLASSES)
    assert EnhancedCTImageStorage in contexts.CT_SOP_CLASSES


# ---- dcmtk ----


_NEEDS_DCMTK = pytest.mark.skipif(
    not Path("/usr/bin/storescu").exists() or shutil.which("/usr/bin/echoscu") is None,
    reason="dcmtk is not installed (apt-get install dcmtk)",
)


def dcmtk(tool: str, config: Config, *paths: Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs one of dcmtk's SCUs; by full path, for pynetdicom brings programs of the same names."""
    command = [f"/usr/bin/{tool}", "-aet", "DCMTK", "-aec", "CSPINE", *options, "127.0.0.1", str(config.receive.port)]
    return subprocess.run(
        [*command, *map(str, paths)],
        env=os.environ | {"TCP_NODELAY": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@_NEEDS_DCMTK
def test_dcmtk_echoscu(receiver: Config) -> None:
    assert dcmtk("echoscu", receiver).returncode == 0


@_NEEDS_DCMTK
@pytest.mark.parametrize(
    ("syntax", "option"), [(ExplicitVRLittleEndian, "-xe"), (RLELossless, "-xr"), (JPEGLSLossless, "-xt")]
)
def test_dcmtk_storescu(receiver: Config, index: Index, tmp_path: Path, syntax: str, option: str) -> None:
    paths = make_ct_series(tmp_path / "sent", num_slices=5, transfer_syntax_uid=syntax)
    done = dcmtk("storescu", receiver, *paths, options=(option,))
    assert done.returncode == 0, done.stderr
    (case,) = index.cases()
    assert (case.num_instances, case.calling_ae_title) == (5, "DCMTK")
    wait_until(lambda: carried(index) == (0, 1, 0))


@_NEEDS_DCMTK
def test_dcmtk_storescu_is_told_that_mr_is_not_taken(receiver: Config, index: Index, tmp_path: Path) -> None:
    sent = make_instance(tmp_path / "sent", lambda ds: setattr(ds, "SOPClassUID", MRImageStorage))
    done = dcmtk("storescu", receiver, sent)
    assert done.returncode != 0
    assert "No presentation context" in done.stdout + done.stderr or "No Acceptable" in done.stdout + done.stderr
    assert index.cases() == []
