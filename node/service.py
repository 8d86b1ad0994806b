"""The node as a whole: what runs, and the one line a Series takes through it.

    receive -> complete -> analyse -> encode -> deliver

Receivers are processes (`receive/`); completeness and delivery are jobs of APScheduler here; analysis and encoding
happen in worker processes (`workers.py`). They meet in the database (`index/`) only, so any of them may die and be
started again. This module is the composition root: read it first.
"""

import fcntl
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from apscheduler.events import EVENT_JOB_ERROR, EVENT_JOB_EXECUTED
from apscheduler.schedulers.background import BackgroundScheduler
from sqlalchemy.exc import SQLAlchemyError

from node.broken_jobs import BrokenJobs
from node.case import Case
from node.commitment import report_due
from node.complete import Sources, check_cases, was_interrupted
from node.config import Config
from node.deliver import deliver_due
from node.index import DatabaseError, Index
from node.notify.clock import notify_due
from node.priority import rank
from node.process import describe_error
from node.profiles import Kind
from node.receive import ReceiverError, Receivers
from node.reminder import Reminder
from node.remove import remove_strays, remove_superseded
from node.retention import finish_interrupted, relieve_disk, run_retention
from node.web.supervisor import WebError, WebProcess
from node.workers import Analysed, Job, JobOutcome, NotAnalysable, WorkerPool

if TYPE_CHECKING:
    from node.watch import Watches

log = logging.getLogger(__name__)

_TICK_S = 0.25  # the longest a finished step waits for the next one
_UNHELD_S = 30.0
_HOLD_S = 5.0
_TAKE_S = 5.0  # for the database server to find out that the last node was killed
_RELIEVE_S = 30.0
_REMIND_OF_DISK_S = 3600.0
_NO_ROOM_WAIT_S = 60.0  # until analyses are tried again that found the disk full
_FIRST_RETENTION_S = 60.0
_RETENTION_JITTER_S = 300  # several nodes on one disk do not all start at the hour
_NOTIFY_S = 2.0
_CLOCK_S = 5.0  # how soon it is seen that the clock was set back


class StartError(Exception):
    """The node cannot start; the message says why."""


class TakenError(Exception):
    """Another node has taken the database while this one runs."""


class Service:
    """The running node. `start`, then `stop`; in between it needs no attention.

    Raises:
        StartError: the data folder cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        try:
            self._data_lock = _lock(config.data_dir)
            self._index = Index(config.data_dir, config.database)
        except OSError as error:
            raise StartError(f"the data folder {config.data_dir} cannot be used: {error.strerror}") from error
        except DatabaseError as error:
            raise StartError(str(error)) from error
        if not self._index.take(_TAKE_S):
            raise StartError("another node uses this database; give each node a database of its own")
        self._pool: WorkerPool | None = None
        self._receivers: Receivers | None = None
        self._web: WebProcess | None = None
        self._watches: Watches | None = None
        # A thread for each job: a destination that hangs for its whole timeout holds up nothing else.
        num_threads = 8 + config.web.enabled
        for each in (config.complete.sources, config.deliver.destinations, config.notify.targets, config.sources.each):
            num_threads += len(each)
        self._scheduler = BackgroundScheduler(
            executors={"default": {"type": "threadpool", "max_workers": num_threads}},
            # A job that is late runs all the same: off the shelf, one that is 1 s late waits for its next time.
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        broken = BrokenJobs(self._index.where, self._name_job)
        self._scheduler.add_listener(broken.on_error, EVENT_JOB_ERROR)
        self._scheduler.add_listener(broken.on_executed, EVENT_JOB_EXECUTED)
        # Ids of the cases that workers have; twice that of one that grew, and went to another before the first ended.
        self._held: list[int] = []
        self._no_room_until = 0.0  # monotonic, s
        self._is_stopping = False
        self._is_taken = False  # the database, by another node
        self._lock = threading.Lock()

    def start(self, stopping: threading.Event) -> None:
        """Starts receiver, workers and clock; no more of them once `stopping` is set.

        Raises:
            StartError: the port cannot be listened on, or the model cannot be loaded.
        """
        index, config = self._index, self._config
        self._end_unheld()
        remove_strays(index)
        index.drop_destinations_except([destination.name for destination in config.deliver.destinations])
        index.drop_targets_except([target.name for target in config.notify.targets])
        finish_interrupted(index)  # before the receiver looks for files that nobody knows
        try:
            self._receivers = Receivers(config, index)
            self._receivers.start()
        except ReceiverError as error:
            raise StartError(str(error)) from error
        if config.web.enabled:
            self._start_web()
        self._pool = WorkerPool(config)
        if problem := self._pool.wait_until_loaded(stopping):
            raise StartError(problem.removesuffix("."))
        if stopping.is_set():
            return
        sources = Sources(index, config)
        self._every_tick(check_cases, index, config, sources)
        self._every_tick(report_due, index, config)
        for source in config.complete.sources:
            self._every_tick(sources.answer_questions, source)
        self._every_tick(self._dispatch)
        self._every_tick(self._receivers.watch)
        self._scheduler.add_job(self._end_unheld, "interval", seconds=_UNHELD_S)
        self._scheduler.add_job(self._hold_database, "interval", seconds=_HOLD_S)
        for destination in config.deliver.destinations:
            self._every_tick(deliver_due, index, config, destination)
        for target in config.notify.targets:
            self._scheduler.add_job(notify_due, "interval", (index, target), seconds=_NOTIFY_S)
        reminder = Reminder(_REMIND_OF_DISK_S)
        self._scheduler.add_job(relieve_disk, "interval", (index, config, reminder), seconds=_RELIEVE_S)
        soon = datetime.now() + timedelta(seconds=_FIRST_RETENTION_S)  # a node that is restarted daily purges too
        self._scheduler.add_job(
            run_retention,
            "interval",
            (index, config, reminder),
            hours=1,
            jitter=_RETENTION_JITTER_S,
            next_run_time=soon,
        )
        if config.sources.each:
            self._start_watching()
        self._scheduler.start()
        log.info("action=started listening=%s:%d", config.receive.host, config.receive.port)

    def heed_clock(self) -> None:
        """Has the jobs go on when the clock was set back: APScheduler lets them rest until it is as late again."""
        set_back = timedelta()
        for job in self._scheduler.get_jobs():
            now = datetime.now(job.next_run_time.tzinfo)
            longest = job.trigger.interval + timedelta(seconds=job.trigger.jitter or 0)
            if (too_late := job.next_run_time - now - longest) > timedelta():
                job.modify(next_run_time=now)
                set_back = max(set_back, too_late)
        if set_back:
            log.warning("action=clock-set-back by_s=%.0f: the jobs go on", set_back.total_seconds())

    def check_taken(self) -> None:
        """Returns while the database is this node's.

        Raises:
            TakenError: it is another's now.
        """
        if self._is_taken:
            raise TakenError(
                "another node has taken this database while its server was away; give each node a database of its own"
            )

    def stop(self) -> None:
        """Stops within 10 s; what a worker held is queued again."""
        log.info("action=stopping")
        self._is_stopping = True  # a job that runs just now may go on until the process ends
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
        for process in (self._receivers, self._web):
            if process is not None:
                process.terminate()
        if self._watches is not None:
            self._watches.stop()
        if self._pool is not None:
            self._pool.stop()
        for process in (self._receivers, self._web):
            if process is not None:
                process.join(4)
        if not self._is_taken:
            self._put_back()
        self._index.close()
        self._data_lock.close()
        log.info("action=stopped")

    def _put_back(self) -> None:
        """Queues again what a worker held, also what `_dispatch` has claimed just now."""
        with self._lock:
            pass  # a claim under way is noted, and none begins any more
        try:
            self._index.put_back()
        except (OSError, SQLAlchemyError) as error:
            log.error(
                "action=not-put-back: %s. What was analysed is queued again at the next start, one attempt older",
                describe_error(error),
            )

    def _start_web(self) -> None:
        self._web = WebProcess(self._config, self._index)
        try:
            self._web.start()
        except WebError as error:
            raise StartError(str(error)) from error
        self._every_tick(self._web.watch)

    def _start_watching(self) -> None:
        from node.watch import Watches

        try:
            self._watches = Watches(self._config, self._index)
        except ModuleNotFoundError as error:
            raise StartError(
                f"sources.orthanc needs {error.name}, which is not installed: pip install 'cspine-node[orthanc]'"
            ) from error
        for watch in self._watches.each:
            poll_s = watch.poll_s
            self._scheduler.add_job(
                watch.look, "interval", seconds=poll_s, jitter=poll_s / 4, next_run_time=datetime.now()
            )

    def _every_tick(self, function: Callable[..., None], *args: object) -> None:
        self._scheduler.add_job(function, "interval", args, seconds=_TICK_S)

    def _hold_database(self) -> None:
        """Sees to it that no other node takes the database: PostgreSQL forgets whose it is when it is restarted."""
        if not self._is_taken and not self._index.hold(_TAKE_S):
            self._is_taken = True
            log.critical("action=database-taken: another node has taken this database; this one stops")

    def _name_job(self, job_id: str) -> str:
        """The function that a job calls."""
        job = self._scheduler.get_job(job_id)
        return job.name if job else job_id

    def _end_unheld(self) -> None:
        """Ends attempts that no worker is at: an earlier run's that was killed, or one whose end was not noted.

        They count: a case that takes the whole node with it is not tried for ever.
        """
        max_attempts = self._config.analyse.max_attempts
        with self._lock:
            if self._is_stopping:
                return  # what a worker held goes back into the queue, and counts not
            lost = self._index.end_lost_attempts(self._held, "the node ended while it was analysed", max_attempts)
        for case in lost:
            log.warning(
                "action=attempt-lost case=%d series=%s attempt=%d of %d: the node ended while it was analysed",
                case.case_id,
                case.series_instance_uid,
                case.attempts,
                max_attempts,
            )

    def _dispatch(self) -> None:
        """Gives queued cases to workers that are free."""
        assert self._pool is not None
        if time.monotonic() < self._no_room_until:
            return
        while len(self._held) < self._config.analyse.workers:
            with self._lock:
                if self._is_stopping:
                    return
                case = self._index.claim_next(partial(rank, config=self._config.priority, now=time.time()))
                if case is None:
                    return
                self._held.append(case.case_id)
            try:
                files = self._index.instance_files(case.series_instance_uid)
                is_interrupted = was_interrupted(self._index.carriers(case.series_instance_uid))
            except BaseException:
                self._let_go(case)  # or its worker would count as busy for ever
                raise
            log.info(
                "action=analysing case=%d series=%s attempt=%d", case.case_id, case.series_instance_uid, case.attempts
            )
            job = Job(
                previous_dir=case.result_dir,
                num_at_source=case.num_at_source,
                is_interrupted=is_interrupted,
                files=files,
                results_dir=self._config.data_dir / "cases" / case.series_instance_uid,
            )
            self._pool.submit(job).add_done_callback(partial(self._on_analysed, case))

    def _on_analysed(self, case: Case, future: "Future[JobOutcome]") -> None:
        try:
            if not future.cancelled():
                self._settle(case, future.result())
                remove_superseded(self._index, case.series_instance_uid)
        finally:
            self._let_go(case)

    def _let_go(self, case: Case) -> None:
        with self._lock:
            self._held.remove(case.case_id)

    def _settle(self, case: Case, outcome: JobOutcome) -> None:
        """Notes how an analysis ended."""
        where = f"case={case.case_id} series={case.series_instance_uid}"
        if isinstance(outcome, Analysed):
            finished = self._index.finish(
                case,
                outcome.folder,
                summary=outcome.summary,
                sop_instance_uids=outcome.sop_instance_uids,
                destinations=[destination.name for destination in self._config.deliver.destinations],
            )
            if finished:
                log.info("action=analysed %s total_s=%.2f: %s", where, outcome.total_s, outcome.summary)
            else:
                log.info("action=superseded %s: more Instances came while it was analysed", where)
        elif isinstance(outcome, NotAnalysable):
            self._refuse(case, outcome)
            log.warning("action=refused %s: %s", where, outcome.reason)
        elif outcome.is_disk_full:
            self._index.put_off(case, "the disk is full: the case waits for room")
            self._no_room_until = time.monotonic() + _NO_ROOM_WAIT_S
            log.error("action=disk-full %s: free some room at %s; it is tried again", where, self._config.data_dir)
        else:
            state = self._index.fail_attempt(case, outcome.reason, self._config.analyse.max_attempts)
            log.error("action=attempt-failed %s attempt=%d state=%s: %s", where, case.attempts, state, outcome.reason)

    def _refuse(self, case: Case, outcome: NotAnalysable) -> None:
        """Notes why a Series was not analysed, and has the reports that say so delivered to those who get reports."""
        if outcome.folder is None:
            self._index.refuse(case, outcome.reason)
            return
        destinations = self._config.deliver.destinations
        self._index.finish(
            case,
            outcome.folder,
            summary="Not analysed",
            sop_instance_uids=outcome.sop_instance_uids,
            destinations=[item.name for item in destinations if Kind.REPORT_SR in item.profile.objects],
            refusal=outcome.reason,
        )


def _lock(data_dir: Path) -> BinaryIO:
    """Takes the data folder for this process, until the file is closed or the process ends, however it does.

    A second node there would put back what the first is analysing, and remove the files it is just receiving.

    Raises:
        StartError: another node has it.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    file = (data_dir / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise StartError(f"another node uses {data_dir}; stop it, or give this one a data_dir of its own") from error
    return file


def is_running(data_dir: Path) -> bool:
    """Whether a node has the data folder at this moment."""
    try:
        with (data_dir / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none was ever started here
        return False
    return False


def serve(config: Config, stopping: threading.Event, on_started: Callable[[], None]) -> None:
    """Runs the node until `stopping` is set.

    Raises:
        StartError: it cannot start.
        TakenError: it cannot go on.
    """
    service = Service(config)
    try:
        service.start(stopping)
        if not stopping.is_set():
            on_started()
        while not stopping.wait(_CLOCK_S):
            service.heed_clock()
            service.check_taken()
    finally:
        service.stop()
