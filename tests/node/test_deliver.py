"""Delivery to real Storage SCPs, willing and unwilling, and to folders; only time is made up."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt
from pynetdicom.sop_class import ComprehensiveSRStorage

from node import service
from node.case import Case, CaseState
from node.config import Config, DicomDestination, FolderDestination
from node.deliver import copy_results, deliver_due
from node.deliver.retry import retry_wait_s
from node.index import Index
from tests.factories import make_ct_series, make_report

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

SERIES, STUDY = "1.2.3", "1.2"

MakeConfig = Callable[..., Config]


class Clock:
    """Stands in for the `time` module."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def time(self) -> float:
        return self.now_s


@pytest.fixture
def clock(index: Index, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The node's clock; it stands still until moved."""
    clock = Clock()
    monkeypatch.setattr(index, "now", clock.time)
    monkeypatch.setattr("node.deliver.clock.time", clock)
    return clock


@pytest.fixture
def results(index: Index) -> Path:
    """A result folder: findings.json and two Instances of different SOP Class, as SEG and SR are."""
    folder = index.data_dir / "cases" / SERIES / "0123456789abcdef"
    folder.mkdir(parents=True)
    make_report(folder / "report.sr.dcm")
    (image,) = make_ct_series(folder, num_slices=1)
    image.rename(folder / "vertebrae.seg.dcm")
    (folder / "findings.json").write_text("{}", encoding="utf-8")
    return folder


def hand_over(index: Index, results: Path, *destinations: str) -> None:
    """Takes a case to DELIVERING."""
    if index.case(SERIES) is None:
        index.add_instance(
            association_id=index.open_association("SCANNER"),
            calling_ae_title="SCANNER",
            path=index.data_dir / "instances" / SERIES / "1.2.3.1.dcm",
            headers=[{"sop_instance_uid": "1.2.3.1", "series_instance_uid": SERIES, "study_instance_uid": STUDY}],
            quiet_time_s=0,
        )
    assert index.queue(the_case(index))
    case = index.claim_next()
    assert case is not None
    assert index.finish(case, results, summary="", sop_instance_uids=(), destinations=destinations)


def the_case(index: Index) -> Case:
    case = index.case(SERIES)
    assert case is not None
    return case


@pytest.fixture
def pacs(free_port: Callable[[], int]) -> DicomDestination:
    """A destination; nothing listens there."""
    return DicomDestination(type="dicom", name="pacs", host="127.0.0.1", port=free_port(), ae_title="PACS", timeout_s=5)


@contextmanager
def listening(
    destination: DicomDestination,
    *,
    sop_classes: tuple[str, ...] = (CTImageStorage, ComprehensiveSRStorage),
    on_store: Callable[[evt.Event], int] = lambda event: 0x0000,
    **settings: Any,
) -> Iterator[list[bytes]]:
    """A Storage SCP at the destination; gives the datasets it accepts, encoded. settings: attributes of the AE."""
    stored: list[bytes] = []

    def handle(event: evt.Event) -> int:
        status = on_store(event)
        if status == 0:
            stored.append(event.encoded_dataset(include_meta=False))
        return status

    ae = AE(ae_title=destination.ae_title)
    for sop_class in sop_classes:
        ae.add_supported_context(sop_class)
    for name, value in settings.items():
        setattr(ae, name, value)
    server = ae.start_server(
        (destination.host, destination.port), block=False, evt_handlers=[(evt.EVT_C_STORE, handle)]
    )
    try:
        yield stored
    finally:
        server.shutdown()


def deliver(index: Index, config: Config, destination: DicomDestination | FolderDestination) -> Case:
    deliver_due(index, config, destination)
    return the_case(index)


# ---- DICOM ----


def test_every_object_is_stored_and_the_case_is_done(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    callers: set[str] = set()

    def note_caller(event: evt.Event) -> int:
        callers.add(event.assoc.requestor.ae_title)
        return 0x0000

    with listening(pacs, on_store=note_caller) as stored:
        case = deliver(index, make_config(receive={"ae_title": "NECKS"}), pacs)
    assert (case.state, case.reason) == (CaseState.DONE, "")
    assert callers == {"NECKS"}
    assert [
        path.read_bytes()[-len(data) :] for path, data in zip(sorted(results.glob("*.dcm")), stored, strict=True)
    ] == stored


def test_a_rejected_ae_title_is_given_up_at_once_with_the_reason(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    """Nodes that retry for ever because an AE title was never configured are a plague."""
    hand_over(index, results, "pacs")
    with listening(pacs, require_calling_aet=["SOMEONE-ELSE"]):
        case = deliver(index, make_config(), pacs)
    assert case.state is CaseState.FAILED
    assert "given up after 1 attempt(s)" in case.reason
    assert "rejected the association from CSPINE" in case.reason
    assert "check AE titles there" in case.reason


def test_a_peer_that_does_not_take_one_sop_class_gets_the_others(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, sop_classes=(CTImageStorage,)) as stored:
        case = deliver(index, make_config(), pacs)
    assert len(stored) == 1
    assert case.state is CaseState.FAILED
    assert "does not take Comprehensive SR Storage as Explicit VR Little Endian; allow it there" in case.reason


def test_a_peer_that_takes_nothing_is_given_up_with_the_reason(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, sop_classes=("1.2.840.10008.1.1",)) as stored:
        case = deliver(index, make_config(), pacs)
    assert stored == []
    assert case.state is CaseState.FAILED
    assert "PACS at 127.0.0.1" in case.reason
    assert "check what it is set to store" in case.reason or "does not take" in case.reason


def test_a_failure_status_is_tried_again(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    config = make_config()
    with listening(pacs, on_store=lambda event: 0xA700):
        case = deliver(index, config, pacs)
    assert case.state is CaseState.DELIVERING
    assert "attempt 1 failed, next in 10 s" in case.reason
    assert "refused report.sr.dcm with status 0xA700" in case.reason
    with listening(pacs) as stored:
        assert deliver(index, config, pacs).state is CaseState.DELIVERING  # not yet due
        clock.now_s += 10
        case = deliver(index, config, pacs)
    assert (case.state, case.reason, len(stored)) == (CaseState.DONE, "", 2)


def test_a_warning_status_counts_as_stored(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, on_store=lambda event: 0xB000):
        assert deliver(index, make_config(), pacs).state is CaseState.DONE


def test_a_peer_that_is_not_there_is_tried_at_doubling_intervals_and_then_given_up(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    config = make_config(deliver={"max_attempts": 5, "retry_first_s": 10, "retry_max_s": 60, "destinations": ()})
    waits = []
    while deliver(index, config, pacs).state is CaseState.DELIVERING:
        assert "cannot be reached; check host and port" in the_case(index).reason
        before_s = clock.now_s
        while index.next_delivery("pacs") is None:
            clock.now_s += 1
        waits.append(clock.now_s - before_s)
    assert waits == [10, 20, 40, 60]
    assert "given up after 5 attempt(s)" in the_case(index).reason


def test_a_peer_that_breaks_off_is_tried_again(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, clock: Clock
) -> None:
    def abort(event: evt.Event) -> int:
        event.assoc.abort()
        return 0x0000

    hand_over(index, results, "pacs")
    config = make_config()
    with listening(pacs, on_store=abort):
        case = deliver(index, config, pacs)
    assert case.state is CaseState.DELIVERING
    assert "broke the connection" in case.reason
    clock.now_s += 10
    with listening(pacs):
        assert deliver(index, config, pacs).state is CaseState.DONE


def test_a_peer_that_is_busy_is_tried_again(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    with listening(pacs, maximum_associations=1):
        ae = AE()
        ae.add_requested_context(CTImageStorage)
        other = ae.associate(pacs.host, pacs.port)
        case = deliver(index, make_config(), pacs)
        other.release()
    assert case.state is CaseState.DELIVERING
    assert "rejected the association" in case.reason


def test_results_that_are_gone_are_given_up_and_not_tried_for_ever(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    for path in results.iterdir():
        path.unlink()
    with listening(pacs):
        case = deliver(index, make_config(), pacs)
    assert case.state is CaseState.FAILED
    assert f"{results} holds no results" in case.reason


# ---- folders ----


def folder_destination(path: Path) -> FolderDestination:
    return FolderDestination(type="folder", name="folder", path=path)


def test_a_folder_gets_the_files_under_study_and_series(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    case = deliver(index, make_config(), folder_destination(tmp_path / "out"))
    assert case.state is CaseState.DONE
    written = tmp_path / "out" / STUDY / SERIES
    assert {path.name: path.read_bytes() for path in written.iterdir()} == {
        path.name: path.read_bytes() for path in results.iterdir()
    }


def test_new_results_replace_the_old_ones(tmp_path: Path) -> None:
    old, new, target = (tmp_path / name for name in ("old", "new", "target"))
    for folder, names in ((old, ("findings.json", "fractures.seg.dcm")), (new, ("findings.json", "vertebrae.seg.dcm"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name, encoding="utf-8")
    copy_results(old, target)
    for name in ("notes.txt", "0001.dcm"):
        (target / name).write_text("the user's own", encoding="utf-8")
    copy_results(new, target)
    assert {path.name: path.read_text(encoding="utf-8") for path in target.iterdir()} == {
        "findings.json": "new",
        "vertebrae.seg.dcm": "new",
        "notes.txt": "the user's own",
        "0001.dcm": "the user's own",
    }


def test_a_folder_that_cannot_be_written_is_tried_again_with_the_reason(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, clock: Clock
) -> None:
    hand_over(index, results, "folder")
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    case = deliver(index, make_config(), folder_destination(blocked / "out"))
    assert case.state is CaseState.DELIVERING
    assert "next in 10 s" in case.reason
    assert str(blocked) in case.reason
    blocked.unlink()
    clock.now_s += 10
    assert deliver(index, make_config(), folder_destination(blocked / "out")).state is CaseState.DONE


# ---- several destinations ----


def test_a_dead_destination_does_not_keep_results_from_another(
    index: Index, make_config: MakeConfig, results: Path, pacs: DicomDestination, tmp_path: Path
) -> None:
    hand_over(index, results, "pacs", "folder")
    config, folder = make_config(), folder_destination(tmp_path / "out")
    assert deliver(index, config, pacs).state is CaseState.DELIVERING
    case = deliver(index, config, folder)
    assert (tmp_path / "out" / STUDY / SERIES / "findings.json").exists()
    assert case.state is CaseState.DELIVERING
    assert case.reason.startswith("delivery to pacs: attempt 1 failed")


def test_many_destinations_that_hang_hold_up_no_other(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The clock's threads must not run out: each destination can block one for its whole timeout."""
    released, reached, checked = threading.Event(), threading.Event(), threading.Semaphore(0)

    def deliver_due_or_hang(_index: Index, _config: Config, destination: FolderDestination) -> None:
        if destination.name == "healthy":
            reached.set()
        else:
            released.wait(20)

    names = [*(f"dead-{number}" for number in range(12)), "healthy"]
    destinations = tuple(FolderDestination(type="folder", name=name, path=tmp_path / name) for name in names)
    monkeypatch.setattr(service, "deliver_due", deliver_due_or_hang)
    monkeypatch.setattr(service, "check_cases", lambda *_: checked.release())
    monkeypatch.setattr(service.Service, "_start_receiver", lambda _: None)
    monkeypatch.setattr(service, "WorkerPool", _NoWorkers)
    node = service.Service(make_config(deliver={"destinations": destinations}))
    try:
        node.start()
        assert reached.wait(5)
        for _ in range(3):
            assert checked.acquire(timeout=5)
    finally:
        released.set()
        node.stop()


class _NoWorkers:
    """A pool that nothing is submitted to."""

    def __init__(self, _config: Config) -> None:
        pass

    def wait_until_loaded(self) -> str:
        return ""

    def stop(self) -> None:
        pass


@pytest.mark.parametrize(
    ("attempts", "wait_s"), [(1, 10), (2, 20), (5, 160), (9, 2560), (10, 3600), (48, 3600), (10**6, 3600)]
)
def test_waits_double_up_to_the_longest(attempts: int, wait_s: float) -> None:
    assert retry_wait_s(attempts, 10, 3600) == wait_s


def test_a_folder_has_the_names_safely_before_the_copy_counts_as_delivered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, target = tmp_path / "made", tmp_path / "share"
    source.mkdir()
    (source / "report.sr.dcm").write_bytes(b"report")
    synced: list[Path] = []
    monkeypatch.setattr("node.deliver.folder.sync", lambda path: synced.append(path))
    copy_results(source, target)
    assert synced == [target / ".report.sr.dcm.draft", target]
