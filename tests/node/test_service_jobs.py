"""What the jobs of the service do when something fails around them; nothing listens here, and no worker runs."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from node.case import CaseState
from node.config import Config
from node.service import Service
from node.workers import Job, JobOutcome
from tests.node.handed_over import SERIES, add_instance, the_case


class _Workers:
    """Takes jobs and never ends one."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> "Future[JobOutcome]":
        self.jobs.append(job)
        return Future()

    def stop(self) -> None:
        pass


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
