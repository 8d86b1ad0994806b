"""A Storage SCP that keeps what it gets, standing in for a PACS: for the demo, the benchmark and the tests."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

from pynetdicom import AE, evt
from pynetdicom.sop_class import Comprehensive3DSRStorage, SegmentationStorage, Verification

from node.config import DicomDestination


class Archive:
    """Listens on loopback from construction to `stop`. `files` grows as Instances are stored: path and time of each."""

    def __init__(self, folder: Path, port: int, ae_title: str = "ARCHIVE") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.destination = DicomDestination(
            type="dicom", name=ae_title.lower(), host="127.0.0.1", port=port, ae_title=ae_title, verify="none"
        )
        self.files: list[tuple[Path, float]] = []
        self._folder = folder
        self._arrived = threading.Condition()
        ae = AE(ae_title=ae_title)
        ae.maximum_pdu_size = 0
        for sop_class in (Verification, SegmentationStorage, Comprehensive3DSRStorage):
            ae.add_supported_context(sop_class)
        self._server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._keep)])

    def stop(self) -> None:
        self._server.shutdown()

    def wait_for(self, is_enough: Callable[[list[Path]], bool], timeout_s: float) -> bool:
        """Waits until what is here is enough; False when it was not in time."""
        with self._arrived:
            return self._arrived.wait_for(lambda: is_enough([path for path, _ in self.files]), timeout_s)

    def _keep(self, event: evt.Event) -> int:
        with self._arrived:  # two may come at once
            path = self._folder / f"{len(self.files) + 1:04d}.dcm"
            path.write_bytes(event.encoded_dataset())
            self.files.append((path, time.time()))
            self._arrived.notify_all()
        return 0x0000
