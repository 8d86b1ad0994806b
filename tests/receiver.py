"""The receiver alone, in threads of the test: Instances come in and are counted, nothing is analysed."""

from collections.abc import Iterator
from contextlib import contextmanager

from node.config import Config
from node.index import Index
from node.receive.server import shut_down, start_server
from node.receive.store import Store
from node.receive.supervisor import listen


@contextmanager
def listening(config: Config, index: Index, grace_s: float = 2.0) -> Iterator[Config]:
    """Listens where the configuration says; gives it back."""
    run = f"run{len(list(index.data_dir.glob('instances/*')))}"
    store = Store(config, index, run)
    listener = listen(config)
    try:
        server = start_server(config, store, listener)
    except BaseException:
        listener.close()
        raise
    try:
        yield config
    finally:
        shut_down(server, grace_s)
        store.close()
