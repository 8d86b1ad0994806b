"""What the jobs of the service do when something fails around them; nothing listens here, and no worker runs."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import datetime, timedelta
from typing import Any, cast
from unittest.mock import MagicMock

import pytest
from apscheduler.executors import base as executors
from apscheduler.schedulers import base as schedulers
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from node import service as service_module
from node.case import CaseState
from node.config import Config
from node.index import Index, tables
from node.service import Service, TakenError
from node.web.settings import WebConfig
from node.workers import Broken, Job, JobOutcome
from tests.node.handed_over import SERIES, add_instance, the_case
from tests.waiting import WAIT_S


class _Workers:
    """Takes jobs and never ends one. on_stopped: called when they were cancelled."""

    def __init__(self, on_stopped: Callable[[], None] = lambda: None) -> None:
        self.jobs: list[Job] = []
        self.ends: list[Future[JobOutcome]] = []
        self._on_stopped = on_stopped

    def submit(self, job: Job) -> "Future[JobOutcome]":
        self.jobs.append(job)
        self.ends.append(Future())
        return self.ends[-1]

    def stop(self) -> None:
        for future in self.ends:
            future.cancel()
        self._on_stopped()


@pytest.fixture
def service(make_config: Callable[..., Config]) -> Iterator[Service]:
    made = Service(make_config())
    yield made
    made.stop()


def test_a_database_that_fails_when_a_case_goes_to_a_worker_costs_no_worker(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker: were it taken for busy, nothing would be analysed any more."""
    workers: Any = _Workers()
    service._pool = workers
    add_instance(service._index, 1)
    assert service._index.queue(the_case(service._index))

    def broken(_series_instance_uid: str) -> None:
        raise OperationalError("SELECT", {}, Exception("the server closed the connection"))

    with monkeypatch.context() as patch:
        patch.setattr(service._index, "instance_files", broken)
        with pytest.raises(OperationalError):
            service._dispatch()
    service._end_unheld()
    assert the_case(service._index).state is CaseState.QUEUED
    service._dispatch()
    assert [list(job.files) for job in workers.jobs] == [[f"{SERIES}.1"]]


def test_a_case_that_grew_stays_with_its_second_worker_when_the_first_ends(make_config: Callable[..., Config]) -> None:
    service, workers = Service(make_config(analyse={"workers": 2})), _Workers()
    service._pool = cast(Any, workers)
    try:
        for number in (1, 2):  # the second comes while what there was of the Series is analysed
            add_instance(service._index, number)
            assert service._index.queue(the_case(service._index))
            service._dispatch()
        assert [len(job.files) for job in workers.jobs] == [1, 2]
        workers.ends[0].cancel()
        service._end_unheld()
        assert the_case(service._index).state is CaseState.ANALYSING
    finally:
        service.stop()


@pytest.mark.parametrize("late", ["_end_unheld", "_dispatch"])
def test_a_job_that_runs_on_while_the_node_stops_costs_a_case_no_attempt(
    late: str, make_config: Callable[..., Config], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler does not wait for it: a destination that hangs would hold up the end."""
    service = Service(make_config())
    job = getattr(service, late)
    workers: Any = _Workers(on_stopped=job if late == "_end_unheld" else lambda: None)
    service._pool = workers
    put_back = service._index.put_back

    def put_back_before_the_job() -> int:
        num = put_back()
        job()
        return num

    monkeypatch.setattr(service._index, "put_back", put_back_before_the_job)
    add_instance(index, 1)
    assert index.queue(the_case(index))
    service._dispatch()
    assert the_case(index).state is CaseState.ANALYSING
    service.stop()
    assert (the_case(index).state, the_case(index).attempts) == (CaseState.QUEUED, 0)


def test_a_database_that_does_not_answer_keeps_no_receiver_running_when_the_node_stops(
    make_config: Callable[..., Config], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the case that was claimed at that moment goes back into the queue all the same."""
    service, asked, answers = Service(make_config()), threading.Event(), threading.Event()
    service._pool = cast(Any, _Workers())
    claim_next = service._index.claim_next

    def claim_at_last(*arguments: Any) -> Any:
        asked.set()
        assert answers.wait(WAIT_S)
        return claim_next(*arguments)

    class Receivers:
        def terminate(self) -> None:
            answers.set()

        def join(self, _timeout_s: float) -> None: ...

    monkeypatch.setattr(service._index, "claim_next", claim_at_last)
    service._receivers = cast(Any, Receivers())
    add_instance(index, 1)
    assert index.queue(the_case(index))
    dispatching = threading.Thread(target=service._dispatch)
    dispatching.start()
    assert asked.wait(WAIT_S)
    stopping = threading.Thread(target=service.stop)
    stopping.start()
    is_told = answers.wait(WAIT_S)
    answers.set()
    for thread in (dispatching, stopping):
        thread.join()
    assert is_told
    assert (the_case(index).state, the_case(index).attempts) == (CaseState.QUEUED, 0)


def test_a_node_stops_in_order_though_its_database_is_away(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(make_config())

    def away() -> None:
        raise OperationalError("UPDATE cases", {}, Exception("the server closed the connection"))

    monkeypatch.setattr(service._index, "put_back", away)
    service.stop()
    assert "action=not-put-back: unexpected OperationalError at " in caplog.text
    Service(make_config()).stop()  # the data folder is free again


def test_a_node_whose_database_another_one_took_ends_with_the_reason_and_leaves_the_cases_alone(
    make_config: Callable[..., Config], index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(make_config())
    service._pool = cast(Any, _Workers())
    service._hold_database()
    service.check_taken()
    add_instance(index, 1)
    assert index.queue(the_case(index))
    service._dispatch()
    monkeypatch.setattr(service._index, "hold", lambda _patience_s: False)
    service._hold_database()
    with pytest.raises(TakenError, match="another node has taken this database"):
        service.check_taken()
    service.stop()
    assert the_case(index).state is CaseState.ANALYSING  # the other's, now


def test_a_node_that_is_stopped_while_its_model_is_loaded_does_not_wait_for_that(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine that takes a minute, after which a service manager would kill it."""
    stopping = threading.Event()

    def load(_: Any, stopping_pool: threading.Event) -> None:
        stopping.set()  # as by SIGTERM
        stopping_pool.wait()

    monkeypatch.setattr("node.workers._Worker.load", load)
    started: list[bool] = []
    config = make_config()
    serving = threading.Thread(
        target=service_module.serve, args=(config, stopping, lambda: started.append(True)), daemon=True
    )
    serving.start()
    serving.join(WAIT_S)
    assert not serving.is_alive()
    assert not started


@pytest.mark.parametrize("with_web", [True, False])
def test_there_is_a_thread_for_each_job(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, with_web: bool
) -> None:
    """Else one that hangs may hold up another one."""
    for name in ("Receivers", "WebProcess", "WorkerPool"):
        made = MagicMock()
        made.return_value.wait_until_loaded.return_value = ""
        monkeypatch.setattr(service_module, name, made)
    web = WebConfig(enabled=with_web)
    service = Service(make_config().model_copy(update={"web": web}))
    try:
        monkeypatch.setattr(service._scheduler, "start", lambda: None)
        service.start(threading.Event())
        jobs, executor = service._scheduler._pending_jobs, service._scheduler._executors["default"]
        assert executor._pool._max_workers == len(jobs) > 0
    finally:
        service.stop()


def test_a_job_whose_time_passed_while_the_machine_slept_or_was_busy_runs_then(service: Service) -> None:
    """Not an hour later, as retention would."""
    ran = threading.Event()
    late = datetime.now() - timedelta(seconds=10)
    service._scheduler.add_job(ran.set, "interval", hours=1, next_run_time=late)
    service._scheduler.start()
    assert ran.wait(20)


class _Clock(datetime):
    """A clock that may be set back."""

    set_back = timedelta()

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) - cls.set_back


def test_jobs_go_on_when_the_clock_is_set_back(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a machine that starts with the local time in its clock and is then put right."""
    ticked = threading.Semaphore(0)
    for module in (executors, schedulers, service_module):
        monkeypatch.setattr(module, "datetime", _Clock)
    service._every_tick(ticked.release)
    service._scheduler.add_job(lambda: None, "interval", hours=1, jitter=300)
    service._scheduler.start()
    assert ticked.acquire(timeout=60)
    service.heed_clock()
    assert "clock-set-back" not in caplog.text
    monkeypatch.setattr(_Clock, "set_back", timedelta(hours=2))
    while ticked.acquire(timeout=1):  # what was due before
        pass
    service.heed_clock()
    for _ in range(3):
        assert ticked.acquire(timeout=60)
    assert "action=clock-set-back by_s=7" in caplog.text
    monkeypatch.setattr(_Clock, "set_back", timedelta())


def test_a_full_disk_costs_a_case_no_attempt_and_is_waited_for(
    service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    workers: Any = _Workers()
    service._pool = workers
    add_instance(service._index, 1)
    assert service._index.queue(the_case(service._index))
    for _ in range(5):  # more than it has attempts
        service._dispatch()
        workers.ends[-1].set_result(Broken(reason="No space left on device", is_disk_full=True))
        case = the_case(service._index)
        assert (case.state, case.attempts) == (CaseState.QUEUED, 0)
        assert "the disk is full" in case.reason
        num_jobs = len(workers.jobs)
        service._dispatch()
        assert len(workers.jobs) == num_jobs
        monkeypatch.setattr(service, "_no_room_until", 0.0)
    assert "action=disk-full" in caplog.text


def test_a_worker_is_told_that_the_sender_broke_off(service: Service) -> None:
    workers: Any = _Workers()
    service._pool = workers
    add_instance(service._index, 1)
    index = service._index
    with index._writing() as connection:
        (association_id,) = connection.scalars(select(tables.associations.c.association_id)).all()
    index.end_association(association_id, released=False)
    assert index.queue(the_case(index))
    service._dispatch()
    assert workers.jobs[0].is_interrupted
