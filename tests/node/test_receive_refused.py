"""What the receiver refuses, with which status, and that nothing of it stays."""

import asyncio
import errno
import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)

from node.case import CaseState
from node.config import Config
from node.encode.identity import derive_uid
from node.index import Index
from node.receive import spool
from node.receive.incoming import IncomingFile
from node.receive.store import Store
from node.watch.taking import Taking
from node.web.stow import Stored, _finish
from tests.node.sending import (
    CANNOT_UNDERSTAND,
    MISMATCH,
    OUT_OF_RESOURCES,
    SUCCESS,
    MakeConfig,
    associate,
    c_store,
    encoded_dataset,
    files_under,
    make_instance,
    store_one,
)
from tests.receiver import listening
from tests.waiting import wait_until


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


def with_a_bomb(encoded: bytes) -> bytes:
    """A deflated dataset with 200 MB of nothing behind it."""
    deflating = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    whole = zlib.decompress(encoded, -zlib.MAX_WBITS) + bytes(200 << 20)
    return deflating.compress(whole) + deflating.flush()


@pytest.mark.parametrize(
    "damage",
    [lambda encoded: encoded[:-100], lambda encoded: encoded[:-200] + b"\xff" * 200, with_a_bomb],
    ids=["cut off", "damaged", "bomb"],
)
def test_a_deflated_dataset_that_is_cut_off_damaged_or_a_bomb_is_refused_with_0xc000(
    receiver: Config, index: Index, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Its beginning, which is all that is needed of it here, can be read; what comes later could not read the file."""
    syntax = DeflatedExplicitVRLittleEndian
    sent = make_instance(tmp_path / "sent", transfer_syntax_uid=syntax)
    encoded, uid = encoded_dataset(sent), pydicom.dcmread(sent).SOPInstanceUID
    association = associate(receiver, transfer_syntaxes=(syntax,))
    assert c_store(association, damage(encoded), uid, transfer_syntax=syntax).Status == CANNOT_UNDERSTAND
    assert files_under(index.data_dir) == []
    assert c_store(association, encoded, uid, transfer_syntax=syntax).Status == SUCCESS
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
        wait_until(lambda: files_under(index.data_dir) == [], uid)
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


def test_what_this_node_made_is_refused_with_0xa900(receiver: Config, index: Index, tmp_path: Path) -> None:
    uid = derive_uid("a result")
    assert store_one(receiver, make_instance(tmp_path / "analysed")) == SUCCESS
    assert index.queue(index.cases()[0])
    case = index.claim_next()
    assert case is not None
    assert index.finish(case, index.data_dir / "cases" / "1", summary="", sop_instance_uids=(uid,), destinations=())
    before = files_under(index.data_dir)

    made = make_instance(tmp_path / "made", lambda ds: setattr(ds, "SOPInstanceUID", uid), series_instance_uid="1.2.9")
    assert store_one(receiver, made) == MISMATCH
    assert (files_under(index.data_dir), len(index.cases())) == (before, 1)


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


def test_the_longest_uid_is_named_in_full_by_whoever_refuses(
    receiver: Config, index: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uid = "1.2." + "3" * 60
    sent = make_instance(tmp_path / "sent", lambda ds: setattr(ds, "SOPInstanceUID", uid))
    ds = pydicom.dcmread(sent)
    ds.Modality = "MR"
    ds.save_as(sent)
    assert store_one(receiver, sent) == MISMATCH
    store = Store(receiver, index, "watching")
    taking = Taking("an archive", "it", "ARCHIVE", store, threading.Event())
    taking.take([sent.read_bytes()], uid)
    part = IncomingFile(store, taking._sender)
    part.write(memoryview(sent.read_bytes()))
    asyncio.run(_finish(part, Stored()))
    store.close()
    assert caplog.text.count(f"instance='{uid}'") == 3
    for how in ("calling='SCANNER'", "by=watch", "by=stow"):
        assert f"action=instance-refused {how}" in caplog.text
