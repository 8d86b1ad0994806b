"""Mutated PDUs and datasets at the real receiver processes: none may crash or hang them, or leave anything behind.

    make fuzz                          # 50,000 cases
    python -m tests.fuzz_receiver --cases 1000 --seed 7

Half of the cases are datasets, changed and sent as well-formed C-STORE requests; half are PDUs, changed and sent in
the place of good ones, among them requests for an association. After every batch a good Instance must still be stored,
by the same processes. The seed is printed; the same seed makes the same cases.
"""

import argparse
import logging
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from pydicom import dcmread

from node.config import Config, ReceiveConfig
from node.index import Index
from node.receive import Receivers
from tests.factories import make_ct_series
from tests.ports import free_port
from tests.wire import ABORT, P_DATA_TF, RELEASE, Peer, associate_rq, c_echo, dataset_of, messages, pdu, value

_BATCH = 250
_PATIENCE_S = 20.0  # after that a receiver hangs
_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF)
_LENGTHS = (0, 1, 2, 5, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32)
    with tempfile.TemporaryDirectory(prefix="cspine-fuzz-") as folder:
        print(f"seed {seed}, {arguments.cases} cases", flush=True)
        for line in fuzz(Path(folder), arguments.cases, seed):
            print(line, flush=True)


def fuzz(folder: Path, num_cases: int, seed: int) -> list[str]:
    """Runs the cases; returns what happened, in lines.

    Raises:
        AssertionError: a receiver died or hangs, or something was left behind.
    """
    rng = random.Random(seed)
    config = Config(
        data_dir=folder / "data",
        receive=ReceiveConfig(
            port=free_port(),
            min_free_disk_mb=0,
            network_timeout_s=2,
            max_instance_mb=1,
            # What is broken off ends within a second; on a fast machine more than 32 of one address end at a time.
            max_associations=256,
            max_associations_per_address=256,
        ),
        log_level="ERROR",
    )
    logging.disable(logging.WARNING)
    index = Index(config.data_dir)
    receivers = Receivers(config, index)
    receivers.start()
    try:
        fuzzer = _Fuzzer(config, folder, rng, [process.pid for process in receivers._processes.values()])
        fuzzer.check()
        before = fuzzer.resources()
        started = time.monotonic()
        for number in range(0, num_cases, _BATCH):
            fuzzer.batch(min(_BATCH, num_cases - number))
            fuzzer.check()
            assert all(process.is_alive() for process in receivers._processes.values()), f"seed {seed}, case {number}"
        took_s = time.monotonic() - started
        after = fuzzer.settled_resources(before)
        kept = {file.path for file in index.needed_files()}
        strays = [p for p in (config.data_dir / "instances").rglob("*.dcm") if p.stat().st_size and p not in kept]
        assert not strays, f"{len(strays)} files without a row were left behind"
    finally:
        logging.disable(logging.NOTSET)
        receivers.terminate()
        receivers.join(10)
        index.close()
    return [
        f"{num_cases} cases in {took_s:.0f} s: no receiver died or hung, {fuzzer.num_good} good Instances in between",
        "answers: " + ", ".join(f"{name} {count}" for name, count in sorted(fuzzer.answers.items())),
        f"threads, descriptors, MiB of the receivers before {before}, after {after}",
    ]


class _Fuzzer:
    def __init__(self, config: Config, folder: Path, rng: random.Random, pids: list[int | None]) -> None:
        self._config, self._rng = config, rng
        self._processes = [psutil.Process(pid) for pid in pids]
        (path,) = make_ct_series(folder / "good", num_slices=1, rows=16, columns=16)
        self._dataset, self._uid = dataset_of(path), str(dcmread(path).SOPInstanceUID)
        self.answers: Counter[str] = Counter()
        self.num_good = 0

    def batch(self, num_cases: int) -> None:
        for number in range(num_cases // 2):
            if number % 50 == 0:
                self._datasets(min(50, num_cases // 2 - number))
        left = num_cases - num_cases // 2
        while left > 0:
            left -= self._pdus(min(left, self._rng.randint(1, 12)))

    def check(self) -> None:
        """A good Instance that was never sent before is stored."""
        uid = self._new_uid()
        with Peer(self._config.receive, _PATIENCE_S) as peer:
            peer.associate()
            peer.send(*messages(uid, self._with_uid(uid)))
            status = peer.status()
            assert status == 0, f"a good Instance was answered with 0x{status or 0:04X}"
            peer.release()
        self.num_good += 1

    def resources(self) -> tuple[int, int, int]:
        """Threads, descriptors and MiB of all receivers."""
        return (
            sum(process.num_threads() for process in self._processes),
            sum(process.num_fds() for process in self._processes),
            sum(process.memory_info().rss for process in self._processes) >> 20,
        )

    def settled_resources(self, before: tuple[int, int, int]) -> tuple[int, int, int]:
        """The same, once what was broken off has ended."""
        deadline = time.monotonic() + 30
        while True:
            now = self.resources()
            if now[0] <= before[0] + 2 and now[1] <= before[1] + 4:
                return now
            assert time.monotonic() < deadline, f"left behind: threads, descriptors, MiB were {before}, are {now}"
            time.sleep(0.2)

    # ---- datasets ----

    def _datasets(self, num_cases: int) -> None:
        """Changed datasets over as few associations as they leave alive; every request is answered or the end of it."""
        peer: Peer | None = None
        for _ in range(num_cases):
            if peer is None:
                peer = Peer(self._config.receive, _PATIENCE_S)
                peer.associate()
            uid = self._new_uid()
            dataset = self._mutated(self._with_uid(uid))
            peer.send(*messages(uid, dataset, piece=self._rng.choice((64, 1024, 16384))))
            pdu_type, body = peer.receive()
            if pdu_type == P_DATA_TF:
                at = body.index(struct.pack("<HHL", 0, 0x0900, 2)) + 8
                self.answers[f"0x{int.from_bytes(body[at : at + 2], 'little'):04X}"] += 1
            else:
                self.answers["closed"] += 1
                peer.socket.close()
                peer = None
        if peer is not None:
            peer.release()
            peer.socket.close()

    def _new_uid(self) -> str:
        """As long as that of the good dataset, whose elements say how long it is: those of `generate_uid` are not."""
        return f"{self._uid[:-9]}{self._rng.randrange(10**9):09d}"

    def _with_uid(self, uid: str) -> bytes:
        """The good dataset as another Instance."""
        return self._dataset.replace(self._uid.encode(), uid.encode())

    # ---- PDUs ----

    def _pdus(self, num_cases: int) -> int:
        """A conversation in which some PDUs are changed; how many were."""
        good = [associate_rq(), *messages(self._uid, self._dataset, piece=512), pdu(P_DATA_TF, value(3, 3, c_echo()))]
        good += [self._rng.choice((RELEASE, ABORT, b""))]
        places = sorted(self._rng.sample(range(len(good)), min(num_cases, len(good))))
        for place in places:
            good[place] = self._mutated(good[place]) if self._rng.random() < 0.9 else self._rng.randbytes(64)
        with Peer(self._config.receive, _PATIENCE_S) as peer:
            try:
                if places[0] == 0:
                    peer.send(good[0])
                else:
                    peer.associate()
                peer.send(*good[1:])
                peer.socket.shutdown(socket.SHUT_WR)
                while (answer := peer.receive())[0]:
                    self.answers[f"PDU type {answer[0]}"] += 1
                self.answers["closed"] += 1
            except TimeoutError:
                raise AssertionError("a receiver hangs") from None
            except OSError:
                self.answers["reset"] += 1
        return len(places)

    # ---- bytes ----

    def _mutated(self, good: bytes) -> bytes:
        data = bytearray(good)
        for _ in range(self._rng.choice((1, 1, 1, 2, 4, 16))):
            data = self._mutate(data)
        return bytes(data)

    def _mutate(self, data: bytearray) -> bytearray:
        rng, size = self._rng, len(data)
        at = rng.randrange(size) if size else 0
        kind = rng.randrange(8)
        if kind == 0 and size:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            data[at] = rng.choice(_INTERESTING)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randint(1, 16)]
        elif kind == 4:
            data[at:at] = rng.randbytes(rng.randint(1, 16))
        elif kind == 5:
            data[at:at] = data[at : at + rng.randint(1, 256)]
        elif kind == 6 and size > 8:
            data[at : at + 4] = struct.pack(rng.choice("<>") + "L", rng.choice(_LENGTHS))
        elif kind == 7:
            data += rng.randbytes(rng.randint(1, 64))
        return data


if __name__ == "__main__":
    sys.exit(main())
