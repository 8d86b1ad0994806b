"""The worker processes that run analyses, behind one small interface: `submit(job) -> Future[JobOutcome]`.

Nothing outside this module knows that there are processes; a cluster could stand here. Each slot is a thread that owns
one process, gives it a job, waits, and replaces it when it died or a step took too long. A worker loads the model once.
"""

import contextlib
import errno
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from node.config import Config
from node.process import be_child, describe_error
from node.reminder import Reminder

if TYPE_CHECKING:
    from model import DecodePool
    from model.pipeline import Pipeline

log = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0
_START_AGAIN_S, _SAY_AGAIN_S = 5.0, 300.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One Series to analyse: its files by SOPInstanceUID, and the folder under which its result folder goes.

    previous_dir: the folder of earlier results, which those of this job supersede; None if there are none.
    num_at_source: Instances that the source of the Series holds; None if it did not say. is_interrupted: its sender
    broke off, or had Instances refused, and did not send it again.
    """

    files: Mapping[str, Path]
    results_dir: Path
    previous_dir: Path | None = None
    num_at_source: int | None = None
    is_interrupted: bool = False


@dataclass(frozen=True, kw_only=True)
class Analysed:
    """The results are on disk."""

    folder: Path
    sop_instance_uids: tuple[str, ...]
    summary: str
    total_s: float


@dataclass(frozen=True, kw_only=True)
class NotAnalysable:
    """This Series cannot be analysed; another attempt would end the same.

    folder: holds the reports that say so; None if none are to be made.
    """

    reason: str
    folder: Path | None = None
    sop_instance_uids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Broken:
    """The attempt failed; another one may succeed. is_disk_full: it failed for that alone, and does not count."""

    reason: str
    is_disk_full: bool = False


JobOutcome = Analysed | NotAnalysable | Broken


@dataclass(frozen=True)
class _Stage:
    """A worker begins a step of its job."""

    name: str


@dataclass(frozen=True)
class _Ready:
    """A worker has loaded the model."""


@dataclass(frozen=True)
class _CannotLoad:
    """A worker cannot load the model, and ends."""

    reason: str


@dataclass(frozen=True)
class _Taken:
    """A worker has received its job."""


_Answer = JobOutcome | _Ready | _CannotLoad | _Taken


class WorkerPool:
    """A fixed number of worker processes.

    A Future that it returns never raises; it is cancelled when the pool stops before the job has ended.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._jobs: queue.SimpleQueue[tuple[Job, Future[JobOutcome]] | None] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[_Answer | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._reminder = Reminder(_SAY_AGAIN_S)
        self._slots = [
            threading.Thread(target=self._run_slot, name=f"worker-slot-{number}", daemon=True)
            for number in range(config.analyse.workers)
        ]
        for slot in self._slots:
            slot.start()

    def wait_until_loaded(self, stopping: threading.Event) -> str:
        """Waits until every worker has tried to load the model; what is wrong with it, "" if nothing is.

        A worker that only died is not the model's fault, and is replaced when it is needed. stopping: once it is set,
        nobody waits any more; on a busy machine, a model may take longer than a service manager has patience.
        """
        answers: list[_Answer | None] = []
        while len(answers) < len(self._slots) and not stopping.is_set():
            with contextlib.suppress(queue.Empty):
                answers.append(self._loaded.get(timeout=0.2))
        return next((answer.reason for answer in answers if isinstance(answer, _CannotLoad)), "")

    def submit(self, job: Job) -> "Future[JobOutcome]":
        """Queues a job for the next free worker."""
        future: Future[JobOutcome] = Future()
        self._jobs.put((job, future))
        return future

    def stop(self) -> None:
        """Ends the workers at once; what they held and what waited is cancelled."""
        self._stopping.set()
        for _ in self._slots:
            self._jobs.put(None)
        for slot in self._slots:
            slot.join()
        while not self._jobs.empty():
            item = self._jobs.get()
            if item is not None:
                item[1].cancel()

    def _run_slot(self) -> None:
        worker = _Worker(self._config)
        self._loaded.put(worker.load(self._stopping))
        while (item := self._jobs.get()) is not None:
            job, future = item
            outcome = worker.run(job, self._stopping)
            if isinstance(outcome, Broken) and not worker.has_taken_job:  # it died while it had nothing to do
                worker = self._replace(worker)
                outcome = worker.run(job, self._stopping)
            if outcome is None:
                future.cancel()
                break
            if not worker.is_usable():
                worker = self._replace(worker)
            future.set_result(outcome)
            # Every job would break at once: what is short for a minute would take all attempts of all that is queued.
            while worker.not_started and not self._stopping.is_set():
                if self._reminder.is_due(worker.not_started):
                    log.error(
                        "action=worker-not-started: %s; nothing is analysed here until it can", worker.not_started
                    )
                self._stopping.wait(_START_AGAIN_S)
                worker = self._replace(worker)
        worker.kill()

    def _replace(self, worker: "_Worker") -> "_Worker":
        worker.kill()
        return _Worker(self._config)


class _Worker:
    """One process, as seen from its slot.

    not_started: why there is no process, "" if there is one. has_taken_job: its last job has reached it.
    """

    def __init__(self, config: Config) -> None:
        context = multiprocessing.get_context("spawn")
        self._timeouts_s = {"start": _START_TIMEOUT_S} | config.analyse.timeouts_s.model_dump()
        self.has_taken_job = False
        self._ready = False
        self._usable = True
        self.not_started = ""
        try:
            self._connection, far_end = context.Pipe()
            with far_end:
                self._process = context.Process(target=_work, args=(config, far_end), name="cspine-worker")
                self._process.start()
        except OSError as error:  # no memory, or too many processes or files
            self.not_started = f"cannot start a worker process: {error.strerror}"

    def is_usable(self) -> bool:
        return self._usable and not self.not_started and self._process.is_alive()

    def kill(self) -> None:
        if not self.not_started:
            self._process.kill()
            self._process.join()
            self._connection.close()

    def load(self, stopping: threading.Event) -> "_Answer | None":
        """Waits until the model is loaded; how that ended, None if the pool stopped first."""
        answer = self._receive("start", stopping)
        self._ready = self._usable = isinstance(answer, _Ready)
        return answer

    def run(self, job: Job, stopping: threading.Event) -> JobOutcome | None:
        """How the job ended; None if the pool stopped first."""
        self.has_taken_job = False
        answer: _Answer | None = _Ready() if self._ready else self.load(stopping)
        if isinstance(answer, _Ready):
            with contextlib.suppress(OSError):  # it is dead, and what follows says how it died
                self._connection.send(job)
            answer = self._receive("read", stopping)
        if isinstance(answer, _Taken):
            self.has_taken_job = True
            answer = self._receive("read", stopping)
        if isinstance(answer, _CannotLoad):
            return Broken(reason=answer.reason)
        assert not isinstance(answer, _Ready | _Taken)
        return answer

    def _receive(self, stage: str, stopping: threading.Event) -> "_Answer | None":
        """What the worker answers; Broken, and no longer usable, if it dies or a step takes too long."""
        if self.not_started and not stopping.is_set():
            return Broken(reason=self.not_started)
        deadline = time.monotonic() + self._timeouts_s[stage]
        while not stopping.is_set():
            try:
                if wait([self._connection], timeout=0.2):
                    answer: _Answer | _Stage = self._connection.recv()
                    if not isinstance(answer, _Stage):
                        return answer
                    stage = answer.name
                    deadline = time.monotonic() + self._timeouts_s[stage]
            except (EOFError, OSError):
                self._usable = False
                self._process.join(5)
                how = _exit_words(self._process.exitcode)
                return Broken(reason=f"the worker process died in step {stage!r} ({how})")
            if time.monotonic() > deadline:
                self._usable = False
                limit_s = self._timeouts_s[stage]
                return Broken(reason=f"step {stage!r} did not end within {limit_s:g} s; its worker was stopped")
        return None


def _exit_words(code: int | None) -> str:
    if code is None:
        return "it closed its connection"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _work(config: Config, connection: Connection) -> None:
    """The worker process: loads the model, says so, then answers one job after the other."""
    be_child(config.log_level)
    from model import BundleError, DecodePool, load_pipeline

    try:
        pipeline = load_pipeline(config.analyse.bundle, config.analyse.device, config.analyse.threads)
    except (BundleError, ValueError) as error:  # ValueError: there is no such device
        connection.send(_CannotLoad(str(error)))
        return
    decode_pool = DecodePool(config.analyse.threads, be_child, (config.log_level,))
    connection.send(_Ready())
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(_Taken())
        try:
            outcome = _do(job, config, pipeline, decode_pool, lambda stage: connection.send(_Stage(stage)))
        except Exception as error:
            log.debug("action=analysis-broke", exc_info=True)  # its message may quote a patient's data
            outcome = _broken(error)
        connection.send(outcome)


def _broken(error: Exception) -> Broken:
    is_disk_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Broken(reason=describe_error(error), is_disk_full=is_disk_full)


def _do(
    job: Job, config: Config, pipeline: "Pipeline", decode_pool: "DecodePool", on_stage: Callable[[str], None]
) -> JobOutcome:
    """Analyses a Series; if it cannot be, leaves the reports that say so, where they are wanted."""
    from model import SeriesError
    from node.analyse import analyse_series, report_refusal, result_folder_name
    from node.complete import series_rules
    from node.encode import NodeIdentity, conclude

    node, profiles = NodeIdentity(ae_title=config.receive.ae_title), config.deliver.profiles
    uids, paths = list(job.files), list(job.files.values())
    try:
        results = analyse_series(
            paths,
            job.results_dir / result_folder_name(uids, pipeline.info),
            pipeline,
            series_rules(config.complete),
            node,
            profiles=profiles,
            decode_pool=decode_pool,
            on_stage=on_stage,
            previous_dir=job.previous_dir,
            num_at_source=job.num_at_source,
            is_interrupted=job.is_interrupted,
        )
    except SeriesError as error:
        reason = str(error)
        if not config.deliver.report_not_analysed:
            return NotAnalysable(reason=reason)
        folder = job.results_dir / result_folder_name(uids, pipeline.info, reason)
        objects = report_refusal(paths, folder, reason, pipeline.info, node, profiles, job.previous_dir)
        return NotAnalysable(
            reason=reason, folder=folder, sop_instance_uids=tuple(made.sop_instance_uid for made in objects)
        )
    return Analysed(
        folder=results.folder,
        sop_instance_uids=tuple(made.sop_instance_uid for made in results.objects),
        summary=" ".join(filter(None, (conclude(results.findings), results.incomplete))),
        total_s=results.findings.timings_s["total"],
    )
