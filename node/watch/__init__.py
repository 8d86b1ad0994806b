"""Archives that are followed for new CT Series: a look now and then, in a thread of its own for each.

`orthanc.py` follows the changes of an Orthanc, `dicomweb.py` what a DICOMweb archive lists (`web_archive.py` speaks to
it, `orthanc/client.py` to Orthanc); `following.py` is what both do, `taking.py` the way of an Instance to disk and
index, the receiver's, and `describe.py` says what the rules can ask before anything is fetched. What becomes of a
Series that is here is decided as for any other (`complete/`).
"""

import time
from typing import TYPE_CHECKING

from node.config import Config
from node.index import Index
from node.receive.store import Store

if TYPE_CHECKING:
    from node.watch.following import Watch

__all__ = ["Watches"]

_END_S = 3.0


class Watches:
    """All that are configured, with one place for the Instances they fetch.

    Raises:
        ModuleNotFoundError: what a watch of an Orthanc needs is not installed.
        OSError: there is no such place.
    """

    def __init__(self, config: Config, index: Index) -> None:
        self._store = Store(config, index, f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-watch")
        self.each: list[Watch] = []
        if config.sources.orthanc:
            from node.watch.orthanc import OrthancWatch

            self.each += [OrthancWatch(config, source, index, self._store) for source in config.sources.orthanc]
        if config.sources.dicomweb:
            from node.watch.dicomweb import DicomWebWatch

            self.each += [DicomWebWatch(config, source, index, self._store) for source in config.sources.dicomweb]

    def stop(self) -> None:
        """Ends what is going on; what is not here by then is fetched after the next start."""
        for watch in self.each:
            watch.stop()
        deadline = time.monotonic() + _END_S
        for watch in self.each:
            watch.join(deadline - time.monotonic())
        self._store.close()
