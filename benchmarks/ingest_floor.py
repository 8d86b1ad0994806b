"""The floor of `ingest.py`: what a receiver in Python costs that does only what must be done, and checks nothing.

    python -m benchmarks.ingest_floor PORT FOLDER

Two processes accept from one socket, with a thread for each association: every context is accepted unread, P-DATA-TF is
read into a file whose name is durable, its CRC-32 reckoned; `fdatasync` and a commit of the row, on the node's schema,
go on at the same time; then comes the success status. No header is read, no UID looked at, nothing kept from a crowd.
"""

import io
import multiprocessing
import os
import signal
import socket
import sqlite3
import struct
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID

from node.index import Index
from node.index.receiving import ADD_INSTANCE_SQLITE, ADD_TO_CASE_SQLITE
from node.index.turn import Turn
from node.receive.command import c_store_response, parse_command
from node.receive.spool import Spool

_MAX_PDU_BYTES = 128 * 1024
_HEADERS = [{"position_lps_mm": [-100.0, -100.0, -1000.25], "spacing_mm": [0.4, 0.4], "instance_number": 1}]


def main() -> None:
    folder = Path(sys.argv[2])
    Index(folder).close()  # makes the tables; a connection is not to be shared with a child
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=100)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    multiprocessing.get_context("fork").Process(target=receive, args=(listener, folder), daemon=True).start()
    receive(listener, folder)


def receive(listener: socket.socket, folder: Path) -> None:
    """A receiver process."""
    spool, syncs = Spool(folder / str(os.getpid())), ThreadPoolExecutor(16)
    index, turn = Index(folder), Turn(folder / "cspine.sqlite.lock")
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        values = connection, spool, syncs, turn, index.open_association("FLOOR")
        threading.Thread(target=serve, args=values, daemon=True).start()


def serve(connection: socket.socket, spool: Spool, syncs: ThreadPoolExecutor, turn: Turn, association_id: int) -> None:
    """One association, from its request to its release."""
    stream, view = connection.makefile("rb", buffering=0), memoryview(bytearray(_MAX_PDU_BYTES))
    data_dir = spool.folder.parent
    database = sqlite3.connect(data_dir / "cspine.sqlite", isolation_level=None)
    database.execute("PRAGMA synchronous=FULL")
    connection.sendall(accept(take(stream, struct.unpack(">BxL", take(stream, 6))[1])))
    while (header := struct.unpack(">BxL", take(stream, 6)))[0] == 4:  # P-DATA-TF
        length = header[1]
        while length:
            size, context_id, control = struct.unpack(">LBB", take(stream, 6))
            length, size = length - size - 4, size - 2
            if control & 1:  # the command: an Instance begins
                request, (path, file) = parse_command(take(stream, size)), spool.take()
                checksum = num_bytes = 0
                continue
            while size:
                piece = view[: stream.readinto(view[:size])]
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
                size, num_bytes = size - len(piece), num_bytes + len(piece)
            if control & 2:  # the last fragment
                syncing = syncs.submit(os.fdatasync, file.fileno())
                row = {"sop_instance_uid": request.sop_instance_uid, "path": str(path.relative_to(data_dir))}
                commit(database, turn, association_id, row | {"num_bytes": num_bytes, "checksum": checksum})
                syncing.result()
                file.close()
                connection.sendall(b"".join(c_store_response(request, context_id, 0, "", 0)))
    connection.sendall(struct.pack(">BxLL", 6, 4, 0))  # A-RELEASE-RP
    connection.close()


def commit(database: sqlite3.Connection, turn: Turn, association_id: int, row: dict[str, object]) -> None:
    """The row of an Instance, and what it changes in its case's."""
    series = {"series_instance_uid": f"1.2.{association_id}"}
    case = series | {"study_instance_uid": "1.2", "calling_ae_title": "FLOOR", "attributes": {}, "now": 0.0}
    with turn:
        database.execute("BEGIN IMMEDIATE")
        ADD_INSTANCE_SQLITE.execute(database, row | series | {"association_id": association_id, "headers": _HEADERS})
        ADD_TO_CASE_SQLITE.execute(database, case | {"next_check_at": 0.0})
        database.execute("COMMIT")


def accept(request: bytes) -> bytes:
    """A-ASSOCIATE-AC with every presentation context, as Explicit VR Little Endian (PS3.8 9.3.3)."""
    items, at = b"", 68
    while at < len(request):
        kind, size = struct.unpack_from(">BxH", request, at)
        body, at = request[at + 4 : at + 4 + size], at + 4 + size
        if kind == 0x10:
            items += item(0x10, body)
        elif kind == 0x20:
            items += item(0x21, body[:1] + bytes(3) + item(0x40, ExplicitVRLittleEndian.encode()))
    user = item(0x51, struct.pack(">L", _MAX_PDU_BYTES)) + item(0x52, PYNETDICOM_IMPLEMENTATION_UID.encode())
    answer = request[:68] + items + item(0x50, user)
    return struct.pack(">BxL", 2, len(answer)) + answer


def item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(body)) + body


def take(stream: io.FileIO, num_bytes: int) -> bytes:
    """Exactly that many bytes; a connection that is closed ends its thread: it only looked whether we listen."""
    taken = b""
    while len(taken) < num_bytes:
        piece = stream.read(num_bytes - len(taken))
        if not piece:
            sys.exit()
        taken += piece
    return taken


if __name__ == "__main__":
    main()
