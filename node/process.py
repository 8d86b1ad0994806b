"""What every process of the node needs of its system: logging, signals, a disk that keeps, an end with its parent."""

import errno
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

log = logging.getLogger(__name__)


def set_up_logging(level: str) -> None:
    """Logs to stderr, one line per state change, nothing that names a patient."""
    logging.basicConfig(
        level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    # pynetdicom speaks of every PDU, and of each refused connection, which our messages name in one sentence; what
    # remains is that one of our own handlers broke. pydicom's warnings quote values, which may name a patient.
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
    logging.getLogger("pynetdicom.events").setLevel(logging.ERROR)
    for library in ("highdicom", "matplotlib", "PIL"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would log the messages of unexpected errors
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    logging.getLogger("apscheduler.executors").setLevel(logging.CRITICAL)  # it would too; the service does it
    logging.getLogger("pydicom").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")


def be_child(
    log_level: str, on_sigterm: "Callable[[int, FrameType | None], None] | signal.Handlers" = signal.SIG_IGN
) -> None:
    """Sets up a child process: logs, leaves stopping to the parent, and ends when the parent does, however that died.

    Ctrl-C and service managers signal every process of a service; a worker that died of that would cost a case an
    attempt. on_sigterm: for a process that its parent stops by SIGTERM. Set here, so that at no moment one is lost.
    """
    set_up_logging(log_level)
    threading.excepthook = _log_broken_thread
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    threading.Thread(target=_end_with_parent, name="parent-watch", daemon=True).start()


def _log_broken_thread(broken: threading.ExceptHookArgs) -> None:
    """In place of a traceback, which may quote a patient's data."""
    name = broken.thread.name if broken.thread is not None else ""
    if broken.exc_value is not None:
        log.error("action=thread-broken thread=%s: %s", name, describe_error(broken.exc_value))


def spare_the_collector() -> None:
    """What is here now stays: modules and dictionaries that the garbage collector would walk again and again.

    It was 7 % of a receiver's CPU.
    """
    gc.collect()
    gc.freeze()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def describe_error(error: BaseException) -> str:
    """Kind and place of an unexpected error, without its message, which may quote a patient's data."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""
    # What the system says, such as "No space left on device", quotes nobody.
    system_says = error.strerror if isinstance(error, OSError) else None
    return f"{system_says or f'unexpected {type(error).__name__}'}{place}"


def describe_listen_error(error: OSError) -> str:
    """Why an address cannot be listened on, and what to do."""
    remedies = {
        errno.EADDRINUSE: "; another program has that port: stop it, or set another port",
        errno.EADDRNOTAVAIL: "; set a host that is an address of this machine",
        errno.EACCES: "; ports below 1024 are for root and for whom CAP_NET_BIND_SERVICE is given",
    }
    number = error.errno or 0  # negative where a host name was not found
    return f"{os.strerror(number) if number > 0 else error.strerror or error}{remedies.get(number, '')}"


def try_write(folder: Path) -> None:
    """Returns if files can be written in the folder, which is made if it is not there.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"probe")
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
