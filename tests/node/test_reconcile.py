"""What a start of the node makes of what a crash left on disk and in the index."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest

from node.case import Case, CaseState
from node.config import Config
from node.index import Index
from node.receive import store
from node.receive.reconcile import reconcile, reconcile_run
from node.receive.status import CONFLICT
from tests.factories import make_ct_series
from tests.node.sending import (
    SUCCESS,
    MakeConfig,
    associate,
    carried,
    encoded_dataset,
    files_under,
    make_instance,
    store_one,
)
from tests.receiver import listening
from tests.stored import path_of


@pytest.fixture
def index(either_index: Index) -> Index:
    """Each test on SQLite and on PostgreSQL."""
    return either_index


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


def received(config: Config, index: Index, tmp_path: Path) -> tuple[list[Path], Case]:
    """Three slices that were sent and taken, and their case."""
    sent = make_ct_series(tmp_path / "sent", num_slices=3)
    with listening(config, index) as listener:
        assert [store_one(listener, path) for path in sent] == [SUCCESS] * 3
    (case,) = index.cases()
    return sent, case


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 500)])
def test_an_instance_whose_file_was_lost_is_taken_again_and_its_case_waits_for_it(
    make_config: MakeConfig,
    index: Index,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent, case = received(make_config(), index, tmp_path)
    index.queue(case)
    uid = pydicom.dcmread(sent[1]).SOPInstanceUID
    stored = path_of(index, uid)
    damage(stored)
    reconcile(index)
    (case,) = index.cases()
    assert (case.state, case.num_instances) == (CaseState.RECEIVING, 2)
    assert case.reason == "1 Instance was lost from the disk; send the Series again"
    assert case.series_instance_uid in caplog.text
    assert index.stored_file(uid) is None
    with listening(make_config(), index) as config:
        assert store_one(config, sent[1]) == SUCCESS
    assert [case.num_instances for case in index.cases()] == [3]
    stored = path_of(index, uid)
    assert encoded_dataset(stored) == encoded_dataset(sent[1])


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 500)])
def test_a_lost_file_of_a_case_that_is_done_is_told_of_and_what_is_sent_again_takes_its_place(
    make_config: MakeConfig,
    index: Index,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent, case = received(make_config(), index, tmp_path)
    assert index.skip(case, "a scout")
    (case,) = index.cases()
    stored = index.stored_file(pydicom.dcmread(sent[1]).SOPInstanceUID)
    assert stored is not None
    damage(stored.path)
    reconcile(index)
    lost = f"series={case.series_instance_uid}: 1 of its files are missing or cut off"
    assert lost in caplog.text
    assert index.cases() == [case]
    with listening(make_config(), index) as config:
        assert [store_one(config, path) for path in sent] == [SUCCESS] * 3
    assert encoded_dataset(stored.path) == encoded_dataset(sent[1])
    caplog.clear()
    reconcile(index)
    assert lost not in caplog.text
    assert files_under(index.data_dir) == sorted(index.instance_paths(case.series_instance_uid))
    assert index.cases() == [case]  # nothing new came


def test_a_file_that_was_lost_is_not_replaced_by_an_instance_of_another_series(
    make_config: MakeConfig, index: Index, tmp_path: Path
) -> None:
    sent = make_instance(tmp_path / "sent")
    with listening(make_config(), index) as config:
        assert store_one(config, sent) == SUCCESS
        (stored,) = files_under(index.data_dir)
        stored.unlink()
        other = pydicom.dcmread(sent)
        other.SeriesInstanceUID = "1.2.9"
        other.save_as(tmp_path / "other.dcm")
        assert store_one(config, tmp_path / "other.dcm") == CONFLICT
        assert files_under(index.data_dir) == []
        assert store_one(config, sent) == SUCCESS
    assert files_under(index.data_dir) == [stored]


def test_of_an_open_association_a_file_with_its_length_but_not_its_bytes_is_taken_again(
    make_config: MakeConfig, index: Index, tmp_path: Path
) -> None:
    """What a power cut may leave whose row was on disk first."""
    sent = make_ct_series(tmp_path / "sent", num_slices=2)
    uids = [pydicom.dcmread(path).SOPInstanceUID for path in sent]
    with listening(make_config(), index) as config:
        association = associate(config)
        assert [association.send_c_store(path).Status for path in sent] == [SUCCESS] * 2
        torn = path_of(index, uids[1])
        torn.write_bytes(bytes(torn.stat().st_size))
        reconcile(index)
        association.abort()
    assert [index.stored_file(uid) is None for uid in uids] == [False, True]
    assert not torn.exists()
    with listening(make_config(), index) as config:
        assert store_one(config, sent[1]) == SUCCESS
    assert [case.num_instances for case in index.cases()] == [2]


@pytest.mark.parametrize("call", ["fdatasync", "stat", "unlink"])
def test_a_file_that_cannot_be_looked_at_is_named_and_keeps_no_node_from_starting(
    call: str,
    make_config: MakeConfig,
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on a disk with a bad block, or after somebody changed its owner. Not by its mode, which root does not mind."""
    sent = make_ct_series(tmp_path / "sent", num_slices=3)
    uids = [str(pydicom.dcmread(path).SOPInstanceUID) for path in sent]
    with listening(make_config(), index) as config:
        association = associate(config)
        assert [association.send_c_store(path).Status for path in sent] == [SUCCESS] * 3
        files = [path_of(index, uid) for uid in uids]
        bad, lost, _ = files
        lost.write_bytes(bytes(lost.stat().st_size))
        strays = [bad.with_name("stray1.dcm"), bad.with_name("stray2.dcm")]
        for stray in strays:
            stray.write_bytes(b"half an Instance")
        if call == "unlink":
            bad = strays[0]

        def fail_at(path: Path | None) -> None:
            if path == bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patch:
            fdatasync, stat, unlink = os.fdatasync, os.stat, Path.unlink
            if call == "fdatasync":
                name = "/proc/self/fd/{}".format
                patch.setattr(os, "fdatasync", lambda fd: (fail_at(Path(name(fd)).readlink()), fdatasync(fd))[1])
            elif call == "stat":
                patch.setattr(os, "stat", lambda path, **values: (fail_at(path), stat(path, **values))[1])
            else:
                patch.setattr(Path, "unlink", lambda path, **values: (fail_at(path), unlink(path, **values))[1])
            reconcile(index)
        association.abort()
    assert index.stored_file(uids[1]) is None
    assert [path_of(index, uid) for uid in (uids[0], uids[2])] == [files[0], files[2]]
    assert [stray for stray in strays if stray.exists()] == [strays[0]] * (call == "unlink")
    assert caplog.text.count(f"path={bad}: Input/output error") == 1


def test_rows_are_gone_through_once_however_many_runs_there_were(
    receiver: Config, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store_one(receiver, make_instance(tmp_path / "sent")) == SUCCESS
    for number in range(20):
        folder = index.data_dir / "instances" / f"old{number}" / "0000"
        folder.mkdir(parents=True)
        (folder / "stray.dcm").write_bytes(b"half an Instance")
    asked: list[Path] = []
    paths_under = index.paths_under
    monkeypatch.setattr(index, "paths_under", lambda folder: (asked.append(folder), paths_under(folder))[1])
    assert reconcile(index) == 20
    assert asked == [index.data_dir / "instances"]
    assert len(files_under(index.data_dir)) == 1
