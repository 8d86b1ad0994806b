"""The node under `kill -9`, and over thousands of associations. `tests/test_crash.py` runs the short form.

    make soak                          # 200 kills under load from four senders, then 2,000 associations
    python -m tests.soak --kills 20 --associations 100 --seed 7

Any process of the real `cspine serve` is killed at random moments, the main one too, while four senders send that do
not give up. Some Series are analysed, with an untrained model, and delivered; most are too short for that and end as
refused, with a report. At the end nothing that was acknowledged may be missing, every case must have ended, and every
analysed Series has one set of results.
"""

import argparse
import hashlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
from pydicom import Dataset, dcmread

from node.archive import Archive
from node.case import CaseState
from node.config import DicomDestination
from node.index import Index
from node.send import Answer, SendError, send_files
from tests.factories import make_ct_series
from tests.ports import free_port
from tests.running_node import RunningNode
from tests.stored import path_of
from tests.untrained import write_untrained_bundle
from tests.wire import dataset_of

_ROLES = ("main", "receiver", "worker")  # each is killed at least once
_NUM_SENDERS = 4
_NUM_SHORT_SLICES = 20
_NUM_LONG_SLICES = 48
_MIN_SLICES = _NUM_LONG_SLICES  # so that none is analysed before it is whole, however long its sender was held up
_OLD_S = 10.0  # by this age a process does its work; else most kills would meet one that is still starting
_TELL_EVERY = 20
# Threads, descriptors, MiB. The clock's threads are made as jobs meet; 10 MiB are 7 KiB for each of 1,500 associations.
_MAY_GROW = {"main": (6, 6, 10), "receiver": (4, 6, 10), "worker": (4, 6, 20)}
_PAUSE_S = 0.05  # between two Instances: no faster than a scanner, so that kills fall into the middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--associations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cspine-soak-") as name:
        print(kill_at_random(Path(name) / "kills", arguments.kills, seed), flush=True)
        print(stay_flat(Path(name) / "flat", arguments.associations), flush=True)


class Sender(threading.Thread):
    """Sends one Series after the other, file by file, until each was acknowledged; keeps the hash of what was."""

    def __init__(self, number: int, folder: Path, long_series: list[list[Path]], node: DicomDestination) -> None:
        super().__init__(name=f"sender{number}", daemon=True)
        self.acknowledged: dict[str, bytes] = {}
        self.num_series = 0
        self.stopping = False
        self._folder, self._long, self._node = folder, list(long_series), node

    def run(self) -> None:
        while self._long or not self.stopping:
            if self._long and (self.num_series % 4 == 0 or self.stopping):
                self._send(self._long.pop())
            else:
                self._send(make_ct_series(self._folder / str(self.num_series), num_slices=_NUM_SHORT_SLICES, rows=64))
            self.num_series += 1

    def _send(self, left: list[Path]) -> None:
        while left:
            answered: list[Path] = []
            try:
                send_files(left, self._node, calling_ae_title="SOAK", on_answer=partial(self._note, answered))
            except SendError:
                time.sleep(0.3)
            left = [path for path in left if path not in answered]

    def _note(self, answered: list[Path], answer: Answer) -> None:
        if answer.taken:
            answered.append(answer.path)
            uid = str(dcmread(answer.path, stop_before_pixels=True).SOPInstanceUID)
            self.acknowledged[uid] = hashlib.sha256(dataset_of(answer.path)).digest()
        time.sleep(_PAUSE_S)


def kill_at_random(folder: Path, num_kills: int, seed: int, num_long: int = 8, main_share: float = 0.1) -> str:
    """Kills, then looks at what became of everything; what happened, in a line.

    main_share: how many of the kills are of the main process.

    Raises:
        AssertionError: something acknowledged is lost, a case is stuck, or results are there twice.
    """
    rng = random.Random(seed)
    folder.mkdir()
    long_series = [
        make_ct_series(folder / f"long{number}", num_slices=_NUM_LONG_SLICES, spacing_mm=2.0, rows=64, columns=64)
        for number in range(num_long)
    ]
    archive = Archive(folder / "archive", free_port())
    destination = archive.destination.model_dump(mode="json")
    node = RunningNode(
        folder,
        complete={"quiet_time_s": 8.0, "min_slices": _MIN_SLICES},  # longer than a sender waits before it goes on
        analyse={"max_attempts": 100, "bundle": str(write_untrained_bundle(folder / "bundle")), "threads": 1},
        deliver={
            "retry_first_s": 0.5,
            "retry_max_s": 2.0,
            "destinations": [destination],
        },
    )
    senders = [
        Sender(number, folder / f"short{number}", long_series[number::_NUM_SENDERS], node.destination)
        for number in range(_NUM_SENDERS)
    ]
    num_killed: Counter[str] = Counter()
    num_told = _TELL_EVERY
    started = time.monotonic()
    try:
        for sender in senders:
            sender.start()
        while (num_done := sum(num_killed[role] for role in _ROLES)) < num_kills or not all(
            num_killed[role] for role in _ROLES
        ):
            if num_done >= num_told:
                num_told += _TELL_EVERY
                print(f"{time.monotonic() - started:.0f} s: {dict(num_killed)}", flush=True)
            time.sleep(rng.uniform(0.2, 2.0))
            if node.process.poll() is not None:  # it gave up while starting: a service manager starts it again
                node.start()
                num_killed["given up"] += 1
            if rng.random() < main_share:
                node.kill()
                node.wait_until_gone()
                node.start()
                num_killed["main"] += 1
            else:
                (role,) = rng.choices(["receiver", "worker"], [2, 1])
                age_s = rng.uniform(0.0, _OLD_S)
                if found := [one for one in node.find_all(role) if time.time() - one.create_time() > age_s]:
                    rng.choice(found).kill()
                    num_killed[role] += 1
        for sender in senders:
            sender.stopping = True
        for sender in senders:
            sender.join(240)
            assert not sender.is_alive(), f"a sender is stuck with {len(sender.acknowledged)} acknowledged"
        num_series = sum(sender.num_series for sender in senders)
        states = node.wait_until_settled(num_series, timeout_s=600)
        index = Index(node.data_dir)
        acknowledged = {uid: digest for sender in senders for uid, digest in sender.acknowledged.items()}
        for uid, digest in acknowledged.items():
            kept = path_of(index, uid)
            assert hashlib.sha256(dataset_of(kept)).digest() == digest, f"{uid} was acknowledged and differs"
        assert sum(case.num_instances for case in index.cases()) == len(acknowledged)
        index.close()
        expected = Counter({CaseState.DONE: num_long, CaseState.REFUSED: num_series - num_long})
        assert states == +expected, f"{states}\n{node.log()}"
    finally:
        for sender in senders:
            sender.stopping = True
        node.stop()
        archive.stop()
    # A repeat replaces itself: whatever was made, and however often, one set of objects a Series is all there is.
    assert len(list((node.data_dir / "cases").glob("*/*/findings.json"))) == num_long
    made = {dcmread(path).SOPInstanceUID for path in (node.data_dir / "cases").rglob("*.dcm")}
    archived = [dcmread(path, stop_before_pixels=True) for path, _ in archive.files]
    uids = {ds.SOPInstanceUID for ds in archived}
    # Where a sender paused for longer than the quiet time, the report on what had come by then is superseded by name.
    assert made <= uids
    assert uids - made <= {uid for ds in archived for uid in superseded_by(ds)}
    node.wait_until_gone()
    return (
        f"{num_done} kills ({dict(num_killed)}) under {_NUM_SENDERS} senders: {len(acknowledged)} "
        f"acknowledged Instances in {num_series} Series, 0 lost; {num_long} analysed once, 0 stuck; "
        f"{time.monotonic() - started:.0f} s"
    )


def superseded_by(report: Dataset) -> list[str]:
    return [
        instance.ReferencedSOPInstanceUID
        for study in report.get("PredecessorDocumentsSequence", [])
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    ]


def stay_flat(folder: Path, num_associations: int) -> str:
    """One association after the other, each with an Instance; what the node holds may not grow.

    Every twenty make a Series, in a Study of its own, that goes all the way: received, judged, refused, its report
    written and delivered. In one Series without end the node would rightly need more for each look at it.

    Raises:
        AssertionError: threads, descriptors or memory of a kind of process grew.
    """
    folder.mkdir()
    node = RunningNode(
        folder,
        complete={"min_slices": _MIN_SLICES, "quiet_time_s": 2.0},
        analyse={"bundle": str(write_untrained_bundle(folder / "bundle")), "threads": 1},
    )
    try:

        def send(first: int, num_series: int) -> dict[str, tuple[int, int, int]]:
            for number in range(first, first + num_series):
                for path in make_ct_series(folder / str(number), num_slices=_NUM_SHORT_SLICES):
                    assert send_files([path], node.destination, calling_ae_title="SOAK") == []
            node.wait_until_settled(first + num_series)
            time.sleep(1)
            return _resources(node)

        num_series = num_associations // _NUM_SHORT_SLICES
        before = send(0, num_series // 4)  # what is kept in memory for good is there by then
        after = send(num_series // 4, num_series - num_series // 4)
    finally:
        node.stop()
    for role, limits in _MAY_GROW.items():
        for what, was, is_now, limit in zip(
            ("threads", "descriptors", "MiB"), before[role], after[role], limits, strict=True
        ):
            assert is_now <= was + limit, f"{what} of {role} grew from {was} to {is_now}"
    return f"{num_associations} associations: threads, descriptors, MiB after a quarter {before}, at the end {after}"


def _resources(node: RunningNode) -> dict[str, tuple[int, int, int]]:
    """Threads, descriptors, MiB of each kind of process."""
    kinds = {"main": [psutil.Process(node.process.pid)]} | {
        role: node.find_all(role) for role in ("receiver", "worker")
    }
    return {
        kind: (
            sum(process.num_threads() for process in processes),
            sum(process.num_fds() for process in processes),
            sum(process.memory_info().rss for process in processes) >> 20,
        )
        for kind, processes in kinds.items()
    }


if __name__ == "__main__":
    sys.exit(main())
