"""The node under `kill -9`: nothing acknowledged is lost, no case is stuck, nothing is made twice.

Four Series are sent over and over by a sender that does not give up, while the receiver or the worker is killed at
random moments. The node is the real `cspine serve`.
"""

import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from pydicom import dcmread

from node.archive import Archive
from node.case import CaseState
from node.config import DicomDestination
from node.index import Index
from node.send import Answer, SendError, send_files
from tests.ports import free_port
from tests.running_node import RunningNode, phantom_series

NUM_SERIES = 4
NUM_KILLS = 20


class Sender(threading.Thread):
    """Sends a Series file by file until each was acknowledged; `acknowledged` says which were."""

    def __init__(self, paths: list[Path], node: DicomDestination) -> None:
        super().__init__(daemon=True)
        self.acknowledged: list[Path] = []
        self._left = list(paths)
        self._node = node
        self.stopping = False

    def run(self) -> None:
        while self._left and not self.stopping:
            try:
                send_files(self._left, self._node, calling_ae_title="CRASH", on_answer=self._note)
            except SendError:
                time.sleep(0.3)
            self._left = [path for path in self._left if path not in self.acknowledged]

    def _note(self, answer: Answer) -> None:
        if answer.taken:
            self.acknowledged.append(answer.path)
        time.sleep(0.02)  # no faster than a scanner, so that kills fall into the middle


# pynetdicom 3.0.4 leaves its socket unclosed when a connection is refused or reset.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.timeout(600)
def test_twenty_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    rng = random.Random(20)
    series = [phantom_series(tmp_path / f"series{number}", seed=number) for number in range(NUM_SERIES)]
    archive = Archive(tmp_path / "archive", free_port())
    node = RunningNode(
        tmp_path,
        complete={"quiet_time_s": 8.0},  # longer than the sender waits: no part of a Series counts as whole
        analyse={"max_attempts": 100},
        deliver={"retry_first_s": 0.5, "retry_max_s": 2.0, "destinations": [archive.destination.model_dump()]},
    )
    senders: list[Sender] = []
    num_killed: Counter[str] = Counter()
    try:
        while sum(num_killed.values()) < NUM_KILLS:
            if not any(sender.is_alive() for sender in senders) and len(senders) < NUM_SERIES:
                senders.append(Sender(series[len(senders)], node.destination))
                senders[-1].start()
            time.sleep(rng.uniform(0.2, 3.0))
            victim = rng.choice(["receiver", "worker"])
            if (process := node.find(victim)) is not None:
                process.kill()
                num_killed[victim] += 1
        for paths in series[len(senders) :]:
            senders.append(Sender(paths, node.destination))
            senders[-1].start()
        for sender in senders:
            sender.join(120)
            assert not sender.is_alive(), f"a sender is stuck with {len(sender.acknowledged)} acknowledged"
        states = node.wait_until_settled(timeout_s=240)
        index = Index(node.data_dir)
        for sender in senders:
            for path in sender.acknowledged:
                kept = index.find_instance(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
                assert kept is not None, f"{path.name} was acknowledged and is lost"
                assert dcmread(kept) == dcmread(path)
        index.close()
    finally:
        for sender in senders:
            sender.stopping = True
        node.stop()
        archive.stop()
    assert states == Counter({CaseState.DONE: NUM_SERIES}), node.log()
    assert min(num_killed["receiver"], num_killed["worker"]) >= 3
    # A repeat replaces itself: whatever was made, and however often, one set of objects a Series is all there is.
    finished = list((node.data_dir / "cases").glob("*/*/findings.json"))
    assert len(finished) == NUM_SERIES
    made = {dcmread(path).SOPInstanceUID for path in (node.data_dir / "cases").rglob("*.dcm")}
    assert {dcmread(path).SOPInstanceUID for path, _ in archive.files} == made
    node.wait_until_gone()
