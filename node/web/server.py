"""The process of the HTTP side. Started and watched by `service.py`, like the receiver."""

import logging
import signal
import threading
from multiprocessing.connection import Connection
from socket import AF_INET, AF_INET6, IPPROTO_TCP, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from node.config import Config
from node.index import Index
from node.process import be_child, describe_error, describe_listen_error, spare_the_collector
from node.receive.store import Store
from node.reminder import Reminder
from node.tls import TlsError, check_pair
from node.web.app import make_app
from node.web.catalog import Catalog
from node.web.limits import LimitedProtocol
from node.web.settings import WebConfig
from node.web.tokens import Tokens

log = logging.getLogger(__name__)

_STOP_S = 3
_REFRESH_S = 1.0


def run(config: Config, run_name: str, ready: Connection) -> None:
    """Says over `ready` that it listens ("") or why it cannot, then serves until SIGTERM.

    run_name: of this run of the process, for the files it stores.
    """
    stopping = threading.Event()
    be_child(config.log_level, on_sigterm=lambda *_: stopping.set())
    web = config.web
    try:
        if web.tls is not None:
            check_pair(web.tls.certificate, web.tls.key)  # whose messages name the file
        listening = _listen(web.host, web.port)
        index = Index(config.data_dir, config.database)
        catalog, store = Catalog(index), Store(config, index, run_name)
        server = make_server(make_app(config, catalog, store, Tokens(config.data_dir)), web)
    except (OSError, TlsError) as error:
        why = describe_listen_error(error) if isinstance(error, OSError) else error
        ready.send(f"{web.host}:{web.port} cannot be served over HTTP: {why}")
        return
    signal.signal(signal.SIGTERM, server.handle_exit)  # uvicorn does so when it runs; one before that would be lost
    if stopping.is_set():
        server.should_exit = True
    spare_the_collector()
    ready.send("")
    threading.Thread(target=_refresh, args=(catalog, stopping), daemon=True).start()
    server.run(sockets=[listening])
    stopping.set()
    store.close()
    catalog.close()
    index.close()


def make_server(app: FastAPI, web: WebConfig) -> uvicorn.Server:
    """Serves the application on the socket that its `run` is given.

    Raises:
        OSError: certificate or key cannot be read (ssl.SSLError is one).
    """
    config = uvicorn.Config(
        app,
        http=LimitedProtocol,
        ws="none",  # whose connections would have no limits
        log_config=None,
        access_log=False,  # addresses name studies
        server_header=False,
        proxy_headers=False,  # the address that `access.py` looks at is that of the proxy, whoever it speaks for
        timeout_graceful_shutdown=_STOP_S,
        ssl_certfile=web.tls.certificate if web.tls else None,
        ssl_keyfile=web.tls.key if web.tls else None,
    )
    config.load()
    return uvicorn.Server(config)


def _listen(host: str, port: int) -> socket:
    """A socket that listens.

    Raises:
        OSError: the address cannot be had.
    """
    # Its protocol is named, or asyncio would not set TCP_NODELAY, and each answer would wait 40 ms.
    listening = socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM, IPPROTO_TCP)
    listening.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
    listening.bind((host, port))
    listening.listen(128)
    return listening


def _refresh(catalog: Catalog, stopping: threading.Event) -> None:
    """Reads what has come since, so that no query has to wait for it; after a fault, such as a full disk, again."""
    reminder = Reminder(60.0)
    while not stopping.wait(_REFRESH_S):
        try:
            catalog.refresh()
        except (OSError, SQLAlchemyError) as error:
            if reminder.is_due("refresh"):
                log.error("action=catalog-not-refreshed: %s; see whether the disk is full", describe_error(error))
