"""What the log says of jobs that break, and of a database that is away for a while."""

import logging

import pytest
from apscheduler.events import EVENT_JOB_ERROR, JobExecutionEvent
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from node import broken_jobs
from node.broken_jobs import BrokenJobs
from node.index import Index
from node.service import Service
from tests.node.test_service_jobs import service  # noqa: F401 - a fixture
from tests.waiting import wait_until

AWAY = OperationalError("SELECT patient", {"name": "Doe"}, Exception("connection\n refused"))


def broke(job_id: str, error: Exception) -> JobExecutionEvent:
    return JobExecutionEvent(EVENT_JOB_ERROR, job_id, "default", None, exception=error)


def test_a_database_that_is_away_is_told_of_once_a_minute_and_when_it_is_back(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now_s = [1000.0]
    monkeypatch.setattr(broken_jobs.time, "monotonic", lambda: now_s[0])
    jobs = BrokenJobs("postgresql://host/db", lambda job_id: f"job {job_id}")
    for _ in range(61 * 4):
        for job_id in ("check", "dispatch"):
            jobs.on_error(broke(job_id, AWAY))
        jobs.on_executed(broke("watch", AWAY))  # one that needs no database
        now_s[0] += 0.25
    first, second = [record.message for record in caplog.records]
    assert first.startswith(
        "action=database-away job=job check: the database postgresql://host/db cannot be reached or used, for 0 s now: "
        "connection refused."
    )
    assert "for 60 s now" in second
    jobs.on_executed(broke("dispatch", AWAY))
    jobs.on_executed(broke("check", AWAY))
    assert [record.message for record in caplog.records][2:] == [
        "action=database-back job=job dispatch: it was away for 61 s"
    ]
    jobs.on_error(broke("check", AWAY))
    assert "for 0 s now" in caplog.records[-1].message
    assert "Doe" not in caplog.text


def test_a_missing_table_is_no_database_that_is_away_and_is_told_of_once_a_minute_for_each_job(
    index: Index, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with index._writing() as connection:
        connection.execute(text("ALTER TABLE associations RENAME TO others"))
    with pytest.raises(OperationalError) as raised:
        index.open_association("SCANNER")
    now_s = [1000.0]
    monkeypatch.setattr(broken_jobs.time, "monotonic", lambda: now_s[0])
    jobs = BrokenJobs(index.where, lambda job_id: f"job {job_id}")
    for _ in range(61 * 4):
        for job_id in ("check", "dispatch"):
            jobs.on_error(broke(job_id, raised.value))
        now_s[0] += 0.25
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "action=job-broke job=job check",
        "action=job-broke job=job dispatch",
    ] * 2
    assert caplog.text.count("(no such table: associations)") == 4


def test_a_job_of_the_service_that_breaks_is_named(
    service: Service,  # noqa: F811 - the fixture
    caplog: pytest.LogCaptureFixture,
) -> None:
    def check_something() -> None:
        raise ValueError

    service._every_tick(check_something)
    service._scheduler.start()
    wait_until(lambda: "action=job-broke" in caplog.text)
    assert "check_something: unexpected ValueError at " in caplog.text
