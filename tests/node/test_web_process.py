"""The process of the HTTP side as the service sees it."""

from collections.abc import Callable

from node.config import Config
from node.index import Index
from node.web.settings import WebConfig
from node.web.supervisor import WebProcess
from tests.ports import free_port
from tests.waiting import WAIT_S


def test_a_watch_that_runs_on_while_the_process_ends_starts_no_other(
    make_config: Callable[..., Config], index: Index
) -> None:
    """The scheduler of the service does not wait for its jobs when the node stops."""
    web = WebProcess(make_config().model_copy(update={"web": WebConfig(enabled=True, port=free_port())}), index)
    web.start()
    process = web._process
    try:
        assert process is not None
        web.terminate()
        process.join(WAIT_S)
        assert process.exitcode == 0  # it heard of it, though it was only just about to serve
        web.watch()
        assert web._process is process
    finally:
        web.join(0)
