"""Asking the sender by C-FIND: a real Orthanc, and peers that lie, refuse, hang or are not there."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from pydicom import Dataset, dcmread
from pynetdicom import AE, evt
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind, Verification

from node.case import Case, CaseState
from node.complete import Sources
from node.complete.sources import count_instances
from node.config import CompleteConfig, Config, Source
from node.index import Index
from node.send import SendError, associated
from tests.factories import make_ct_series
from tests.node.test_complete import GAP, WHOLE
from tests.node.test_complete_clock import Clock, Node, clock, clocked  # noqa: F401 - fixtures
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.waiting import WAIT_S, wait_until

# pynetdicom leaves the socket of a failed connection to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

Respond = Callable[[evt.Event], Iterator[tuple[int, Dataset | None]]]


@pytest.fixture
def archive() -> Iterator[Callable[[Respond], Source]]:
    """Starts a Query SCP that answers as the test says; gives it as a source."""
    servers = []

    def start(respond: Respond) -> Source:
        ae = AE(ae_title="PACS")
        ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
        port = free_port()
        servers.append(ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_FIND, respond)]))
        return at(port)

    yield start
    for server in servers:
        server.shutdown()


def at(port: int) -> Source:
    return Source(name="pacs", sends_as=("SCANNER",), host="127.0.0.1", port=port, ae_title="PACS", timeout_s=WAIT_S)


def tells(count: Any, *, series: str | None = None) -> Respond:
    """One answer with that count."""

    def respond(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        found = Dataset()
        found.QueryRetrieveLevel = "SERIES"
        found.SeriesInstanceUID = series or event.identifier.SeriesInstanceUID
        if count is not None:
            found.NumberOfSeriesRelatedInstances = count
        yield 0xFF00, found

    return respond


def knows_nothing(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
    yield 0x0000, None


def refuses(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
    yield 0xA700, None


def hangs(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
    while event.assoc.is_established:
        time.sleep(0.05)
    yield 0x0000, None


def never_ends(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
    found = Dataset()
    found.SeriesInstanceUID = "9.9"
    while not event.is_cancelled and event.assoc.is_established:
        yield 0xFF00, found


def breaks_off(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
    event.assoc.abort()
    yield 0x0000, None


A_CASE: dict[str, Any] = {"study_instance_uid": "1.2", "series_instance_uid": "1.2.3"}


def a_case() -> Case:
    values: dict[str, Any] = dict.fromkeys(Case.__dataclass_fields__) | A_CASE
    return Case(**values)


def test_the_count_is_read(archive: Callable[[Respond], Source]) -> None:
    assert count_instances(a_case(), archive(tells(300)), "CSPINE") == 300


@pytest.mark.parametrize(
    ("respond", "why"),
    [
        (tells(None), "does not tell how many"),
        (tells(300, series="1.2.4"), "does not tell how many"),  # of another Series
        (knows_nothing, "does not tell how many"),
        (refuses, "refused the query with status 0xA700"),
        (hangs, "broke off the query"),
        (breaks_off, "broke off the query"),
        (never_ends, "came to no end"),
    ],
)
def test_what_is_no_answer_is_an_error(archive: Callable[[Respond], Source], respond: Respond, why: str) -> None:
    """Those that give none would go on for ever."""
    source = archive(respond)
    if respond in (hangs, never_ends):
        source = source.model_copy(update={"timeout_s": 2.0})
    with pytest.raises(SendError, match=why):
        count_instances(a_case(), source, "CSPINE")


def test_a_source_that_ends_the_association_before_it_is_asked_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def slow(*arguments: Any, **values: Any) -> Iterator[Any]:
        with associated(*arguments, **values) as association:
            wait_until(lambda: not association.is_established)
            yield association

    monkeypatch.setattr("node.complete.sources.associated", slow)
    ae, port = AE(ae_title="PACS"), free_port()
    ae.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    aborting = [(evt.EVT_ESTABLISHED, lambda event: Timer(0.1, event.assoc.abort).start())]
    server = ae.start_server(("127.0.0.1", port), block=False, evt_handlers=aborting)
    try:
        with pytest.raises(SendError, match="ended the association before it was asked"):
            count_instances(a_case(), at(port), "CSPINE")
    finally:
        server.shutdown()


def test_a_source_that_is_not_there_or_answers_no_queries_is_an_error() -> None:
    with pytest.raises(SendError, match="cannot be reached"):
        count_instances(a_case(), at(free_port()), "CSPINE")
    ae, port = AE(ae_title="PACS"), free_port()
    ae.add_supported_context(Verification)
    server = ae.start_server(("127.0.0.1", port), block=False)
    try:
        with pytest.raises(SendError, match="takes nothing"):
            count_instances(a_case(), at(port), "CSPINE")
    finally:
        server.shutdown()


# ---- what follows from it ----


@pytest.fixture
def node(clocked: Index, clock: Clock) -> Node:  # noqa: F811 - the fixtures imported above
    return Node(clocked, clock, analyse_all=True)


def ask(node: Node, source: Source) -> None:
    """Looks, lets the question be asked, and looks again."""
    node.check()
    node.sources.answer_questions(source)
    node.check()


def with_source(node: Node, source: Source) -> Node:
    node.config = Config(complete=CompleteConfig(sources=(source,)), rules=node.config.rules)
    node.sources = Sources(node.index, node.config)
    return node


def test_all_that_the_source_holds_is_here_so_it_starts_at_once(
    archive: Callable[[Respond], Source],
    node: Node,
) -> None:
    source = archive(tells(40))
    with_source(node, source)
    node.send(WHOLE[:15])
    node.send(WHOLE[15:])  # two associations: without a source, the quiet time
    node.check()
    assert node.case().state is CaseState.RECEIVING
    ask(node, source)
    assert node.case().state is CaseState.QUEUED


def test_the_source_holds_more_so_the_rest_is_awaited(archive: Callable[[Respond], Source], node: Node) -> None:
    asked = []

    def respond(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked.append(event)
        yield from tells(40)(event)

    source = archive(respond)
    with_source(node, source)
    node.send(WHOLE[:35])  # looks whole
    ask(node, source)
    assert node.case().state is CaseState.RECEIVING
    node.send(WHOLE[35:38])
    ask(node, source)
    assert (node.case().state, len(asked)) == (CaseState.RECEIVING, 1)  # it has said already that there are 40
    node.send(WHOLE[38:])
    ask(node, source)
    assert (node.case().state, len(asked)) == (CaseState.QUEUED, 2)


def test_what_comes_while_the_source_is_asked_has_it_asked_again(
    archive: Callable[[Respond], Source], node: Node
) -> None:
    asked = []

    def respond(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        asked.append(event)
        if len(asked) == 1:
            node.send(WHOLE[35:])
            node.check()
        yield from tells(40)(event)

    source = archive(respond)
    with_source(node, source)
    node.send(WHOLE[:35])
    ask(node, source)
    ask(node, source)
    assert (node.case().state, len(asked)) == (CaseState.QUEUED, 2)


def test_what_the_source_holds_and_does_not_send_is_awaited_no_longer_than_the_quiet_time(
    archive: Callable[[Respond], Source], node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    source = archive(tells(40))
    with_source(node, source)
    node.send(WHOLE[:35])
    ask(node, source)
    node.check(29.9)
    assert node.case().state is CaseState.RECEIVING
    node.check(0.2)
    assert (node.case().state, node.case().num_at_source) == (CaseState.QUEUED, 40)
    assert "its source holds 40" in caplog.text


def test_a_series_that_is_started_again_has_its_source_asked_again(
    archive: Callable[[Respond], Source], node: Node
) -> None:
    """It may have deleted what it did not send, or hold more of what seemed whole."""
    counts = [40, 35, 40]

    def respond(event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        yield from tells(counts[0])(event)

    source = archive(respond)
    with_source(node, source)
    node.send(WHOLE[:35])
    ask(node, source)
    told = []
    while counts:
        node.check(86400)
        told.append(node.case().num_at_source)
        del counts[0]
        claimed = node.index.claim_next()
        assert claimed is not None
        assert node.index.fail_attempt(claimed, "broke", 1) is CaseState.FAILED
        assert node.index.retry(node.case())
        if counts:
            ask(node, source)
    assert told == [40, 35, 40]


def test_a_gap_stays_a_gap_whatever_the_source_says(archive: Callable[[Respond], Source], node: Node) -> None:
    source = archive(tells(len(GAP)))
    with_source(node, source)
    node.send(GAP)
    ask(node, source)
    assert node.case().state is CaseState.RECEIVING


def test_a_silent_source_costs_one_wait_and_one_line(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    source = at(free_port())
    with_source(node, source)
    node.send(WHOLE)
    ask(node, source)
    assert node.case().state is CaseState.QUEUED  # as if there were no source
    node.send(WHOLE, "1.2.4")
    node.check()
    assert node.case("1.2.4").state is CaseState.QUEUED  # not even asked
    assert caplog.text.count("action=source-silent") == 1


def test_a_sender_that_is_no_source_is_not_asked(archive: Callable[[Respond], Source], node: Node) -> None:
    source = archive(tells(99)).model_copy(update={"sends_as": ("OTHER",)})
    with_source(node, source)
    node.send(WHOLE)
    node.check()
    assert node.case().state is CaseState.QUEUED


def test_a_real_orthanc_answers(tmp_path: Path) -> None:
    orthanc = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    try:
        paths = make_ct_series(tmp_path / "in", num_slices=8)
        orthanc.upload(tmp_path / "in")
        ds = dcmread(paths[0], stop_before_pixels=True)
        values: dict[str, Any] = vars(a_case()) | {
            "study_instance_uid": ds.StudyInstanceUID,
            "series_instance_uid": ds.SeriesInstanceUID,
        }
        source = Source(
            **orthanc.destination.model_dump(include={"name", "host", "port", "ae_title"}), sends_as="ORTHANC"
        )
        assert count_instances(Case(**values), source, "CSPINE") == 8
        with pytest.raises(SendError, match="does not tell"):
            count_instances(a_case(), source, "CSPINE")
    finally:
        orthanc.stop()
