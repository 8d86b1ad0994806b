"""What becomes of cases is told once to whom it concerns, however often that takes; on a real index and web server."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from node.case import Case, NotificationState
from node.cli import main
from node.index import Index, NewInstance
from node.notify.clock import notify_due
from node.targets import Rule, WebhookTarget
from tests.factories import make_ct_series
from tests.node.handed_over import Clock
from tests.node.test_notify_messages import WebServer, findings

SERIES, STUDY = "1.2.3", "1.2"


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer().serving() as server:
        yield server


@pytest.fixture
def target(web: WebServer, index: Index, clock: Clock) -> WebhookTarget:
    """A target that has been in use for a while."""
    target = WebhookTarget(type="webhook", name="hook", url=web.url)
    notify_due(index, target)
    clock.now_s += 1
    return target


def told(web: WebServer) -> list[str]:
    return [json.loads(body)["event"] for _, body in web.got]


def analysing(index: Index, path: Path | None = None) -> Case:
    association = index.open_association("CT1")
    slices = [{"sop_instance_uid": "1.2.3.4", "series_instance_uid": SERIES, "study_instance_uid": STUDY}]
    stored = path or index.data_dir / "instances" / SERIES / "1.2.3.4.dcm"
    new = NewInstance(association_id=association, calling_ae_title="CT1", path=stored, headers=slices)
    index.add_instances([new], quiet_time_s=0)
    case = index.case(SERIES)
    assert case is not None
    index.queue(case)
    claimed = index.claim_next()
    assert claimed is not None
    return claimed


def finish(
    index: Index, case: Case, name: str = "a", destinations: tuple[str, ...] = (), **probabilities: float
) -> None:
    folder = index.data_dir / "cases" / SERIES / name
    folder.mkdir(parents=True)
    (folder / "findings.json").write_text(json.dumps(findings(**probabilities)))
    assert index.finish(case, folder, summary=f"Said {name}.", sop_instance_uids=[], destinations=destinations)


def test_a_positive_case_is_told_once(index: Index, web: WebServer, target: WebhookTarget) -> None:
    finish(index, analysing(index), C5=0.9)
    for _ in range(3):
        notify_due(index, target)
    assert told(web) == ["positive"]
    assert json.loads(web.got[0][1])["text"] == "Said a."


def test_a_negative_case_is_told_only_to_who_asks(index: Index, web: WebServer, target: WebhookTarget) -> None:
    finish(index, analysing(index))
    notify_due(index, target)
    assert told(web) == []
    assert [item.state for item in index.notifications()] == [NotificationState.UNWANTED]


def test_a_refused_series_is_told_to_who_asks(index: Index, web: WebServer, target: WebhookTarget) -> None:
    asking = target.model_copy(update={"when": Rule(events=("not-analysed",))})
    index.refuse(analysing(index), "Series 1.2.3 has 5 slices.")
    notify_due(index, asking)
    assert told(web) == ["not-analysed"]


def test_results_are_told_even_if_their_delivery_failed_at_once(
    index: Index, web: WebServer, target: WebhookTarget
) -> None:
    finish(index, analysing(index), destinations=("pacs",), C2=0.8)
    index.drop_destinations_except([])
    notify_due(index, target)
    assert sorted(told(web)) == ["failed", "positive"]


def test_what_a_target_that_is_gone_was_not_told_keeps_no_case_from_being_purged(
    index: Index, web: WebServer, target: WebhookTarget
) -> None:
    web.status = 503
    finish(index, analysing(index), C5=0.9)
    notify_due(index, target)
    index.drop_targets_except([target.name])
    assert index.finished_cases() == []
    index.drop_targets_except(["another"])
    (item,) = index.notifications()
    assert (item.state, item.reason) == (NotificationState.FAILED, "this target is no longer in the configuration")
    assert len(index.finished_cases()) == 1


def test_what_happens_after_the_clock_was_set_back_is_told_and_nothing_twice(
    index: Index, web: WebServer, target: WebhookTarget, clock: Clock
) -> None:
    clock.now_s += 3600
    finish(index, analysing(index), C5=0.9)
    notify_due(index, target)
    clock.now_s -= 3600
    notify_due(index, target)
    assert told(web) == ["positive"]
    case = index.case(SERIES)
    assert case is not None
    assert index.retry(case)
    case = index.case(SERIES)
    assert case is not None
    clock.now_s += 1
    index.refuse(case, "Series 1.2.3 has 5 slices.")
    asking = target.model_copy(update={"when": Rule(events=("not-analysed",))})
    for _ in range(2):
        notify_due(index, asking)
    assert told(web) == ["positive", "not-analysed"]


def test_a_new_target_hears_nothing_of_old_cases(index: Index, web: WebServer, clock: Clock) -> None:
    finish(index, analysing(index), C5=0.9)
    clock.now_s += 1
    notify_due(index, WebhookTarget(type="webhook", name="new", url=web.url))
    notify_due(index, WebhookTarget(type="webhook", name="new", url=web.url))
    assert told(web) == []


def test_what_was_written_late_is_told_though_nothing_changes_after_it(
    index: Index, web: WebServer, target: WebhookTarget, clock: Clock
) -> None:
    asking = target.model_copy(update={"when": Rule(events=("positive", "not-analysed"))})
    clock.now_s += 10
    index.refuse(analysing(index), "Series 1.2.3 has 5 slices.")
    notify_due(index, asking)
    clock.now_s -= 1  # another writer looked at the clock before that one, and had its turn after it
    case = index.case(SERIES)
    assert case is not None
    assert index.retry(case)
    finish(index, analysing(index), C5=0.9)
    clock.now_s += 60
    for _ in range(2):
        notify_due(index, asking)
    assert told(web) == ["not-analysed", "positive"]


def test_a_receiver_that_was_down_hears_it_later(
    index: Index, web: WebServer, target: WebhookTarget, clock: Clock
) -> None:
    web.status = 503
    finish(index, analysing(index), C5=0.9)
    notify_due(index, target)
    notify_due(index, target)  # not before its time
    assert len(web.got) == 1
    (item,) = index.notifications()
    assert item.state is NotificationState.PENDING
    assert "503" in item.reason
    clock.now_s += 60
    web.status = 200
    notify_due(index, target)
    assert [item.state for item in index.notifications()] == [NotificationState.SENT]


def test_after_a_day_it_is_given_up_and_can_be_tried_by_hand(
    index: Index, web: WebServer, target: WebhookTarget, clock: Clock
) -> None:
    web.status = 503
    finish(index, analysing(index), C5=0.9)
    while index.notifications() == [] or index.notifications()[0].state is NotificationState.PENDING:
        notify_due(index, target)
        clock.now_s += 1800
    (item,) = index.notifications()
    assert item.state is NotificationState.FAILED
    assert 23 * 3600 < clock.now_s - item.at < 30 * 3600
    assert index.retry_notifications([item.notification_id, 999]) == 1
    notify_due(index, target)
    assert index.notifications()[0].reason.startswith("attempt 1 failed, next in")
    web.status = 200
    clock.now_s += 10
    notify_due(index, target)
    assert [item.state for item in index.notifications()] == [NotificationState.SENT]


def test_a_refusal_for_good_is_not_tried_again(index: Index, web: WebServer, target: WebhookTarget) -> None:
    web.status = 401
    finish(index, analysing(index), C5=0.9)
    notify_due(index, target)
    (item,) = index.notifications()
    assert (item.state, item.attempts) == (NotificationState.FAILED, 1)


def test_results_that_were_replaced_before_they_were_told_are_not_told(
    index: Index, web: WebServer, target: WebhookTarget, clock: Clock
) -> None:
    finish(index, analysing(index), C5=0.9)
    index.note_events(target.name)
    for path in (index.data_dir / "cases" / SERIES / "a").iterdir():
        path.unlink()
    notify_due(index, target)
    assert told(web) == []


def test_what_a_receiver_that_was_down_has_missed_is_not_told_after_the_newer_results(
    index: Index, web: WebServer, target: WebhookTarget, clock: Clock
) -> None:
    all_results = target.model_copy(update={"when": Rule(events=("positive", "negative"))})
    web.status = 503
    finish(index, analysing(index), "a", C5=0.9)
    notify_due(index, all_results)
    web.status, web.got = 200, []
    clock.now_s += 1
    case = index.case(SERIES)
    assert case is not None
    assert index.retry(case)
    finish(index, analysing(index), "b")
    for _ in range(2):
        notify_due(index, all_results)
        clock.now_s += 60
    assert told(web) == ["negative"]
    assert {item.text: item.state for item in index.notifications()} == {
        "Said a.": NotificationState.UNWANTED,
        "Said b.": NotificationState.SENT,
    }


def test_the_end_of_one_whose_case_was_deleted_is_not_taken_for_anothers(
    index: Index, target: WebhookTarget, clock: Clock
) -> None:
    index.note_events("other")
    clock.now_s += 1
    finish(index, analysing(index), C5=0.9)
    index.note_events(target.name)
    under_way = index.next_notification(target.name)
    case = index.case(SERIES)
    assert under_way is not None
    assert case is not None
    assert index.delete_case(case) is not None
    finish(index, analysing(index), "b", C5=0.9)
    index.note_events("other")
    assert [item.notification_id for item in index.notifications()] == [under_way.notification_id]
    index.settle_notification(under_way, NotificationState.SENT)
    assert index.next_notification("other") is not None


@pytest.mark.parametrize("patient_data", [False, True])
def test_the_patient_is_named_only_where_that_is_switched_on(
    index: Index, web: WebServer, target: WebhookTarget, tmp_path: Path, patient_data: bool
) -> None:
    def name(_i: int, ds: object) -> None:
        ds.PatientName, ds.PatientID = "Müller^Eva^^^", "P-1"  # type: ignore[attr-defined]
        ds.SpecificCharacterSet = "ISO_IR 192"  # type: ignore[attr-defined]

    (path,) = make_ct_series(index.data_dir / "instances" / SERIES, num_slices=1, edit=name)
    finish(index, analysing(index, path), C5=0.9)
    notify_due(index, target.model_copy(update={"patient_data": patient_data}))
    ((_, body),) = web.got
    assert ("patient" in json.loads(body)) is patient_data
    assert ("P-1" in body.decode()) is patient_data
    if patient_data:
        assert json.loads(body)["patient"]["name"] == "Müller^Eva"


def test_nothing_in_the_database_names_the_patient(
    index: Index, web: WebServer, target: WebhookTarget, tmp_path: Path
) -> None:
    def name(_i: int, ds: object) -> None:
        ds.PatientName = "Zzyzx^Eva"  # type: ignore[attr-defined]

    (path,) = make_ct_series(index.data_dir / "instances" / SERIES, num_slices=1, edit=name)
    finish(index, analysing(index, path), C5=0.9)
    notify_due(index, target.model_copy(update={"patient_data": True}))
    stored = b"".join(file.read_bytes() for file in index.data_dir.glob("cspine.sqlite*"))
    assert b"Zzyzx" not in stored


# ---- by hand ----


@pytest.fixture
def cspine(tmp_path: Path, index: Index, web: WebServer) -> Callable[..., tuple[int, str]]:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data_dir: {index.data_dir}\nnotify:\n  targets:\n    - {{name: hook, type: webhook, url: '{web.url}'}}\n"
    )

    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["notifications", *arguments[:1], "--config", str(config), *arguments[1:]])
        return done.exit_code, done.output

    return run


def test_a_target_can_be_tried_by_hand(cspine: Callable[..., tuple[int, str]], web: WebServer) -> None:
    assert cspine("test", "hook") == (0, "hook: sent.\n")
    assert "no patient was examined" in web.got[0][1].decode()
    web.status = 404
    status, said = cspine("test", "hook")
    assert status == 1
    assert "answered 404" in said
    status, said = cspine("test", "other")
    assert status == 2
    assert "there are: hook" in said


def test_notifications_are_listed_with_what_was_wrong(
    cspine: Callable[..., tuple[int, str]], index: Index, web: WebServer, target: WebhookTarget
) -> None:
    web.status = 401
    finish(index, analysing(index), C5=0.9)
    notify_due(index, target)
    status, said = cspine("list")
    assert status == 0
    assert "failed" in said
    number = index.notifications()[0].notification_id
    assert cspine("retry", str(number), "77") == (
        1,
        "1 of 2 will be sent again.\nThe others have not failed, or do not exist; see `cspine notifications list`.\n",
    )
