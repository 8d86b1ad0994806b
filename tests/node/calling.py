"""Peers that call the receiver from addresses and under AE titles of their choice."""

import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom.association import Association

from node.config import Config
from node.implementation import make_ae
from node.receive import guard
from tests.factories import make_ct_series
from tests.raw_scu import ON_OPEN
from tests.waiting import WAIT_S

MakeConfig = Callable[..., Config]


def associate(
    config: Config, *, calling: str = "CT1", called: str = "CSPINE", source: str = "127.0.0.1"
) -> Association:
    ae = make_ae(calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = WAIT_S
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    return ae.associate(
        config.receive.host, config.receive.port, ae_title=called, bind_address=(source, 0), evt_handlers=ON_OPEN
    )


def rejected(association: Association) -> tuple[int, int, int] | None:
    """Result, source and reason."""
    if not association.is_rejected:
        return None
    answer = association.acceptor.primitive
    return answer.result, answer.result_source, answer.diagnostic


def connect(config: Config, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((config.receive.host, config.receive.port), WAIT_S, source_address=(source, 0))


def is_quiet(connection: socket.socket) -> bool:
    """Whether the other end has said nothing so far, and not closed it."""
    return not select.select([connection], [], [], 0)[0]


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end closes it some time, whatever it says before."""
    connection.settimeout(WAIT_S)
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def let_pass(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the guard of a receiver in this process see its clock so much later."""
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds, sleep=time.sleep)
    monkeypatch.setattr(guard, "time", later)


def served(config: Config, folder: Path) -> bool:
    """Whether a sender from another address gets its Instance stored."""
    (path,) = make_ct_series(folder, num_slices=1)
    association = associate(config)
    assert association.is_established
    status = association.send_c_store(path).Status
    association.release()
    return bool(status == 0)


def item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def associate_rq(
    *user_items: bytes, application_context: bytes = b"1.2.840.10008.3.1.1.1", version: int = 1,
    sop_class: str = CTImageStorage, of_context: bytes = item(0x40, ExplicitVRLittleEndian.encode()), more: bytes = b"",
) -> bytes:  # fmt: skip
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2) for one SOP Class, with these items of user information beside the usual.

    of_context: sub-items of the presentation context, behind the abstract syntax. more: items at the end.
    """
    context = b"\1\0\0\0" + item(0x30, sop_class.encode()) + of_context
    user = item(0x51, struct.pack(">L", 16384)) + item(0x52, b"1.2.3") + b"".join(user_items)
    content = struct.pack(">HH16s16s32x", version, 0, b"CSPINE".ljust(16), b"CT1".ljust(16))
    content += item(0x10, application_context) + item(0x20, context) + item(0x50, user) + more
    return struct.pack(">BBL", 1, 0, len(content)) + content
