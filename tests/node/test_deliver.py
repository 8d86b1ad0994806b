"""Delivery in general: the database's side of it, what becomes of an attempt, and several destinations."""

import threading
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from node import service
from node.case import CaseState, DeliveryState, ObjectProgress, ObjectState
from node.config import Config, DeliverConfig, DicomDestination, FolderDestination
from node.deliver import copy_results
from node.deliver.policy import Verdict, after_answers, after_error, next_question_s
from node.index import Index
from node.profiles import PRESETS
from node.retry import describe_wait, retry_wait_s
from tests.node.handed_over import (
    SERIES,
    STUDY,
    Clock,
    add_instance,
    deliver,
    hand_over,
    make_results,
    the_case,
    the_delivery,
)

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

MakeConfig = Callable[..., Config]
PATIENCE = DeliverConfig(destinations=())

WAITING = ObjectProgress(state=ObjectState.WAITING, reason="refused a.dcm for now")
TAKEN = ObjectProgress(state=ObjectState.TAKEN)
VERIFIED = ObjectProgress(state=ObjectState.VERIFIED)
REFUSED = ObjectProgress(state=ObjectState.REFUSED, reason="does not take SR")


# ---- what becomes of an attempt ----


@pytest.mark.parametrize(
    ("objects", "verified", "state", "reason"),
    [
        ((TAKEN, TAKEN), False, DeliveryState.DONE, ""),
        ((TAKEN, VERIFIED), True, DeliveryState.VERIFYING, "taken, and not yet found there"),
        ((VERIFIED, VERIFIED), True, DeliveryState.DONE, ""),
        ((VERIFIED, REFUSED), True, DeliveryState.FAILED, "1 of 2 objects are there; does not take SR"),
        ((TAKEN, REFUSED), True, DeliveryState.VERIFYING, "taken, and not yet found there"),
        ((REFUSED, WAITING), True, DeliveryState.PENDING, "attempt 2 failed, next in 20 s: refused a.dcm for now"),
        (
            (VERIFIED, ObjectProgress(state=ObjectState.VERIFIED, reason="took a.dcm with status 0xB000")),
            True,
            DeliveryState.DONE,
            "took a.dcm with status 0xB000",
        ),
    ],
)
def test_answers_lead_to_a_state_and_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    objects: tuple[ObjectProgress, ...],
    verified: bool,
    state: DeliveryState,
    reason: str,
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    by_uid = dict(enumerate(objects))
    verdict = after_answers(
        {str(uid): item for uid, item in by_uid.items()}, attempts=2, verified=verified, patience=PATIENCE
    )
    assert (verdict.state, verdict.reason) == (state, reason)


def test_a_permanent_error_or_the_last_attempt_ends_a_delivery() -> None:
    def verdict(attempts: int, *, permanent: bool) -> Verdict:
        state = DeliveryState.PENDING
        return after_error("no", permanent=permanent, state=state, attempts=attempts, patience=PATIENCE)

    assert verdict(1, permanent=True).reason == "given up after 1 attempt(s): no"
    assert verdict(PATIENCE.max_attempts, permanent=False).state is DeliveryState.FAILED
    assert verdict(PATIENCE.max_attempts - 1, permanent=False).state is DeliveryState.PENDING


@pytest.mark.parametrize(
    ("attempts", "wait_s"), [(1, 10), (2, 20), (5, 160), (9, 2560), (14, 81920), (15, 86400), (10**6, 86400)]
)
def test_waits_double_up_to_a_day(attempts: int, wait_s: float) -> None:
    waits = {retry_wait_s(attempts, PATIENCE.retry_first_s, PATIENCE.retry_max_s) for _ in range(20)}
    assert all(0.9 * wait_s <= wait <= wait_s for wait in waits)
    assert len(waits) > 1  # what failed together is not all tried again at the same moment


@pytest.mark.parametrize(
    ("since_sent_s", "wait_s"), [(0, 1), (1, 1), (8, 8), (200, 100), (299.5, 0.5), (300, None), (9000, None)]
)
def test_a_destination_is_asked_again_after_as_long_as_it_has_had(since_sent_s: float, wait_s: float | None) -> None:
    assert next_question_s(since_sent_s, 300) == wait_s


@pytest.mark.parametrize(
    ("seconds", "said"), [(10, "10 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172800, "2 days")]
)
def test_waits_are_said_as_people_say_them(seconds: float, said: str) -> None:
    assert describe_wait(seconds) == said


# ---- folders ----


def folder_destination(path: Path, **settings: object) -> FolderDestination:
    return FolderDestination.model_validate({"type": "folder", "name": "folder", "path": path, **settings})


def test_a_folder_gets_the_files_under_study_and_series(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    case = deliver(index, make_config(), folder_destination(tmp_path / "out"))
    assert (case.state, case.reason) == (CaseState.DONE, "")
    written = tmp_path / "out" / STUDY / SERIES
    assert {path.name: path.read_bytes() for path in written.iterdir()} == {
        path.name: path.read_bytes() for path in results.iterdir()
    }
    objects = the_delivery(index, "folder").objects.values()
    assert [item.state for item in objects] == [ObjectState.VERIFIED] * 3


def test_a_folder_gets_what_its_profile_names_and_no_more(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    deliver(index, make_config(), folder_destination(tmp_path / "out", profile={"objects": ["vertebrae_seg"]}))
    assert [path.name for path in (tmp_path / "out" / STUDY / SERIES).iterdir()] == ["vertebrae.seg.dcm"]


def test_results_made_for_other_profiles_are_given_up_with_what_to_do(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    case = deliver(index, make_config(), folder_destination(tmp_path / "out", profile=PRESETS["plain-pacs"]))
    assert case.state is CaseState.FAILED
    assert "analyse the Series again" in case.reason


def test_a_file_that_does_not_read_back_as_it_was_written_is_written_again(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over(index, results, "folder")
    destination = folder_destination(tmp_path / "out")
    spoilt = tmp_path / "out" / STUDY / SERIES / "report.sr.dcm"
    with monkeypatch.context() as patch:
        patch.setattr("node.deliver.folder.sync", lambda path: spoilt.exists() and spoilt.write_bytes(b"spoilt"))
        case = deliver(index, make_config(), destination)
    assert case.state is CaseState.DELIVERING
    assert "folder took report.sr.dcm, and 0 s later lacks it" in case.reason
    clock.now_s += 10
    assert deliver(index, make_config(), destination).state is CaseState.DONE
    assert spoilt.read_bytes() == (results / "report.sr.dcm").read_bytes()
    assert len(list(spoilt.parent.iterdir())) == 3  # the others are still there


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


def test_results_that_are_gone_are_given_up_and_not_tried_for_ever(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    for path in results.iterdir():
        path.unlink()
    case = deliver(index, make_config(), folder_destination(tmp_path / "out"))
    assert case.state is CaseState.FAILED
    assert f"{results} holds nothing for this destination; analyse the Series again" in case.reason


def test_a_damaged_result_is_given_up_and_holds_up_no_other_case(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    (results / "report.sr.dcm").write_bytes(b"")
    hand_over(index, make_results(index, series_uid="1.2.4"), "folder", series_uid="1.2.4")
    case = deliver(index, make_config(), folder_destination(tmp_path / "out"))
    assert case.state is CaseState.FAILED
    assert f"{results / 'report.sr.dcm'} is damaged; analyse the Series again" in case.reason
    assert the_case(index, "1.2.4").state is CaseState.DONE


def test_a_fault_in_one_delivery_puts_that_one_off(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over(index, results, "folder")
    hand_over(index, make_results(index, series_uid="1.2.4"), "folder", series_uid="1.2.4")
    with monkeypatch.context() as broken:
        broken.setattr("node.deliver.clock.open_courier", Mock(side_effect=KeyError("a fault")))
        with pytest.raises(KeyError):
            deliver(index, make_config(), folder_destination(tmp_path / "out"))
    deliver(index, make_config(), folder_destination(tmp_path / "out"))
    assert {the_case(index, uid).state for uid in (SERIES, "1.2.4")} == {CaseState.DELIVERING, CaseState.DONE}


# ---- several destinations, and by hand ----


@pytest.fixture
def dead(free_port: Callable[[], int]) -> DicomDestination:
    """A PACS where nothing listens."""
    return DicomDestination(
        type="dicom", name="pacs", host="127.0.0.1", port=free_port(), ae_title="PACS", timeout_s=30
    )


def test_a_dead_destination_does_not_keep_results_from_another(
    index: Index, make_config: MakeConfig, results: Path, dead: DicomDestination, tmp_path: Path
) -> None:
    hand_over(index, results, "pacs", "folder")
    config, folder = make_config(), folder_destination(tmp_path / "out")
    assert deliver(index, config, dead).state is CaseState.DELIVERING
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
            released.wait(200)

    names = [*(f"dead-{number}" for number in range(12)), "healthy"]
    destinations = tuple(FolderDestination(type="folder", name=name, path=tmp_path / name) for name in names)
    monkeypatch.setattr(service, "deliver_due", deliver_due_or_hang)
    monkeypatch.setattr(service, "check_cases", lambda *_: checked.release())
    monkeypatch.setattr(service, "Receivers", _NoReceivers)
    monkeypatch.setattr(service, "WorkerPool", _NoWorkers)
    node = service.Service(make_config(deliver={"destinations": destinations}))
    try:
        node.start(threading.Event())
        assert reached.wait(60)
        for _ in range(3):
            assert checked.acquire(timeout=60)
    finally:
        released.set()
        node.stop()


class _NoReceivers:
    """Nothing listens."""

    def __init__(self, _config: Config, _index: Index) -> None:
        pass

    def start(self) -> None:
        pass

    watch = terminate = start

    def join(self, _timeout_s: float) -> None:
        pass


class _NoWorkers:
    """A pool that nothing is submitted to."""

    def __init__(self, _config: Config) -> None:
        pass

    def wait_until_loaded(self, _stopping: threading.Event) -> str:
        return ""

    def stop(self) -> None:
        pass


def test_a_failed_delivery_that_is_retried_by_hand_reopens_the_case_and_has_all_attempts(
    index: Index, make_config: MakeConfig, results: Path, dead: DicomDestination, clock: Clock
) -> None:
    hand_over(index, results, "pacs")
    config = make_config(deliver={"max_attempts": 1, "destinations": ()})
    assert deliver(index, config, dead).state is CaseState.FAILED
    assert index.retry_delivery(the_delivery(index, "pacs"))
    assert (the_case(index).state, the_case(index).reason) == (CaseState.DELIVERING, "")
    assert the_delivery(index, "pacs").attempts == 0
    assert index.next_delivery("pacs") is not None


def test_a_retry_of_a_snapshot_that_has_moved_on_does_nothing(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, clock: Clock
) -> None:
    hand_over(index, results, "folder")
    seen = the_delivery(index, "folder")
    clock.now_s += 1
    deliver(index, make_config(), folder_destination(tmp_path / "out"))
    assert not index.retry_delivery(seen)
    assert the_delivery(index, "folder").state is DeliveryState.DONE


def test_a_done_delivery_that_is_retried_by_hand_is_sent_again_as_a_whole(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    folder = folder_destination(tmp_path / "out")
    deliver(index, make_config(), folder)
    lost = tmp_path / "out" / STUDY / SERIES / "report.sr.dcm"
    lost.unlink()
    assert index.retry_delivery(the_delivery(index, "folder"))
    assert deliver(index, make_config(), folder).state is CaseState.DONE
    assert lost.exists()


def test_a_delivery_given_up_by_hand_ends_the_case_and_stays_ended_whatever_the_running_attempt_finds(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over(index, results, "folder")

    def give_up_meanwhile(_path: Path) -> None:
        index.give_up_delivery(the_delivery(index, "folder"))

    monkeypatch.setattr("node.deliver.folder.sync", give_up_meanwhile)
    case = deliver(index, make_config(), folder_destination(tmp_path / "out"))
    assert (case.state, case.reason) == (CaseState.FAILED, "delivery to folder: given up by hand")
    assert not index.give_up_delivery(the_delivery(index, "folder"))


def test_a_retry_does_not_hide_that_a_later_analysis_failed(
    index: Index, make_config: MakeConfig, results: Path, dead: DicomDestination
) -> None:
    hand_over(index, results, "pacs")
    deliver(index, make_config(deliver={"max_attempts": 1, "destinations": ()}), dead)
    add_instance(index, 2)
    assert index.queue(the_case(index))
    case = index.claim_next()
    assert case is not None
    index.fail_attempt(case, "the worker died", max_attempts=1)
    assert index.retry_delivery(the_delivery(index, "pacs"))
    assert (the_case(index).state, the_case(index).reason) == (CaseState.FAILED, "the worker died")


def test_what_a_destination_has_of_replaced_results_is_known(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder", "pacs")
    deliver(index, make_config(), folder_destination(tmp_path / "out"))
    there = set(the_delivery(index, "folder").objects)
    add_instance(index, 2)
    hand_over(index, make_results(index, "fedcba9876543210"), "folder", "pacs")
    assert set(the_delivery(index, "folder").superseded) == there
    assert the_delivery(index, "pacs").superseded == ()


def test_a_retry_by_hand_counts_whatever_the_running_attempt_finds(index: Index, results: Path, clock: Clock) -> None:
    hand_over(index, results, "pacs")
    attempt = index.next_delivery("pacs")
    assert attempt is not None
    clock.now_s += 30
    assert index.retry_delivery(the_delivery(index, "pacs"))
    taken = {"1.2.3.1": ObjectProgress(state=ObjectState.TAKEN)}
    assert not index.settle_delivery(attempt, DeliveryState.FAILED, "given up after 20 attempt(s)", objects=taken)
    assert (the_delivery(index, "pacs").state, the_case(index).state) == (DeliveryState.PENDING, CaseState.DELIVERING)
    assert the_delivery(index, "pacs").superseded == ("1.2.3.1",)  # should newer results come before it is tried


def test_an_attempt_whose_case_was_deleted_says_nothing_of_the_next_one(index: Index, results: Path) -> None:
    hand_over(index, results, "pacs")
    attempt = index.next_delivery("pacs")
    assert attempt is not None
    assert index.delete_case(the_case(index)) is not None
    hand_over(index, make_results(index, series_uid="1.2.4"), "pacs", series_uid="1.2.4")
    assert the_delivery(index, "pacs").delivery_id == attempt.delivery_id  # SQLite gives numbers again
    taken = {"1.2.3.1": ObjectProgress(state=ObjectState.TAKEN)}
    assert not index.settle_delivery(attempt, DeliveryState.DONE, objects=taken)
    assert the_delivery(index, "pacs").superseded == ()


def test_what_a_destination_has_is_known_though_it_was_to_be_sent_again(
    index: Index, make_config: MakeConfig, results: Path, tmp_path: Path
) -> None:
    hand_over(index, results, "folder")
    deliver(index, make_config(), folder_destination(tmp_path / "out"))
    there = set(the_delivery(index, "folder").objects)
    assert index.retry_delivery(the_delivery(index, "folder"))
    add_instance(index, 2)
    hand_over(index, make_results(index, "fedcba9876543210"), "folder")
    assert set(the_delivery(index, "folder").superseded) == there
