"""The worker pool with real processes that are killed, hang, die at start and are stopped.

What runs in them here is not the model but `play`, which does as the name of the first file tells it. The workers
import this module, so it imports little.
"""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest

from node import workers
from node.config import Config
from node.process import be_child, describe_error
from node.workers import Analysed, Broken, Job, JobOutcome, NotAnalysable, WorkerPool
from tests.waiting import WAIT_S, wait_until

MakeConfig = Callable[..., Config]
MakePool = Callable[..., WorkerPool]


def play(config: Config, connection: Connection) -> None:
    """Stands in for `workers._work` in the worker process."""
    be_child(config.log_level)
    if config.analyse.device == "cuda:99":
        os._exit(7)
    connection.send(workers._Ready())
    while True:
        job: Job = connection.recv()
        if "before it took" in next(iter(job.files.values())).name and die_once(job.results_dir):
            os.kill(os.getpid(), signal.SIGKILL)
        connection.send(workers._Taken())
        match next(iter(job.files.values())).name:
            case "hang":
                (job.results_dir / "begun").touch()
                time.sleep(600)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "hang in classify":
                for stage in ("read", "segment", "classify"):
                    connection.send(workers._Stage(stage))
                    (job.results_dir / stage).touch()
                    wait_until((job.results_dir / f"{stage} is over").exists)
            case "slow":
                time.sleep(1)
            case "meet":
                meet(job.results_dir)
        summary = f"{os.getpid()}"
        connection.send(Analysed(folder=job.results_dir, sop_instance_uids=(), summary=summary, total_s=0.0))


def no_memory(*_: object) -> None:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def die_once(folder: Path) -> bool:
    """Whether no other process has asked this of this folder."""
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def meet(folder: Path) -> None:
    """Waits until another process has come here."""
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) == 2)


def make_job(paths: list[Path], results_dir: Path) -> Job:
    from pydicom import dcmread

    files = {str(dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in paths}
    return Job(files=files, results_dir=results_dir)


def job(what: str, results_dir: Path = Path("results")) -> Job:
    return Job(files={"1.2": Path(what)}, results_dir=results_dir)


def hang(pool: WorkerPool, folder: Path) -> "Future[JobOutcome]":
    """Submits a job that does not end, and waits until it has begun."""
    future = pool.submit(job("hang", folder))
    wait_until((folder / "begun").exists)
    return future


@pytest.fixture
def make_pool(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePool]:
    """Makes pools whose workers run `play`; keyword arguments are settings of the section `analyse`."""
    monkeypatch.setattr(workers, "_work", play)
    pools = []

    def make(**analyse: object) -> WorkerPool:
        pools.append(WorkerPool(make_config(analyse=analyse)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


def worker_pids() -> list[int]:
    """Processes of this one that are workers; the resource tracker of multiprocessing is none."""
    return [child.pid for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def outcome_of(future: "Future[JobOutcome]") -> JobOutcome:
    return future.result(WAIT_S)


def pid_of(outcome: JobOutcome) -> int:
    assert isinstance(outcome, Analysed)
    return int(outcome.summary)


def test_one_worker_does_one_job_after_the_other(make_pool: MakePool) -> None:
    pool = make_pool()
    futures = [pool.submit(job("ok")) for _ in range(3)]
    assert len({pid_of(outcome_of(future)) for future in futures}) == 1


def test_two_workers_work_at_the_same_time(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(workers=2)
    (tmp_path / "meet").mkdir()
    futures = [pool.submit(job("meet", tmp_path / "meet")) for _ in range(2)]
    assert len({pid_of(outcome_of(future)) for future in futures}) == 2


def test_a_worker_killed_in_the_middle_breaks_its_job_and_the_next_one_works(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool()
    first = pid_of(outcome_of(pool.submit(job("ok"))))
    hanging = hang(pool, tmp_path)
    os.kill(first, signal.SIGKILL)
    assert outcome_of(hanging) == Broken(reason="the worker process died in step 'read' (signal SIGKILL)")
    assert pid_of(outcome_of(pool.submit(job("ok")))) != first


@pytest.mark.parametrize(("what", "words"), [("die", "signal SIGKILL"), ("exit", "exit status 3")])
def test_a_worker_that_dies_of_its_job_says_how(make_pool: MakePool, what: str, words: str) -> None:
    pool = make_pool()
    assert outcome_of(pool.submit(job(what))) == Broken(reason=f"the worker process died in step 'read' ({words})")
    assert isinstance(outcome_of(pool.submit(job("ok"))), Analysed)


def test_a_worker_that_died_while_idle_costs_no_job(make_pool: MakePool) -> None:
    """Say, the system took it for its memory; no case should lose an attempt for that."""
    pool = make_pool()
    first = pid_of(outcome_of(pool.submit(job("ok"))))
    os.kill(first, signal.SIGKILL)
    assert pid_of(outcome_of(pool.submit(job("ok")))) != first


def test_a_worker_that_dies_before_it_took_its_job_costs_no_job(make_pool: MakePool, tmp_path: Path) -> None:
    """As one does that was killed a moment ago and does not look dead yet."""
    pool = make_pool()
    first = pid_of(outcome_of(pool.submit(job("ok"))))
    assert pid_of(outcome_of(pool.submit(job("die before it took it", tmp_path)))) != first


@pytest.mark.parametrize("short_of", ["popen_spawn_posix.Popen", "connection.Pipe"])
def test_workers_that_cannot_be_started_break_the_job_and_the_next_ones_work(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, short_of: str
) -> None:
    """Memory, descriptors or processes are short for a while: no job waits forever for a slot that is gone."""
    monkeypatch.setattr(workers, "_START_AGAIN_S", 0.1)
    pool = make_pool()
    first = pid_of(outcome_of(pool.submit(job("ok"))))
    with monkeypatch.context() as short:
        tries = Mock(side_effect=no_memory)
        short.setattr(f"multiprocessing.{short_of}", tries)
        os.kill(first, signal.SIGKILL)
        reason = "cannot start a worker process: Cannot allocate memory"
        assert outcome_of(pool.submit(job("ok"))) == Broken(reason=reason)
        queued = pool.submit(job("ok"))  # no other case loses an attempt
        wait_until(lambda: tries.call_count >= 5)
        assert not queued.done()
    assert caplog.text.count(f"action=worker-not-started: {reason}") == 1  # though it tried again and again
    assert isinstance(outcome_of(queued), Analysed)
    with monkeypatch.context() as short:
        short.setattr(f"multiprocessing.{short_of}", no_memory)
        os.kill(pid_of(outcome_of(queued)), signal.SIGKILL)
        outcome_of(pool.submit(job("ok")))
        queued = pool.submit(job("ok"))
        pool.stop()
        assert queued.cancelled()


class Clock:
    """What time it is for the one slot of a pool: it stands still until moved."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._num_looks = 0

    def monotonic(self) -> float:
        self._num_looks += 1
        return self.now_s

    def wait_until_seen(self) -> None:
        """Returns when the slot has taken what its worker said before, and has seen what time it is."""
        seen = self._num_looks + 3  # one look after a wait that may have ended before, two after what was said
        wait_until(lambda: self._num_looks >= seen)


@pytest.mark.parametrize("step", ["read", "classify"])
def test_a_worker_whose_step_takes_too_long_is_stopped_and_replaced(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Each step has its own time: the first two take longer together than either may."""
    clock = Clock()
    monkeypatch.setattr(workers, "time", clock)
    pool = make_pool(timeouts_s={"read": 2.5, "segment": 2.5, "classify": 2.5})
    first = pid_of(outcome_of(pool.submit(job("ok"))))
    future = pool.submit(job("hang in classify", tmp_path))
    for name in ("read", "segment") if step == "classify" else ():
        wait_until((tmp_path / name).exists)
        clock.wait_until_seen()
        clock.now_s += 2.0
        clock.wait_until_seen()
        (tmp_path / f"{name} is over").touch()
    wait_until((tmp_path / step).exists)
    clock.wait_until_seen()
    assert not future.done()
    clock.now_s += 3.0
    assert outcome_of(future) == Broken(reason=f"step {step!r} did not end within 2.5 s; its worker was stopped")
    assert not psutil.pid_exists(first)
    assert isinstance(outcome_of(pool.submit(job("ok"))), Analysed)


def test_a_worker_that_dies_at_start_breaks_the_job(make_pool: MakePool) -> None:
    outcome = outcome_of(make_pool(device="cuda:99").submit(job("ok")))
    assert outcome == Broken(reason="the worker process died in step 'start' (exit status 7)")


def test_stop_ends_the_workers_at_once_and_cancels_what_they_held_and_what_waited(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool()
    outcome_of(pool.submit(job("ok")))
    held, waiting = hang(pool, tmp_path), pool.submit(job("ok"))
    pool.stop()
    assert held.cancelled()
    assert waiting.cancelled()
    assert worker_pids() == []


def test_stop_right_after_start_leaves_no_process(make_pool: MakePool) -> None:
    make_pool(workers=2).stop()
    assert worker_pids() == []


def test_a_callback_may_submit_the_next_job(make_pool: MakePool) -> None:
    """So does the service; it runs in the slot's thread."""
    pool, done = make_pool(), threading.Event()
    pool.submit(job("ok")).add_done_callback(lambda _: pool.submit(job("ok")).add_done_callback(lambda _: done.set()))
    assert done.wait(WAIT_S)


def test_sigterm_to_the_whole_process_group_leaves_the_job_to_the_pool(make_pool: MakePool) -> None:
    """As systemd stops a service: the worker must not die on its own, which would cost the case an attempt."""
    pool = make_pool()
    pid = pid_of(outcome_of(pool.submit(job("ok"))))
    slow = pool.submit(job("slow"))
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert pid_of(outcome_of(slow)) == pid


# ---- with what really runs in the worker ----


@pytest.fixture
def make_real_pool(make_config: MakeConfig) -> Iterator[MakePool]:
    pools = []

    def make(**sections: dict[str, object]) -> WorkerPool:
        pools.append(WorkerPool(make_config(**sections)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.stop()


def test_a_bundle_that_cannot_be_loaded_breaks_the_job_with_the_reason(
    make_real_pool: MakePool, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    pool = make_real_pool(analyse={"bundle": tmp_path / "empty"})
    outcome = pool.submit(job("ok")).result(WAIT_S)
    assert isinstance(outcome, Broken)
    assert str(tmp_path / "empty") in outcome.reason


def test_the_real_worker_tells_what_cannot_be_analysed_from_what_broke(
    make_real_pool: MakePool, untrained_bundle: Path, tmp_path: Path
) -> None:
    from tests.factories import make_ct_series

    pool = make_real_pool(analyse={"bundle": untrained_bundle})
    paths = make_ct_series(tmp_path / "series", num_slices=5)
    outcome = pool.submit(make_job(paths, tmp_path / "results")).result(WAIT_S)
    assert isinstance(outcome, NotAnalysable)
    assert "5 slices; at least 30 are needed" in outcome.reason
    assert outcome.folder is not None
    assert [path.name for path in outcome.folder.iterdir()] == ["report.sr.dcm"]
    assert len(outcome.sop_instance_uids) == 1
    for path in make_ct_series(tmp_path / "other", num_slices=5):  # other Instances in files of the same names
        path.replace(tmp_path / "series" / path.name)
    other = pool.submit(make_job(paths, tmp_path / "results")).result(WAIT_S)
    assert isinstance(other, NotAnalysable)
    assert other.folder != outcome.folder

    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    whole = make_ct_series(tmp_path / "whole", num_slices=30, spacing_mm=2.5, rows=64, columns=64)
    outcome = pool.submit(make_job(whole, tmp_path / "file")).result(2 * WAIT_S)
    assert isinstance(outcome, Broken)
    assert outcome.reason.startswith("Not a directory")


def test_a_series_of_which_half_is_missing_is_analysed_and_says_so_everywhere(
    make_real_pool: MakePool, untrained_bundle: Path, tmp_path: Path
) -> None:
    from tests.factories import make_ct_series

    paths = make_ct_series(tmp_path / "series", num_slices=60, spacing_mm=1.25, rows=64, columns=64)[::2]
    pool = make_real_pool(analyse={"bundle": untrained_bundle})
    by_numbers = make_job(paths, tmp_path / "results")
    by_count = replace(by_numbers, num_at_source=60, results_dir=tmp_path / "others")
    for half, words in (
        (by_numbers, "Of InstanceNumbers 1 to 59, 29 are not here: Instances may be missing."),
        (by_count, "Its source holds 60 Instances, and 30 came."),
    ):
        outcome = pool.submit(half).result(2 * WAIT_S)
        assert isinstance(outcome, Analysed)
        assert outcome.summary.endswith(f" {words}")
        assert words in json.loads((outcome.folder / "findings.json").read_text())["warnings"]
        assert words.encode() in (outcome.folder / "report.sr.dcm").read_bytes()


def test_an_unexpected_error_is_told_without_its_message_which_may_name_a_patient() -> None:
    try:
        raise ValueError("Doe^John")
    except ValueError as error:
        told = describe_error(error)
    assert told.startswith("unexpected ValueError at ")
    assert "Doe" not in told
    assert describe_error(OSError(28, "No space left on device")) == "No space left on device"


def test_a_full_disk_is_told_from_what_breaks() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert workers._broken(full) == Broken(reason="No space left on device", is_disk_full=True)
    assert not workers._broken(OSError(errno.EIO, "x")).is_disk_full
