"""Mutated PDUs and datasets at the real receiver processes: none may crash or hang them, or leave anything behind.

    make fuzz                          # 50,000 cases
    python -m tests.fuzz_receiver --cases 1000 --seed 7

Half of the cases are datasets, changed and sent as well-formed C-STORE requests; half are PDUs, changed and sent in
the place of good ones, among them requests for an association. They begin as CT in every kind of transfer syntax, and
as Enhanced CT. After every batch a good Instance must still be stored, by the same processes, and at the end no thread
of them may have broken. The seed is printed; the same seed makes the same cases.
"""

import argparse
import logging
import os
import random
import socket
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydicom import dcmread
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
)

from node.config import Config, ReceiveConfig
from node.index import Index
from node.receive import Receivers
from tests.factories import make_ct_series, make_enhanced_ct
from tests.node.calling import associate_rq as odd_associate_rq
from tests.node.calling import item
from tests.ports import free_port
from tests.transfer_syntaxes import convert, undefine_lengths
from tests.wire import ABORT, P_DATA_TF, RELEASE, Peer, associate_rq, c_echo, dataset_of, messages, pdu, value

_BATCH = 250
_GROUP = 25  # cases of one kind after another
_SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
    RLELossless,
    JPEGLSLossless,
)
_PATIENCE_S = 20.0  # after that a receiver hangs
_INTERESTING = (0, 1, 2, 0x7F, 0x80, 0xFF)
_ITEM, _EMPTY_ITEM = b"\xfe\xff\x00\xe0", b"\xfe\xff\x00\xe0\0\0\0\0"
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
    said = folder / "stderr"
    with _stderr_to(said):
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
        broken = [line for line in said.read_text().splitlines() if "thread-broken" in line or "Traceback" in line]
        assert not broken, f"seed {seed}, {len(broken)} threads broke, the first: {broken[0]}"
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


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """For the processes that are started within."""
    before = os.dup(2)
    try:
        with path.open("wb") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@dataclass(frozen=True, kw_only=True)
class _Good:
    """An Instance as it goes over the network."""

    uid: str
    sop_class: str
    syntax: str
    dataset: bytes

    def request(self) -> bytes:
        return associate_rq((self.syntax,), sop_class=self.sop_class)

    def with_uid(self, uid: str) -> bytes:
        """As another Instance."""
        if self.syntax != DeflatedExplicitVRLittleEndian:
            return self.dataset.replace(self.uid.encode(), uid.encode())
        inflated = zlib.decompress(self.dataset, -zlib.MAX_WBITS)
        return deflated(inflated.replace(self.uid.encode(), uid.encode()))


def deflated(data: bytes) -> bytes:
    deflating = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    encoded = deflating.compress(data) + deflating.flush()
    return encoded + b"\0" * (len(encoded) % 2)


def _good_ones(folder: Path) -> list[_Good]:
    paths = []
    for number, syntax in enumerate(_SYNTAXES):
        paths += make_ct_series(folder / str(number), num_slices=1, rows=16, columns=16)
        convert(paths[-1], syntax)
    for number in range(2):
        paths.append(make_enhanced_ct(folder / f"enhanced{number}.dcm", num_frames=3, rows=4, columns=4))
    undefine_lengths(paths[-1])
    good = []
    for path in paths:
        ds = dcmread(path)
        syntax = str(ds.file_meta.TransferSyntaxUID)
        uid, sop_class = str(ds.SOPInstanceUID), str(ds.SOPClassUID)
        good.append(_Good(uid=uid, sop_class=sop_class, syntax=syntax, dataset=dataset_of(path)))
    return good


class _Fuzzer:
    def __init__(self, config: Config, folder: Path, rng: random.Random, pids: list[int | None]) -> None:
        self._config, self._rng = config, rng
        self._processes = [psutil.Process(pid) for pid in pids]
        self._good = _good_ones(folder / "good")
        self._num_groups = 0
        self.answers: Counter[str] = Counter()
        self.num_good = 0

    def batch(self, num_cases: int) -> None:
        for number in range(num_cases // 2):
            if number % _GROUP == 0:
                self._datasets(min(_GROUP, num_cases // 2 - number))
        left = num_cases - num_cases // 2
        while left > 0:
            left -= self._pdus(min(left, self._rng.randint(1, 12)))

    def check(self) -> None:
        """A good Instance that was never sent before is stored."""
        good = self._next_good()
        uid = self._new_uid(good)
        with Peer(self._config.receive, _PATIENCE_S) as peer:
            peer.associate(good.request())
            peer.send(*messages(uid, good.with_uid(uid), sop_class=good.sop_class))
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
        good = self._next_good()
        for _ in range(num_cases):
            if peer is None:
                peer = Peer(self._config.receive, _PATIENCE_S)
                peer.associate(good.request())
            uid = self._new_uid(good)
            dataset = good.with_uid(uid)
            if good.syntax == DeflatedExplicitVRLittleEndian and self._rng.random() < 0.5:
                dataset = deflated(self._mutated(zlib.decompress(dataset, -zlib.MAX_WBITS)))
            else:
                dataset = self._mutated(dataset)
            piece = 16384 if len(dataset) > 2**16 else self._rng.choice((64, 1024, 16384))
            peer.send(*messages(uid, dataset, piece, sop_class=good.sop_class))
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

    def _next_good(self) -> _Good:
        """One after the other."""
        self._num_groups += 1
        return self._good[self._num_groups % len(self._good)]

    def _new_uid(self, good: _Good) -> str:
        """As long as that of the good dataset, whose elements say how long it is: those of `generate_uid` are not."""
        return f"{good.uid[:-9]}{self._rng.randrange(10**9):09d}"

    # ---- PDUs ----

    def _pdus(self, num_cases: int) -> int:
        """A conversation in which some PDUs are changed; how many were."""
        one = self._next_good()
        stored = messages(one.uid, one.dataset, piece=512, sop_class=one.sop_class)
        good = [one.request(), *stored, pdu(P_DATA_TF, value(3, 3, c_echo()))]
        good += [self._rng.choice((RELEASE, ABORT, b""))]
        places = sorted(self._rng.sample(range(len(good)), min(num_cases, len(good))))
        for place in places:
            good[place] = self._mutated(good[place]) if self._rng.random() < 0.9 else self._rng.randbytes(64)
        if places[0] == 0 and self._rng.random() < 0.1:  # well-formed, which changed bytes seldom are
            good[0] = odd_associate_rq(of_context=self._rng.choice((b"", item(0x40, b""), item(0x41, b"x"))))
        with Peer(self._config.receive, _PATIENCE_S) as peer:
            try:
                if places[0] == 0:
                    peer.send(good[0])
                else:
                    peer.associate(one.request())
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
        kind = rng.randrange(9)
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
        elif kind == 7:  # empty items, where there are items
            place = max(data.find(_ITEM, at), 0) or at
            data[place:place] = _EMPTY_ITEM * rng.choice((1, 2, 100, 100, 8000))
        elif kind == 8:
            data += rng.randbytes(rng.randint(1, 64))
        return data


if __name__ == "__main__":
    sys.exit(main())
