"""What a start of the node makes of what a crash left on disk and in the index."""

import os
from collections.abc import Callable
from pathlib import Path

import pydicom
import pytest

from node.case import CaseState
from node.config import Config
from node.index import Index
from node.receive import store
from node.receive.reconcile import reconcile, reconcile_run
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
