"""Archives that are followed for new CT Series: a look now and then, in a thread of its own for each.

`orthanc.py` follows the changes of an Orthanc and fetches what passes the rules, by the same way to disk and index as
C-STORE; `describe.py` says what the rules can ask before anything is fetched. What becomes of a Series that is here is
decided as for any other (`complete/`). `orthanc/client.py` speaks to the archive; it needs `orthanc-api-client`, so
`node/service.py` imports this only where something is watched.
"""

import time

from node.config import Config
from node.index import Index
from node.receive.store import Store
from node.watch.orthanc import OrthancWatch

__all__ = ["OrthancWatch", "Watches"]

_END_S = 3.0


class Watches:
    """All that are configured, with one place for the Instances they fetch.

    Raises:
        OSError: there is no such place.
    """

    def __init__(self, config: Config, index: Index) -> None:
        self._store = Store(config, index, f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-watch")
        self.each = [OrthancWatch(config, source, index, self._store) for source in config.sources.orthanc]

    def stop(self) -> None:
        """Ends what is going on; what is not here by then is fetched after the next start."""
        for watch in self.each:
            watch.stop()
        deadline = time.monotonic() + _END_S
        for watch in self.each:
            watch.join(deadline - time.monotonic())
        self._store.close()
