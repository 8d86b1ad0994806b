"""The receiver, asked over real associations: by pynetdicom, by dcmtk, and with what no decent SCU would send."""

import errno
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)
from pynetdicom import AE
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import split_dataset
from pynetdicom.sop_class import Verification

from node.case import CaseState
from node.config import Config
from node.encode.identity import derive_uid
from node.index import Index
from node.receive import ReceiverError, Receivers, contexts, lane, spool, store
from node.receive.commit import GroupCommit
from node.receive.reconcile import reconcile, reconcile_run
from tests.factories import make_ct_series, make_enhanced_ct
from tests.receiver import listening
from tests.wire import Peer, associate_rq, messages

SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND, CONFLICT = 0x0000, 0xA700, 0xA900, 0xC000, 0xC111

MakeConfig = Callable[..., Config]


@pytest.fixture
def receiver(make_config: MakeConfig, index: Index) -> Iterator[Config]:
    """A receiver on the `index` fixture; gives its configuration."""
    with listening(make_config(), index) as config:
        yield config


def associate(
    config: Config, *sop_classes: str, transfer_syntaxes: tuple[str, ...] = (ExplicitVRLittleEndian,)
) -> Association:
    ae = AE(ae_title="SCANNER")
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
    for sop_class in sop_classes or (CTImageStorage,):
        for syntax in transfer_syntaxes:
            ae.add_requested_context(sop_class, syntax)
    return ae.associate(config.receive.host, config.receive.port, ae_title="ANYTHING")


def encoded_dataset(path: Path) -> bytes:
    """What follows the File Meta Information: what goes over the network."""
    _, offset = split_dataset(path)
    return path.read_bytes()[offset:]


def c_store(
    association: Association,
    encoded: bytes,
    sop_instance_uid: str,
    *,
    sop_class_uid: str = CTImageStorage,
    transfer_syntax: str = ExplicitVRLittleEndian,
) -> Dataset:
    """Sends bytes as they are, under whatever UIDs; the answer, empty if none came.

    pynetdicom's own `send_c_store` is too well-behaved for that.
    """
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID = sop_class_uid
    request._affected_sop_instance_uid = UID(sop_instance_uid)  # past its own check
    request.DataSet = BytesIO(encoded)
    context = next(c for c in association.accepted_contexts if c.transfer_syntax[0] == transfer_syntax)
    association._reactor_checkpoint.clear()
    while not association._is_paused:
        time.sleep(0.0001)
    association.dimse.send_msg(request, context.context_id)
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    status = Dataset()
    if response is not None:
        status.Status, status.ErrorComment = response.Status, response.ErrorComment or ""
    return status


def store_one(config: Config, path: Path, **given: Any) -> int:
    """Sends the Instance in a file over an association of its own; the status."""
    meta, _ = split_dataset(path)
    values = {
        "sop_instance_uid": str(meta.MediaStorageSOPInstanceUID),
        "sop_class_uid": str(meta.MediaStorageSOPClassUID),
        "transfer_syntax": str(meta.TransferSyntaxUID),
    } | given
    association = associate(config, values["sop_class_uid"], transfer_syntaxes=(values["transfer_syntax"],))
    assert association.is_established
    status = c_store(association, encoded_dataset(path), **values)
    association.release()
    return int(status.Status)


def make_instance(folder: Path, edit: Callable[[Dataset], None] | None = None, **given: Any) -> Path:
    (path,) = make_ct_series(folder, num_slices=1, edit=lambda _, ds: edit(ds) if edit else None, **given)
    return path


def files_under(folder: Path) -> list[Path]:
    """Files with content: others are made ahead."""
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("cspine."))
    return sorted(path for path in found if path.stat().st_size > 0)


def wait_until(is_so: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# ---- what is taken ----


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
    stored = index.find_instance(uid)
    assert stored is not None
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
                time.sleep(0.2)
            sync(descriptor)
            happened.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

        return noted

    monkeypatch.setattr(os, "fsync", note(fsync))
    monkeypatch.setattr(os, "fdatasync", note(fdatasync))
    monkeypatch.setattr(index, "add_instances", lambda *a, **k: (add(*a, **k), happened.append("row"))[0])
    monkeypatch.setattr(lane, "c_store_response", lambda *a: (happened.append("status"), response(*a))[1])
    sent = make_instance(tmp_path / "sent")
    assert store_one(receiver, sent) == SUCCESS
    stored = index.find_instance(pydicom.dcmread(sent).SOPInstanceUID)
    assert stored is not None
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
    stored = index.find_instance(uid)
    assert stored is not None
    assert encoded_dataset(stored) == encoded_dataset(first)
    assert len(index.cases()) == 1


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
    monkeypatch.setattr(GroupCommit, "add", lambda *values: (both.wait(5), add(*values))[1])
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


# ---- what is refused ----


@pytest.mark.parametrize("sop_class", [MRImageStorage, SecondaryCaptureImageStorage, SegmentationStorage])
def test_presentation_contexts_other_than_ct_are_rejected(receiver: Config, sop_class: str) -> None:
    association = associate(receiver, CTImageStorage, sop_class)
    assert [context.abstract_syntax for context in association.accepted_contexts] == [CTImageStorage]
    assert [context.abstract_syntax for context in association.rejected_contexts] == [sop_class]
    association.release()


def refused(receiver: Config, index: Index, path: Path, **given: Any) -> int:
    """The status of an Instance of which nothing may stay."""
    status = store_one(receiver, path, **given)
    assert files_under(index.data_dir) == []
    assert index.cases() == []
    return status


def test_mr_in_a_ct_context_is_refused_with_0xa900(receiver: Config, index: Index, tmp_path: Path) -> None:
    sent = make_instance(tmp_path / "sent", lambda ds: setattr(ds, "Modality", "MR"))
    assert refused(receiver, index, sent) == MISMATCH


def test_a_sop_class_other_than_the_announced_one_is_refused_with_0xa900(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    sent = make_instance(tmp_path / "sent", lambda ds: setattr(ds, "SOPClassUID", MRImageStorage))
    assert refused(receiver, index, sent, sop_class_uid=CTImageStorage) == MISMATCH


def test_a_sop_instance_uid_other_than_the_announced_one_is_refused_with_0xa900(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    assert refused(receiver, index, make_instance(tmp_path / "sent"), sop_instance_uid="1.2.3") == MISMATCH


@pytest.mark.parametrize("garbage", [b"", b"\0", b"garbage" * 1000, b"\xff" * 4096, os.urandom(4096)])
def test_garbage_is_refused_with_0xc000_and_the_association_lives_on(
    receiver: Config, index: Index, tmp_path: Path, garbage: bytes
) -> None:
    association = associate(receiver)
    status = c_store(association, garbage or b"\0\0", generate_uid())
    assert status.Status == CANNOT_UNDERSTAND
    assert files_under(index.data_dir) == []
    assert association.send_c_store(make_instance(tmp_path / "sent")).Status == SUCCESS
    association.release()


HOSTILE_UIDS = [
    "../../x", "/etc/x", "1.2/../../x", "1.2\\x", "..", ".", "1..2", "1.2.", "a.b", "1." * 99 + "1", "", "1.2\n.3"
]  # fmt: skip


def with_uid(encoded: bytes, keyword: str, value: str) -> bytes:
    """An Explicit VR dataset with another value for one UID, which pydicom would not write."""
    tag = pydicom.tag.Tag(keyword)
    head = struct.pack("<HH2s", tag.group, tag.element, b"UI")
    at = encoded.index(head)
    (length,) = struct.unpack_from("<H", encoded, at + 6)
    padded = value.encode() + b"\0" * (len(value) % 2)
    return encoded[:at] + head + struct.pack("<H", len(padded)) + padded + encoded[at + 8 + length :]


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of such values; the node ignores warnings
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_a_uid_that_is_none_is_refused_and_becomes_no_path(
    receiver: Config, index: Index, tmp_path: Path, keyword: str
) -> None:
    ds = pydicom.dcmread(make_instance(tmp_path / "sent"))
    for uid in HOSTILE_UIDS:
        announced = uid if keyword == "SOPInstanceUID" else str(ds.SOPInstanceUID)
        association = associate(receiver)
        association.dimse_timeout = 1  # to some of these pynetdicom's answer is to drop the association
        status = c_store(
            association, with_uid(encoded_dataset(tmp_path / "sent" / "0000.dcm"), keyword, uid), announced
        )
        assert status.get("Status") in (CANNOT_UNDERSTAND, MISMATCH, None), uid
        association.release() if "Status" in status else association.abort()
        assert files_under(index.data_dir) == [], uid
    assert index.cases() == []
    named_as_we_do = re.compile(r"data|data/cspine.*|data/instances(/run0(/0000(/000-\d\d.dcm)?)?)?|sent|sent/0000.dcm")
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert [name for name in names if not named_as_we_do.fullmatch(name)] == []


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID"])
def test_a_missing_uid_is_refused_with_0xc000(receiver: Config, index: Index, tmp_path: Path, keyword: str) -> None:
    sent = make_instance(tmp_path / "sent", lambda ds: delattr(ds, keyword))
    assert refused(receiver, index, sent) == CANNOT_UNDERSTAND


def test_below_the_watermark_of_free_disk_everything_is_refused_with_0xa700(
    make_config: MakeConfig, index: Index, tmp_path: Path
) -> None:
    with listening(make_config(receive={"min_free_disk_mb": 10**9}), index) as config:
        assert refused(config, index, make_instance(tmp_path / "sent")) == OUT_OF_RESOURCES


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk(io.FileIO):
    """A file that takes a few bytes, and then no more."""

    def write(self, data: Any) -> int:
        if self.tell() > 0:
            no_space()
        return super().write(bytes(data)[:1000])


def test_c_store_on_a_full_disk_returns_0xa700_and_leaves_no_file(
    make_config: MakeConfig,
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent = make_instance(tmp_path / "sent")
    with listening(make_config(), index) as config, monkeypatch.context() as patch:
        patch.setattr(spool, "FileIO", FullDisk)
        assert refused(config, index, sent) == OUT_OF_RESOURCES
    with listening(make_config(), index) as config:
        with monkeypatch.context() as patch:
            patch.setattr(index, "add_instances", no_space)
            assert refused(config, index, sent) == OUT_OF_RESOURCES
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", no_space)
            assert store_one(config, sent) == OUT_OF_RESOURCES
        assert files_under(index.data_dir) == []
        assert [(case.state, case.num_instances) for case in index.cases()] == [(CaseState.REFUSED, 0)]
        assert caplog.text.count("No space left on device") == 3
        assert store_one(config, sent) == SUCCESS


def test_a_database_that_fails_is_answered_with_0xa700_so_that_the_sender_tries_again(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it failed as early as the association was noted."""
    with monkeypatch.context() as patch:
        patch.setattr(index, "open_association", no_space)
        assert refused(receiver, index, make_instance(tmp_path / "sent")) == OUT_OF_RESOURCES


def test_what_this_node_made_is_refused_with_0xa900(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = derive_uid("a result")
    sent = make_instance(tmp_path / "sent", lambda ds: setattr(ds, "SOPInstanceUID", uid))
    monkeypatch.setattr(index, "is_result", lambda asked: asked == uid)
    assert refused(receiver, index, sent) == MISMATCH


def test_a_refusal_says_why_in_64_characters_and_names_no_patient(
    receiver: Config, index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    association = associate(receiver)
    sent = make_instance(tmp_path / "sent", lambda ds: setattr(ds, "Modality", "MR"))
    status = c_store(association, encoded_dataset(sent), pydicom.dcmread(sent).SOPInstanceUID)
    association.release()
    assert status.ErrorComment == "Modality is 'MR'; only CT is taken"
    assert "status=0xA900" in caplog.text
    assert "Neck" not in caplog.text


# ---- associations ----


def carried(index: Index) -> tuple[int, int, int]:
    """Open, released and broken associations of the only case."""
    (case,) = index.cases()
    return carried_by(index, case.series_instance_uid)


def carried_by(index: Index, series_instance_uid: str) -> tuple[int, int, int]:
    carriers = index.stored_series(series_instance_uid).carriers
    ended = [carrier.released for carrier in carriers if carrier.ended_at is not None]
    return len(carriers) - len(ended), ended.count(True), ended.count(False)


def test_an_association_is_open_until_it_is_released(receiver: Config, index: Index, tmp_path: Path) -> None:
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    assert carried(index) == (1, 0, 0)
    association.release()
    assert carried(index) == (0, 1, 0)  # noted before the release was answered
    assert len(index.cases_to_check()) == 1


def test_a_release_stays_a_release_when_the_connection_closes_at_once(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pynetdicom tells of both from different threads; the slower one here is the one that tells of the release."""
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    acceptor = next(t for t in threading.enumerate() if "AcceptorThread" in t.name)
    send_release = acceptor.acse.send_release  # type: ignore[attr-defined]

    def send_release_slowly(*args: Any, **values: Any) -> None:
        send_release(*args, **values)
        time.sleep(0.3)

    monkeypatch.setattr(acceptor.acse, "send_release", send_release_slowly)  # type: ignore[attr-defined]
    association.release()
    time.sleep(0.5)
    assert carried(index) == (0, 1, 0)


def test_an_aborted_association_is_noted(receiver: Config, index: Index, tmp_path: Path) -> None:
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    association.abort()
    wait_until(lambda: carried(index) == (0, 0, 1))


def test_a_dropped_connection_is_noted(receiver: Config, index: Index, tmp_path: Path) -> None:
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    connection = association.dul.socket.socket
    connection.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: carried(index) == (0, 0, 1))
    connection.close()


def test_a_silent_association_is_ended(make_config: MakeConfig, index: Index, tmp_path: Path) -> None:
    with listening(make_config(receive={"network_timeout_s": 0.3}), index) as config:
        association = associate(config)
        association.send_c_store(make_instance(tmp_path / "sent"))
        wait_until(lambda: carried(index) == (0, 0, 1))
        association.abort()


def test_associations_above_the_limit_are_rejected_as_transient(make_config: MakeConfig, index: Index) -> None:
    with listening(make_config(receive={"max_associations": 1}), index) as config:
        first, second = associate(config), associate(config)
        assert (first.is_established, second.is_rejected) == (True, True)
        assert (second.acceptor.primitive.result, second.acceptor.primitive.diagnostic) == (2, 2)
        first.release()


def test_senders_at_the_same_time_are_all_served(receiver: Config, index: Index, tmp_path: Path) -> None:
    sent = [make_ct_series(tmp_path / str(number), num_slices=6) for number in range(4)]
    statuses: list[int] = []

    def send(paths: list[Path]) -> None:
        association = associate(receiver)
        statuses.extend(association.send_c_store(path).Status for path in paths)
        association.release()

    threads = [threading.Thread(target=send, args=(paths,)) for paths in sent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [SUCCESS] * 24
    assert [case.num_instances for case in index.cases()] == [6, 6, 6, 6]


# ---- crash and start ----


def test_files_without_a_row_are_removed_at_start_and_no_others(receiver: Config, index: Index, tmp_path: Path) -> None:
    sent = make_instance(tmp_path / "sent")
    assert store_one(receiver, sent) == SUCCESS
    (stored,) = files_under(index.data_dir)
    beside = stored.with_name("stray.dcm")
    elsewhere = index.data_dir / "instances" / "run9" / "0000" / stored.name
    elsewhere.parent.mkdir(parents=True)
    for stray in (beside, elsewhere):
        stray.write_bytes(b"half an Instance")
    reconcile(index)
    assert list((index.data_dir / "instances").rglob("*.dcm")) == [stored]
    assert not elsewhere.parent.parent.exists()
    assert [case.num_instances for case in index.cases()] == [1]


def test_what_a_dead_receiver_left_is_removed_while_another_is_receiving(
    receiver: Config, index: Index, tmp_path: Path
) -> None:
    association = associate(receiver)
    association.send_c_store(make_instance(tmp_path / "sent"))
    (kept,) = files_under(index.data_dir)
    half = kept.with_name("half.dcm")
    half.write_bytes(b"just arriving")
    dead = store.Store(receiver, index, "dead")
    path, file = dead.spool.take()
    file.write(b"half an Instance")
    file.close()
    index.open_association("GONE", "dead")
    reconcile_run(index, "dead")
    reconcile_run(index, "died before it made a folder")
    assert files_under(index.data_dir) == sorted([kept, half])
    assert not path.exists()
    assert carried(index) == (1, 0, 0)  # the other receiver's
    association.release()
    dead.close()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 500)])
def test_an_instance_whose_file_was_lost_is_taken_again_and_its_case_waits_for_it(
    make_config: MakeConfig,
    index: Index,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent = make_ct_series(tmp_path / "sent", num_slices=3)
    with listening(make_config(), index) as config:
        assert [store_one(config, path) for path in sent] == [SUCCESS] * 3
    (case,) = index.cases()
    index.queue(case)
    uid = pydicom.dcmread(sent[1]).SOPInstanceUID
    stored = index.find_instance(uid)
    assert stored is not None
    damage(stored)
    reconcile(index)
    (case,) = index.cases()
    assert (case.state, case.num_instances) == (CaseState.RECEIVING, 2)
    assert case.reason == "1 Instance was lost from the disk; send the Series again"
    assert case.series_instance_uid in caplog.text
    assert index.find_instance(uid) is None
    with listening(make_config(), index) as config:
        assert store_one(config, sent[1]) == SUCCESS
    assert [case.num_instances for case in index.cases()] == [3]
    stored = index.find_instance(uid)
    assert stored is not None
    assert encoded_dataset(stored) == encoded_dataset(sent[1])


def test_of_an_open_association_a_file_with_its_length_but_not_its_bytes_is_taken_again(
    make_config: MakeConfig, index: Index, tmp_path: Path
) -> None:
    """What a power cut may leave whose row was on disk first."""
    sent = make_ct_series(tmp_path / "sent", num_slices=2)
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in sent]
    with listening(make_config(), index) as config:
        association = associate(config)
        assert [association.send_c_store(path).Status for path in sent] == [SUCCESS] * 2
        torn = index.find_instance(uids[1])
        assert torn is not None
        torn.write_bytes(bytes(torn.stat().st_size))
        reconcile(index)
        association.abort()
    assert [index.find_instance(uid) is None for uid in uids] == [False, True]
    assert not torn.exists()
    with listening(make_config(), index) as config:
        assert store_one(config, sent[1]) == SUCCESS
    assert [case.num_instances for case in index.cases()] == [2]


# ---- the processes ----


@pytest.fixture
def receivers(make_config: MakeConfig, index: Index) -> Iterator[tuple[Config, Receivers]]:
    """The receiver processes as the node runs them."""
    config = make_config(receive={"processes": 2})
    running = Receivers(config, index)
    running.start()
    yield config, running
    running.terminate()
    running.join(5)


def test_the_processes_stop_cleanly_while_an_association_is_open(
    receivers: tuple[Config, Receivers], index: Index, tmp_path: Path
) -> None:
    config, running = receivers
    association = associate(config)
    assert association.send_c_store(make_instance(tmp_path / "sent")).Status == SUCCESS
    processes = list(running._processes.values())
    running.terminate()
    for process in processes:
        process.join(8)
    assert [process.exitcode for process in processes] == [0, 0]
    wait_until(lambda: association.is_aborted)
    assert carried(index) == (0, 0, 1)
    assert [path for path in (index.data_dir / "instances").rglob("*.dcm") if not path.stat().st_size] == []


def test_a_killed_receiver_is_replaced_and_no_connection_is_refused_meanwhile(
    receivers: tuple[Config, Receivers], index: Index, tmp_path: Path
) -> None:
    config, running = receivers
    first, second = (make_instance(tmp_path / name) for name in ("first", "second"))
    killed = list(running._processes.values())
    with Peer(config.receive, timeout_s=60) as peer:
        peer.associate()
        peer.send(*messages(str(pydicom.dcmread(first).SOPInstanceUID), encoded_dataset(first)))
        assert peer.status() == SUCCESS
        for process in killed:
            process.kill()
            process.join()
        assert peer.receive()[0] == 0
    with Peer(config.receive, timeout_s=60) as peer:  # in the queue of the port, which outlives the processes
        peer.send(associate_rq())
        running.watch()
        assert peer.receive()[0] == 2
        peer.send(*messages(str(pydicom.dcmread(second).SOPInstanceUID), encoded_dataset(second)))
        assert peer.status() == SUCCESS
        peer.release()
    assert len(index.cases()) == 2
    assert carried_by(index, index.cases()[-1].series_instance_uid) == (0, 0, 1)
    assert len(running._processes) == 2
    assert not set(killed) & set(running._processes.values())


def test_a_port_in_use_is_named(make_config: MakeConfig, receiver: Config, index: Index) -> None:
    with pytest.raises(ReceiverError) as raised:
        Receivers(receiver, index)
    assert str(raised.value) == f"127.0.0.1:{receiver.receive.port} cannot be listened on: Address already in use"


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


def test_enhanced_sop_classes_are_those_of_the_model() -> None:
    from model.stack import CT_SOP_CLASSES

    assert set(contexts.CT_SOP_CLASSES) == set(CT_SOP_CLASSES)
    assert EnhancedCTImageStorage in contexts.CT_SOP_CLASSES
