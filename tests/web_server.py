"""The node's HTTP side in a thread of the test, on a port of its own."""

import socket
import threading
import time
from pathlib import Path
from typing import Any

import requests
from pydicom import dcmread

from model import slice_headers
from node.config import Config
from node.index import Index, NewInstance
from node.receive.store import Store
from node.web.app import make_app
from node.web.catalog import Catalog
from node.web.server import make_server
from node.web.tokens import Tokens
from tests.waiting import WAIT_S


class WebServer:
    """Serves from construction to `stop`; `get` asks it. url: of the DICOMweb service."""

    def __init__(self, config: Config, index: Index, listening: socket.socket | None = None) -> None:
        listening = listening or socket.create_server(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        self.root = f"{'https' if config.web.tls else 'http'}://127.0.0.1:{self.port}"
        self.url = f"{self.root}/dicom-web"
        self.catalog = Catalog(index)
        self.tokens = Tokens(index.data_dir)
        self.store = Store(config, index, f"test-{self.port}")
        app = make_app(config, self.catalog, self.store, self.tokens)
        self._server = make_server(app, config.web)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + WAIT_S
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def get(self, path: str, accept: str = "", **more: object) -> requests.Response:
        """The answer to a GET of a path below the service."""
        headers = {"Accept": accept} if accept else {}
        return requests.get(self.url + path, headers=headers, timeout=WAIT_S, **more)  # type: ignore[arg-type]

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(WAIT_S)
        self.store.close()
        self.catalog.close()


def found_in(answer: requests.Response) -> list[dict[str, Any]]:
    """The matches of a search; where there is none, that is said by 204, without a body (PS3.18 8.3.4.4.1)."""
    assert answer.status_code == (200 if answer.content else 204), answer.text
    return answer.json() if answer.content else []


def hold(index: Index, paths: list[Path]) -> None:
    """Makes the node hold these Instances, as if they had been received."""
    association = index.open_association("CT1")
    batch = []
    for path in paths:
        headers = [header.to_dict() for header in slice_headers(dcmread(path, stop_before_pixels=True))]
        batch.append(NewInstance(association_id=association, calling_ae_title="CT1", path=path, headers=headers))
    index.add_instances(batch, quiet_time_s=30)
