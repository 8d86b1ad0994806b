"""The database: the states of a case, changes that miss when the case moved on, and several writers at once."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from node.case import Case, CaseState, Delivery, DeliveryState
from node.index import Index, NewInstance, WatchedSource, tables
from tests.stored import add_instance, path_of

SERIES, STUDY = "1.2.3", "1.2"


@pytest.fixture
def index(tmp_path: Path, database: SecretStr | None) -> Iterator[Index]:
    """The index of an empty data folder; each test runs with SQLite and with PostgreSQL."""
    opened = Index(tmp_path / "data", database)
    yield opened
    opened.close()


def header(number: int, series_instance_uid: str = SERIES) -> dict[str, Any]:
    return {
        "sop_instance_uid": f"{series_instance_uid}.{number}",
        "series_instance_uid": series_instance_uid,
        "study_instance_uid": STUDY,
    }


def add(
    index: Index, number: int, *, association_id: int | None = None, series_uid: str = SERIES, quiet_time_s: float = 0.0
) -> None:
    """Notes Instance `number`; over an association of its own unless one is named."""
    add_instance(
        index,
        association_id=association_id or index.open_association("SCANNER"),
        calling_ae_title="SCANNER",
        path=index.data_dir / "instances" / series_uid / f"{series_uid}.{number}.dcm",
        headers=[header(number, series_uid)],
        quiet_time_s=quiet_time_s,
    )


def the_case(index: Index, series_uid: str = SERIES) -> Case:
    case = index.case(series_uid)
    assert case is not None
    return case


def claimed(index: Index) -> Case:
    """A case that a worker holds."""
    add(index, 1)
    assert index.queue(the_case(index))
    case = index.claim_next()
    assert case is not None
    return case


def finish(index: Index, case: Case, *destinations: str, folder: str = "results") -> bool:
    return index.finish(
        case,
        index.data_dir / "cases" / SERIES / folder,
        summary="fracture absent 0.02",
        sop_instance_uids=("9.8.7",),
        destinations=destinations,
    )


def due(index: Index, destination: str) -> Delivery:
    delivery = index.next_delivery(destination)
    assert delivery is not None
    return delivery


def test_a_case_goes_from_receiving_to_done(index: Index) -> None:
    add(index, 1)
    add(index, 2)
    case = the_case(index)
    assert (case.state, case.num_instances, case.attempts) == (CaseState.RECEIVING, 2, 0)
    assert (case.study_instance_uid, case.calling_ae_title) == (STUDY, "SCANNER")
    assert index.queue(case)
    assert the_case(index).state is CaseState.QUEUED
    held = index.claim_next()
    assert held is not None
    assert (held.state, held.attempts) == (CaseState.ANALYSING, 1)
    assert finish(index, held, "pacs")
    case = the_case(index)
    assert (case.state, case.summary) == (CaseState.DELIVERING, "fracture absent 0.02")
    assert case.result_dir == index.data_dir / "cases" / SERIES / "results"
    index.settle_delivery(due(index, "pacs"), DeliveryState.DONE)
    assert the_case(index).state is CaseState.DONE


def test_the_same_instance_twice_counts_once(index: Index) -> None:
    add(index, 1)
    add(index, 1)
    assert the_case(index).num_instances == 1
    assert len(index.instance_paths(SERIES)) == 1


def new(index: Index, number: int, series_uid: str = SERIES, **values: Any) -> NewInstance:
    values = {"association_id": index.open_association("SCANNER"), "calling_ae_title": "SCANNER"} | values
    path = index.data_dir / "instances" / series_uid / f"{series_uid}.{number}.dcm"
    return NewInstance(path=path, headers=[header(number, series_uid)], **values)


def test_a_batch_tells_of_each_instance_whether_it_is_new(index: Index) -> None:
    add(index, 1)
    batch = [new(index, 2), new(index, 1), new(index, 1, "1.9"), new(index, 2)]
    assert index.add_instances(batch, quiet_time_s=0) == [True, False, True, False]
    assert [(case.series_instance_uid, case.num_instances) for case in index.cases()] == [("1.9", 1), (SERIES, 2)]
    assert index.add_instances(batch, quiet_time_s=0) == [False] * 4
    assert index.add_instances([], quiet_time_s=0) == []


def test_a_case_has_the_attributes_of_its_first_instance(index: Index) -> None:
    attributes = {"KVP": 120.0, "ConvolutionKernel": ["Br40", "3"]}
    batch = [new(index, 1, attributes=attributes), new(index, 2, attributes={"KVP": 80.0})]
    assert index.add_instances(batch, quiet_time_s=0) == [True, True]
    add(index, 3)
    assert the_case(index).attributes == attributes


def test_a_batch_is_noted_whole_or_not_at_all(index: Index) -> None:
    with pytest.raises(IntegrityError):
        index.add_instances([new(index, 1), new(index, 2, association_id=999)], quiet_time_s=0)
    assert index.cases() == []
    add(index, 1)  # and the next one gets its turn


def test_without_destinations_a_finished_case_is_done(index: Index) -> None:
    assert finish(index, claimed(index))
    assert the_case(index).state is CaseState.DONE


def test_paths_are_kept_relative_so_the_data_folder_can_move(index: Index) -> None:
    add(index, 1)
    with index._engine.connect() as connection:
        path = connection.scalar(select(tables.instances.c.path))
    assert path == f"instances/{SERIES}/{SERIES}.1.dcm"
    assert path_of(index, f"{SERIES}.1") == index.data_dir / path
    assert index.stored_file("1.2.3.4.5.6") is None


def test_a_change_decided_on_an_old_snapshot_is_dropped(index: Index) -> None:
    add(index, 1)
    old = the_case(index)
    add(index, 2)
    assert not index.queue(old)
    assert not index.refuse(old, "too few slices")
    assert the_case(index).state is CaseState.RECEIVING
    assert index.queue(the_case(index))


def test_results_of_a_deleted_case_are_not_those_of_the_case_that_gets_its_number(index: Index) -> None:
    deleted = claimed(index)
    assert index.delete_case(deleted) is not None
    add(index, 1, series_uid="1.2.4")
    assert index.queue(the_case(index, "1.2.4"))
    assert index.claim_next() is not None
    assert not finish(index, deleted, "pacs")
    index.fail_attempt(deleted, "the worker died", max_attempts=1)
    other = the_case(index, "1.2.4")
    assert (other.state, other.reason, other.result_dir) == (CaseState.ANALYSING, "", None)
    assert index.delete_case(deleted) is None
    assert the_case(index, "1.2.4") == other


def test_results_of_fewer_instances_are_dropped_when_one_came_meanwhile(index: Index) -> None:
    held = claimed(index)
    add(index, 2)
    assert not finish(index, held, "pacs")
    assert (the_case(index).state, index.next_delivery("pacs")) == (CaseState.RECEIVING, None)
    assert not index.is_result("9.8.7")


@pytest.mark.parametrize("state", [s for s in CaseState if s is not CaseState.RECEIVING])
def test_a_late_instance_reopens_a_case_from_any_state(index: Index, state: CaseState) -> None:
    add(index, 1)
    with index._writing() as connection:
        connection.execute(update(tables.cases).values(state=state, reason="why", attempts=2))
    add(index, 2, quiet_time_s=60)
    case = the_case(index)
    assert (case.state, case.reason, case.attempts, case.num_instances) == (CaseState.RECEIVING, "", 0, 2)
    assert index.cases_to_check() == []


def test_deliveries_of_superseded_results_do_not_count_for_the_new_ones(index: Index) -> None:
    assert finish(index, claimed(index), "pacs", folder="old")
    old = due(index, "pacs")
    add(index, 2)
    assert index.queue(the_case(index))
    held = index.claim_next()
    assert held is not None
    assert finish(index, held, "pacs", folder="new")
    index.settle_delivery(old, DeliveryState.DONE)
    assert the_case(index).state is CaseState.DELIVERING
    assert due(index, "pacs").result_dir.name == "new"


def end_without_results(index: Index, how: str) -> None:
    """A late Instance comes, and then no results."""
    add(index, 2)
    if how == "refused":
        assert index.refuse(the_case(index), "gaps")
        return
    if how == "skipped":
        assert index.skip(the_case(index), "another Series is preferred")
        return
    assert index.queue(the_case(index))
    held = index.claim_next()
    assert held is not None
    reports = index.data_dir / "cases" / SERIES / "reports"
    assert index.finish(
        held, reports, summary="Not analysed", sop_instance_uids=(), destinations=["reports"], refusal="gaps"
    )


@pytest.mark.parametrize("how", ["refused", "refused with a report", "skipped"])
def test_results_that_wait_for_a_destination_go_out_no_more_once_the_case_ends_without_any(
    index: Index, how: str
) -> None:
    assert finish(index, claimed(index), "done", "waiting", "on its way", "verifying", "failed", "reports")
    index.settle_delivery(due(index, "done"), DeliveryState.DONE)
    index.settle_delivery(due(index, "verifying"), DeliveryState.VERIFYING, transaction_uid="1.2.9")
    index.settle_delivery(due(index, "failed"), DeliveryState.FAILED, "given up after 20 attempt(s)")
    on_its_way = due(index, "on its way")
    end_without_results(index, how)
    assert {delivery.destination: delivery.state for delivery in index.deliveries()} == {
        "done": DeliveryState.DONE,
        **dict.fromkeys(("waiting", "on its way", "verifying", "failed"), DeliveryState.SUPERSEDED),
        "reports": DeliveryState.PENDING if how == "refused with a report" else DeliveryState.SUPERSEDED,
    }
    ended = the_case(index)
    assert not index.settle_delivery(on_its_way, DeliveryState.PENDING, "attempt 1 failed", 0.0)
    assert not index.report_commitment("1.2.9", ["9.8.7"], {})
    assert all(index.next_delivery(name) is None for name in ("waiting", "on its way", "verifying", "failed"))
    assert the_case(index) == ended
    assert index.undelivered_cases() == set()


def test_new_results_go_also_where_earlier_ones_were_superseded(index: Index) -> None:
    assert finish(index, claimed(index), "pacs", "gone")
    end_without_results(index, "refused")
    assert index.retry(the_case(index))
    assert index.queue(the_case(index))
    held = index.claim_next()
    assert held is not None
    assert finish(index, held, "pacs", folder="new")
    assert due(index, "pacs").result_dir.name == "new"
    assert index.next_delivery("gone") is None
    index.settle_delivery(due(index, "pacs"), DeliveryState.DONE)
    assert (the_case(index).state, the_case(index).reason) == (CaseState.DONE, "")


def test_results_go_out_though_their_instances_were_lost_from_the_disk(index: Index) -> None:
    assert finish(index, claimed(index), "pacs")
    index.forget_instances([f"{SERIES}.1"])
    assert the_case(index).state is CaseState.REFUSED
    assert due(index, "pacs").state is DeliveryState.PENDING


def test_however_many_instances_were_lost_the_node_starts(index: Index) -> None:
    """Of all that waited when a disk was lost; no statement takes so many values."""
    for number in (1, 2):
        add(index, number)
    lost = [f"1.9.{number}" for number in range(70_000)]
    reasons = index.forget_instances([f"{SERIES}.1", *lost, f"{SERIES}.2"])
    assert reasons == {SERIES: "2 Instances were lost from the disk; send the Series again"}
    assert (the_case(index).state, the_case(index).num_instances) == (CaseState.REFUSED, 0)


def test_a_refusal_that_is_overtaken_supersedes_nothing(index: Index) -> None:
    assert finish(index, claimed(index), "pacs")
    add(index, 2)
    old = the_case(index)
    add(index, 3)
    assert not index.refuse(old, "gaps")
    assert due(index, "pacs").state is DeliveryState.PENDING


def test_a_case_is_checked_after_the_quiet_time_or_when_its_association_ends(index: Index) -> None:
    association_id = index.open_association("SCANNER")
    add(index, 1, association_id=association_id, quiet_time_s=60)
    assert index.cases_to_check() == []
    index.end_association(association_id, released=True)
    assert [case.series_instance_uid for case in index.cases_to_check()] == [SERIES]
    index.check_again(the_case(index), time.time() + 60)
    assert index.cases_to_check() == []
    index.check_now(the_case(index))
    assert [case.series_instance_uid for case in index.cases_to_check()] == [SERIES]


def test_an_association_that_ends_while_its_series_is_judged_has_it_judged_again(index: Index) -> None:
    association_id = index.open_association("SCANNER")
    add(index, 1, association_id=association_id, quiet_time_s=60)
    judged = the_case(index)  # it is still open: wait for the quiet time
    index.end_association(association_id, released=True)
    index.check_again(judged, time.time() + 60)
    assert [case.series_instance_uid for case in index.cases_to_check()] == [SERIES]


def test_how_each_association_ended_is_known(index: Index) -> None:
    released, aborted, still_open = (index.open_association("SCANNER") for _ in range(3))
    for number, association_id in enumerate((released, aborted, still_open)):
        add(index, number, association_id=association_id)
    index.end_association(released, released=True)
    index.end_association(aborted, released=False)
    stored = index.stored_series(SERIES)
    ends = [(carrier.ended_at is not None, carrier.released) for carrier in stored.carriers]
    assert ends == [(True, True), (True, False), (False, False)]
    assert sorted(h["sop_instance_uid"] for h in stored.headers) == [f"{SERIES}.{n}" for n in range(3)]
    index.end_lost_associations()
    stored = index.stored_series(SERIES)
    ends = [(carrier.ended_at is not None, carrier.released) for carrier in stored.carriers]
    assert ends == [(True, True), (True, False), (True, False)]


def test_cases_are_claimed_in_the_order_they_were_queued(index: Index) -> None:
    for series_uid in ("1.1", "1.2", "1.3"):
        add(index, 1, series_uid=series_uid)
    for series_uid in ("1.3", "1.1", "1.2"):
        assert index.queue(the_case(index, series_uid))
    order = [case.series_instance_uid for case in iter(index.claim_next, None)]
    assert order == ["1.3", "1.1", "1.2"]


def test_an_attempt_that_broke_is_repeated_until_they_are_used_up(index: Index) -> None:
    held = claimed(index)
    assert index.fail_attempt(held, "worker died", max_attempts=2) is CaseState.QUEUED
    held = index.claim_next()
    assert held is not None
    assert held.attempts == 2
    assert index.fail_attempt(held, "worker died again", max_attempts=2) is CaseState.FAILED
    case = the_case(index)
    assert (case.state, case.reason) == (CaseState.FAILED, "worker died again")
    assert index.claim_next() is None


def test_put_back_queues_what_was_held_and_costs_no_attempt(index: Index) -> None:
    claimed(index)
    assert index.put_back() == 1
    assert (the_case(index).state, the_case(index).attempts) == (CaseState.QUEUED, 0)
    assert index.put_back() == 0


def test_a_case_that_takes_the_node_with_it_is_not_tried_for_ever(index: Index) -> None:
    for number in (1, 2):
        case = claimed(index) if number == 1 else index.claim_next()
        assert case is not None
        assert index.end_lost_attempts([case.case_id], "the node ended", max_attempts=2) == []
        assert index.end_lost_attempts([], "the node ended", max_attempts=2)
        state = CaseState.QUEUED if number == 1 else CaseState.FAILED
        assert (the_case(index).state, the_case(index).attempts) == (state, number)
    assert the_case(index).reason == "the node ended"
    assert index.claim_next() is None


def test_a_case_is_done_only_when_every_destination_has_its_results(index: Index) -> None:
    assert finish(index, claimed(index), "pacs", "folder")
    index.settle_delivery(due(index, "folder"), DeliveryState.DONE)
    index.settle_delivery(due(index, "pacs"), DeliveryState.PENDING, "not reachable", time.time() + 60)
    case = the_case(index)
    assert (case.state, case.reason) == (CaseState.DELIVERING, "delivery to pacs: not reachable")
    assert index.next_delivery("pacs") is None


def test_a_delivery_given_up_makes_the_case_failed_with_its_reason(index: Index) -> None:
    assert finish(index, claimed(index), "pacs", "folder")
    index.settle_delivery(due(index, "pacs"), DeliveryState.FAILED, "AE title rejected")
    assert the_case(index).state is CaseState.DELIVERING
    index.settle_delivery(due(index, "folder"), DeliveryState.DONE)
    case = the_case(index)
    assert (case.state, case.reason) == (CaseState.FAILED, "delivery to pacs: AE title rejected")


def test_attempts_of_a_delivery_are_counted(index: Index) -> None:
    assert finish(index, claimed(index), "pacs")
    for attempt in (1, 2, 3):
        delivery = due(index, "pacs")
        assert delivery.attempts == attempt
        index.settle_delivery(delivery, DeliveryState.PENDING, "again", time.time())


def test_deliveries_to_a_destination_no_longer_configured_are_given_up(index: Index) -> None:
    assert finish(index, claimed(index), "old-pacs", "folder")
    index.settle_delivery(due(index, "folder"), DeliveryState.DONE)
    index.drop_destinations_except(["folder"])
    case = the_case(index)
    assert case.state is CaseState.FAILED
    assert "old-pacs: this destination is no longer in the configuration" in case.reason


def test_what_this_node_made_is_known(index: Index) -> None:
    assert not index.is_result("9.8.7")
    assert finish(index, claimed(index))
    assert index.is_result("9.8.7")
    headers = [header(2, "1.2.9") | {"sop_instance_uid": "9.8.7"}]
    path, association_id = index.data_dir / "instances" / "2.dcm", index.open_association("SCANNER")
    assert not add_instance(
        index, association_id=association_id, calling_ae_title="S", path=path, headers=headers, quiet_time_s=0.0
    )
    assert index.case("1.2.9") is None


def test_cases_are_listed_latest_first(index: Index) -> None:
    for number in range(3):
        add(index, 1, series_uid=f"1.{number}")
    assert [case.series_instance_uid for case in index.cases()] == ["1.2", "1.1", "1.0"]
    assert len(index.cases(limit=2)) == 2


def test_everything_survives_closing_and_opening_again(
    index: Index, tmp_path: Path, database: SecretStr | None
) -> None:
    add(index, 1)
    before = the_case(index)
    index.close()
    again = Index(tmp_path / "data", database)
    assert the_case(again) == before
    again.close()


@pytest.mark.parametrize("database", [None])
def test_sqlite_commits_survive_a_power_cut(index: Index) -> None:
    """WAL, and synchronous=FULL (2): the WAL is fsynced at each commit. Every pooled connection must have them."""
    connections = [index._engine.connect() for _ in range(3)]
    for connection in connections:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        connection.close()


def test_how_far_a_watched_archive_was_followed_is_kept(index: Index) -> None:
    assert index.watched_source("orthanc") == WatchedSource(source="orthanc")
    index.note_failure("orthanc", "it cannot be reached")
    index.note_position("orthanc", 2**40)
    index.note_position("orthanc", 2**40 + 7, num_fetched=1)
    index.note_position("orthanc", 2**40 + 9, num_fetched=2)
    known = index.watched_source("orthanc")
    assert (known.position, known.num_series) == (2**40 + 9, 3)
    assert (known.is_failing, known.error, known.succeeded_at) == (True, "it cannot be reached", None)
    index.note_success("orthanc")
    known = index.watched_source("orthanc")
    assert (known.is_failing, known.position, known.error) == (False, 2**40 + 9, "it cannot be reached")
    assert index.watched_source("another").position is None
