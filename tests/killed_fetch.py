"""A node that is killed in the middle of fetching from an Orthanc that it watches, and goes on."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.phantom import Fracture
from node.case import Case, CaseState
from tests.gate import Gate
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.running_node import RunningNode, phantom_series
from tests.waiting import wait_until


@contextmanager
def fetched_with_a_kill(
    folder: Path, settings: Callable[[str], dict[str, dict[str, Any]]]
) -> Iterator[tuple[Case, OrthancServer]]:
    """The case that was done in the end, and the Orthanc; later nothing more may have come of it.

    settings: `sources` and `deliver` of the node, for the address of the Orthanc.
    """
    http_port = free_port()
    gate = Gate(http_port, num_bytes=2_000_000)  # of eight million
    (folder / "node").mkdir()
    node = RunningNode(
        folder / "node",
        analyse={"threads": 1},
        complete={"quiet_time_s": 60},  # longer than the model takes to load: the rest comes after that
        **settings(f"http://127.0.0.1:{gate.port}"),
    )
    orthanc = OrthancServer(
        folder / "orthanc", port=free_port(), node_port=node.port, http_port=http_port, routes_by=""
    )
    try:
        fracture = Fracture(level="C5", kind="body", width_mm=2.0)
        paths = phantom_series(folder / "in", seed=5, fractures=(fracture,))
        orthanc.upload(folder / "in")
        wait_until(node.cases, node.log)
        node.kill()
        node.wait_until_gone()
        assert 0 < node.cases()[0].num_instances < len(paths)
        gate.open()
        node.start()
        assert node.wait_until_settled() == Counter({CaseState.DONE: 1}), node.log()
        (case,) = node.cases()
        assert case.num_instances == len(paths)
        assert {"CT", "SEG", "SR"} <= {series.modality for series in orthanc.series()}
        yield case, orthanc
        assert node.wait_until_settled() == Counter({CaseState.DONE: 1}), node.log()
        assert node.stop() < 10
    finally:
        if node.process.poll() is None:
            node.kill()
        orthanc.stop()
        gate.stop()
