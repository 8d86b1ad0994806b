"""How senders send, against the whole node: when each Series starts, and that it starts once.

One node for all of them; its quiet time is short, so that a fixed wait would show as no time won.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom.association import Association

from node.case import Case, CaseState
from node.complete.judge import pauses_s
from node.config import CompleteConfig
from node.index import Index
from node.send import associated, send_files
from tests.factories import make_ct_series
from tests.running_node import RunningNode

QUIET_S = 16.0
MIN_SLICES = CompleteConfig().min_slices
AT_ONCE_S = 8.0  # promised is 1 s; the machine may be busy with other tests


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, untrained_bundle: Path) -> Iterator[RunningNode]:
    running = RunningNode(
        tmp_path_factory.mktemp("node"),
        complete={"quiet_time_s": QUIET_S},
        analyse={"bundle": str(untrained_bundle), "threads": 1},
    )
    deadline = time.monotonic() + 90
    while "action=started" not in running.log():  # it takes Instances before its model is loaded
        assert time.monotonic() < deadline, running.log()
        time.sleep(0.1)
    yield running
    running.stop()


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    """A small Series in a Study of its own."""
    return make_ct_series(tmp_path / "series", num_slices=32, spacing_mm=2.0)


def calling(node: RunningNode, ae_title: str) -> AbstractContextManager[Association]:
    contexts = [(CTImageStorage, [ExplicitVRLittleEndian])]
    return associated(node.destination, contexts, calling_ae_title=ae_title)


def store(association: Association, paths: Sequence[Path]) -> None:
    for path in paths:
        assert association.send_c_store(dcmread(path)).Status == 0


def case_of(node: RunningNode, paths: Sequence[Path]) -> Case:
    uid = dcmread(paths[0], stop_before_pixels=True).SeriesInstanceUID
    return next(case for case in node.cases() if case.series_instance_uid == uid)


def started_after_s(node: RunningNode, paths: Sequence[Path]) -> float:
    """Seconds from the last Instance to the start, once there is a result: the only one, of all Instances."""
    deadline = time.monotonic() + 90
    while (case := case_of(node, paths)).state is not CaseState.DONE:
        assert case.state not in (CaseState.FAILED, CaseState.REFUSED, CaseState.SKIPPED), case.reason
        assert time.monotonic() < deadline, node.log()
        time.sleep(0.1)
    assert (case.num_instances, case.num_reopened) == (len(paths), 0)
    assert len(list((node.data_dir / "cases" / case.series_instance_uid).iterdir())) == 1
    assert case.won_s is not None
    return QUIET_S - case.won_s


def test_one_association(node: RunningNode, series: list[Path]) -> None:
    send_files(series, node.destination, calling_ae_title="ONE")
    assert started_after_s(node, series) < AT_ONCE_S


def test_several_associations_in_parallel(node: RunningNode, series: list[Path]) -> None:
    together = threading.Barrier(4)

    def send(part: list[Path]) -> None:
        with calling(node, "PARALLEL") as association:
            store(association, part[:1])
            together.wait(60)
            store(association, part[1:])
            together.wait(60)

    threads = [threading.Thread(target=send, args=(series[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started_after_s(node, series) < AT_ONCE_S


def test_several_associations_in_sequence_from_a_sender_that_is_not_known(
    node: RunningNode, series: list[Path]
) -> None:
    """The first part looks whole but for its number of slices; after the second there may be a third."""
    for part in (series[:20], series[20:28], series[28:]):
        send_files(part, node.destination, calling_ae_title="SEQUENCE")
    assert started_after_s(node, series) == pytest.approx(QUIET_S, abs=0.01)


def test_an_association_for_each_image(node: RunningNode, series: list[Path]) -> None:
    series = series[:MIN_SLICES]  # it is not whole before the last
    for path in series:
        send_files([path], node.destination, calling_ae_title="EACH")
    with closing(Index(node.data_dir)) as index:
        longest_s = max(pauses_s(index.carriers(case_of(node, series).series_instance_uid)))
    settles_s = min(QUIET_S, max(2.0, 4 * longest_s))
    assert settles_s <= started_after_s(node, series) < settles_s + AT_ONCE_S


def test_series_interleaved_in_one_association(node: RunningNode, series: list[Path], tmp_path: Path) -> None:
    other = make_ct_series(tmp_path / "other", num_slices=32, spacing_mm=2.0)
    with calling(node, "INTERLEAVED") as association:
        for one, two in zip(series, other, strict=True):
            store(association, [one, two])
    for paths in (series, other):
        assert started_after_s(node, paths) < AT_ONCE_S


def test_of_two_reconstructions_of_a_study_one_is_analysed_and_the_other_says_why(
    node: RunningNode, series: list[Path], tmp_path: Path
) -> None:
    study = dcmread(series[0], stop_before_pixels=True).StudyInstanceUID
    thick = make_ct_series(tmp_path / "thick", num_slices=30, spacing_mm=2.5, study_instance_uid=study)
    send_files([*thick, *series], node.destination, calling_ae_title="STUDY")
    assert started_after_s(node, series) < AT_ONCE_S
    passed_over = case_of(node, thick)
    assert passed_over.state is CaseState.SKIPPED
    preferred = case_of(node, series).series_instance_uid
    assert passed_over.reason == f"Series {preferred} of this Study is preferred (thinner slices: 2 mm, here 2.5 mm)"


def test_a_pause_inside_an_association(node: RunningNode, series: list[Path]) -> None:
    with calling(node, "PAUSING") as association:
        store(association, series[:31])
        time.sleep(2.5)
        assert case_of(node, series).state is CaseState.RECEIVING
        store(association, series[31:])
    assert started_after_s(node, series) < AT_ONCE_S


def test_a_broken_association_and_a_resend(node: RunningNode, series: list[Path]) -> None:
    with calling(node, "BROKEN") as association:
        store(association, series[:31])
        association.abort()
    time.sleep(1.0)
    assert case_of(node, series).state is CaseState.RECEIVING
    send_files(series, node.destination, calling_ae_title="BROKEN")
    assert started_after_s(node, series) < AT_ONCE_S


def test_a_late_slice_starts_the_series_again(node: RunningNode, series: list[Path]) -> None:
    *most, last = series
    send_files(most, node.destination, calling_ae_title="LATE")
    started_after_s(node, most)
    before = case_of(node, series)
    send_files([last], node.destination, calling_ae_title="LATE")
    deadline = time.monotonic() + 90
    while (case := case_of(node, series)).state is not CaseState.DONE or case.result_dir == before.result_dir:
        assert time.monotonic() < deadline, node.log()
        time.sleep(0.1)
    assert (case.num_instances, case.num_reopened) == (len(series), 1)
