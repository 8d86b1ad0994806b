"""Places for associations, counted over all receiver processes together. Asked by `guard.py`.

A file holds a row for each place. Who has a place holds the kernel's lock on its row, so that a process that dies in
whatever way leaves none taken.
"""

import fcntl
import os
import threading
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

_ROW_BYTES = 16  # an IPv6 address


class NoPlaceError(Exception):
    """All places are taken, or all that one peer may have; the message says which."""


class Places:
    """`num` places, of which one peer has at most `num_per_peer`. One object per process and file."""

    def __init__(self, path: Path, num: int, num_per_peer: int) -> None:
        self._num, self._num_per_peer = num, num_per_peer
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o640)
        missing = num * _ROW_BYTES - os.fstat(self._descriptor).st_size
        if missing > 0:  # now, since a disk that has filled up must not keep peers from being told so
            os.pwrite(self._descriptor, bytes(missing), num * _ROW_BYTES - missing)
        self._lock = threading.Lock()
        self._mine: set[int] = set()  # a process does not conflict with its own locks, so it must know them

    def close(self) -> None:
        """Gives all of this process back."""
        os.close(self._descriptor)

    def take(self, address: IPv4Address | IPv6Address) -> int:
        """Takes a place; returns its number.

        Raises:
            NoPlaceError: there is none for this peer.
        """
        peer = _peer(address)
        with self._lock:
            self._lock_rows(self._num, fcntl.LOCK_EX)  # the byte after the last row: one process at a time looks
            try:
                return self._take(peer, address)
            finally:
                self._lock_rows(self._num, fcntl.LOCK_UN)

    def free(self, place: int) -> None:
        """Gives a place back."""
        with self._lock:
            self._mine.discard(place)
            self._lock_rows(place, fcntl.LOCK_UN)

    def _take(self, peer: bytes, address: IPv4Address | IPv6Address) -> int:
        found: int | None = None
        num_peer = 0
        for row in range(self._num):
            if row not in self._mine and self._try_lock(row):
                if found is None:
                    found = row
                else:
                    self._lock_rows(row, fcntl.LOCK_UN)
            elif os.pread(self._descriptor, _ROW_BYTES, row * _ROW_BYTES) == peer:
                num_peer += 1
        if found is not None and num_peer < self._num_per_peer:
            os.pwrite(self._descriptor, peer, found * _ROW_BYTES)
            self._mine.add(found)
            return found
        if found is None:
            raise NoPlaceError(f"all {self._num} associations of receive.max_associations are taken")
        self._lock_rows(found, fcntl.LOCK_UN)
        raise NoPlaceError(
            f"{address} has all {self._num_per_peer} associations of receive.max_associations_per_address"
        )

    def _try_lock(self, row: int) -> bool:
        try:
            self._lock_rows(row, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _lock_rows(self, row: int, operation: int) -> None:
        fcntl.lockf(self._descriptor, operation, 1, row)


def _peer(address: IPv4Address | IPv6Address) -> bytes:
    """What counts as one peer: an IPv4 address, or the /64 of an IPv6 one, of which a host may use any address."""
    if isinstance(address, IPv4Address):
        return address.packed.ljust(_ROW_BYTES, b"\0")
    return address.packed[:8] + b"\0" * 7 + b"\6"
